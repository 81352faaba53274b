"""Page and slot allocators: who holds which physical unit. Torch-free, single owner, not thread-safe.

`None` means "not now": the caller queues, reclaims or retracts. Freeing a unit that is not held raises
`IntegrityError`, because two holders of one page would overwrite each other's KV without any visible fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvstore.errors import IntegrityError
from kvstore.ids import PageId, SlotId


class _Units:
    """Free list of the integers [0, size), handed out in first-freed order.

    First-freed order keeps a freed unit's bytes untouched for as long as possible, which makes a use after free show up
    late but a leak of stale state show up never: tests poison freed memory instead of relying on reuse order.
    """

    def __init__(self, size: int, what: str) -> None:
        if size < 0:
            raise ValueError(f"number of {what}s must not be negative: {size}")
        self.size, self._what = size, what
        self._free: deque[int] = deque(range(size))
        self._held: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        return len(self._held)

    def take(self, count: int) -> list[int] | None:
        if count < 0:
            raise ValueError(f"cannot take {count} {self._what}s")
        if count > len(self._free):
            return None
        units = [self._free.popleft() for _ in range(count)]
        self._held.update(units)
        return units

    def give_back(self, units: Iterable[int]) -> None:
        units = list(units)
        if len(set(units)) != len(units) or not self._held.issuperset(units):
            raise IntegrityError(f"{self._what}s {units} are not all held exactly once")
        self._held.difference_update(units)
        self._free.extend(units)

    def check(self) -> None:
        free = set(self._free)
        if len(free) != len(self._free):
            raise IntegrityError(f"a {self._what} is twice on the free list")
        if free & self._held or free | self._held != set(range(self.size)):
            raise IntegrityError(
                f"{self._what}s: {len(free)} free and {len(self._held)} held do not partition {self.size}"
            )

    def check_holders(self, claimed: Iterable[int]) -> None:
        claimed = list(claimed)
        if sorted(claimed) != sorted(self._held):
            raise IntegrityError(f"{self._what}s held {sorted(self._held)} but claimed by owners {sorted(claimed)}")


class PageAllocator:
    """Hands out the pages of one index space."""

    def __init__(self, num_pages: int) -> None:
        self._units = _Units(num_pages, "page")

    @property
    def num_pages(self) -> int:
        """All pages, free and held."""
        return self._units.size

    @property
    def num_free(self) -> int:
        """Pages that `allocate` can still give."""
        return self._units.num_free

    @property
    def num_held(self) -> int:
        """Pages that someone holds."""
        return self._units.num_held

    def allocate(self, count: int) -> list[PageId] | None:
        """All `count` pages, or `None` and no change."""
        units = self._units.take(count)
        return None if units is None else [PageId(u) for u in units]

    def free(self, pages: Iterable[PageId]) -> None:
        """Give pages back. Raises `IntegrityError` when one is not held or is named twice."""
        self._units.give_back(pages)

    def check_integrity(self, claimed: Iterable[PageId] | None = None) -> None:
        """Raise `IntegrityError` unless free and held partition the pool (and `claimed` is exactly what is held)."""
        self._units.check()
        if claimed is not None:
            self._units.check_holders(claimed)


class SlotAllocator:
    """Hands out request slots. The engine resets a slot's rings before its first use (`KVPools.reset_slot`)."""

    def __init__(self, num_slots: int) -> None:
        self._units = _Units(num_slots, "slot")

    @property
    def num_slots(self) -> int:
        """All slots, free and held."""
        return self._units.size

    @property
    def num_free(self) -> int:
        """Slots that `allocate` can still give."""
        return self._units.num_free

    @property
    def num_held(self) -> int:
        """Slots that someone holds."""
        return self._units.num_held

    def allocate(self) -> SlotId | None:
        """One slot, or `None` when all are held."""
        units = self._units.take(1)
        return None if units is None else SlotId(units[0])

    def free(self, slot: SlotId) -> None:
        """Give a slot back. Raises `IntegrityError` when it is not held."""
        self._units.give_back([slot])

    def check_integrity(self, claimed: Iterable[SlotId] | None = None) -> None:
        """Raise `IntegrityError` unless free and held partition the slots (and `claimed` is exactly what is held)."""
        self._units.check()
        if claimed is not None:
            self._units.check_holders(claimed)


@dataclass(frozen=True, slots=True)
class KVAllocators:
    """The three index spaces of one worker's store."""

    full: PageAllocator
    window: PageAllocator
    slots: SlotAllocator

    @classmethod
    def of_sizes(cls, *, full_pages: int, window_pages: int, slots: int) -> KVAllocators:
        """Allocators over pools of these sizes."""
        return cls(PageAllocator(full_pages), PageAllocator(window_pages), SlotAllocator(slots))

    @property
    def num_held(self) -> int:
        """Units of any space that someone holds: zero when idle, or pages have leaked."""
        return self.full.num_held + self.window.num_held + self.slots.num_held

    def check_integrity(self) -> None:
        """Check each space's own bookkeeping; see `sequence_kv.check_ownership` for the check against owners."""
        self.full.check_integrity()
        self.window.check_integrity()
        self.slots.check_integrity()
