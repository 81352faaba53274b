"""Page and slot allocators under directed and random operations."""

from __future__ import annotations

import random

import pytest

from kvstore.allocator import PageAllocator, SlotAllocator
from kvstore.errors import IntegrityError
from kvstore.ids import PageId, SlotId


def test_allocation_is_all_or_nothing() -> None:
    pages = PageAllocator(4)
    assert pages.allocate(3) is not None
    assert pages.allocate(2) is None
    assert pages.num_free == 1


def test_allocated_pages_are_distinct_until_freed() -> None:
    pages = PageAllocator(8)
    first, second = pages.allocate(5), pages.allocate(3)
    assert sorted((first or []) + (second or [])) == list(range(8))


def test_freeing_a_page_twice_is_an_integrity_error() -> None:
    pages = PageAllocator(2)
    held = pages.allocate(1)
    assert held is not None
    pages.free(held)
    with pytest.raises(IntegrityError):
        pages.free(held)


def test_freeing_the_same_page_twice_in_one_call_is_an_integrity_error() -> None:
    pages = PageAllocator(2)
    (page,) = pages.allocate(1) or []
    with pytest.raises(IntegrityError):
        pages.free([page, page])


def test_freeing_a_foreign_page_changes_nothing() -> None:
    pages = PageAllocator(3)
    held = pages.allocate(2) or []
    with pytest.raises(IntegrityError):
        pages.free([held[0], PageId(2)])
    assert pages.num_held == 2
    pages.check_integrity(held)


def test_claims_that_differ_from_what_is_held_are_found() -> None:
    pages = PageAllocator(3)
    held = pages.allocate(2) or []
    with pytest.raises(IntegrityError, match="claimed"):
        pages.check_integrity(held[:1])


def test_slots_run_out_and_come_back() -> None:
    slots = SlotAllocator(2)
    first, second = slots.allocate(), slots.allocate()
    assert slots.allocate() is None
    slots.free(SlotId(first or 0))
    assert slots.allocate() == first
    with pytest.raises(IntegrityError):
        slots.free(SlotId(7))
    assert second is not None


@pytest.mark.parametrize("seed", range(5))
def test_random_operations_keep_pages_and_slots_partitioned(seed: int) -> None:
    rng = random.Random(seed)
    pages, slots = PageAllocator(9), SlotAllocator(3)
    held_pages: list[PageId] = []
    held_slots: list[SlotId] = []
    for _ in range(2000):
        match rng.randrange(4):
            case 0:
                wanted = rng.randrange(5)
                got = pages.allocate(wanted)
                assert (got is None) == (wanted > 9 - len(held_pages))
                held_pages += got or []
            case 1:
                count = rng.randint(0, len(held_pages))
                rng.shuffle(held_pages)
                pages.free(held_pages[:count])
                held_pages = held_pages[count:]
            case 2:
                slot = slots.allocate()
                assert (slot is None) == (len(held_slots) == 3)
                held_slots += [] if slot is None else [slot]
            case _:
                if held_slots:
                    slots.free(held_slots.pop(rng.randrange(len(held_slots))))
        pages.check_integrity(held_pages)
        slots.check_integrity(held_slots)
