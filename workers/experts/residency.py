"""`Residency`: who comes into the slab and who leaves, decided from use counters between steps. Torch-free.

Owns: `Usage` of one GPU, the choice of moves under a policy, hysteresis and layer floors. Does not own: slots
(`slots.py`), copies. A decision looks at all pairs at once: the desired set is the most valuable `num_slots`, each
layer's best few first; a decision then moves towards it by at most `moves` pairs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.experts.policy import Ids, Policy, Usage, Values, per_layer_floor

logger = logging.getLogger(__name__)

PROMPT_STEPS, PROMPT_MOVES = 128, 64
"""Steps that a prompt counts for, and pairs that come in for it at once: 0.9 GB, 16 ms of the link for V4-Flash.
# simulated: 64 and 256 steps are worse (`prompt_uses.py` has the gain)."""

URGENT_MOVES = 32
"""Pairs that one decision brings in at most when that many are urgent: 0.4 GB for V4-Flash, 8 ms of the link."""

FLOOR_BONUS = 1e9
"""More than any policy's value: a layer's best few come before all others."""


@dataclass(frozen=True, slots=True)
class Moves:
    """One decision. `enter` is ordered, the most valuable first; at most one leaves for each that enters."""

    enter: Ids
    leave: Ids


class Residency:
    """Use of every pair, and decisions from it. One owner."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        top_k: int,
        policy: Policy,
        profile: Values | None = None,
        pinned: Sequence[int] = (),
    ) -> None:
        """`profile` [L * E]: share of steps that needed each pair in a recorded run; starts the heat.

        `pinned`: pairs that come first, in this order, and never leave.
        """
        self.policy = policy
        self._pinned = np.array(pinned, np.int64)
        self._stays = np.zeros(num_layers * num_experts, bool)
        self._stays[self._pinned] = True
        self.usage = Usage.empty(num_layers * num_experts, profile)
        if profile is not None:
            self.usage.heat += profile * policy.half_life_steps
        self._num_layers, self._num_experts, self._top_k = num_layers, num_experts, top_k

    def note(self, uses: Ids, steps: int) -> None:
        """Counters of the last `steps` steps: int64 [L * E]."""
        self.usage.note_counts(uses, steps, self.policy.half_life_steps)

    def note_prompt(self, shares: Values) -> None:
        """What a prompt used whose decode steps are about to come: share of its tokens [L * E]."""
        self.usage.note_prompt(shares, PROMPT_STEPS, self.policy.half_life_steps)

    def by_layer(self, values: Ids) -> Ids:
        """[L * E] as [L, E]."""
        return values.reshape(self._num_layers, self._num_experts)

    def heat_share(self, inside: npt.NDArray[np.bool_]) -> float:
        """Part of all recent uses that the pairs of a mask [L * E] have; 0 before the first use."""
        heat = self.usage.heat
        return float(heat[inside].sum() / max(1e-9, heat.sum()))

    def first_residents(self, num_slots: int) -> Ids:
        """Whom an empty slab starts with: the pinned, then the best by profile; without one, an equal share of each
        layer."""
        others = max(0, num_slots - len(self._pinned))
        if self.usage.profile.any():
            chosen = self._best(np.where(self._stays, -1.0, self.usage.profile), others)
        else:
            order = np.argsort(np.arange(len(self.usage.heat)) % self._num_experts, kind="stable")
            chosen = np.sort(order[~self._stays[order]][:others])
        return np.concatenate([self._pinned, chosen])

    def decide(
        self,
        held: Ids,
        num_free: int,
        moves: int,
        *,
        keep: Callable[[Ids], npt.NDArray[np.bool_]],
        urgent_moves: int = URGENT_MOVES,
    ) -> Moves:
        """At most `moves` pairs to bring in, or `urgent_moves` where that many are urgent, and whom to send away.

        `held`: pairs with a slot. `keep(pairs)`: which of them must stay now (in flight, or needed by a running step).
        """
        if not self.policy.admits or moves < 1:
            return Moves(np.empty(0, np.int64), np.empty(0, np.int64))
        inside = np.zeros(len(self.usage.heat), bool)
        inside[held] = True
        used = self.usage.last_step >= 0
        values = self.policy.value(self.usage)
        worth = np.where(inside, self.policy.margin, 0.0) + values
        worth[~used & (self.usage.profile == 0)] = 0.0
        count = len(held) + num_free
        if not count:
            return Moves(np.empty(0, np.int64), np.empty(0, np.int64))
        score = worth + np.where(self._in_floor(worth, count), FLOOR_BONUS, 0.0)
        least = np.partition(score, -count)[-count]
        desired = score > least
        equal = np.flatnonzero(score == least)
        # Of equals those stay who are there, then the lower pair.
        desired[equal[np.argsort(~inside[equal], kind="stable")][: count - int(desired.sum())]] = True
        most = max(moves, urgent_moves)
        enter = _first(np.flatnonzero(used & ~inside & desired), -score, most)
        spare = np.flatnonzero(inside & ~desired & ~self._stays)
        spare = spare[~keep(spare)] if len(spare) else spare
        leave = _first(spare[::-1], score, max(0, len(enter) - num_free))
        enter = enter[: num_free + len(leave)]
        # Both are sorted: the i-th newcomer beyond the free slots takes the i-th leaver's place.
        ahead = values[enter]
        ahead[num_free:] -= values[leave]
        enter = enter[: max(moves, int((ahead >= self.policy.urgent).sum()))]
        leave = leave[: max(0, len(enter) - num_free)]
        if len(enter) and logger.isEnabledFor(logging.DEBUG):
            logger.debug("experts: in %s; out %s", self._named(enter, worth), self._named(leave, worth))
        return Moves(enter, leave)

    def _named(self, pairs: Ids, worth: Values) -> str:
        """`layer/expert=worth` of each."""
        pairs_of = (divmod(pair, self._num_experts) for pair in pairs.tolist())
        return " ".join(f"{layer}/{e}={worth[layer * self._num_experts + e]:.1f}" for layer, e in pairs_of) or "nobody"

    def _in_floor(self, worth: Values, count: int) -> npt.NDArray[np.bool_]:
        """Which pairs are among the best few of their layer, of those that are worth anything."""
        floor = per_layer_floor(count, self._num_layers, self._top_k)
        if floor == 0:
            return np.zeros(len(worth), bool)
        table = worth.reshape(self._num_layers, self._num_experts)
        least = np.partition(table, self._num_experts - floor, axis=1)[:, self._num_experts - floor, None]
        above, equal = table > least, table == least
        first_equal = np.cumsum(equal, axis=1) <= floor - above.sum(axis=1, keepdims=True)
        inside: npt.NDArray[np.bool_] = (above | (equal & first_equal)) & (table > 0)
        return inside.ravel()

    def _best(self, worth: Values, count: int) -> Ids:
        """Ascending pairs of the highest worth, each layer's floor first; ties to the lower pair.

        A negative worth is never part of a floor.
        """
        floor = per_layer_floor(count, self._num_layers, self._top_k)
        table = worth.reshape(self._num_layers, self._num_experts)
        rank = np.empty_like(table, dtype=np.int64)
        order = np.argsort(-table, axis=1, kind="stable")
        np.put_along_axis(rank, order, np.arange(self._num_experts)[None, :], 1)
        first = (rank.ravel() >= floor) | (worth < 0)
        return np.sort(np.lexsort((np.arange(len(worth)), -worth, first))[:count])


def _first(pairs: Ids, key: Values, count: int) -> Ids:
    """The `count` pairs with the lowest `key` [all pairs], ascending; of equals those that stand first in `pairs`."""
    if count < len(pairs):
        bound = np.partition(key[pairs], count)[count] if count else -np.inf
        pairs = pairs[key[pairs] <= bound]
    return pairs[np.argsort(key[pairs], kind="stable")][:count]
