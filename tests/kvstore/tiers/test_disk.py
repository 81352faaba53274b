"""The disk tier: one write per byte, whole files only, a budget that holds, restart."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvstore.tiers.base import planned_header
from kvstore.tiers.disk import DiskTier, FolderInUse
from kvstore.tiers.image_file import BLOCK_BYTES, BUFFER_BYTES, layout_of
from tests.kvstore.tiers.parts import TINY, FaultyFiles, StepExecutor, key, make_image


class Disk:
    """A disk tier whose threads run when told."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.writer, self.reader, self.files = StepExecutor(), StepExecutor(), FaultyFiles()
        settings: dict[str, Any] = {"spec": TINY, "budget_bytes": 1 << 20, "model_hash": "weights", **options}
        self.tier = DiskTier(folder, "w0", ops=self.files, writer=self.writer, reader=self.reader, **settings)
        self.folder = folder / "w0"

    def run(self) -> None:
        self.reader.run_all()
        self.writer.run_all()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.suffix != ".lock")

    def checked(self) -> None:
        self.run()
        self.tier.check_integrity(files=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path)
    yield made
    made.checked()
    made.tier.close()


@pytest.mark.parametrize("n", [0, 1, 127, 128, 255, 256, 257, 600])
def test_an_image_comes_back_bit_for_bit(disk: Disk, n: int) -> None:
    image = make_image(n, n)
    saved = disk.tier.put(key("a"), image)
    disk.run()
    assert saved is not None and saved.result()
    loaded = disk.tier.get(key("a"))
    disk.run()
    back = loaded.result()
    assert back is not None
    assert back.header == image.sealed().header
    assert torch.equal(back.payload, image.payload)


def test_an_image_larger_than_the_buffer_comes_back(tmp_path: Path) -> None:
    spec = _wide_spec()
    tier = DiskTier(tmp_path, "w0", spec=spec, budget_bytes=64 << 20)
    image = make_image(900, 3, spec=spec)
    assert image.payload.numel() > 2 * BUFFER_BYTES
    saved = tier.put(key("a"), image)
    assert saved is not None and saved.result(timeout=30)
    into = torch.empty_like(image.payload)
    assert tier.get(key("a"), into).result(timeout=30) is not None
    assert torch.equal(into, image.payload)
    tier.close()


def _wide_spec() -> Any:
    import dataclasses

    from kvstore.spec import KVSpec, Plane

    return KVSpec(tuple(dataclasses.replace(p, planes=(Plane("data", 6000),)) for p in TINY.pools), "fp8")


def test_every_byte_is_written_once_and_into_the_final_file(disk: Disk) -> None:
    image = make_image(600)
    total = layout_of(key("a"), image.header).total_bytes
    disk.tier.put(key("a"), image)
    disk.run()
    assert disk.files.written == disk.files.peak_bytes == total
    assert [call for call in disk.files.calls if call != "write_at"] == [
        "create",
        "preallocate",
        "sync",
        "rename",
        "sync_folder",
    ]


def test_no_reader_sees_a_file_before_its_rename(disk: Disk) -> None:
    disk.tier.put(key("a"), make_image(600))
    early = disk.tier.get(key("a"))
    assert early.result() is None and key("a") not in disk.tier
    disk.run()
    assert key("a") in disk.tier and disk.names() == ["0000000000.kv"]


