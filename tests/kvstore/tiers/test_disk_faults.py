"""Bad disks and bad files: every fault is a counted miss or a counted failure, and nothing is left behind."""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvstore.image import KVImage
from kvstore.tiers.image_file import layout_of
from tests.kvstore.layouts import small_spec
from tests.kvstore.tiers.parts import key, make_image
from tests.kvstore.tiers.test_disk import Disk

PAYLOAD = 4096
"""Where the payload of a tiny image begins in its file."""

CALLS = ["create", "preallocate", "write_at", "sync", "rename", "sync_folder"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failing_call_is_a_counted_failure_and_leaves_nothing(tmp_path: Path, call: str, code: int) -> None:
    disk = Disk(tmp_path)
    disk.files.fail(call, code=code)
    saved = disk.tier.put(key("a"), make_image(600))
    disk.checked()
    assert saved is not None and saved.result() is False
    stats = disk.tier.stats()
    assert (stats.put_failures, stats.out_of_space) == (1, int(code != errno.EIO))
    assert stats.used_bytes == stats.images == disk.files.total_bytes == 0 and disk.names() == []
    again = disk.tier.put(key("a"), make_image(600))
    disk.checked()
    assert again is not None and again.result() is True
    disk.tier.close()


def test_a_disk_that_fills_in_the_middle_of_a_save(tmp_path: Path) -> None:
    disk = Disk(tmp_path, budget_bytes=64 << 20)
    parts = (bytes(1 << 20) for _ in range(12))
    disk.files.fail("write_at", after=2)
    saved = disk.tier.put_stream(key("a"), parts, lambda: make_image(1).header)
    disk.checked()
    assert saved.result() is False and disk.files.written == 8 << 20
    assert disk.names() == [] and disk.tier.stats().used_bytes == 0 and disk.tier.stats().out_of_space == 1
    disk.tier.close()


def test_a_failed_assembly_of_a_stream_leaves_neither_file(tmp_path: Path) -> None:
    disk = Disk(tmp_path, budget_bytes=64 << 20)
    image = make_image(600)
    disk.files.fail("preallocate")
    saved = disk.tier.put_stream(key("a"), [bytes(image.payload.numpy())], lambda: image.header)
    disk.checked()
    assert saved.result() is False and disk.names() == []
    disk.tier.close()


def test_a_file_that_cannot_be_removed_stays_charged(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    image = make_image(600)
    disk.tier.put(key("a"), image)
    disk.run()
    disk.files.fail("unlink", code=errno.EIO)
    disk.tier.discard(key("a"))
    disk.run()
    assert disk.tier.stats().orphans == 1
    assert disk.tier.stats().used_bytes == layout_of(key("a"), image.header).total_bytes == disk.files.total_bytes
    disk.tier.check_integrity()
    disk.tier.close()


def _flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 0x20
    path.write_bytes(raw)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut by one block": lambda path: path.write_bytes(path.read_bytes()[:-4096]),
    "cut in the payload": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut unaligned": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + bytes(4096)),
    "zeroes of the right size": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "magic": lambda path: _flip(path, 0),
    "version": lambda path: _flip(path, 8),
    "preamble length": lambda path: _flip(path, 17),
    "preamble checksum": lambda path: _flip(path, 46),
    "key": lambda path: _flip(path, 52),
    "image header": lambda path: _flip(path, 120),
    "first payload byte": lambda path: _flip(path, PAYLOAD),
    "last payload byte": lambda path: _flip(path, PAYLOAD + make_image(600).payload.numel() - 65),
    "trailer": lambda path: _flip(path, path.stat().st_size - 3),
    "another file": lambda path: path.write_bytes(b"PNG" * 40_000),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_a_counted_miss_and_is_removed(tmp_path: Path, damage: str) -> None:
    disk = Disk(tmp_path)
    image = make_image(600)
    disk.tier.put(key("a"), image)
    disk.run()
    assert layout_of(key("a"), image.header).payload_offset == PAYLOAD
    DAMAGE[damage](disk.folder / "0000000000.kv")
    loaded = disk.tier.get(key("a"))
    disk.run()
    assert loaded.result() is None
    stats = disk.tier.stats()
    assert (stats.corrupt, stats.gets, stats.images, stats.used_bytes) == (1, 0, 0, 0)
    assert disk.names() == []
    disk.checked()
    disk.tier.close()


def test_every_payload_bit_is_covered(tmp_path: Path, seed: int) -> None:
    """Flips one random payload byte of a saved file, many times; only padding between pools may go unseen."""
    image = make_image(600)
    places = [s.place for s in image.header.segments]
    covered = torch.zeros(image.payload.numel(), dtype=torch.bool)
    for place in places:
        covered[place.offset : place.offset + place.length] = True
    offsets = covered.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    for round_ in range(20):
        disk = Disk(tmp_path / str(round_))
        disk.tier.put(key("a"), image)
        disk.run()
        at = int(offsets[int(torch.randint(len(offsets), (1,), generator=generator))])
        _flip(disk.folder / "0000000000.kv", PAYLOAD + at)
        loaded = disk.tier.get(key("a"))
        disk.run()
        assert loaded.result() is None, at
        disk.tier.close()


def test_a_file_that_vanished_or_cannot_be_read_is_a_miss(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for name in "ab":
        disk.tier.put(key(name), make_image(600))
    disk.run()
    (disk.folder / "0000000000.kv").unlink()
    disk.files.sizes.pop(disk.folder / "0000000000.kv")
    lost = disk.tier.get(key("a"))
    disk.run()
    disk.files.fail("read_at", after=3, code=errno.EIO)
    unread = disk.tier.get(key("b"))
    disk.checked()
    assert lost.result() is None and unread.result() is None
    assert disk.tier.stats().read_errors == 2
    disk.tier.close()


def test_an_image_of_another_layout_or_model_is_a_foreign_miss(tmp_path: Path) -> None:
    disk = Disk(tmp_path, budget_bytes=8 << 20)
    disk.tier.put(key("layout"), make_image(300, spec=small_spec(), model_hash="weights"))
    disk.tier.put(key("model"), make_image(300, model_hash="other weights"))
    disk.run()
    loads = [disk.tier.get(key(name)) for name in ("layout", "model")]
    disk.checked()
    assert [load.result() for load in loads] == [None, None]
    assert disk.tier.stats().foreign == 2 and disk.names() == []
    disk.tier.close()


def test_files_swapped_between_keys_are_caught(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    for name in "ab":
        disk.tier.put(key(name), make_image(600))
    disk.run()
    first, second = (disk.folder / f"000000000{i}.kv" for i in range(2))
    swapped = second.read_bytes()
    second.write_bytes(first.read_bytes())
    first.write_bytes(swapped)
    loads = [disk.tier.get(key(name)) for name in "ab"]
    disk.run()
    assert [load.result() for load in loads] == [None, None] and disk.tier.stats().corrupt == 2
    disk.tier.close()


def test_segments_that_do_not_cover_the_payload_are_not_a_hit(tmp_path: Path) -> None:
    disk = Disk(tmp_path, budget_bytes=64 << 20)
    image = make_image(600)
    header = dataclasses.replace(image.header, segments=image.header.segments[:2])
    disk.tier.put(key("a"), KVImage(header, image.payload))
    streamed = disk.tier.put_stream(key("b"), [bytes(image.payload.numpy())], lambda: header)
    disk.run()
    loads = [disk.tier.get(key(name)) for name in "ab"]
    disk.checked()
    assert [load.result() for load in loads] == [None, None] and disk.names() == []
    assert disk.tier.stats().corrupt >= 1 and streamed.done()
    disk.tier.close()


def test_memory_that_changed_since_it_was_sealed_is_not_saved(tmp_path: Path) -> None:
    disk = Disk(tmp_path)
    image = make_image(600).sealed()
    image.payload[image.header.segments[1].place.offset] ^= 1
    saved = disk.tier.put(key("a"), image)
    disk.checked()
    assert saved is not None and saved.result() is False
    assert disk.tier.stats().put_failures == 1 and disk.names() == []
    disk.tier.close()
