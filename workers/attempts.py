"""`Attempts`: which attempt of each request a worker serves. Torch-free, engine thread only.

A request id has at most one live attempt: a newer epoch ends the older one, an older or equal epoch is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

from workers.errors import RequestAborted, RequestError
from workers.sequence import Sequence


class DuplicateRequest(RequestError):
    """The same attempt is already being served."""

    status = 409
    code = "duplicate_request"


class Attempts:
    """Live sequences by request id."""

    def __init__(self) -> None:
        self._by_id: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(tuple(self._by_id.values()))

    def find(self, request_id: str, epoch: int | None = None) -> Sequence | None:
        """The live attempt of a request; with `epoch`, only that attempt."""
        sequence = self._by_id.get(request_id)
        if sequence is None or (epoch is not None and sequence.request.epoch != epoch):
            return None
        return sequence

    def superseded_by(self, request_id: str, epoch: int) -> Sequence | None:
        """The older attempt that must end before attempt `epoch` begins.

        Raises `DuplicateRequest` for the same epoch, `RequestAborted` for an older one.
        """
        live = self._by_id.get(request_id)
        if live is None:
            return None
        if live.request.epoch == epoch:
            raise DuplicateRequest(f"request {request_id} epoch {epoch} is already being served")
        if live.request.epoch > epoch:
            raise RequestAborted(f"request {request_id} epoch {epoch}: epoch {live.request.epoch} is current")
        return live

    def add(self, sequence: Sequence) -> None:
        self._by_id[sequence.request.request_id] = sequence

    def remove(self, sequence: Sequence) -> bool:
        """True when `sequence` was the live attempt; each attempt ends only once."""
        if self._by_id.get(sequence.request.request_id) is not sequence:
            return False
        del self._by_id[sequence.request.request_id]
        return True

    def expired(self, now_s: float) -> list[Sequence]:
        """Attempts whose deadline has passed."""
        return [s for s in self._by_id.values() if s.deadline_s <= now_s]

    def next_deadline_s(self) -> float | None:
        """The earliest deadline."""
        return min((s.deadline_s for s in self._by_id.values()), default=None)
