"""The host arena: budget, alignment, merging of freed neighbours, random use."""

from __future__ import annotations

import random

import pytest

from kvstore.arena import EXTENT_ALIGN_BYTES, Extent, HostArena
from kvstore.errors import IntegrityError

PAGE = EXTENT_ALIGN_BYTES


def test_extents_never_exceed_the_budget() -> None:
    arena = HostArena(4 * PAGE)
    assert arena.allocate(3 * PAGE) is not None
    assert arena.allocate(2 * PAGE) is None
    assert arena.allocate(PAGE) is not None
    assert arena.used_bytes == arena.budget_bytes


def test_a_byte_costs_a_page_and_is_counted() -> None:
    arena = HostArena(2 * PAGE)
    extent = arena.allocate(1)
    assert extent is not None and extent.length == 1
    assert arena.used_bytes == PAGE
    assert arena.tensor(extent).shape == (1,)


def test_freed_neighbours_merge_into_room_for_a_larger_extent() -> None:
    arena = HostArena(3 * PAGE)
    extents = [arena.allocate(PAGE) for _ in range(3)]
    for i in (0, 2, 1):
        held = extents[i]
        assert held is not None
        arena.free(held)
        arena.check_integrity()
    assert arena.allocate(3 * PAGE) is not None


def test_freeing_what_is_not_held_is_an_integrity_error() -> None:
    arena = HostArena(2 * PAGE)
    extent = arena.allocate(PAGE)
    assert extent is not None
    arena.free(extent)
    for wrong in (extent, Extent(PAGE, 1, PAGE)):
        with pytest.raises(IntegrityError):
            arena.free(wrong)


@pytest.mark.parametrize("seed", range(5))
def test_random_extents_always_tile_the_slab(seed: int) -> None:
    rng = random.Random(seed)
    arena = HostArena(32 * PAGE)
    held: dict[Extent, int] = {}
    for step in range(1500):
        if rng.random() < 0.55:
            extent = arena.allocate(rng.randint(0, 6 * PAGE))
            if extent is not None:
                arena.tensor(extent).fill_(step % 251)
                held[extent] = step % 251
        elif held:
            extent = rng.choice(list(held))
            assert bool((arena.tensor(extent) == held.pop(extent)).all())
            arena.free(extent)
        arena.check_integrity()
        assert arena.num_held == len(held)
