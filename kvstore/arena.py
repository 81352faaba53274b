"""`HostArena`: one fixed slab of host memory, cut into extents.

A fixed slab makes the budget a promise (nothing is ever allocated beyond it), keeps pages warm between requests (fresh
memory costs a page fault per 4 KiB, more than the copy into it) and can be pinned once. First fit over a sorted free
list; freed neighbours merge. Not thread-safe: its owner locks.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import torch

from kvstore.errors import IntegrityError
from kvstore.host_memory import pinned_slab

EXTENT_ALIGN_BYTES = 4096
"""Extents start and end at pages of host memory, so that direct I/O and pinned copies can use them."""


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [offset, offset + length) of the slab; `reserved` is the length rounded up to whole host pages."""

    offset: int
    length: int
    reserved: int


class HostArena:
    """Extents of a slab of `budget_bytes`."""

    def __init__(self, budget_bytes: int, *, pinned: bool = False) -> None:
        """Reserve the slab. Pages are touched at first use, or at once when pinned."""
        self.budget_bytes = budget_bytes
        self._slab = pinned_slab(budget_bytes) if pinned else torch.empty(budget_bytes, dtype=torch.uint8)
        self._free: list[tuple[int, int]] = [(0, budget_bytes)]  # (offset, length), sorted, never adjacent
        self._held: dict[int, Extent] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes in extents, rounding included."""
        return sum(extent.reserved for extent in self._held.values())

    @property
    def largest_free_bytes(self) -> int:
        """Length of the longest free range."""
        return max((length for _, length in self._free), default=0)

    @property
    def num_held(self) -> int:
        """Extents that someone holds."""
        return len(self._held)

    def allocate(self, length: int) -> Extent | None:
        """An extent of `length` bytes, or `None` when no free range is long enough."""
        reserved = max(1, -(-length // EXTENT_ALIGN_BYTES)) * EXTENT_ALIGN_BYTES
        for i, (offset, room) in enumerate(self._free):
            if room >= reserved:
                extent = Extent(offset, length, reserved)
                self._free[i : i + 1] = [(offset + reserved, room - reserved)] if room > reserved else []
                self._held[offset] = extent
                return extent
        return None

    def free(self, extent: Extent) -> None:
        """Give an extent back. Raises `IntegrityError` when it is not held."""
        if self._held.pop(extent.offset, None) != extent:
            raise IntegrityError(f"{extent} is not held")
        start, end = extent.offset, extent.offset + extent.reserved
        i = bisect.bisect(self._free, (start, 0))
        if i < len(self._free) and self._free[i][0] == end:
            end += self._free.pop(i)[1]
        if i > 0 and sum(self._free[i - 1]) == start:
            i -= 1
            start = self._free.pop(i)[0]
        self._free.insert(i, (start, end - start))

    def tensor(self, extent: Extent) -> torch.Tensor:
        """The extent's bytes: uint8 [length], a view of the slab, valid until `free`."""
        return self._slab[extent.offset : extent.offset + extent.length]

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless extents and free ranges tile the slab exactly once."""
        ranges = sorted([*self._free, *((e.offset, e.reserved) for e in self._held.values())])
        reached = 0
        for offset, length in ranges:
            if offset != reached or length <= 0:
                raise IntegrityError(f"slab is not tiled at byte {reached}: next range is {(offset, length)}")
            reached = offset + length
        if reached != self.budget_bytes:
            raise IntegrityError(f"slab of {self.budget_bytes} bytes is tiled only to {reached}")