def test_unknown_size_is_staged_and_writes_twice(disk: Disk) -> None:
    image = make_image(600, 4)
    raw = bytes(image.payload.numpy())
    saved = disk.tier.put_stream(key("a"), (raw[i : i + 1000] for i in range(0, len(raw), 1000)), lambda: image.header)
    disk.checked()
    assert saved.result()
    total = layout_of(key("a"), image.header).total_bytes
    assert disk.files.peak_bytes > disk.files.total_bytes == total
    assert disk.files.written == total + -(-len(raw) // BLOCK_BYTES) * BLOCK_BYTES
    loaded = disk.tier.get(key("a"))
    disk.run()
    back = loaded.result()
    assert back is not None and torch.equal(back.payload, image.payload)
    assert disk.names() == ["0000000000.kv"] and disk.tier.stats().used_bytes == total


def test_a_stream_stops_at_the_budget(tmp_path: Path) -> None:
    disk = Disk(tmp_path, budget_bytes=6 << 20)
    saved = disk.tier.put_stream(key("a"), (bytes(1 << 20) for _ in range(40)), lambda: make_image(1).header)
    disk.checked()
    assert saved.result() is False
    assert disk.files.peak_bytes <= 6 << 20
    assert disk.names() == [] and disk.tier.stats().out_of_space == 1
    disk.tier.close()


def test_a_stream_of_another_length_than_its_header_fails(disk: Disk) -> None:
    saved = disk.tier.put_stream(key("a"), [b"x" * 100], lambda: make_image(600).header)
    disk.checked()
    assert saved.result() is False and disk.names() == [] and disk.tier.stats().used_bytes == 0


def test_no_room_is_none_and_room_returns_with_a_discard(tmp_path: Path) -> None:
    image = make_image(600)
    disk = Disk(tmp_path, budget_bytes=layout_of(key("a"), image.header).total_bytes)
    assert disk.tier.put(key("a"), image) is not None
    disk.run()
    assert disk.tier.put(key("b"), image) is None
    disk.tier.discard(key("a"))
    assert disk.tier.put(key("b"), image) is not None  # the removal is queued before this write
    disk.checked()
    assert disk.files.peak_bytes <= disk.tier.budget_bytes
    disk.tier.close()


def test_eviction_drops_the_least_recently_used(tmp_path: Path) -> None:
    image = make_image(600)
    disk = Disk(tmp_path, budget_bytes=3 * layout_of(key("a"), image.header).total_bytes, evict=True)
    for name in "abc":
        disk.tier.put(key(name), image)
    disk.run()
    disk.tier.get(key("a"))
    disk.run()
    assert disk.tier.put(key("d"), image) is not None
    disk.checked()
    assert disk.tier.keys() == (key("c"), key("a"), key("d"))
    assert disk.tier.stats().evictions == 1 and disk.files.peak_bytes <= disk.tier.budget_bytes
    disk.tier.close()


def test_an_image_being_read_is_not_evicted(tmp_path: Path) -> None:
    image = make_image(600)
    disk = Disk(tmp_path, budget_bytes=layout_of(key("a"), image.header).total_bytes, evict=True)
    disk.tier.put(key("a"), image)
    disk.run()
    loaded = disk.tier.get(key("a"))
    assert disk.tier.put(key("b"), image) is None
    disk.checked()
    assert loaded.result() is not None
    disk.tier.close()


def test_a_discard_during_a_save_leaves_nothing(disk: Disk) -> None:
    saved = disk.tier.put(key("a"), make_image(600))
    assert disk.tier.discard(key("a"))
    again = disk.tier.put(key("a"), make_image(600, 9))
    disk.checked()
    assert saved is not None and saved.result() is False
    assert again is not None and again.result() is True
    assert len(disk.names()) == 1


@pytest.mark.parametrize("call", ["create", "write_at", "sync", "rename", "sync_folder"])
def test_a_discard_at_any_call_of_a_save_leaves_nothing(disk: Disk, call: str) -> None:
    disk.files.during(call, lambda: disk.tier.discard(key("a")))
    saved = disk.tier.put(key("a"), make_image(600))
    disk.checked()
    assert saved is not None and saved.result() is False
    assert key("a") not in disk.tier and disk.names() == [] and disk.tier.stats().used_bytes == 0


@pytest.mark.parametrize("call", ["open", "read_at"])
def test_a_discard_at_any_call_of_a_load_leaves_nothing(disk: Disk, call: str) -> None:
    disk.tier.put(key("a"), make_image(600))
    disk.run()
    disk.files.during(call, lambda: disk.tier.discard(key("a")))
    loaded = disk.tier.get(key("a"))
    disk.checked()
    assert loaded.result() is not None
    assert disk.names() == [] and disk.tier.stats().used_bytes == 0


def test_a_discard_during_a_load_keeps_the_file_until_the_load_ends(disk: Disk) -> None:
    image = make_image(600, 2)
    disk.tier.put(key("a"), image)
    disk.run()
    loaded = disk.tier.get(key("a"))
    disk.tier.discard(key("a"))
    disk.writer.run_all()
    assert disk.names() and disk.tier.stats().used_bytes
    disk.checked()
    back = loaded.result()
    assert back is not None and torch.equal(back.payload, image.payload)
    assert not disk.names() and disk.tier.stats().used_bytes == 0


def test_a_place_of_the_wrong_size_is_a_callers_bug(disk: Disk) -> None:
    disk.tier.put(key("a"), make_image(600))
    disk.run()
    with pytest.raises(ValueError, match="into a place"):
        disk.tier.get(key("a"), torch.empty(10, dtype=torch.uint8))
    assert key("a") in disk.tier


def test_one_live_owner_per_folder(disk: Disk, tmp_path: Path) -> None:
    with pytest.raises(FolderInUse):
        DiskTier(tmp_path, "w0", spec=TINY, budget_bytes=1 << 20)


def _leftovers(folder: Path) -> None:
    disk = Disk(folder)
    disk.tier.put(key("a"), make_image(600, 1))
    disk.tier.put(key("b"), make_image(300, 2))
    disk.run()
    disk.tier.close()
    (disk.folder / "0000000007.part").write_bytes(b"half")
    (disk.folder / "0000000008.stage").write_bytes(b"half")
    (disk.folder / "0000000009.kv").write_bytes(b"not an image")
    (disk.folder / "notes.txt").write_text("someone else's")


def test_a_restart_discards_what_an_earlier_run_left(tmp_path: Path) -> None:
    _leftovers(tmp_path)
    disk = Disk(tmp_path)
    assert disk.names() == ["notes.txt"] and disk.tier.stats().used_bytes == 0
    disk.tier.close()


def test_a_restart_can_index_complete_images(tmp_path: Path) -> None:
    _leftovers(tmp_path)
    disk = Disk(tmp_path, recovery="index")
    assert disk.names() == ["0000000000.kv", "0000000001.kv", "notes.txt"]
    assert disk.tier.keys() == (key("a"), key("b")) and disk.tier.stats().corrupt == 1
    loaded = disk.tier.get(key("b"))
    saved = disk.tier.put(key("c"), make_image(5))
    disk.run()
    back = loaded.result()
    assert back is not None and torch.equal(back.payload, make_image(300, 2).payload)
    assert saved is not None and saved.result() and "0000000010.kv" in disk.names()
    disk.tier.close()


def test_a_restart_of_another_model_indexes_nothing(tmp_path: Path) -> None:
    first = Disk(tmp_path)
    first.tier.put(key("a"), make_image(600, model_hash="weights"))
    first.run()
    first.tier.close()
    other = Disk(tmp_path, recovery="index", model_hash="other weights")
    assert other.tier.keys() == () and other.names() == [] and other.tier.stats().foreign == 1
    other.tier.close()


def test_budget_holds_under_random_use(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    disk = Disk(tmp_path, budget_bytes=60_000, evict=True)
    for _ in range(600):
        name = key(rng.choice("abcdef"))
        roll = rng.random()
        if roll < 0.3:
            if not disk.tier.discard(name):
                disk.tier.put(name, make_image(rng.randrange(700)))
        elif roll < 0.5:
            disk.tier.get(name)
        else:
            rng.choice((disk.writer, disk.reader)).run_one()
        disk.tier.check_integrity()
        assert disk.files.total_bytes <= disk.tier.budget_bytes
    disk.checked()
    stats = disk.tier.stats()
    assert stats.evictions and stats.refused and stats.peak_bytes <= 60_000
    disk.tier.close()


def test_real_threads_keep_the_account(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    tier = DiskTier(tmp_path, "w0", spec=TINY, budget_bytes=120_000, sync=False, evict=True)
    images = {name: make_image(600, ord(name)) for name in "abcdefgh"}
    loads = []
    for _ in range(500):
        name = rng.choice("abcdefgh")
        roll = rng.random()
        if roll < 0.4:
            loads.append((name, tier.get(key(name))))
        elif roll < 0.5:
            tier.discard(key(name))
        else:
            with contextlib.suppress(ValueError):  # it is here already, or still being written
                saved = tier.put(key(name), images[name])
                assert saved is None or rng.random() < 0.5 or saved.result(timeout=30)
        tier.check_integrity()
    back = [(name, load.result(timeout=30)) for name, load in loads]
    assert any(image is not None for _, image in back)
    assert all(image is None or torch.equal(image.payload, images[name].payload) for name, image in back)
    for name in images:
        tier.discard(key(name))
    tier.close()
    tier.check_integrity(files=True)
    assert tier.stats().corrupt == tier.stats().read_errors == tier.stats().put_failures == 0


def test_the_predicted_layout_bounds_every_header() -> None:
    for text in ("r", "\u0001" * 30, "é" * 30, "\U0001f600" * 30):
        header = planned_header(TINY, 600, request_id=text, model_hash=text, segment_bytes=100)
        image = make_image(600, request_id=text, model_hash=text)
        assert len(image.sealed().header.to_bytes()) < layout_of(key(text), image.header).payload_offset
        assert layout_of(key(text), header).total_bytes % BLOCK_BYTES == 0
