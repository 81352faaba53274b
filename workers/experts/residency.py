"""`Residency`: who comes into the slab and who leaves, decided from use counters between steps. Torch-free.

Owns: `Usage` of one GPU, the choice of moves under a policy, hysteresis and layer floors. Does not own: slots
(`slots.py`), copies. A decision looks at all pairs at once: the desired set is the most valuable `num_slots`, each
layer's best few first; a decision then moves towards it by at most `moves` pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.experts.policy import Ids, Policy, Usage, Values, per_layer_floor


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

    def decide(self, held: Ids, num_free: int, moves: int, *, keep: Callable[[Ids], npt.NDArray[np.bool_]]) -> Moves:
        """At most `moves` pairs to bring in, and whom to send away for them.

        `held`: pairs with a slot. `keep(pairs)`: which of them must stay now (in flight, or needed by a running step).
        """
        if not self.policy.admits or moves < 1:
            return Moves(np.empty(0, np.int64), np.empty(0, np.int64))
        values = self.policy.value(self.usage)
        inside = np.zeros(len(values), bool)
        inside[held] = True
        worth = np.where(inside, self.policy.margin, 1.0) * values
        worth[self.usage.last_step < 0] = np.where(inside[self.usage.last_step < 0], 0.0, -1.0)
        desired = np.zeros(len(values), bool)
        desired[self._best(worth, len(held) + num_free)] = True
        enter = np.flatnonzero(desired & ~inside & (self.usage.last_step >= 0))
        enter = enter[np.lexsort((enter, -values[enter]))][:moves]
        spare = np.flatnonzero(inside & ~desired & ~self._stays)
        spare = spare[~keep(spare)] if len(spare) else spare
        spare = spare[np.lexsort((-spare, values[spare]))]
        leave = spare[: max(0, len(enter) - num_free)]
        return Moves(enter[: num_free + len(leave)], leave)

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
