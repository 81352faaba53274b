"""Reading experts from disk: mmap, residency and direct, from shards and from an expert-major file.
`python -m tests.bench.expert_disk`.

A synthetic slice of V4-Flash: experts of the real record size (13.4 MB), stored back to back like an official shard
(unaligned, scales before weights), and the same repacked. Each cell is its own process and starts with none of the
file cached:

  - sweep: every expert once, as at start (`stream`: nothing should stay behind, except with mmap);
  - misses: what an LFRU cache with 44 % of these experts misses of V4-like routing, one after another.

"read" is `read_bytes` of /proc/self/io during the misses over the bytes that they asked for; "cached" what the page
cache holds of the file afterwards (mincore); "RSS" is its
growth, which counts mapped pages of the cache, too. "capped" runs in
a memory cgroup where one can be made, else it is left out.

Prediction: a miss costs the disk's rate for cold bytes. mmap is fastest as long as everything fits, because repeated
misses come from memory; under a cap it falls to the others. direct needs the fewest CPU seconds a byte and reads every
miss anew. Repacking changes little here: an official expert is one run already, at most a page more a read.

# measured: 192 experts, 2.57 GB, 200 misses, cap 1.07 GB, `residency` within 0.54 GB; 2 shared cores under load 5-8,
# 23.5 GiB, Linux 6.18, ext4 on a virtual disk, 2026-11-21 (the disk is shared, rates vary up to 5x):
#   source     layout  memory     sweep GB/s  miss ms (p99)    GB/s  read  CPU s/GB  cached MB  RSS MB
#   mmap       shards  unlimited        0.76      2.5 ( 40.8)    3.10  0.00      0.26       2567    2582
#   mmap       packed  unlimited        0.16      3.0 ( 14.5)    3.18  0.00      1.25       2567    2582
#   residency  shards  unlimited        0.52     15.1 (110.0)    0.61  0.81      0.34        535     550
#   residency  packed  unlimited        0.93     14.1 (172.3)    0.53  0.81      0.34        535     550
#   direct     shards  unlimited        0.72     14.0 (139.9)    0.65  1.00      0.18          0      28
#   direct     packed  unlimited        0.36     22.4 (224.6)    0.33  1.00      0.26          0      28
#   mmap       shards  capped           0.29     21.0 (162.2)    0.43  0.54      0.56       1046    1060
#   mmap       packed  capped           0.29     21.6 (161.5)    0.45  0.68      0.68       1040    1054
#   residency  shards  capped           0.46     18.4 ( 65.4)    0.53  0.81      0.36        535     550
#   residency  packed  capped           0.65     22.9 ( 56.1)    0.54  0.82      0.40        535     550
#   direct     shards  capped           0.64     16.0 ( 42.7)    0.70  1.00      0.20          0      28
#   direct     packed  capped           0.52     24.3 ( 46.9)    0.51  1.00      0.28          0      28
# The order is as predicted: mmap wins while all fits and falls to the disk's rate under the cap, direct costs the least
# CPU; repacked against shards is within the spread. 32 experts, minutes before: sweeps 0.6-1.4 GB/s for every
# strategy, a miss 8-13 ms with direct, 11-14 ms with residency.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from workers.checkpoint.names import StoredForm
from workers.experts.config import ExpertConfig
from workers.experts.generator import V4_LIKE, generate
from workers.experts.policy import LFRU
from workers.experts.records import ORDER, ExpertRecords, Piece, RecordForm, Run
from workers.experts.repack import read_packed, write_packed
from workers.experts.residency import Residency
from workers.experts.supply import ExpertSupply

HIDDEN, INNER, LAYERS, TOP_K = 4096, 2048, 2, 6
GATE = StoredForm("I8", (INNER, HIDDEN // 2), ("F8_E8M0",), (INNER, HIDDEN // 32))
DOWN = StoredForm("I8", (HIDDEN, INNER // 2), ("F8_E8M0",), (HIDDEN, INNER // 32))
HEADER_BYTES = 123457
CAP_BYTES = 1 << 30
HOST_BYTES = 1 << 29
"""Budget of `residency`."""
SHARE = 0.44
CGROUPS = Path("/sys/fs/cgroup/memory")


def form() -> RecordForm:
    """V4-Flash's."""
    offsets, at = {}, 0
    for part in ORDER:
        stored = DOWN if part.startswith("w2") else GATE
        rows, columns = stored.scale_shape if part.endswith("scale") else stored.shape
        offsets[part] = (at, at + rows * columns)
        at += rows * columns
    return RecordForm(GATE, DOWN, offsets, at)


def shard_records(path: Path, num_pairs: int) -> ExpertRecords:
    """One run each: w1, w2, w3 in the order of their names, scale first."""
    known, runs = form(), []
    for pair in range(num_pairs):
        start = at = HEADER_BYTES + pair * known.record_bytes
        pieces = []
        for part in sorted(ORDER):
            first, end = known.offsets[part]
            pieces.append(Piece(at, first, end - first))
            at += end - first
        runs.append((Run(path, start, at, tuple(pieces)),))
    return ExpertRecords(known, tuple(runs))


def write_slice(path: Path, num_pairs: int) -> None:
    """Bytes that differ for every expert."""
    size = form().record_bytes
    block = np.random.default_rng(0).integers(0, 250, size, np.uint8)
    with open(path, "wb") as file:
        file.write(bytes(HEADER_BYTES))
        for pair in range(num_pairs):
            block[::4096] = pair % 250
            file.write(block)
        file.flush()
        os.fsync(file.fileno())


