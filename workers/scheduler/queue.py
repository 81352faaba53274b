"""Waiting for admission: priority, then age, with back-fill that cannot starve the head."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator

from workers.sequence import Sequence

MAX_OVERTAKES = 32
"""How often the head may be overtaken by requests that fit when it does not; then the queue waits for it."""


class AdmissionQueue:
    """Requests that have no promise yet, in order of `Sequence.order`."""

    def __init__(self) -> None:
        self._waiting: list[Sequence] = []
        self._overtaken: tuple[tuple[str, int], int] | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def push(self, sequence: Sequence) -> None:
        """Adds a request at its place."""
        bisect.insort(self._waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Takes a request out, if it is there."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)

    def take(self, accept: Callable[[Sequence], bool]) -> list[Sequence]:
        """Removes and returns, in order, the requests that `accept` takes (it makes the promise)."""
        taken: list[Sequence] = []
        blocked: Sequence | None = None
        for sequence in tuple(self._waiting):
            if blocked is not None and not self._may_overtake(blocked):
                break
            if accept(sequence):
                self._waiting.remove(sequence)
                taken.append(sequence)
                if blocked is not None:
                    self._count_overtake(blocked)
            elif blocked is None:
                blocked = sequence
        return taken

    def _may_overtake(self, head: Sequence) -> bool:
        return self._overtaken is None or self._overtaken[0] != head.key or self._overtaken[1] < MAX_OVERTAKES

    def _count_overtake(self, head: Sequence) -> None:
        same = self._overtaken is not None and self._overtaken[0] == head.key
        self._overtaken = (head.key, self._overtaken[1] + 1 if same and self._overtaken else 1)
