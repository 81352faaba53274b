"""`Histogram`: how often a measured value fell under each of fixed bounds, for metrics. Torch-free."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterable, Sequence

DISTINCT_BOUNDS = (2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384)
"""Experts that a step needs of a layer: from one token's of a small model to all of V4-Pro."""

SUM = "sum"
"""Key of the sum of all values beside the bounds."""


class Histogram:
    """Counts since start. Any thread."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds`: ascending; a value that equals one counts under it, as Prometheus has it."""
        self._names = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        self._bounds = bounds
        self._counts = [0] * len(self._names)
        self._sum = 0.0
        self._lock = threading.Lock()

    def add(self, values: Iterable[float]) -> None:
        """Counts each value."""
        with self._lock:
            for value in values:
                self._counts[bisect_left(self._bounds, value)] += 1
                self._sum += value

    def fields(self, label: str) -> dict[str, float]:
        """`label/bound` -> number of values up to it, and `label/sum`: a field of `WorkerStats`."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        found: dict[str, float] = {}
        up_to = 0
        for name, count in zip(self._names, counts, strict=True):
            up_to += count
            found[f"{label}/{name}"] = up_to
        return {**found, f"{label}/{SUM}": total}
