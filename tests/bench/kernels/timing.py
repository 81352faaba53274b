"""Timing shared by the kernel benchmarks: inside CUDA graphs, over weights that are not in L2, against copy bandwidth.

A benchmark makes `num_copies(weight_bytes)` different copies of its weights, one call per copy, and gives the list of
calls to `graph_ms`: one graph holds them all in order, as a model's layers would be, so launches overlap (PDL) and
nothing is found in L2. Its rows go to `report`, with the bandwidth that `copy_bandwidth` measured in the same run.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

MIN_COPIES = 20
COPIES_BYTES = 512 << 20
"""Least bytes of all copies together: several times the 50 MB of L2 of an H200."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement. `num_bytes` and `flops`: what the kernel must move and compute at least, per call."""

    name: str
    ms: float
    num_bytes: float
    flops: float = 0.0
    note: str = ""

    @property
    def gbps(self) -> float:
        return self.num_bytes / self.ms / 1e6

    @property
    def tflops(self) -> float:
        return self.flops / self.ms / 1e9


def num_copies(bytes_each: int) -> int:
    """How many different operands a benchmark must walk through so that none is found in L2."""
    if bytes_each >= COPIES_BYTES:
        return 3
    return max(MIN_COPIES, -(-COPIES_BYTES // max(bytes_each, 1)))


def graph_ms(calls: Sequence[Callable[[], object]], *, replays: int = 15) -> float:
    """Milliseconds per call of `calls`, captured in order in one CUDA graph: median over replays.

    Every call runs once before the capture, so compilation is outside. Calls must not synchronise or allocate.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times) / len(calls)


def copy_bandwidth(num_bytes: int = 1 << 30) -> float:
    """GB/s of a device-to-device copy, bytes read plus bytes written: the ceiling of memory-bound kernels.

    NOTE: timed outside a graph. A graph turns the copy into a node for the copy engines, which reach 2,700 GB/s on an
    H200 where the same copy in a stream reaches 4,200.
    """
    source = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * num_bytes / statistics.median(times) / 1e6


def report(rows: Sequence[Row], copy_gbps: float) -> None:
    """Print a table and one JSON line. Share = what copy bandwidth would need for the bytes, over the time taken."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy_gbps:.0f} GB/s")
    print(f"{'case':44s} {'us':>9s} {'MB':>9s} {'GB/s':>7s} {'share':>6s} {'TFLOP/s':>8s}  note")
    for row in rows:
        share = row.gbps / copy_gbps
        tflops = f"{row.tflops:8.1f}" if row.flops else " " * 8
        sizes = f"{row.ms * 1e3:9.2f} {row.num_bytes / 1e6:9.2f} {row.gbps:7.0f} {share:6.1%}"
        print(f"{row.name:44s} {sizes} {tflops}  {row.note}".rstrip())
    print(json.dumps({"copy_gbps": copy_gbps, "rows": [dataclasses.asdict(row) for row in rows]}))
