"""Pure choices of the schedulers: how a token budget is split, whom to take out when a pool is short."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Protocol

from workers.sequence import Sequence

CHUNK_ALIGN = 128
"""Chunk ends are multiples of this where possible: no compression window is then left open between chunks, so that
every compressed entry of the chunk can leave at once."""


def split_budget(remaining: Seq[int], starts: Seq[int], budget: int) -> list[int]:
    """Tokens each prompt computes in one step of at most `budget` tokens, oldest prompt first.

    The oldest gets at least half of the budget, so that it never starves; the other half first finishes the shortest
    prompts, so that a short prompt does not wait behind a long one; what is left goes in order of age.
    """
    grants = [0] * len(remaining)
    if not remaining:
        return grants
    left = budget
    reserve = min(remaining[0], (budget + 1) // 2)
    for i in sorted(range(1, len(remaining)), key=lambda i: remaining[i]):
        if remaining[i] > left - reserve:
            break
        grants[i] = remaining[i]
        left -= remaining[i]
    for i in range(len(remaining)):
        if left == 0:
            break
        if grants[i] == 0:
            grants[i] = _align(starts[i], min(remaining[i], left), remaining[i])
            left -= grants[i]
    if not any(grants):
        grants[0] = min(remaining[0], budget)
    return grants


def _align(start: int, count: int, remaining: int) -> int:
    """`count` cut so that the chunk ends on a multiple of `CHUNK_ALIGN`, unless it ends the prompt."""
    if count == remaining:
        return count
    return max(0, (start + count) // CHUNK_ALIGN * CHUNK_ALIGN - start)


class ShortagePolicy(Protocol):
    """Chooses victims when a running request's pages cannot grow even after reclaiming."""

    def victims(self, running: Seq[Sequence], blocked: Sequence) -> Seq[Sequence]:
        """Running requests to take out so that `blocked` may grow (it may be the victim itself).

        None when pages are on their way already: `blocked` then waits, and the question comes again next step.
        """


class TakeNewest:
    """The running request with the lowest priority, then the latest arrival."""

    def victims(self, running: Seq[Sequence], blocked: Sequence) -> Seq[Sequence]:
        return [max(running, key=lambda s: s.order)]
