"""The stage of `dsv4 bench experts`: a model with one slab and one bank, and caches of any size over them.

Owns: a table of experts by token id in every layer, so that a step's routing is the trace's and not that of random
weights (a token id of measured step s and sequence b is `s * B + b`; the kernels are those of serving, in the same
graphs); the bank and its bytes; what the slab holds between two caches. One bank and one slab serve all budgets: a
budget uses the first slots, and whoever is where a new cache wants him is not copied again.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.bench import floors
from cluster.bench.expert_sweep import MOST_STEPS, Workload
from cluster.bench.scene import Scene, Wanted, fill_plausibly
from kvstore.errors import IntegrityError
from workers.experts.bank import HostBank
from workers.experts.cache import ExpertCache
from workers.experts.layout import ExpertShape
from workers.experts.places import Places
from workers.experts.policy import Ids, Policy, Values
from workers.experts.slots import SlotState
from workers.gpu.cached_experts import ExpertMemory, homes_in, uses_scratch
from workers.gpu.expert_stream import ExpertsInPlace, ExpertStream
from workers.gpu.synthetic import layer_experts
from workers.model.config import PAGE_TOKENS, ModelConfig

CONTEXT, CHUNK = 4096, 8192

STAGED, SCRATCH = 56, 96
"""Experts of one staging half of prefill, and of decode's scratch at most: 2.8 GB in all at V4-Flash's size."""

CHECKED_SLOTS = 48
"""Slots whose bytes are compared with the bank after each cell."""

Say = Callable[[str], None]


def routed_by_token(config: ModelConfig, layers: int) -> ModelConfig:
    """The trunk's first layers, each of which takes its experts from a table of token ids."""
    return dataclasses.replace(floors.trunk(config), num_hash_layers=layers)


