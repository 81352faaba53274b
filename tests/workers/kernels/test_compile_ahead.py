"""Launches inside `compile_ahead` compile on threads and do not run; others are as ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.runtime import _async_compile  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from workers.kernels.compile_ahead import compile_ahead  # noqa: E402


def plain(x: Any) -> None:
    """Stands for a kernel: its launches are looked at, never run."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch was to compile only."""
    found: list[bool] = []

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> None:
        found.append(warmup)
        mode = _async_compile.active_mode.get()
        if mode is not None:
            mode.submit(f"kernel {args}", lambda: threading.current_thread().name, built.append)

    built: list[str] = []
    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(JITFunction, "built", built, raising=False)
    return found


def test_launches_of_the_block_compile_on_other_threads_and_are_waited_for(launched: list[bool]) -> None:
    kernel = JITFunction(plain)
    kernel[(1,)](1)
    with compile_ahead(2):
        kernel[(1,)](2)
        kernel[(1,)](3)
        kernel[(1,)](3)
    kernel[(1,)](4)
    assert launched == [False, True, True, True, False]
    names = JITFunction.built  # type: ignore[attr-defined]
    assert len(names) == 2 and all(name.startswith("compile") for name in names)


def test_launches_of_other_threads_run(launched: list[bool]) -> None:
    kernel = JITFunction(plain)
    with compile_ahead(1):
        other = threading.Thread(target=kernel[(1,)], args=(1,))
        other.start()
        other.join()
    assert launched == [False]


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(launched: list[bool]) -> None:
    with compile_ahead(1):
        mode = _async_compile.active_mode.get()
        assert mode is not None

        def broken() -> None:
            raise ValueError("no such instruction")

        mode.submit("broken", broken, lambda kernel: None)
    assert _async_compile.active_mode.get() is None
    assert isinstance(mode.raw_futures[0], Future) and mode.raw_futures[0].exception() is not None


def test_the_end_does_not_wait_for_ever(launched: list[bool], caplog: pytest.LogCaptureFixture) -> None:
    stuck = threading.Event()
    try:
        with compile_ahead(1, most_seconds=0.05):
            mode = _async_compile.active_mode.get()
            assert mode is not None
            mode.submit("slow", stuck.wait, lambda kernel: None)
        assert _async_compile.active_mode.get() is None and "1 kernels not compiled" in caplog.text
    finally:
        stuck.set()
