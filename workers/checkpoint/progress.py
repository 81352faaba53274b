"""How far a long read or write of tensors has come, and how fast. Torch-free; drawing it is the caller's business."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """State after one more piece of work: bytes so far and in all, seconds since the start, the tensor just done."""

    done_bytes: int
    total_bytes: int
    elapsed_s: float
    tensor: str

    @property
    def bytes_per_s(self) -> float:
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0


OnProgress = Callable[[Progress], None]


class ProgressCounter:
    """Adds up bytes and reports each addition."""

    def __init__(
        self, total_bytes: int, on_progress: OnProgress | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total_bytes, self._on_progress, self._clock = total_bytes, on_progress, clock
        self._start_s = clock()
        self.done_bytes = 0

    def add(self, num_bytes: int, tensor: str) -> None:
        """Count `num_bytes` more of `tensor`."""
        self.done_bytes += num_bytes
        if self._on_progress is not None:
            elapsed_s = self._clock() - self._start_s
            self._on_progress(Progress(self.done_bytes, self._total_bytes, elapsed_s, tensor))
