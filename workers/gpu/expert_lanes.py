"""An expert cache's work on a device: table changes on the steps' stream, slot copies on one beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.experts.cache import Lanes


def lanes_of(device: torch.device) -> Lanes:
    """`CudaLanes`, or `HostLanes` where steps run on the host."""
    return CudaLanes(device) if device.type == "cuda" else HostLanes()


class CudaMark:
    """An event that was recorded."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def passed(self) -> bool:
        """Whether everything before it is over."""
        return self._event.query()


class CudaLanes:
    """`workers.experts.cache.Lanes` of one device. Steps run on the stream that is current at each call."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._side = torch.cuda.Stream(self._device)

    def step_mark(self) -> CudaMark:
        """After every step and table change launched so far."""
        return CudaMark(torch.cuda.current_stream(self._device))

    def step_copy(self, target: Tensor, source: Tensor) -> None:
        """In order with the steps."""
        target.copy_(source, non_blocking=True)

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        """Beside the steps."""
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)

    def side_mark(self) -> CudaMark:
        """After every side copy so far."""
        return CudaMark(self._side)


class PassedMark:
    """A point in work that was over when its call returned."""

    def passed(self) -> bool:
        """Always."""
        return True


class HostLanes:
    """Steps that run on the host, in Triton's interpreter: whatever is launched is over at once."""

    def step_mark(self) -> PassedMark:
        """Now."""
        return PassedMark()

    def step_copy(self, target: Tensor, source: Tensor) -> None:
        """Copies."""
        target.copy_(source)

    side_mark, side_copy = step_mark, step_copy
