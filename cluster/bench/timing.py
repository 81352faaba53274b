"""Time on the device: launches inside a CUDA graph, ceilings of this device, the clock of the compiler.

Owns: how anything is timed. A graph of many launches is replayed and its time divided, so that neither the host nor the
first launch counts. Where all operands together would stay in the L2 cache, although in a model gigabytes pass between
two uses, the cache is flushed before each launch and the flush's own time is taken off. The flush reads: after writes
the next kernel would wait for the cache to be written back.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cluster.bench.floors import Rates

MIN_GRAPH_MS = 15.0
"""Device time of one measurement: events resolve 0.5 us."""

FLUSH_BYTES = 160 << 20
"""Read between launches to empty the cache: three times the 50 MB of an H200."""

FLUSHES = 40
"""Flushes timed together, as many as a step has launches of one kind."""

Call = Callable[[], Any]


def graph_ms(calls: Sequence[Call], *, replays: int = 5, run_first: bool = True) -> float:
    """Milliseconds of all `calls` together, captured once and replayed. Calls must not synchronise or allocate."""
    if run_first:
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return replay_ms(graph.replay, replays=replays)


def replay_ms(replay: Call, *, replays: int = 5) -> float:
    """Median time of one `replay`, each measurement long enough for the events."""
    once = _elapsed(replay, 1)
    inner = max(1, round(MIN_GRAPH_MS / max(once, 1e-3)))
    return statistics.median(_elapsed(replay, inner) / inner for _ in range(replays))


def _elapsed(action: Call, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(count):
        action()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def cold_ms(calls: Sequence[Call], nbytes: float) -> float:
    """Mean milliseconds of one call, as after gigabytes of other traffic. `nbytes`: of all their operands."""
    if nbytes >= FLUSH_BYTES:
        return graph_ms(calls) / len(calls)
    flush, flush_ms = _flush()
    flushed = [step for call in calls for step in (flush, call)]
    return max(1e-4, graph_ms(flushed) / len(calls) - flush_ms)


@functools.cache
def _flush() -> tuple[Call, float]:
    """What empties the cache, and its milliseconds among others of its kind."""
    scratch = torch.zeros(FLUSH_BYTES >> 12, 1 << 10, dtype=torch.int32, device="cuda")
    flush = partial(torch.amax, scratch, dim=1, out=torch.empty(len(scratch), dtype=torch.int32, device="cuda"))
    return flush, graph_ms([flush] * FLUSHES) / FLUSHES


def measure_rates() -> Rates:
    """Copy bandwidth over 1 GiB and products of 8192^3 with random operands, the best of a few."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(left)
    bf16 = _tflop_s(lambda: torch.mm(left, right, out=out), size)
    return Rates(_copy_gb_s(), bf16, _fp8_tflop_s(left, right, size))


def _copy_gb_s() -> float:
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_(0, 256)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(_elapsed(lambda: target.copy_(source), 5) / 5 for _ in range(4)) / 1e6


def _fp8_tflop_s(left: torch.Tensor, right: torch.Tensor, size: int) -> float | None:
    if torch.cuda.get_device_capability() < (8, 9):
        return None
    one = torch.ones((), device="cuda")
    a, b = left.to(torch.float8_e4m3fn), right.to(torch.float8_e4m3fn).t()
    return _tflop_s(
        lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True), size
    )


def _tflop_s(product: Call, size: int) -> float:
    _elapsed(product, 3)
    return 2 * size**3 / min(_elapsed(product, 8) / 8 for _ in range(3)) / 1e9