class ExpertScene:
    """Model, bank and slab."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: int,
        batches: Sequence[int],
        most_slots: int,
        say: Say,
        scratch: bool = True,
        bank_experts: int | None = None,
        context: int = CONTEXT,
        chunk: int = CHUNK,
        device: str = "cuda",
    ) -> None:
        """`scratch`: absent experts of a decode step are brought to scratch, where kernels do so, not read in place.

        `bank_experts`: different experts of a layer in the bank, where host memory cannot hold all; others share bytes.
        """
        self.device, self.context, self.chunk = torch.device(device), context, chunk
        self.most_running = max(batches)
        wanted = Wanted("experts", routed_by_token(config, layers), layers, True, tuple(batches), (context,), (chunk,))
        began = time.perf_counter()
        self.scene = Scene(wanted, experts_held=1, device=device)
        self.config = self.scene.config
        experts = config.n_routed_experts
        shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
        self.expert_bytes = shape.expert_bytes
        pairs = layers * experts
        self.held = min(bank_experts or experts, experts)
        layer, expert = np.divmod(np.arange(pairs), experts)
        places = layer * self.held + expert % self.held
        self.bank = HostBank(range(layers * self.held), pairs, shape.expert_bytes, places=places)
        self.model_s, self.lock_s, self.fill_s = self._seconds(began), 0.0, 0.0
        self._make_bank(shape, layers, say)
        staged = scratch and uses_scratch(config, self.device)
        num_scratch = min(self.most_running * config.num_experts_per_tok, SCRATCH) if staged else 0
        slab = Places(most_slots, num_scratch, min(STAGED, experts))
        self.memory = ExpertMemory.allocate(self.config, slab, self.bank, device)
        self.codes = homes_in(self.bank, pairs)
        self.stream = ExpertStream(self.memory, lambda: self.codes)
        self._inside = np.full(most_slots, -1, np.int64)
        """Pair whose bytes each slot holds, -1 where nobody knows."""
        self._use(self.memory.attach(self.scene.weights))

    def _seconds(self, began: float) -> float:
        self.synchronize()
        return time.perf_counter() - began

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _make_bank(self, shape: ExpertShape, layers: int, say: Say) -> None:
        """Locked pages, and every expert from its own seed, made on the device, straight into its place."""
        began = time.perf_counter()
        if self.device.type == "cuda":
            self.bank.lock()
        self.lock_s = time.perf_counter() - began
        say(f"bank: {self.bank.nbytes / 1e9:.1f} GB locked in {self.lock_s:.1f} s")
        began = time.perf_counter()
        staging = torch.empty(self.held, shape.expert_bytes, dtype=torch.uint8, device=self.device)
        places = self.bank.memory.view(layers, self.held, shape.expert_bytes)
        for layer in range(layers):
            layer_experts(staging, shape, layer)
            # One copy an expert: the driver refuses a copy over the border of two pieces that were locked apart.
            for expert in range(self.held):
                places[layer, expert].copy_(staging[expert], non_blocking=True)
        self.fill_s = self._seconds(began)
        say(f"bank filled in {self.fill_s:.1f} s, {self.bank.nbytes / 1e9 / self.fill_s:.1f} GB/s")

    def _use(self, weights: Any) -> None:
        """A model over the slab. The one with experts of its own goes first."""
        from workers.gpu.model import GpuModel

        scene = self.scene
        scene.model, scene.weights = None, weights
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        scene.model = GpuModel(
            self.config,
            weights,
            scene.pools,
            max_running=self.most_running,
            max_context=scene.wanted.max_context,
            expert_stream=self.stream,
            decode_experts=ExpertsInPlace(self.memory),
        )

    def route_as(self, workload: Workload) -> None:
        """Every layer's table follows the workload's measured steps.

        As many rows are written as for the largest batch: of a small vocabulary other token ids are drawn, too, and
        must not be routed as by the workload before.
        """
        trace = workload.trace.part(workload.past, workload.past + MOST_STEPS)
        steps, _, batch, chosen = trace.experts.shape
        count = steps * self.most_running
        assert steps * batch <= count <= self.config.vocab_size
        rows = torch.from_numpy(trace.experts.astype(np.int32))
        token = torch.arange(count) % (steps * batch)
        for index, layer in enumerate(self.scene.weights.layers):
            assert layer.tid2eid is not None
            layer.tid2eid[:count].copy_(rows[:, index].reshape(-1, chosen)[token])

    def restart(self, batch: int) -> None:
        """The same KV and positions for every cell of a batch; nothing has run yet."""
        fill_plausibly(self.scene.pools, self.config, 0)
        self.scene.reseed()
        first = self.context - 2 * PAGE_TOKENS  # a page begins: MOST_STEPS lie inside it
        self.scene.model.start(self.scene.decode_batch(batch, self.context, first))

    def cache(self, num_slots: int, policy: Policy, profile: Values | None) -> ExpertCache:
        """A cache whose slots are still empty; `fill` them."""
        return self.memory.cache(num_slots=num_slots, policy=policy, profile=profile, filled=False)

    def fill(self, cache: ExpertCache, pairs: Ids) -> float:
        """Brings in `pairs`, the most valuable first; seconds. Slots are given out in order: who is there stays."""
        began, slots = time.perf_counter(), cache.slots.num_slots
        left = set(pairs.tolist())
        order = []
        for pair in self._inside[:slots].tolist():
            # A pair may lie in two slots: one from a larger cache, one from a smaller cache after it.
            order.append(pair if pair in left else -1)
            left.discard(pair)
        there = {pair: slot for slot, pair in enumerate(order) if pair >= 0}
        rest = iter([pair for pair in pairs.tolist() if pair not in there])
        order = [pair if pair >= 0 else next(rest, -1) for pair in order]
        slab = self.memory.slab

        def bring(some: Sequence[int]) -> list[Tensor]:
            return [slab[there[pair]] if pair in there else self.bank.expert(pair) for pair in some]

        cache.fill([pair for pair in order if pair >= 0], bring)
        return self._seconds(began)

    def keep_slots(self, cache: ExpertCache) -> None:
        """Notes what the slab holds when a cell is over, and compares some of it with the bank.

        Raises `IntegrityError` when a slot does not hold its expert.
        """
        self.synchronize()
        slots = cache.slots.num_slots
        self._inside[:slots] = -1
        for pair in cache.slots.residents().tolist():
            assert cache.slots.state_of(pair) is SlotState.RESIDENT
            self._inside[cache.slots.slot_of(pair)] = pair
        known = np.flatnonzero(self._inside[:slots] >= 0).tolist()
        for slot in random.Random(slots).sample(known, min(CHECKED_SLOTS, len(known))):
            pair = int(self._inside[slot])
            if not torch.equal(self.memory.slab[slot], self.bank.expert(pair).to(self.device, non_blocking=True)):
                raise IntegrityError(f"slot {slot} does not hold expert pair {pair}")

    def all_resident(self) -> None:
        """Every expert in a slot; where they do not fit, several share one: the speed of a model without a cache."""
        slots = self.memory.places.slots
        self.memory.table.copy_(torch.arange(self.memory.table.numel(), dtype=torch.int32) % slots)

    def all_at_home(self) -> None:
        """No expert in a slot."""
        self.memory.table.copy_(torch.from_numpy(homes_in(self.bank, self.memory.table.numel())))
