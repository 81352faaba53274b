"""CUDA graphs of the decode step, one for each bucket of batch sizes.

Owns: which buckets there are, capture, replay, and the log of what capture costs. A graph holds the whole step, from
the embedding to the greedy ids and the positions of the next step, so a replay needs nothing from the host. Without
CUDA (Triton's interpreter) a replay is the step itself.
"""

from __future__ import annotations

import bisect
import logging
import time
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

SMALL_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64)
"""Batch sizes that get a graph of their own; beyond them every 32."""

BUCKET_STEP = 32


def bucket_sizes(max_batch: int) -> tuple[int, ...]:
    """Ascending buckets up to the first that holds `max_batch` sequences (that one is exactly `max_batch`)."""
    large = range(SMALL_BUCKETS[-1] + BUCKET_STEP, max_batch, BUCKET_STEP)
    return (*(size for size in (*SMALL_BUCKETS, *large) if size < max_batch), max_batch)


class DecodeGraphs:
    """Graphs of one step function. Engine thread only."""

    def __init__(
        self, step: Callable[[int], None], max_batch: int, device: torch.device, *, enabled: bool | None = None
    ) -> None:
        """`step(bucket)` launches a bucket's step; it is captured unless `enabled` is false or there is no CUDA."""
        self._step = step
        self._device = device
        self.buckets = bucket_sizes(max_batch)
        self.enabled = device.type == "cuda" if enabled is None else enabled
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool: object | None = None

    def bucket_of(self, batch: int) -> int:
        """The smallest bucket that holds `batch` sequences."""
        return self.buckets[bisect.bisect_left(self.buckets, batch)]

    def replay(self, bucket: int) -> None:
        """Run the step of a bucket, once, on the current stream: launched eagerly the first time, and then captured."""
        if not self.enabled:
            self._step(bucket)
        elif bucket in self._graphs:
            self._graphs[bucket].replay()
        else:
            self._capture(bucket)

    def run_all(self) -> None:
        """Run a step of every bucket, largest first, and wait for them. The metadata must hold padding only."""
        for bucket in reversed(self.buckets):
            self._step(bucket)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def capture_all(self) -> None:
        """Capture every bucket, largest first, so that the others find their kernels compiled and memory to share.

        The step's metadata must hold padding only: the eager run before each capture then writes no KV.
        """
        began = time.perf_counter()
        for bucket in reversed(self.buckets):
            if self.enabled:
                self._capture(bucket)
            else:
                self._step(bucket)
        logger.info("decode buckets=%s ready_s=%.1f", ",".join(map(str, self.buckets)), time.perf_counter() - began)

    def _capture(self, bucket: int) -> None:
        """Run the step eagerly, so that its kernels are compiled and loaded, and capture it, which runs nothing."""
        began = time.perf_counter()
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            self._step(bucket)
        torch.cuda.current_stream(self._device).wait_stream(side)
        torch.cuda.synchronize(self._device)
        compiled = time.perf_counter()
        free, _ = torch.cuda.mem_get_info(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._step(bucket)
        self._pool = self._pool or graph.pool()
        self._graphs[bucket] = graph
        torch.cuda.synchronize(self._device)
        taken = free - torch.cuda.mem_get_info(self._device)[0]
        now = time.perf_counter()
        logger.info(
            "graph bucket=%d first_run_s=%.2f capture_s=%.2f memory_MiB=%.1f",
            bucket,
            compiled - began,
            now - compiled,
            taken / 2**20,
        )