def missed_pairs(num_pairs: int, count: int) -> list[int]:
    """Misses of a cache, in order."""
    experts = num_pairs // LAYERS
    trace = generate(V4_LIKE, steps=6 * count, layers=LAYERS, experts=experts, top_k=TOP_K, seed=5)
    residency = Residency(LAYERS, experts, TOP_K, LFRU)
    inside, missed = np.zeros(num_pairs, bool), []
    for step in range(trace.num_steps):
        needed = trace.needed(step)
        missed += needed[~inside[needed]].tolist() if step >= 50 else []
        residency.note(np.bincount(needed, minlength=num_pairs), 1)
        held = np.flatnonzero(inside)
        free = int(SHARE * num_pairs) - len(held)
        moves = residency.decide(held, free, 16, keep=lambda pairs: np.zeros(len(pairs), bool))
        inside[moves.leave], inside[moves.enter] = False, True
    return missed[:count]


def cached_bytes(path: Path) -> int:
    """What the page cache holds of a file, by mincore."""
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    flags = (ctypes.c_ubyte * pages)()
    anchor = ctypes.c_char.from_buffer(view)
    libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), flags)
    return int((np.frombuffer(flags, np.uint8) & 1).sum()) * mmap.PAGESIZE


def forget(path: Path) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rss_bytes() -> int:
    """Resident pages of this process now, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def disk_bytes() -> int:
    """Bytes that this process made the block device read."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


def measure(source: str, folder: Path, packed: bool, num_pairs: int, count: int) -> dict[str, object]:
    """One cell, in this process."""
    records = shard_records(folder / "shard.bin", num_pairs)
    path = folder / ("packed.bin" if packed else "shard.bin")
    if packed:
        records = read_packed(path, records)
    forget(path)
    host = HOST_BYTES if source == "residency" else 0
    supply = ExpertSupply(records, ExpertConfig(slots=1, source=source, host_bytes=host), num_readers=1)
    out, missed, rss = np.zeros(records.record_bytes, np.uint8), missed_pairs(num_pairs, count), rss_bytes()
    began, cpu = time.perf_counter(), time.process_time()
    for pair in range(num_pairs):
        supply.read(pair, out, stream=True)
    sweep_s = time.perf_counter() - began
    before, times = disk_bytes(), []
    for pair in missed:
        start = time.perf_counter()
        supply.read(pair, out)
        times.append(time.perf_counter() - start)
    asked = len(times) * records.record_bytes
    total = (num_pairs + len(times)) * records.record_bytes
    found: dict[str, object] = {
        "sweep_gb_s": num_pairs * records.record_bytes / sweep_s / 1e9,
        "miss_ms": float(np.median(times)) * 1e3,
        "miss_p99_ms": float(np.quantile(times, 0.99)) * 1e3,
        "miss_gb_s": asked / sum(times) / 1e9,
        "read_share": (disk_bytes() - before) / asked,
        "cpu_s_gb": (time.process_time() - cpu) / total * 1e9,
        "cached_mb": cached_bytes(path) / 1e6,
        "held_mb": supply.disk.held_bytes / 1e6,
        "rss_mb": (rss_bytes() - rss) / 1e6,
    }
    supply.close()
    return found


@contextmanager
def capped() -> Iterator[Path | None]:
    """A memory cgroup (version 1) below this process's own, for the cells; None where none can be made."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = next((line.split(":")[2] for line in lines if line.split(":")[1] == "memory"), None)
    group = CGROUPS / f"{own}/dsv4-expert-disk".lstrip("/")
    try:
        if own is None:
            raise FileNotFoundError("no memory controller")
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(CAP_BYTES))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        group.rmdir()


def cell(arguments: dict[str, object]) -> dict[str, object]:
    """One cell in a process of its own."""
    command = [sys.executable, "-m", "tests.bench.expert_disk", "--cell", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr else "failed"}
    result: dict[str, object] = json.loads(done.stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=192, help="experts of the slice (13.4 MB each)")
    parser.add_argument("--misses", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where the slice is written; a temporary folder if unset")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        values = json.loads(options.cell)
        if group := values.pop("group"):
            (Path(group) / "cgroup.procs").write_text(str(os.getpid()))
        print(json.dumps(measure(folder=Path(values.pop("folder")), **values)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name, capped() as group:
        folder = Path(name)
        write_slice(folder / "shard.bin", options.pairs)
        write_packed(shard_records(folder / "shard.bin", options.pairs), folder / "packed.bin")
        size = options.pairs * form().record_bytes / 1e9
        print(f"{options.pairs} experts, {size:.2f} GB, {options.misses} misses; cap {CAP_BYTES / 1e9:.2f} GB")
        print("source     layout  memory     sweep GB/s  miss ms (p99)    GB/s  read  CPU s/GB  cached MB  RSS MB")
        rows = []
        for is_capped in (False, True) if group else (False,):
            for source in ("mmap", "residency", "direct"):
                for packed in (False, True):
                    wanted = {"source": source, "packed": packed, "num_pairs": options.pairs, "count": options.misses}
                    row = cell({**wanted, "folder": str(folder), "group": str(group) if is_capped else ""})
                    rows.append({**wanted, "capped": is_capped, **row})
                    print(line_of(rows[-1]), flush=True)
        print(json.dumps(rows))


def line_of(row: dict[str, object]) -> str:
    """One cell as text."""
    layout = "packed" if row["packed"] else "shards"
    head = f"{row['source']:<10} {layout:<7} {'capped' if row['capped'] else 'unlimited':<10}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head} {row['sweep_gb_s']:>10.2f}  {row['miss_ms']:>7.1f} ({row['miss_p99_ms']:>5.1f})  "
        f"{row['miss_gb_s']:>6.2f}  {row['read_share']:>4.2f}  {row['cpu_s_gb']:>8.2f}  "
        f"{row['cached_mb']:>9.0f}  {row['rss_mb']:>6.0f}"
    )


if __name__ == "__main__":
    main()
