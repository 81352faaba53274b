"""Whom to take out of the batch when a pool is short. Pure functions over counters; torch-free.

The order is: nobody who is protected (retracted too often, resumed a moment ago) while others are left, then the lowest
priority, then the lowest score. A score adds up, each about one at its ordinary largest: bytes to move, past retracts,
age, and nearness to the end, where leaving frees nothing that would not come free soon anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.spec import PAGE_TOKENS
from workers.scheduler.admission import Need, pages_of

BYTES_SCALE = 256 << 20
"""Bytes that count as one: about 64K tokens of V4-Flash, 5 ms over PCIe."""

AGE_SCALE_S = 60.0
"""Age that counts as one."""


@dataclass(frozen=True, slots=True)
class VictimLimits:
    """See `RetractConfig`."""

    horizon_steps: int
    max_retracts: int
    min_run_steps: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """One running request, as the choice sees it."""

    key: tuple[str, int]
    priority: int
    age_s: float
    num_tokens: int
    """Committed tokens n."""
    held: Need
    """Units it holds, all of which come free."""
    move_bytes: int
    """Payload of its image."""
    remaining: int
    """Output tokens until it must end."""
    num_retracts: int = 0
    steps_since_resume: int | None = None
    """None: never resumed."""


def is_protected(candidate: Candidate, limits: VictimLimits) -> bool:
    """Whether others go first."""
    resumed = candidate.steps_since_resume
    recent = resumed is not None and resumed < limits.min_run_steps
    return recent or candidate.num_retracts >= limits.max_retracts


def score(candidate: Candidate, limits: VictimLimits) -> float:
    """The lower, the sooner it leaves."""
    nearness = max(0.0, 1.0 - candidate.remaining / limits.horizon_steps)
    return (
        candidate.move_bytes / BYTES_SCALE
        + candidate.num_retracts / limits.max_retracts
        + min(1.0, candidate.age_s / AGE_SCALE_S)
        + nearness
    )


def growth(candidate: Candidate, num_steps: int) -> Need:
    """Units that one request takes during its next steps; window pages that fall out of reach are not counted off."""
    steps = min(num_steps, max(1, candidate.remaining))
    full = max(0, pages_of(candidate.num_tokens + steps) - candidate.held.full_pages)
    first, last = candidate.num_tokens // PAGE_TOKENS, (candidate.num_tokens + steps - 1) // PAGE_TOKENS
    new_window = last - first + (candidate.num_tokens % PAGE_TOKENS == 0)
    return Need(full, new_window, 0)


def total(needs: Iterable[Need]) -> Need:
    """Sum of units."""
    needs = list(needs)
    return Need(sum(n.full_pages for n in needs), sum(n.window_pages for n in needs), sum(n.slots for n in needs))


def shortfall(batch: Sequence[Candidate], free: Need, num_steps: int) -> Need:
    """Units that the batch lacks for its next steps."""
    need = total(growth(c, num_steps) for c in batch)
    return Need(max(0, need.full_pages - free.full_pages), max(0, need.window_pages - free.window_pages), 0)


def choose_victims(batch: Sequence[Candidate], free: Need, limits: VictimLimits) -> list[Candidate]:
    """Requests to take out so that the rest can run on for `horizon_steps`; one request always stays.

    `free` counts units that are free or will be soon. Empty when they are enough for the next step of all. Victims that
    a later choice made needless are spared again, the most expensive first.
    """
    if not _lacks(batch, free, 1):
        return []
    order = sorted(batch, key=lambda c: (is_protected(c, limits), c.priority, score(c, limits), c.key))
    chosen: list[Candidate] = []
    rest = list(order)
    for candidate in order:
        if len(rest) == 1 or not _lacks(rest, _with(free, chosen), limits.horizon_steps):
            break
        chosen.append(candidate)
        rest.remove(candidate)
    for candidate in sorted(chosen, key=lambda c: c.move_bytes, reverse=True):
        fewer = [c for c in chosen if c is not candidate]
        if fewer and not _lacks([*rest, candidate], _with(free, fewer), limits.horizon_steps):
            chosen, rest = fewer, [*rest, candidate]
    return chosen


def _lacks(batch: Sequence[Candidate], free: Need, num_steps: int) -> bool:
    short = shortfall(batch, free, num_steps)
    return short.full_pages > 0 or short.window_pages > 0


def _with(free: Need, chosen: Sequence[Candidate]) -> Need:
    return total([free, *(c.held for c in chosen)])
