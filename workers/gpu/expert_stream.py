"""Absent experts on their way to a prefill step's products.

`ExpertStream` brings a prefill step's absent experts to the device, to staging places that decode's slots know nothing
of. A chunk of thousands of tokens uses nearly every expert, several times over: absent ones are copied once into one of
two halves while the layer before computes, whoever was chosen. A step of fewer tokens uses few of them, because a cache
keeps those that are used most: what its routing has chosen is copied by a launch between routing and products, into
both halves (`workers/kernels/experts_bring.py`). What finds no place is read in place.

`ExpertsInPlace` enqueues nothing: the products of a decode step read absent experts where they are, or bring them to
scratch themselves (`workers/kernels/experts_stage.py`).

Owns: the use of the slab's places beyond the slots, the tables of one step, the order of copies and products. Does not
own: residency: a step sees the table as it was when the step began. One owner, the thread that launches; nothing here
waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.experts.layout import TIER_SHIFT, ExpertSlab, Tier, code_of
from workers.gpu.buffers import Groups
from workers.gpu.cached_experts import ExpertMemory

HALVES = 2

FEW_USES = 6.0
"""Tokens' choices for each expert of a layer up to which a step brings what it has chosen, and beyond which all that is
absent comes while the layer before computes: 256 tokens of V4-Flash.
# measured: H200, absent experts in host memory, 6 layers, V4-like routing. 89 % resident: 16 tokens 17.7 ms against
44.8, 64: 25.9 and 44.9, 256: 47.6 and 46.0, 512: 64 and 47. 60 %: 22 and 94, 56 and 112, 123 and 157, 161 and 190.
"""


class ExpertsInPlace:
    """Every expert where the table says."""

    def __init__(self, memory: ExpertMemory) -> None:
        self._slabs = [memory.layer(index) for index in range(memory.config.num_hidden_layers)]

    def begin(self, num_tokens: int) -> None:
        """Nothing to prepare."""

    def layer(self, index: int, groups: Any) -> ExpertSlab:
        """The layer's part of the table."""
        return self._slabs[index]

    def done(self, index: int) -> None:
        """Nothing to give back."""


