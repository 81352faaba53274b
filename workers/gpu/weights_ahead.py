"""`WeightsAhead`: brings the next weights of a decode step to the L2 cache while a launch runs that leaves memory idle.

Half of a layer's launches wait for latency (streams, selection, attention, routing) and read next to nothing, the other
half only reads weights, whose addresses are known beforehand. A second stream issues prefetches behind events of the
first, so the main chain gains no launch and no dependency; in a CUDA graph they become a branch that joins at the end.

Owns: the side stream and its events. Does not own: what is brought when (`step.py`), the instruction
(`workers/kernels/prefetch.py`). Results do not depend on it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class WeightsAhead:
    """Prefetches beside the current stream. Engine thread only."""

    def __init__(self, device: torch.device) -> None:
        """Imports Triton. The side stream has priority: its programs end at once and must not wait for a place."""
        from workers.kernels.prefetch import prefetch

        self._prefetch = prefetch
        self._device = device
        self._side = torch.cuda.Stream(device, priority=-1)
        self._open = False

    def bring(self, *tensors: Tensor | None, limit_bytes: int | None = None) -> None:
        """Start prefetching these once everything enqueued so far has run; at most `limit_bytes` of each."""
        current = torch.cuda.current_stream(self._device)
        self._side.wait_event(current.record_event())
        with torch.cuda.stream(self._side):
            for tensor in tensors:
                if tensor is not None:
                    self._prefetch(tensor, limit_bytes)
        self._open = True

    def join(self) -> None:
        """The current stream goes on behind every prefetch; ends a step."""
        if self._open:
            torch.cuda.current_stream(self._device).wait_event(self._side.record_event())
            self._open = False
