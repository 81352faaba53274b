"""A model whose experts are only partly in device memory: slab, table and counters in place of one slot an expert.

Owns: the slab of `num_slots` experts, the table and use counters of all layers, the bank behind them. Kernels read a
resident expert from the slab and any other in place from the bank; which is which changes only between steps
(`workers/experts/cache.py`), and no graph is ever captured again for it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from workers.errors import BadConfig
from workers.experts.bank import HostBank
from workers.experts.cache import ExpertCache
from workers.experts.policy import LFRU, Policy, Values
from workers.experts.residency import Residency
from workers.experts.slots import SlotTable, Tier, code_of
from workers.gpu.expert_lanes import CudaLanes
from workers.gpu.weights import ExpertShape, ExpertSlab, GpuWeights
from workers.model.config import ModelConfig


@dataclass(frozen=True, slots=True)
class ExpertMemory:
    """Device memory of the cache, and the bank."""

    slab: Tensor  # uint8 [num_slots, expert_bytes]
    table: Tensor  # int32 [L * E]
    heat: Tensor  # int32 [L * E]
    bank: HostBank

    @classmethod
    def allocate(cls, config: ModelConfig, num_slots: int, bank: HostBank, device: torch.device | str) -> ExpertMemory:
        """All pairs at home in the bank, no use counted. Raises `BadConfig` below one layer's choices of one token."""
        if num_slots < config.num_experts_per_tok:
            raise BadConfig(
                "expert_hbm_gb",
                f"{num_slots} slots",
                f"at least {config.num_experts_per_tok}, what one token needs of a layer",
                "worker config",
            )
        shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
        pairs = config.num_hidden_layers * config.n_routed_experts
        slab = torch.empty(num_slots, shape.expert_bytes, dtype=torch.uint8, device=device)
        homes = torch.from_numpy(homes_in(bank)).to(device)
        return cls(slab, homes, torch.zeros(pairs, dtype=torch.int32, device=device), bank)

    def attach(self, weights: GpuWeights) -> GpuWeights:
        """The same weights, their experts read through this table. What they held before is dropped."""
        experts = self.table.numel() // len(weights.layers)
        layers = []
        for index, layer in enumerate(weights.layers):
            part = slice(index * experts, (index + 1) * experts)
            slab = ExpertSlab(self.slab.view(-1), self.table[part], host=self.bank.memory, heat=self.heat[part])
            layers.append(dataclasses.replace(layer, experts=slab))
        return dataclasses.replace(weights, layers=tuple(layers))

    def cache(
        self,
        config: ModelConfig,
        *,
        num_slots: int | None = None,
        policy: Policy = LFRU,
        profile: Values | None = None,
        interval: int = 16,
        moves: int = 16,
        verify: bool = False,
    ) -> ExpertCache:
        """A cache of the first `num_slots` slots, filled with the best of `profile`; every other pair at home."""
        num_slots = num_slots or len(self.slab)
        homes = homes_in(self.bank)
        self.table.copy_(torch.from_numpy(homes))
        self.heat.zero_()
        slots = SlotTable(homes, num_slots)
        residency = Residency(
            config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok, policy, profile
        )
        cache = ExpertCache(
            self.slab[:num_slots],
            self.table,
            self.heat,
            self.bank,
            slots,
            residency,
            CudaLanes(self.table.device),
            interval=interval,
            moves=moves,
            verify=verify,
        )
        cache.fill(residency.first_residents(num_slots).tolist())
        return cache


def homes_in(bank: HostBank) -> np.ndarray:
    """int32 [pairs]: codes of places in the bank. Raises ValueError when a pair has none."""
    if (bank.place < 0).any():
        raise ValueError(f"{int((bank.place < 0).sum())} pairs have no home")
    return np.array([code_of(Tier.HOST, int(index)) for index in bank.place], np.int32)
