"""`Branch`: a second line of launches beside the main one, for small kernels that a large one can hide.

A captured step becomes a graph of two lines: kernels of the branch run where the main line's leave room on a
multiprocessor. Dependent launches (`workers/kernels/launch.py`) stay as they are on either line.
# measured (H200, 2026-11-21, one token, 4K of context; 8 layers of the model, 3 of them C4, twice each): store beside
# the product of the queries and selection beside most of it 1.009 and 1.010 ms, in one line 1.018 and 1.019; a branch
# in layers of every kind 1.047 against 1.033.

A fork or a join is an edge like those of dependent launches, as captured by CUDA 13: whoever is launched dependently
behind one may start when the last launches of *both* lines have signalled. So what it reads ahead of its wait must be
older than that on the branch, too; where it is not, `pdl_options(dependent=False)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Branch:
    """The second line of one device. On the CPU there is none: everything stays in the order of the calls."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Launches of the block come after all that was enqueued before it, and beside what follows it."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is enqueued from here on comes after all that was enqueued in blocks."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
