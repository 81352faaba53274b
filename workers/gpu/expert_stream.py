"""Absent experts on their way to a step's products: `ExpertStream` for prefill, `ExpertFetch` for decode.

`ExpertStream` brings a prefill step's absent experts to the device layer by layer, one layer ahead of the products.

A chunk of thousands of tokens uses nearly every expert, several times over, so absent ones are copied once into one of
two staging halves while the layer before computes, and never enter the slots of decode. What does not fit a half is
read in place from the bank.

Owns: the staging memory, the tables of one step, the order of copies and products. Does not own: residency: a step sees
the table as it was when the step began. One owner, the thread that launches; nothing here waits for the device.

`ExpertFetch` enqueues one launch a layer that copies the absent experts of exactly this step to scratch. It is part of
the captured step and looks at the table on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.experts.bank import HostBank
from workers.experts.slots import Tier, code_of
from workers.gpu.weights import ExpertSlab, GpuWeights

HALVES = 2


class ExpertFetch:
    """Scratch for one model's decode steps."""

    def __init__(self, weights: GpuWeights, expert_bytes: int, scratch_experts: int) -> None:
        """Allocates `scratch_experts` experts on the device; absent ones beyond are read in place."""
        from workers.kernels.experts_fetch import fetch_experts

        self._fetch = fetch_experts
        self._slabs = [layer.experts for layer in weights.layers]
        device = weights.device
        self.scratch = torch.empty(scratch_experts, expert_bytes, dtype=torch.uint8, device=device)
        self._table = torch.zeros(self._slabs[0].table.numel(), dtype=torch.int32, device=device)

    def begin(self) -> None:
        """Nothing to prepare: a captured step prepares itself."""

    def layer(self, index: int, groups: Any) -> ExpertSlab:
        """Enqueues the layer's copies; the slab in which its products find every expert."""
        slab = self._slabs[index]
        self._fetch(groups, slab, self._table, self.scratch)
        return ExpertSlab(slab.base, self._table, host=slab.host, peer=self.scratch.view(-1))

    def done(self, index: int) -> None:
        """Scratch is used again by the next layer, behind this one's products."""


class ExpertStream:
    """Staging for one model. `codes()` is the host's view of the device table, int32 [L * E]."""

    def __init__(
        self,
        slab: Tensor,
        bank: HostBank,
        codes: Callable[[], np.ndarray],
        *,
        num_layers: int,
        half_experts: int,
        device: torch.device | str,
    ) -> None:
        """Allocates `HALVES * half_experts` experts on the device. Raises ValueError without room for one."""
        if half_experts < 1:
            raise ValueError(f"a staging half holds at least one expert, not {half_experts}")
        self._slab, self._bank, self._codes = slab, bank, codes
        self._num_layers, self._half = num_layers, half_experts
        self._device = torch.device(device)
        self.staging = torch.empty(HALVES, half_experts, bank.expert_bytes, dtype=torch.uint8, device=device)
        pairs = len(codes())
        self._num_experts = pairs // num_layers
        cuda = self._device.type == "cuda"
        self._table = torch.empty(pairs, dtype=torch.int32, device=device)
        self._pinned = [torch.empty(pairs, dtype=torch.int32, pin_memory=cuda) for _ in range(HALVES)]
        self._turn = 0
        self._side = torch.cuda.Stream(self._device) if cuda else None
        self._arrived: list[torch.cuda.Event | None] = [None] * num_layers
        self._read: list[torch.cuda.Event | None] = [None] * HALVES
        self._table_read: list[torch.cuda.Event | None] = [None] * HALVES
        self._streamed: list[np.ndarray] = []
        self.copied_bytes = 0
        """Bytes brought in since the start."""

    def begin(self) -> None:
        """A step begins: fixes its tables and starts the first layer's copies."""
        codes = self._codes().reshape(self._num_layers, self._num_experts).copy()
        self._streamed = []
        for layer in range(self._num_layers):
            absent = np.flatnonzero(codes[layer] >> 24 != Tier.SLAB)[: self._half]
            codes[layer, absent] = [code_of(Tier.PEER, index) for index in range(len(absent))]
            self._streamed.append(absent)
        turn, self._turn = self._turn, (self._turn + 1) % HALVES
        if (event := self._table_read[turn]) is not None:
            event.synchronize()
        self._pinned[turn].numpy()[:] = codes.reshape(-1)
        self._table.copy_(self._pinned[turn], non_blocking=True)
        self._table_read[turn] = self._mark()
        self._fetch(0)

    def layer(self, index: int, groups: Any = None) -> ExpertSlab:
        """Where the kernels of this layer find its experts. Starts the next layer's copies. `groups` is not used."""
        if index + 1 < self._num_layers:
            self._fetch(index + 1)
        if (event := self._arrived[index]) is not None:
            torch.cuda.current_stream(self._device).wait_event(event)
        part = slice(index * self._num_experts, (index + 1) * self._num_experts)
        half = self.staging[index % HALVES].view(-1)
        return ExpertSlab(self._slab.view(-1), self._table[part], host=self._bank.memory, peer=half)

    def done(self, index: int) -> None:
        """The layer's products have been launched: its half may be written behind them."""
        self._read[index % HALVES] = self._mark()

    def _fetch(self, layer: int) -> None:
        half, first = layer % HALVES, layer * self._num_experts
        sources = [self._bank.expert(first + int(expert)) for expert in self._streamed[layer]]
        self.copied_bytes += len(sources) * self._bank.expert_bytes
        if self._side is None:
            for slot, source in enumerate(sources):
                self.staging[half, slot].copy_(source)
            return
        if (event := self._read[half]) is not None:
            self._side.wait_event(event)
        with torch.cuda.stream(self._side):
            for slot, source in enumerate(sources):
                self.staging[half, slot].copy_(source, non_blocking=True)
            self._arrived[layer] = torch.cuda.Event()
            self._arrived[layer].record(self._side)

    def _mark(self) -> torch.cuda.Event | None:
        if self._side is None:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event
