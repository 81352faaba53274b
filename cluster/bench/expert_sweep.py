"""What `dsv4 bench experts` runs: budgets, workloads and the cells that combine them. Torch-free.

Owns: the meaning of a budget's text, routing of a workload and what a cache has seen of it before the first measured
step. Does not own: the device (`expert_scene.py`), measuring (`experts.py`).

A workload has a past, as a server has that ran for a while: `PAST_TOKENS` tokens of the same routing. Its first part is
the recorded profile, over its last part the policy decides as often as the cache would, and so arrives at the residents
and counters with which the measurement begins.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from workers.experts.cache import INTERVAL, MOVES
from workers.experts.generator import ROUTINGS, generate
from workers.experts.layout import ExpertShape
from workers.experts.policy import Ids, Values
from workers.experts.residency import Residency
from workers.experts.trace import RoutingTrace
from workers.model.config import ModelConfig

PAST_TOKENS, REPLAYED_TOKENS, LEAST_PAST_STEPS = 3072, 512, 64
MOST_STEPS = 136
"""Steps of a trace that a cell may run, warm-up included."""

UNITS = {"gib": 1 << 30, "": 10**9}

_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?)(gib)?(t)?")


@dataclass(frozen=True, slots=True)
class Budget:
    """A name for tables and the slots that it buys."""

    name: str
    slots: int


def budgets_of(texts: Sequence[str], config: ModelConfig, beside_bytes: int) -> list[Budget]:
    """`64` buys slots of 64 GB, `118gib` of 118 GiB; `24t` what a GPU of 24 GB has left beside `beside_bytes`.

    Raises ValueError for another text.
    """
    size = ExpertShape(config.hidden_size, config.moe_intermediate_size).expert_bytes
    most, found = config.num_hidden_layers * config.n_routed_experts, []
    for text in texts:
        match = _BUDGET.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a budget like 64, 118gib or 24t")
        number, unit, total = match[1], match[2] or "", bool(match[3])
        amount = float(number) * UNITS[unit] - (beside_bytes if total else 0)
        slots = max(config.num_experts_per_tok, min(most, int(amount // size)))
        found.append(Budget(f"{number} {'GiB' if unit else 'GB'}{' total' if total else ''}", slots))
    return found


@dataclass(frozen=True)
class Workload:
    """Decode steps of `batch` sequences under one routing."""

    routing: str
    batch: int
    layers: int
    experts: int
    top_k: int

    @property
    def past(self) -> int:
        """Steps before the first measured one."""
        return max(LEAST_PAST_STEPS, PAST_TOKENS // self.batch)

    @cached_property
    def trace(self) -> RoutingTrace:
        """Past and measured steps; always the same ones."""
        return generate(
            ROUTINGS[self.routing],
            steps=self.past + MOST_STEPS,
            layers=self.layers,
            experts=self.experts,
            batch=self.batch,
            top_k=self.top_k,
            seed=17,
        )

    @cached_property
    def needed(self) -> list[Ids]:
        """Pairs of every step."""
        return self.trace.all_needed()

    def profile(self, start: int, end: int) -> Values:
        """Share of steps [start, end) that needed each pair."""
        found = np.zeros(self.layers * self.experts)
        for pairs in self.needed[start:end]:
            found[pairs] += 1 / (end - start)
        return found

    @property
    def replayed(self) -> int:
        """The past's last steps, over which the policy decides."""
        return min(self.past // 2, max(LEAST_PAST_STEPS // 2, REPLAYED_TOKENS // self.batch))

    def recorded(self) -> Values:
        """The profile of a policy that will be replayed."""
        return self.profile(0, self.past - self.replayed)

    def same_text(self) -> Values:
        """The profile of the measured steps themselves: what a repeated text would leave behind."""
        return self.profile(self.past, self.past + MOST_STEPS)

    def residents_after_past(self, residency: Residency, slots: int) -> Ids:
        """Who holds a slot when the measurement begins, the most valuable first. `residency` has seen the past then."""
        inside = np.zeros(self.layers * self.experts, bool)
        inside[residency.first_residents(slots)] = True
        period = 2 * INTERVAL
        for begin in range(self.past - self.replayed, self.past, period):
            steps = self.needed[begin : begin + period]
            residency.note(np.bincount(np.concatenate(steps), minlength=len(inside)), len(steps))
            held = np.flatnonzero(inside)
            moves = residency.decide(held, slots - len(held), MOVES, keep=lambda pairs: np.zeros(len(pairs), bool))
            inside[moves.leave], inside[moves.enter] = False, True
        held = np.flatnonzero(inside)
        worth = residency.policy.value(residency.usage)
        return held[np.lexsort((held, -worth[held]))]


@dataclass(frozen=True, slots=True)
class Cell:
    """One measurement. `budget` None: every expert is read over the link."""

    workload: Workload
    budget: Budget | None
    policy: str
    same_text: bool = False


def first_cells(workload: Workload, budgets: Sequence[Budget], policy: str) -> Iterator[Cell]:
    """One workload without a cache and at every budget, the largest first, so that most experts are where the next
    cell wants them."""
    yield Cell(workload, None, policy)
    yield from (Cell(workload, budget, policy) for budget in sorted(set(budgets), key=lambda b: -b.slots))


def batch_cells(workloads: Sequence[Workload], few: Sequence[Budget], policy: str) -> Iterator[Cell]:
    """The other workloads at a few budgets."""
    for budget in sorted(set(few), key=lambda b: -b.slots):
        yield from (Cell(workload, budget, policy) for workload in workloads)


def policy_cells(workload: Workload, few: Sequence[Budget], policies: Sequence[str]) -> Iterator[Cell]:
    """The other policies at a few budgets, and the profile of the measured text itself."""
    for budget in sorted(set(few), key=lambda b: -b.slots):
        yield Cell(workload, budget, "static", same_text=True)
        yield from (Cell(workload, budget, policy) for policy in policies)
