"""Promises of memory: what a request may need at most, and a ledger that never promises more than there is.

Owns: `Need` arithmetic per role and the `Ledger` of promises. Does not own: physical pages (`kvstore.allocator`).
Invariant: while every request keeps within its promise, no allocation of a promised unit can fail. Admission by a
smaller, predicted need (retract) replaces the `Need` function and then has to handle shortage.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.allocator import KVAllocators
from kvstore.errors import IntegrityError
from kvstore.spec import PAGE_TOKENS
from workers.errors import RequestTooLong
from workers.messages import GenerateRequest


def pages_of(num_tokens: int) -> int:
    """Logical pages of `num_tokens` tokens."""
    return -(-num_tokens // PAGE_TOKENS)


def pages_spanned(num_tokens: int) -> int:
    """Most pages that `num_tokens` consecutive tokens can touch, wherever they begin."""
    return 0 if num_tokens <= 0 else (num_tokens + PAGE_TOKENS - 2) // PAGE_TOKENS + 1


@dataclass(frozen=True, slots=True)
class Need:
    """Most units of each index space that one request will hold at once."""

    full_pages: int
    window_pages: int
    slots: int = 1

    def fits(self, room: Need) -> bool:
        """Whether `room` covers this need in every space."""
        return (
            self.full_pages <= room.full_pages and self.window_pages <= room.window_pages and self.slots <= room.slots
        )


def decode_need(request: GenerateRequest, window_tokens: int) -> Need:
    """Need of decoding to `max_tokens`: the last output token is never stored."""
    num_stored = len(request.prompt_ids) + request.sampling.max_tokens - 1
    return Need(pages_of(num_stored), min(pages_of(num_stored), pages_spanned(window_tokens + 1)))


def prefill_need(request: GenerateRequest, window_tokens: int, chunk_tokens: int) -> Need:
    """Need of computing the prompt in chunks of at most `chunk_tokens`."""
    full = pages_of(len(request.prompt_ids))
    return Need(full, min(full, pages_spanned(window_tokens + chunk_tokens)))


class Ledger:
    """Promises by request key. Not thread-safe; owned by one scheduler."""

    def __init__(self, allocators: KVAllocators) -> None:
        self.total = Need(allocators.full.num_pages, allocators.window.num_pages, allocators.slots.num_slots)
        self._promised: dict[tuple[str, int], Need] = {}
        self._used = Need(0, 0, 0)

    @property
    def promised(self) -> Need:
        """Sum of all promises."""
        return self._used

    def __len__(self) -> int:
        return len(self._promised)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self._promised

    def require_possible(self, need: Need) -> None:
        """Raises `RequestTooLong` when `need` could not be met by an empty worker."""
        if not need.fits(self.total):
            raise RequestTooLong(
                f"the request needs {need.full_pages} KV pages, {need.window_pages} window pages, {need.slots} slots; "
                f"this worker has {self.total.full_pages}, {self.total.window_pages}, {self.total.slots}"
            )

    def has_room(self, need: Need) -> bool:
        """Whether `promise` would succeed now."""
        return _add(self._used, need, 1).fits(self.total)

    def promise(self, key: tuple[str, int], need: Need) -> bool:
        """Promises `need` to `key`; False and unchanged when it does not fit now."""
        if key in self._promised:
            raise IntegrityError(f"{key} already has a promise")
        used = _add(self._used, need, 1)
        if not used.fits(self.total):
            return False
        self._promised[key], self._used = need, used
        return True

    def withdraw(self, key: tuple[str, int]) -> None:
        """Ends the promise to `key`, if there is one."""
        need = self._promised.pop(key, None)
        if need is not None:
            self._used = _add(self._used, need, -1)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless the sum is that of the promises and within the pools."""
        total = Need(0, 0, 0)
        for need in self._promised.values():
            total = _add(total, need, 1)
        if total != self._used or not total.fits(self.total):
            raise IntegrityError(f"ledger says {self._used}, its promises sum to {total}, pools hold {self.total}")


def _add(a: Need, b: Need, sign: int) -> Need:
    return Need(a.full_pages + sign * b.full_pages, a.window_pages + sign * b.window_pages, a.slots + sign * b.slots)