class ExpertStream:
    """Staging for one model. `codes()` is the host's view of the device table, int32 [L * E]."""

    def __init__(self, memory: ExpertMemory, codes: Callable[[], np.ndarray]) -> None:
        """Raises ValueError without room for one expert in a half."""
        places, self._device = memory.places, memory.table.device
        if places.half < 1:
            raise ValueError(f"a staging half holds at least one expert, not {places.half}")
        self._memory, self._codes, self._half = memory, codes, places.half
        self._num_layers = memory.config.num_hidden_layers
        self._first = [places.slots + places.scratch + half * places.half for half in range(HALVES)]
        cuda = self._device.type == "cuda"
        pairs = memory.table.numel()
        self._num_experts = pairs // self._num_layers
        self._table = torch.empty(pairs, dtype=torch.int32, device=self._device)
        self._pinned = [torch.empty(pairs, dtype=torch.int32, pin_memory=cuda) for _ in range(HALVES)]
        self._turn = 0
        self._side = torch.cuda.Stream(self._device) if cuda else None
        self._arrived: list[torch.cuda.Event | None] = [None] * self._num_layers
        self._read: list[torch.cuda.Event | None] = [None] * HALVES
        self._table_read: list[torch.cuda.Event | None] = [None] * HALVES
        self._streamed: list[list[Tensor]] = []
        self._few = False
        self._lacking: list[bool] = []
        """Layers of a step of few tokens that have absent experts."""
        self._chosen = torch.zeros(self._num_experts, dtype=torch.int32, device=self._device)
        """Table of one layer of such a step: who was chosen."""
        self._brought = torch.zeros(1, dtype=torch.int64, device=self._device)
        self._brought_then = torch.zeros(1, dtype=torch.int64, pin_memory=cuda)
        """Experts that such steps have copied, and the same as the host knew it one step ago."""
        self._copied = 0
        self.steps = 0
        """Steps since the start."""
        if cuda:
            self._compile()

    @property
    def copied_experts(self) -> int:
        """Experts copied since the start; those of the last step of few tokens may be missing."""
        brought = self._brought_then if self._side is not None else self._brought
        return self._copied + int(brought)

    @property
    def copied_bytes(self) -> int:
        """The same in bytes."""
        return self.copied_experts * self._memory.expert_bytes

    def begin(self, num_tokens: int) -> None:
        """A step begins: fixes its tables and starts the first layer's copies."""
        config = self._memory.config
        self._few = num_tokens * config.num_experts_per_tok <= FEW_USES * config.n_routed_experts
        codes = self._codes().reshape(self._num_layers, self._num_experts).copy()
        self._streamed, self._lacking = [], []
        for layer, row in enumerate(codes):
            absent = np.flatnonzero(row >> TIER_SHIFT != Tier.SLAB)
            self._lacking.append(len(absent) > 0)
            absent = absent[: 0 if self._few else self._half]
            self._streamed.append([self._memory.bytes_at(*run) for run in _runs(row[absent])])
            row[absent] = code_of(Tier.SLAB, self._first[layer % HALVES]) + np.arange(len(absent))
        self.steps += 1
        turn, self._turn = self._turn, (self._turn + 1) % HALVES
        if (event := self._table_read[turn]) is not None:
            event.synchronize()
        self._pinned[turn].numpy()[:] = codes.reshape(-1)
        self._table.copy_(self._pinned[turn], non_blocking=True)
        self._brought_then.copy_(self._brought, non_blocking=True)
        self._table_read[turn] = self._mark()
        if not self._few:
            self._fetch(0)

    def layer(self, index: int, groups: Any) -> ExpertSlab:
        """Where the kernels of this layer find its experts. Copies those that a step of few tokens has chosen, else
        starts the next layer's copies."""
        slab = self._memory.layer(index, self._table[index * self._num_experts : (index + 1) * self._num_experts])
        if self._few:
            return self._bring(index, slab, groups) if self._lacking[index] else slab
        if index + 1 < self._num_layers:
            self._fetch(index + 1)
        if (event := self._arrived[index]) is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        return slab

    def done(self, index: int) -> None:
        """The layer's products have been launched: what it has used of staging may be written behind them."""
        mark = self._mark()
        for half in range(HALVES) if self._few else (index % HALVES,):
            self._read[half] = mark

    def _bring(self, index: int, slab: ExpertSlab, groups: Any) -> ExpertSlab:
        from workers.kernels.experts_bring import bring

        room = HALVES * self._half
        bring(groups, slab, self._memory.expert_bytes, self._first[0], room, self._chosen, self._brought)
        return self._memory.layer(index, self._chosen)

    def _compile(self) -> None:
        """Launch `bring` for a step that has chosen nobody."""
        nobody = self._chosen
        self._bring(0, self._memory.layer(0), Groups(nobody[:1], nobody, nobody, nobody))

    def _fetch(self, layer: int) -> None:
        half, sources = layer % HALVES, self._streamed[layer]
        self._copied += sum(source.numel() for source in sources) // self._memory.expert_bytes
        if self._side is None:
            self._copy(half, sources)
            return
        if (event := self._read[half]) is not None:
            self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            self._copy(half, sources)
            self._arrived[layer] = torch.cuda.Event()
            self._arrived[layer].record(self._side)

    def _copy(self, half: int, sources: list[Tensor]) -> None:
        """Enqueues copies to the half's places, one behind the other."""
        target, at = self._memory.slab[self._first[half] :].view(-1), 0
        for source in sources:
            target[at : at + source.numel()].copy_(source, non_blocking=True)
            at += source.numel()

    def _mark(self) -> torch.cuda.Event | None:
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def _runs(codes: np.ndarray) -> list[tuple[int, int]]:
    """(first code, count) of neighbours at the other GPU, and every other code alone.

    Fewer copies are fewer moments in which the launching thread waits for the interpreter. Host memory is locked piece
    by piece, and no copy may span two.
    """
    alone = np.ones(len(codes), bool)
    alone[1:] = (np.diff(codes) != 1) | (codes[1:] >> TIER_SHIFT != Tier.PEER)
    starts = np.flatnonzero(alone)
    counts = np.diff(np.append(starts, len(codes)))
    return [(int(codes[start]), int(count)) for start, count in zip(starts, counts, strict=True)]
