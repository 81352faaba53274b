"""`SequenceKV`: the page tables and the slot of one request. Torch-free; owned by one engine thread.

Logical page p covers tokens [256 p, 256 p + 256). The full table maps every logical page (C4, indexer, C128 rows); the
window table maps only those that the sliding window may still read, with `None` where a page was reclaimed or never
needed. Growth is all or nothing, so that a `False` leaves the request runnable.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.allocator import KVAllocators
from kvstore.errors import IntegrityError
from kvstore.ids import PageId, SlotId
from kvstore.spec import PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class SequenceIndices:
    """Where one request's rows are, as a value that outlives changes to its `SequenceKV`.

    Attributes:
        full_pages: physical page by logical page.
        window_pages: physical window page by logical page, `None` where reclaimed; same length as `full_pages`.
        slot: request slot of the state rings.
        num_tokens: committed tokens n; decides which rows are alive.
    """

    full_pages: tuple[PageId, ...]
    window_pages: tuple[PageId | None, ...]
    slot: SlotId
    num_tokens: int


class SequenceKV:
    """Pages and slot of one request. Use as a context manager, or call `free` exactly once."""

    def __init__(self, allocators: KVAllocators, slot: SlotId, window_tokens: int) -> None:
        """Use `open`. `slot` is already taken from `allocators.slots` and belongs to this object now."""
        self._allocators = allocators
        self._window_tokens = window_tokens
        self._slot: SlotId | None = slot
        self._full: list[PageId] = []
        self._window: list[PageId | None] = []
        self._num_tokens = 0

    @classmethod
    def open(cls, allocators: KVAllocators, *, window_tokens: int) -> SequenceKV | None:
        """An empty sequence with a slot, or `None` when no slot is free."""
        slot = allocators.slots.allocate()
        return None if slot is None else cls(allocators, slot, window_tokens)

    @property
    def slot(self) -> SlotId:
        """The request slot; raises `IntegrityError` after `free`."""
        if self._slot is None:
            raise IntegrityError("sequence was used after free")
        return self._slot

    @property
    def is_free(self) -> bool:
        """Whether `free` has run."""
        return self._slot is None

    @property
    def num_tokens(self) -> int:
        """Tokens that have been given place (the largest n of `grow_to`)."""
        return self._num_tokens

    @property
    def num_full_pages(self) -> int:
        """Full pages held."""
        return len(self._full)

    @property
    def num_window_pages(self) -> int:
        """Window pages held now."""
        return sum(page is not None for page in self._window)

    @property
    def full_pages(self) -> tuple[PageId, ...]:
        """Physical full pages by logical page."""
        return tuple(self._full)

    @property
    def window_pages(self) -> tuple[PageId | None, ...]:
        """Physical window pages by logical page, `None` where reclaimed."""
        return tuple(self._window)

    def pages_to_grow(self, num_tokens: int, *, window_from: int = 0) -> tuple[int, int]:
        """(full pages, window pages) that `grow_to` with the same arguments would take."""
        have, need = len(self._full), -(-num_tokens // PAGE_TOKENS)
        first = max(have, window_from // PAGE_TOKENS)
        return max(0, need - have), max(0, need - first)

    def grow_to(self, num_tokens: int, *, window_from: int = 0) -> bool:
        """Give place to tokens up to `num_tokens`; `False` and no change when either space is too full.

        Args:
            window_from: first token whose window row will be written. A restore of n tokens passes max(0, n - window),
                and takes no window pages for what the window has already left.
        """
        slot = self.slot
        num_full, num_window = self.pages_to_grow(num_tokens, window_from=window_from)
        full = self._allocators.full.allocate(num_full)
        if full is None:
            return False
        window = self._allocators.window.allocate(num_window)
        if window is None:
            self._allocators.full.free(full)
            return False
        assert slot == self._slot
        self._full.extend(full)
        self._window.extend([None] * (num_full - num_window))
        self._window.extend(window)
        self._num_tokens = max(self._num_tokens, num_tokens)
        return True

    def reclaim_window(self, num_tokens: int) -> int:
        """Free window pages that no token from `num_tokens` on can read. Returns how many were freed."""
        first_live = max(0, num_tokens - self._window_tokens) // PAGE_TOKENS
        dead = [page for page in self._window[:first_live] if page is not None]
        self._allocators.window.free(dead)
        self._window[:first_live] = [None] * len(self._window[:first_live])
        return len(dead)

    def indices(self, num_tokens: int | None = None) -> SequenceIndices:
        """A snapshot of the tables for `num_tokens` committed tokens (default: all that have place).

        Raises:
            ValueError: more tokens than have place.
        """
        n = self._num_tokens if num_tokens is None else num_tokens
        if not 0 <= n <= len(self._full) * PAGE_TOKENS:
            raise ValueError(f"{n} tokens do not fit {len(self._full)} pages")
        return SequenceIndices(tuple(self._full), tuple(self._window), self.slot, n)

    def free(self) -> None:
        """Give everything back. Raises `IntegrityError` when called twice."""
        slot = self.slot
        self._allocators.full.free(self._full)
        self._allocators.window.free([page for page in self._window if page is not None])
        self._allocators.slots.free(slot)
        self._slot, self._full, self._window = None, [], []

    def __enter__(self) -> SequenceKV:
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.is_free:
            self.free()


def check_ownership(allocators: KVAllocators, sequences: Iterable[SequenceKV]) -> None:
    """Raise `IntegrityError` unless the live sequences hold exactly what the allocators have given out."""
    live = [s for s in sequences if not s.is_free]
    for sequence in live:
        if len(sequence.window_pages) != len(sequence.full_pages):
            raise IntegrityError(f"slot {sequence.slot}: window and full tables differ in length")
    allocators.check_integrity()
    allocators.full.check_integrity(page for s in live for page in s.full_pages)
    allocators.window.check_integrity(page for s in live for page in s.window_pages if page is not None)
    allocators.slots.check_integrity(s.slot for s in live)
