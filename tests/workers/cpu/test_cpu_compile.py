"""Where compiled kernels are kept: the first writable folder, one per content of the sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.cpu import compile as module


def test_a_read_only_checkout_falls_back_to_the_next_folder(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be: mkdir fails for every user, root included")
    folder = module.cache_folder([blocked, tmp_path / "user"])
    assert folder is not None
    assert folder.parent == tmp_path / "user"


def test_no_writable_folder_means_no_cache(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert module.cache_folder([blocked]) is None


def test_changed_sources_get_their_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("x = 1")
    monkeypatch.setattr(module, "PACKAGE", tmp_path)
    before = module.source_digest()
    (tmp_path / "a.py").write_text("x = 2")
    assert module.source_digest() != before
