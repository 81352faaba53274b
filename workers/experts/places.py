"""What a GPU worker's budget of experts buys: slots of the cache, scratch for decode, staging for prefill. Torch-free.

Owns: the split of one slab. Does not own: bytes of one expert, who sits where.

    slots     the cache's
    scratch   absent experts of one layer of a decode step, copied there before its products, where kernels do so
    staging   absent experts of two layers of a prefill step: one is computed while the next one's arrive

Scratch and staging only make steps faster (what does not fit is read in place from host memory), so that the smallest
budget that works is the slots of one token's choices of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.errors import BadConfig
from workers.experts.config import SOURCE, ExpertConfig

MOST_SCRATCH = 128
"""Experts of decode's scratch: 1.7 GB at V4-Flash's size, all that a layer lacks at 32 tokens a step and 12 % spill."""

SCRATCH_SHARE = 8
"""A small budget spends at most one place in so many on scratch: slots save more copies than scratch makes faster."""


ALLOCATION_BYTES = 512
"""What torch rounds each allocation up to."""

SHARED_BYTES = 2 << 20
"""What the driver rounds memory up to that another process may map, on every GPU that we know."""


@dataclass(frozen=True, slots=True)
class Places:
    """How many experts each part of a slab holds, in this order."""

    slots: int
    scratch: int = 0
    half: int = 0
    """Of one of prefill's two staging halves."""

    @property
    def total(self) -> int:
        """Experts of the whole slab."""
        return self.slots + self.scratch + 2 * self.half


@dataclass(frozen=True, slots=True)
class ExpertSizes:
    """What a plan must know of a model and its worker."""

    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    max_running: int
    """Sequences of the largest decode step; 0 for a worker that only prefills."""
    prefills: bool
    unit_bytes: int = ALLOCATION_BYTES
    """Device memory comes in multiples of this; more for memory that another process may map."""
    stages: bool = True
    """Whether a decode step copies absent experts to scratch; else it reads them in place, and all places are slots."""

    @property
    def pairs(self) -> int:
        """All (layer, expert) pairs."""
        return self.layers * self.experts

    @property
    def table_bytes(self) -> int:
        """Device bytes beside the slab: table, counters, a prefill step's own table and that of one of its layers, all
        int32, and a count; what stands in for a slab of another process while there is none."""
        stand_in = self.unit_bytes if self.unit_bytes > ALLOCATION_BYTES else 0
        return 4 * (3 * self.pairs + self.experts) + 5 * ALLOCATION_BYTES + stand_in

    def slab_bytes(self, places: Places) -> int:
        """Device memory of a slab."""
        return -(-places.total * self.expert_bytes // self.unit_bytes) * self.unit_bytes


def plan_places(config: ExpertConfig, sizes: ExpertSizes, *, spare_bytes: int | None = None) -> Places:
    """The split of a limited budget. Raises `BadConfig` naming the smallest one that works.

    `spare_bytes`: what the rest of the worker leaves of `total_gpu`; needed with that budget only.
    """
    if config.slots is not None:
        if config.slots < sizes.top_k:
            raise _too_small("slots", config.slots, "slots", sizes.top_k, sizes)
        slots = min(config.slots, sizes.pairs)
        if slots == sizes.pairs:
            return Places(slots)
        return Places(slots, _scratch(sizes, slots), min(_half(sizes, slots), slots))
    if config.hbm_bytes is not None:
        key, given, budget = "hbm", config.hbm_bytes, config.hbm_bytes
    else:
        assert config.total_gpu_bytes is not None and spare_bytes is not None
        key, given, budget = "total_gpu", config.total_gpu_bytes, spare_bytes
    whole = (budget - sizes.table_bytes) // sizes.unit_bytes * sizes.unit_bytes
    held = whole // sizes.expert_bytes
    if held < sizes.top_k:
        least = given - budget + sizes.table_bytes + sizes.slab_bytes(Places(sizes.top_k))
        raise _too_small(key, given, "bytes", least, sizes)
    if held >= sizes.pairs:
        return Places(sizes.pairs)
    scratch = min(_scratch(sizes, held), held - sizes.top_k)
    half = min(_half(sizes, held - scratch), (held - scratch - sizes.top_k) // 2)
    return Places(held - scratch - 2 * half, scratch, half)


def _scratch(sizes: ExpertSizes, held: int) -> int:
    """Places of decode's scratch out of `held`."""
    if not sizes.stages:
        return 0
    return min(sizes.experts, sizes.max_running * sizes.top_k, MOST_SCRATCH, held // SCRATCH_SHARE)


def _half(sizes: ExpertSizes, held: int) -> int:
    """Places of one staging half: what a layer lacks when the rest of `held` is shared equally among the layers."""
    if not sizes.prefills:
        return 0
    return min(sizes.experts, -(-(sizes.pairs - held) // max(1, sizes.layers - 2)))


def _too_small(key: str, found: int, unit: str, least: int, sizes: ExpertSizes) -> BadConfig:
    detail = f"{sizes.top_k} slots for one token's choices of a layer, {sizes.expert_bytes} bytes each"
    return BadConfig(f"experts.{key}", f"{found} {unit}", f"at least {least} {unit}: {detail}", SOURCE)
