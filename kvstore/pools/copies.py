"""Copies of whole requests between the pools and host memory that run beside the model's stream.

Owns: two side streams, a bounded ring of staging blocks, and the events that say when a copy is over. One launch
gathers a block of an image (all of it, unless it is larger than a staging block), one copy takes it to the host; the
next block is gathered meanwhile. A load is the mirror. All work is enqueued at once; nothing waits for the device.

A copy starts behind the work that the caller's current stream holds at the call. Until `done()` the pages and the slot
belong to the copy, and so does the host payload: the caller gives nothing of it out before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvstore.image import KVImage
from kvstore.pools.pieces import Block, Planner, cut_blocks
from kvstore.pools.pool import Pool
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import REGION_ALIGN_BYTES, KVSpec, RowRange

DEFAULT_STAGING_BYTES = 192 << 20
"""Device bytes of the ring, two blocks: an image of 32K tokens of V4-Flash passes in two pieces.

# measured: H200, 2026-11: the three pieces of 128 MiB took 0.130 ms to gather, the two of 192 MiB 0.112 ms
"""


class PendingLoad:
    """A load on its way. `done()` is asked from the engine thread."""

    def __init__(self, over: torch.cuda.Event | None = None) -> None:
        """`over`: fires when the last byte has moved; `None` when it has."""
        self._over = over

    def done(self) -> bool:
        """Whether pages, slot and payload belong to the caller again. Raises what the device raises."""
        if self._over is not None and self._over.query():
            self._over = None
        return self._over is None

    def wait(self) -> None:
        """Block the calling thread until `done`, not the device."""
        if self._over is not None:
            self._over.synchronize()
            self._over = None


class PendingCopy(PendingLoad):
    """A copy to the host on its way."""

    def __init__(self, image: KVImage, move: PendingLoad | None = None) -> None:
        """`image`: whole when `move` is done; `None` when it is."""
        super().__init__(None if move is None else move._over)
        self._image = image

    def image(self) -> KVImage:
        """The image; waits for its bytes when the copy is not done."""
        self.wait()
        return self._image


@dataclass(slots=True)
class _Stage:
    """One block of the ring and the last use of it."""

    block: torch.Tensor  # int64 [words of a staging block]
    free: torch.cuda.Event | None = None


class Mover:
    """Gathers and scatters of one `KVPools`. Runs on CUDA devices, and on the CPU under Triton's interpreter."""

    def __init__(
        self, spec: KVSpec, pools: Sequence[Pool], device: torch.device, *, staging_bytes: int = DEFAULT_STAGING_BYTES
    ) -> None:
        """Allocate the ring.

        Raises:
            ImportError: Triton is missing.
            ValueError: a pool's rows are not whole 4-byte words.
        """
        from kvstore.pools import kernels

        self._launch = kernels.launch
        self._planner = Planner(spec, [pool.num_units for pool in pools])
        self._pools = tuple(pool.data for pool in pools if pool.spec.layers)
        self._most_bytes = staging_bytes // 2 - REGION_ALIGN_BYTES
        self._device = device
        self._stages = [
            _Stage(torch.empty(staging_bytes // 2, dtype=torch.uint8, device=device).view(torch.int64))
            for _ in range(2)
        ]
        self._turn = 0
        self._cuda = device.type == "cuda"
        if self._cuda:
            self._kernel_stream, self._copy_stream = (torch.cuda.Stream(device) for _ in range(2))

    def copy_out(self, payload: torch.Tensor, places: Sequence[RowRange], indices: SequenceIndices) -> PendingLoad:
        """Fill `payload` (uint8 [image bytes], host; pinned to run beside the model) with the live rows.

        Raises:
            IntegrityError: `indices` does not map a live row; nothing has moved.
            ValueError: a segment is too large to be staged.
        """
        blocks = self._blocks(places, indices)
        kernel, copy = self._begin()
        for block in blocks:
            stage = self._next_stage()
            self._wait(kernel, stage.free)
            self._run(block, indices, stage, kernel, to_pool=False)
            self._follow(copy, kernel)
            with torch.cuda.stream(copy):
                payload[block.start : block.end].copy_(_bytes(stage, block), non_blocking=True)
                stage.free = self._event(copy)
        return PendingLoad(self._event(copy))

    def copy_in(self, payload: torch.Tensor, places: Sequence[RowRange], indices: SequenceIndices) -> PendingLoad:
        """Reset the slot and put the rows of `payload` into the places of `indices`.

        Raises:
            IntegrityError, ValueError: as `copy_out`.
        """
        blocks = self._blocks(places, indices) or [Block((), 0, 0)]
        kernel, copy = self._begin()
        for i, block in enumerate(blocks):
            stage = self._next_stage()
            self._wait(copy, stage.free)
            with torch.cuda.stream(copy):
                _bytes(stage, block).copy_(payload[block.start : block.end], non_blocking=True)
            self._follow(kernel, copy)
            self._run(block, indices, stage, kernel, to_pool=True, reset=i == 0)
            stage.free = self._event(kernel)
        return PendingLoad(self._event(kernel))

    def gather_only(self, places: Sequence[RowRange], indices: SequenceIndices) -> None:
        """The launches of `copy_out` on the current stream, without its copies: what a benchmark times."""
        current = torch.cuda.current_stream(self._device) if self._cuda else None
        for block in self._blocks(places, indices):
            self._run(block, indices, self._next_stage(), current, to_pool=False)

    def _blocks(self, places: Sequence[RowRange], indices: SequenceIndices) -> list[Block]:
        self._planner.check_mapped(indices)
        return cut_blocks(self._planner.spec, indices.num_tokens, places, self._most_bytes)

    def _run(
        self,
        block: Block,
        indices: SequenceIndices,
        stage: _Stage,
        stream: torch.cuda.Stream | None,
        *,
        to_pool: bool,
        reset: bool = False,
    ) -> None:
        plan = self._planner.table(block, indices, reset=reset)
        if not plan.pieces:
            return
        words = torch.from_numpy(plan.words)
        pools = tuple(pool.view(torch.int64) for pool in self._pools)
        with torch.cuda.stream(stream):
            if self._cuda:
                words = words.pin_memory().to(self._device, non_blocking=True)
            self._launch(
                pools,
                stage.block,
                words,
                self._planner.shapes,
                pieces=plan.pieces,
                tiles=plan.tiles,
                to_pool=to_pool,
            )

    def _next_stage(self) -> _Stage:
        self._turn = 1 - self._turn
        return self._stages[self._turn]

    def _begin(self) -> tuple[torch.cuda.Stream | None, torch.cuda.Stream | None]:
        """Both side streams, behind the caller's current stream."""
        if not self._cuda:
            return None, None
        current = torch.cuda.current_stream(self._device)
        self._kernel_stream.wait_stream(current)
        self._copy_stream.wait_stream(current)
        return self._kernel_stream, self._copy_stream

    @staticmethod
    def _wait(stream: torch.cuda.Stream | None, event: torch.cuda.Event | None) -> None:
        if stream is not None and event is not None:
            stream.wait_event(event)

    @staticmethod
    def _follow(stream: torch.cuda.Stream | None, first: torch.cuda.Stream | None) -> None:
        if stream is not None and first is not None:
            stream.wait_stream(first)

    @staticmethod
    def _event(stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        return None if stream is None else stream.record_event()


def _bytes(stage: _Stage, block: Block) -> torch.Tensor:
    return stage.block.view(torch.uint8)[block.start - block.base : block.end - block.base]
