"""A model whose experts are only partly in device memory: slab, table and counters in place of one slot an expert.

Owns: the slab, the table and use counters of all layers, and what else kernels read experts from: the host bank, the
other GPU's slab. Kernels read a resident expert from the slab and any other in place; which is which changes only
between steps (`workers/experts/cache.py`), and no graph is ever captured again for it. The slab also has the places to
which steps bring absent experts (`expert_stream.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.experts.bank import HostBank
from workers.experts.cache import INTERVAL, MOVES, Bring, ExpertCache, Lanes
from workers.experts.layout import TIER_SHIFT, ExpertShape, ExpertSlab, Tier, code_of
from workers.experts.places import Places
from workers.experts.policy import LFRU, Policy, Values
from workers.experts.residency import Residency
from workers.experts.slots import NOWHERE, SlotTable
from workers.gpu.expert_lanes import lanes_of
from workers.gpu.weights import GpuWeights
from workers.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ExpertMemory:
    """Device memory of the cache, and where absent experts are."""

    config: ModelConfig
    slab: Tensor  # uint8 [places.total, expert_bytes]
    places: Places
    table: Tensor  # int32 [L * E]
    heat: Tensor  # int32 [L * E]
    bank: HostBank | None
    """None: no expert is ever absent from slab and peer."""
    peer: Any = None
    """The other GPU's slab as kernels take it."""

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        places: Places,
        bank: HostBank | None,
        device: torch.device | str,
        *,
        heat: Tensor | None = None,
        slab: Tensor | None = None,
        peer: Any = None,
    ) -> ExpertMemory:
        """All pairs at home in the bank. `heat`, `slab`: counters and memory that exist already."""
        shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
        pairs = config.num_hidden_layers * config.n_routed_experts
        if slab is None:
            slab = torch.empty(places.total * shape.expert_bytes, dtype=torch.uint8, device=device)
        if heat is None:
            heat = torch.zeros(pairs, dtype=torch.int32, device=device)
        homes = torch.from_numpy(homes_in(bank, pairs)).to(device)
        return cls(config, slab.view(places.total, shape.expert_bytes), places, homes, heat, bank, peer)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return self.slab.shape[1]

    @property
    def nbytes(self) -> int:
        """Device bytes of slab, table and counters."""
        return sum(t.numel() * t.element_size() for t in (self.slab, self.table, self.heat))

    def layer(self, index: int, table: Tensor | None = None) -> ExpertSlab:
        """Where kernels find a layer's experts. `table` int32 [E] instead of the layer's part of ours."""
        part = slice(index * self.config.n_routed_experts, (index + 1) * self.config.n_routed_experts)
        host = None if self.bank is None else self.bank.memory
        table = self.table[part] if table is None else table
        scratch = {"first_scratch": self.places.slots, "num_scratch": self.places.scratch}
        return ExpertSlab(self.slab.view(-1), table, host=host, peer=self.peer, heat=self.heat[part], **scratch)

    def bytes_at(self, code: int, count: int = 1) -> Tensor:
        """uint8 [count * expert_bytes] of an absent pair, by its code, and of those that lie behind it.

        Raises `OSError` when it is nowhere.
        """
        index = code & (1 << TIER_SHIFT) - 1
        bank = None if self.bank is None else self.bank.memory
        home = {Tier.HOST: bank, Tier.PEER: self.peer}.get(code >> TIER_SHIFT)
        if home is None:
            raise OSError(f"code {code:#x} is of no tier that holds absent experts")
        return home[index * self.expert_bytes : (index + count) * self.expert_bytes]

    def homes(self, at_peer: Sequence[int] = ()) -> np.ndarray:
        """int32 [pairs]: where absent pairs are; place i of the other GPU's slab holds `at_peer[i]`."""
        homes = homes_in(self.bank, self.table.numel())
        homes[np.asarray(at_peer, np.int64)] = np.arange(len(at_peer), dtype=np.int32) | code_of(Tier.PEER, 0)
        return homes

    def attach(self, weights: GpuWeights) -> GpuWeights:
        """The same weights, their experts read through this table. What they held before is dropped."""
        layers = [dataclasses.replace(layer, experts=self.layer(i)) for i, layer in enumerate(weights.layers)]
        return dataclasses.replace(weights, layers=tuple(layers))

    def cache(
        self,
        *,
        num_slots: int | None = None,
        policy: Policy = LFRU,
        profile: Values | None = None,
        pinned: Sequence[int] = (),
        filled: bool = True,
        bring: Bring | None = None,
        interval: int = INTERVAL,
        moves: int = MOVES,
        verify: bool = False,
    ) -> ExpertCache:
        """A cache of the first `num_slots` slots; every pair without one at home.

        Args:
            pinned: pairs that take the first slots, in this order, and never leave. Who has no home must be among them.
            filled: bring the best of `profile` into the other slots now.
            bring: where bytes come from at the start; by default the bank.

        Raises ValueError for more slots than the slab has: what lies behind them is overwritten by steps.
        """
        num_slots = num_slots or self.places.slots
        if num_slots > self.places.slots:
            raise ValueError(f"{num_slots} slots wanted, the slab has {self.places.slots} before scratch and staging")
        homes = self.homes()
        self.table.copy_(torch.from_numpy(homes))
        self.heat.zero_()
        c = self.config
        residency = Residency(c.num_hidden_layers, c.n_routed_experts, c.num_experts_per_tok, policy, profile, pinned)
        lanes: Lanes = lanes_of(self.table.device)
        cache = ExpertCache(
            self.slab[:num_slots],
            self.table,
            self.heat,
            self.bank,
            SlotTable(homes, num_slots),
            residency,
            lanes,
            interval=interval,
            moves=moves,
            verify=verify,
        )
        first = residency.first_residents(num_slots).tolist()
        cache.fill(first if filled else [pair for pair in first if pair in set(pinned)], bring)
        return cache


def uses_scratch(config: ModelConfig, device: torch.device) -> bool:
    """Whether decode's products on the device copy absent experts to scratch before they read them."""
    if device.type != "cuda":
        return True
    from workers.kernels import experts_sm90

    return not experts_sm90.serves(device, config.hidden_size, config.moe_intermediate_size)


def homes_in(bank: HostBank | None, num_pairs: int) -> np.ndarray:
    """int32 [pairs]: codes of places in the bank, `NOWHERE` for a pair that has none."""
    if bank is None:
        return np.full(num_pairs, NOWHERE, np.int32)
    return np.where(bank.place < 0, NOWHERE, bank.place | code_of(Tier.HOST, 0)).astype(np.int32)
