"""Replays a routing trace against a cache of a given size: hit rates of every policy beside Belady's optimum.

The model of a step: what is resident before it decides the hits (`trace.py` has the definition); misses are read in
place, so a pair need not be brought in to be used. After the step the cache keeps the most valuable of its residents
and of at most `moves` pairs that the step missed; each layer keeps its best few whatever the others are worth.
Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.experts.policy import Ids, Policy, Usage, Values, highest, per_layer_floor
from workers.experts.trace import RoutingTrace

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Hits:
    """Counts over the measured steps."""

    policy: str
    slots: int
    needed: int
    hits: int
    cold: int
    capacity: int
    moved: int
    """Pairs brought in."""
    steps: int

    @property
    def rate(self) -> float:
        """Hits over all needed pairs, cold misses included."""
        return self.hits / max(1, self.needed)

    @property
    def warm_rate(self) -> float:
        """Hits over needed pairs that were used before."""
        return self.hits / max(1, self.needed - self.cold)

    @property
    def misses_per_step(self) -> float:
        """Pairs a step reads from a slower tier."""
        return (self.cold + self.capacity) / max(1, self.steps)


def simulate(
    trace: RoutingTrace,
    slots: int,
    policy: Policy,
    *,
    warmup: int = 0,
    moves: int | None = None,
    profile: Values | None = None,
    resident: Ids | None = None,
    needed: list[Ids] | None = None,
) -> Hits:
    """Hits of one policy. `warmup` steps run uncounted; `moves` bounds pairs brought in a step (default: no bound).

    The cache starts with `resident`, else with the best of `profile`, else empty. `needed` saves recomputing the
    trace's own. Raises ValueError without a slot.
    """
    if slots < 1:
        raise ValueError(f"a cache needs a slot, not {slots}")
    needed = trace.all_needed() if needed is None else needed
    usage = Usage.empty(trace.num_pairs, profile)
    inside = np.zeros(trace.num_pairs, bool)
    if resident is None and profile is not None:
        resident = highest(profile, np.arange(trace.num_pairs), slots)
    if resident is not None:
        inside[resident[:slots]] = True
    floor = per_layer_floor(slots, trace.num_layers, trace.experts.shape[-1])
    tally = _Tally()
    for step, pairs in enumerate(needed):
        missed = pairs[~inside[pairs]]
        if step >= warmup:
            tally.add(len(pairs), len(missed), int((usage.last_step[missed] < 0).sum()))
        usage.note(pairs, policy.half_life_steps)
        if policy.admits and len(missed):
            moved = _bring_in(inside, missed, usage, policy, slots, floor, trace.num_experts, moves)
            tally.moved += moved if step >= warmup else 0
    return tally.hits_of(policy.name, slots)


def belady(trace: RoutingTrace, slots: int, *, warmup: int = 0, needed: list[Ids] | None = None) -> Hits:
    """The optimum of a cache that may also refuse to bring a pair in: keep what is needed soonest."""
    needed = trace.all_needed() if needed is None else needed
    following = _next_uses(needed, trace.num_pairs)
    upcoming = np.full(trace.num_pairs, NEVER, np.int64)
    inside, seen = np.zeros(trace.num_pairs, bool), np.zeros(trace.num_pairs, bool)
    tally = _Tally()
    for step, pairs in enumerate(needed):
        missed = pairs[~inside[pairs]]
        if step >= warmup:
            tally.add(len(pairs), len(missed), int((~seen[missed]).sum()))
        seen[pairs] = True
        upcoming[pairs] = following[step]
        useful = missed[upcoming[missed] != NEVER]
        inside[useful] = True
        surplus = int(inside.sum()) - slots
        if surplus > 0:
            residents = np.flatnonzero(inside)
            latest = np.argpartition(upcoming[residents], len(residents) - surplus)[len(residents) - surplus :]
            inside[residents[latest]] = False
        tally.moved += int(inside[useful].sum()) if step >= warmup else 0
    return tally.hits_of("belady", slots)


def best_static(trace: RoutingTrace, slots: int, *, warmup: int = 0, needed: list[Ids] | None = None) -> Hits:
    """The best fixed set for the measured steps, known only afterwards: what no static profile can beat."""
    needed = trace.all_needed() if needed is None else needed
    steps_of = np.zeros(trace.num_pairs)
    for pairs in needed[warmup:]:
        steps_of[pairs] += 1
    inside = np.zeros(trace.num_pairs, bool)
    inside[highest(steps_of, np.arange(trace.num_pairs), slots)] = True
    tally = _Tally()
    for pairs in needed[warmup:]:
        tally.add(len(pairs), int((~inside[pairs]).sum()), 0)
    return tally.hits_of("best static", slots)


class _Tally:
    """Sums of measured steps."""

    def __init__(self) -> None:
        self.needed = self.missed = self.cold = self.moved = self.steps = 0

    def add(self, needed: int, missed: int, cold: int) -> None:
        self.needed += needed
        self.missed += missed
        self.cold += cold
        self.steps += 1

    def hits_of(self, policy: str, slots: int) -> Hits:
        hits, capacity = self.needed - self.missed, self.missed - self.cold
        return Hits(policy, slots, self.needed, hits, self.cold, capacity, self.moved, self.steps)


def _bring_in(
    inside: npt.NDArray[np.bool_],
    missed: Ids,
    usage: Usage,
    policy: Policy,
    slots: int,
    floor: int,
    num_experts: int,
    moves: int | None,
) -> int:
    """Keeps the best of residents and wanted pairs; how many pairs came in."""
    values = policy.value(usage)
    wanted = missed if moves is None else highest(values, missed, moves)
    pool = np.concatenate((np.flatnonzero(inside), wanted))
    if len(pool) > slots:
        worth = np.where(inside[pool], policy.margin, 0.0) + values[pool]
        kept = pool[np.lexsort((pool, -worth, ~_in_floor(pool, worth, floor, num_experts)))[:slots]]
    else:
        kept = pool
    before = inside.copy()
    inside[:] = False
    inside[kept] = True
    return int((inside & ~before).sum())


def _in_floor(pool: Ids, worth: Values, floor: int, num_experts: int) -> npt.NDArray[np.bool_]:
    """Which of `pool` are among the `floor` best of their layer."""
    order = np.lexsort((pool, -worth, pool // num_experts))
    layer = (pool // num_experts)[order]
    first = np.searchsorted(layer, layer)
    inside = np.empty(len(pool), bool)
    inside[order] = np.arange(len(pool)) - first < floor
    return inside


def _next_uses(needed: list[Ids], num_pairs: int) -> list[Ids]:
    """For each step, the next step after it that needs each of its pairs; `NEVER` when none does."""
    upcoming = np.full(num_pairs, NEVER, np.int64)
    out: list[Ids] = [np.empty(0, np.int64)] * len(needed)
    for step in range(len(needed) - 1, -1, -1):
        out[step] = upcoming[needed[step]]
        upcoming[needed[step]] = step
    return out
