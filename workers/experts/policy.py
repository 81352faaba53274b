"""Which experts deserve the fast tier: pure functions over counters. Torch-free, no state of their own.

A policy turns `Usage` into one number a pair: the value of having it resident; the cache keeps the highest and evicts
the lowest. What the running step needs, and what a copy is writing, is protected by the cache, not by the policy. Ties
go to the lower pair number, so that simulator, CPU and GPU choose alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]


@dataclass(slots=True)
class Usage:
    """Counters of every (layer, expert) pair, each [L * E]."""

    count: Values
    """Steps that needed the pair."""
    heat: Values
    """The same with exponential forgetting."""
    last_step: Ids
    """Last step that needed it, -1 before the first."""
    profile: Values
    """Share of steps that needed it in a recorded run; zeros without one."""
    step: int = 0

    @classmethod
    def empty(cls, num_pairs: int, profile: Values | None = None) -> Usage:
        """No use yet."""
        return cls(
            np.zeros(num_pairs),
            np.zeros(num_pairs),
            np.full(num_pairs, -1, np.int64),
            np.zeros(num_pairs) if profile is None else profile,
        )

    def note(self, needed: Ids, half_life_steps: float) -> None:
        """Counts one step."""
        self.heat *= 0.5 ** (1.0 / half_life_steps)
        self.count[needed] += 1
        self.heat[needed] += 1
        self.last_step[needed] = self.step
        self.step += 1

    def note_counts(self, uses: Ids, steps: int, half_life_steps: float) -> None:
        """Counts `steps` steps at once: `uses` [L * E] of each pair, at most one a step."""
        needed = np.minimum(uses, steps)
        self.heat *= 0.5 ** (steps / half_life_steps)
        self.count += needed
        self.heat += needed
        self.step += steps
        self.last_step[uses > 0] = self.step - 1

    def note_prompt(self, shares: Values, steps: int, half_life_steps: float) -> None:
        """What a prompt used counts like `steps` steps with these shares; its experts were used just now."""
        self.heat *= 0.5 ** (steps / half_life_steps)
        self.heat += shares * steps
        self.last_step[shares > 0] = max(0, self.step - 1)


@dataclass(frozen=True, slots=True)
class Policy:
    """One named way to value pairs.

    Attributes:
        value: residents with the lowest value go first.
        half_life_steps: memory of `Usage.heat`.
        admits: whether misses displace residents at all; a static cache is filled once from the profile.
        margin: how much more than the resident it displaces a newcomer must be worth (hysteresis).
        urgent: from how much more on a decision may bring in more pairs than usual.
    """

    name: str
    value: Callable[[Usage], Values]
    half_life_steps: float = 256.0
    admits: bool = True
    margin: float = 0.0
    urgent: float = np.inf


def recency(usage: Usage) -> Values:
    """LRU: the last step of use."""
    return usage.last_step.astype(np.float64)


def frequency(usage: Usage) -> Values:
    """LFU: uses so far, the more recent of equals first."""
    return usage.count + _age_fraction(usage)


def heat(usage: Usage) -> Values:
    """Decayed frequency, the more recent of equals first."""
    return usage.heat + 1e-3 * _age_fraction(usage)


def heat_and_recency(usage: Usage) -> Values:
    """LFRU: decayed frequency plus a bonus that halves every 16 steps since the last use."""
    age = usage.step - usage.last_step
    bonus = np.where(usage.last_step < 0, 0.0, 0.5 ** (np.minimum(age, 1000) / 16.0))
    return usage.heat + bonus


def profile(usage: Usage) -> Values:
    """The recorded share of steps."""
    return usage.profile


def _age_fraction(usage: Usage) -> Values:
    return (usage.last_step + 1.0) / (usage.step + 2.0)


USES_A_MOVE = 3.0
"""Uses (heat) that a newcomer must have ahead: one pays for the copy, the others are noise among pairs that are hardly
used. # simulated, misses and moves a step with and without it, V4-like routing, batch 1: 122 GiB 3.90 and 0.32, 4.01
and 1.00; 118 GiB 5.06 and 0.12, 5.21 and 1.00; 64 GB 27.05 and 27.00; 10 GB 126.4 and 126.1."""

USES_URGENT = 8.0
"""Uses ahead that only another kind of text brings about. # simulated, 64 GB, every layer's popularity drawn anew: hit
rate 200 to 250 steps later 65.3 -> 79.1 %, at 13 GB 33.7 -> 41.9; in steady text as many moves as without it."""

LRU = Policy("lru", recency)
LFU = Policy("lfu", frequency)
HEAT = Policy("heat", heat, urgent=USES_URGENT)
LFRU = Policy("lfru", heat_and_recency, margin=USES_A_MOVE, urgent=USES_URGENT)
STATIC = Policy("static", profile, admits=False)

POLICIES: dict[str, Policy] = {policy.name: policy for policy in (LRU, LFU, HEAT, LFRU, STATIC)}


def per_layer_floor(slots: int, layers: int, top_k: int) -> int:
    """Slots that each layer keeps whatever the others' experts are worth: half its fair share, at most 2 x top-k."""
    return min(slots // (2 * layers), 2 * top_k)


def highest(values: Values, among: Ids, count: int) -> Ids:
    """The `count` pairs of `among` with the highest value, ties to the lower pair."""
    order = np.lexsort((among, -values[among]))
    return among[order[:count]]
