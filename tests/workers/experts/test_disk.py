"""Every disk strategy hands out the stored bytes or a clear error, and holds no more than it may."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.workers.checkpoint.conftest import TINY, random_tensors
from workers.checkpoint.check import check_directory
from workers.checkpoint.load import iter_tensors
from workers.checkpoint.save import save_official
from workers.errors import BadCheckpoint, BadConfig
from workers.experts.config import ExpertConfig
from workers.experts.disk import ALIGN, ResidencyDisk, open_disk, page_range
from workers.experts.records import ExpertRecords, is_routed
from workers.experts.repack import read_packed, write_packed
from workers.experts.supply import TRIES, ExpertSupply, ExpertUnavailable

SOURCES = ("mmap", "residency", "direct")
HOST_BYTES = 1 << 17


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "tiny"
    save_official(path, TINY, random_tensors(TINY, 3))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    save_official(tmp_path / "tiny", TINY, random_tensors(TINY, 3))
    return tmp_path / "tiny"


def records_of(folder: Path) -> ExpertRecords:
    return ExpertRecords.of_checkpoint(check_directory(folder).require_sound())


def supply_of(records: ExpertRecords, source: str, **values: object) -> ExpertSupply:
    fields = {"slots": 4, "source": source, "host_bytes": HOST_BYTES if source == "residency" else 0, **values}
    try:
        return ExpertSupply(records, ExpertConfig(**fields), num_readers=1)
    except BadConfig as exc:
        if "file system" in str(exc):
            pytest.skip(str(exc))
        raise


def all_records(supply: ExpertSupply) -> np.ndarray:
    out = np.zeros((supply.records.num_pairs, supply.record_bytes), np.uint8)
    for pair, row in enumerate(out):
        supply.read(pair, row)
    return out


def expected_records(folder: Path, records: ExpertRecords) -> np.ndarray:
    """The same bytes through the ordinary loader."""
    out = np.zeros((records.num_pairs, records.record_bytes), np.uint8)
    for raw in iter_tensors(folder, draft_blocks=False):
        if is_routed(raw.spec.name):
            _, layer, _, _, expert, matrix, _ = raw.spec.name.split(".")
            row = out[int(layer) * TINY.n_routed_experts + int(expert)]
            row[slice(*records.form.offsets[f"{matrix}.weight"])] = raw.weight.numpy().view(np.uint8).ravel()
            assert raw.scale is not None
            row[slice(*records.form.offsets[f"{matrix}.scale"])] = raw.scale.numpy().ravel()
    return out


@pytest.mark.parametrize("packed", [False, True], ids=["shards", "packed"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_strategy_reads_what_the_checkpoint_holds(
    folder: Path, tmp_path: Path, source: str, packed: bool
) -> None:
    records = records_of(folder)
    expected = expected_records(folder, records)
    if packed:
        write_packed(records, tmp_path / "experts.bin")
        records = read_packed(tmp_path / "experts.bin", records)
        assert all(run.start % ALIGN == 0 for (run,) in records.runs)
    supply = supply_of(records, source)
    assert np.array_equal(all_records(supply), expected)
    assert np.array_equal(all_records(supply), expected)
    supply.close()


@pytest.mark.parametrize("source", SOURCES)
def test_threads_read_at_once_without_mixing_experts(folder: Path, source: str) -> None:
    records = records_of(folder)
    expected = expected_records(folder, records)
    supply = supply_of(records, source)

    def work(seed: int) -> bool:
        out = np.zeros(records.record_bytes, np.uint8)
        for pair in np.random.default_rng(seed).integers(0, records.num_pairs, 60).tolist():
            supply.read(pair, out, stream=bool(pair % 3 == seed % 3))
            if not np.array_equal(out, expected[pair]):
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))
    assert supply.counters.io_errors == 0 and supply.counters.disk_reads == 480
    supply.close()


def test_a_small_bank_serves_its_experts_and_the_disk_the_others(folder: Path) -> None:
    records = records_of(folder)
    expected = expected_records(folder, records)
    stride = -(-records.record_bytes // ALIGN) * ALIGN
    supply = supply_of(records, "mmap", host_bytes=3 * stride + 1)
    assert supply.fill_bank([7, 2, 5, 1]) == 3 and supply.bank_bytes == 3 * stride
    assert np.array_equal(all_records(supply), expected)
    assert (supply.counters.bank_reads, supply.counters.disk_reads) == (3, 3 + records.num_pairs - 3)
    supply.close()


@pytest.mark.parametrize("source", SOURCES)
def test_a_shard_that_shrinks_under_way_is_a_clear_error(own: Path, source: str) -> None:
    records = records_of(own)
    supply = supply_of(records, source)
    out = np.zeros(records.record_bytes, np.uint8)
    supply.read(5, out)
    run = records.runs[5][0]
    os.truncate(run.path, run.start + 100)
    with pytest.raises(ExpertUnavailable, match=rf"pair 5 .*{TRIES} times.*{run.path.name}.*truncated"):
        supply.read(5, out)
    assert supply.counters.io_errors == TRIES
    supply.read(0, out)
    supply.close()


@pytest.mark.parametrize("source", SOURCES)
def test_changed_bytes_are_noticed_when_asked_to(own: Path, source: str) -> None:
    records = records_of(own)
    supply = supply_of(records, source, verify=True)
    out = np.zeros(records.record_bytes, np.uint8)
    supply.read(5, out)
    with open(records.runs[5][0].path, "r+b") as file:
        file.seek(records.runs[5][0].start + 40)
        file.write(bytes([out[40] ^ 1, 77]))
    with pytest.raises(ExpertUnavailable, match="bytes changed"):
        supply.read(5, out)
    supply.close()


def test_a_damaged_packed_file_never_serves_an_expert(folder: Path, tmp_path: Path) -> None:
    path, original = tmp_path / "experts.bin", records_of(folder)
    size = write_packed(original, path)
    records = read_packed(path, original)
    assert size == path.stat().st_size and not list(tmp_path.glob("*.writing"))
    with open(path, "r+b") as file:
        file.seek(records.runs[3][0].start + 9)
        file.write(b"\xaa\x55")
    supply = supply_of(records, "mmap")
    out = np.zeros(records.record_bytes, np.uint8)
    supply.read(2, out)
    with pytest.raises(ExpertUnavailable, match="bytes changed"):
        supply.read(3, out)
    supply.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-1], "bytes"),
        (lambda data: b"XXXX" + data[4:], "repack"),
        (lambda data: data[:16] + b"{" * 30 + data[46:], "garbage"),
        (lambda data: data[:8] + b"\xff" * 8 + data[16:], "head of at most"),
        (lambda data: data.replace(b'"format": 1', b'"format": 9'), "format 1"),
        (lambda data: data[:5], "repack"),
    ],
)
def test_a_packed_file_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    path, original = tmp_path / "experts.bin", records_of(folder)
    write_packed(original, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(BadCheckpoint, match=message):
        read_packed(path, original)


def test_residency_keeps_no_more_than_its_budget(folder: Path) -> None:
    records = records_of(folder)
    largest = max(sum(page_range(run)[1] for run in runs) for runs in records.runs)
    disk = open_disk(records, "residency", host_bytes=2 * largest, num_readers=1)
    out = np.zeros(records.record_bytes, np.uint8)
    draw = np.random.default_rng(0)
    for pair in draw.integers(0, records.num_pairs, 60).tolist():
        disk.read(pair, out, stream=bool(draw.integers(2)))
        assert 0 <= disk.held_bytes <= 2 * largest
    assert isinstance(disk, ResidencyDisk) and disk.held_bytes > 0
    disk.close()
    with pytest.raises(BadConfig, match=f"at least {largest} bytes"):
        open_disk(records, "residency", host_bytes=largest - 1, num_readers=1)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"policy": "best"}, "policy"),
        ({"source": "tape"}, "source"),
        ({"slots": 4, "source": "residency"}, "host"),
        ({"slots": 4, "policy": "static"}, "policy"),
        ({"slots": 4, "hbm_bytes": 4}, "slots"),
        ({"slots": 0}, "slots"),
        ({"host_bytes": -1}, "host"),
    ],
)
def test_contradicting_settings_are_refused(values: dict[str, object], key: str) -> None:
    with pytest.raises(BadConfig, match=f"experts.{key}"):
        ExpertConfig(**values)
