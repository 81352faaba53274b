"""Page tables of one request: growth, window reclaim, restore, and random use by several requests."""

from __future__ import annotations

import random

import pytest

from kvstore.allocator import KVAllocators
from kvstore.errors import IntegrityError
from kvstore.sequence_kv import SequenceKV, check_ownership
from tests.kvstore.layouts import opened


def _allocators(full: int = 8, window: int = 4, slots: int = 3) -> KVAllocators:
    return KVAllocators.of_sizes(full_pages=full, window_pages=window, slots=slots)


def test_growth_takes_a_page_in_both_spaces_every_256_tokens() -> None:
    allocators = _allocators()
    sequence = opened(allocators, 256)
    assert (sequence.num_full_pages, sequence.num_window_pages) == (1, 1)
    assert sequence.grow_to(257)
    assert (sequence.num_full_pages, sequence.num_window_pages) == (2, 2)


def test_growth_that_fails_in_the_window_space_gives_the_full_pages_back() -> None:
    allocators = _allocators(window=1)
    sequence = opened(allocators, 256)
    assert not sequence.grow_to(512)
    assert allocators.full.num_held == 1
    assert sequence.num_tokens == 256
    check_ownership(allocators, [sequence])


def test_pages_to_grow_predicts_what_growth_takes() -> None:
    allocators = _allocators()
    sequence = opened(allocators, 300)
    predicted = sequence.pages_to_grow(900)
    before = (allocators.full.num_held, allocators.window.num_held)
    assert sequence.grow_to(900)
    after = (allocators.full.num_held, allocators.window.num_held)
    assert predicted == (after[0] - before[0], after[1] - before[1]) == (2, 2)


@pytest.mark.parametrize(("n", "kept"), [(255, 2), (256, 2), (383, 2), (384, 1), (512, 1)])
def test_reclaim_keeps_every_page_the_window_still_reads(n: int, kept: int) -> None:
    allocators = _allocators()
    sequence = opened(allocators, 512)
    freed = sequence.reclaim_window(n)
    assert (freed, sequence.num_window_pages) == (2 - kept, kept)
    check_ownership(allocators, [sequence])


def test_reclaim_again_frees_nothing() -> None:
    sequence = opened(_allocators(), 700)
    assert sequence.reclaim_window(700) == 2
    assert sequence.reclaim_window(700) == 0
    assert sequence.window_pages[:2] == (None, None)


def test_long_prefill_runs_in_a_bounded_number_of_window_pages() -> None:
    allocators = _allocators(full=8, window=2)
    sequence = opened(allocators, 256)
    for end in range(512, 2049, 256):
        sequence.reclaim_window(end - 256)
        assert sequence.grow_to(end)
    assert sequence.num_full_pages == 8


def test_restore_takes_window_pages_only_for_the_live_window() -> None:
    allocators = _allocators()
    sequence = opened(allocators, 1000, window_from=1000 - 128)
    assert sequence.num_full_pages == 4
    assert [page is None for page in sequence.window_pages] == [True, True, True, False]


def test_indices_are_a_snapshot() -> None:
    allocators = _allocators()
    sequence = opened(allocators, 300)
    indices = sequence.indices(299)
    sequence.grow_to(600)
    assert len(indices.full_pages) == 2
    assert indices.num_tokens == 299
    with pytest.raises(ValueError, match="do not fit"):
        sequence.indices(10_000)


def test_no_slot_means_no_sequence() -> None:
    allocators = _allocators(slots=1)
    assert SequenceKV.open(allocators, window_tokens=128) is not None
    assert SequenceKV.open(allocators, window_tokens=128) is None


def test_free_returns_everything_once() -> None:
    allocators = _allocators()
    sequence = opened(allocators, 600)
    sequence.free()
    assert allocators.num_held == 0
    with pytest.raises(IntegrityError):
        sequence.free()
    with pytest.raises(IntegrityError):
        sequence.grow_to(700)


def test_leaving_the_context_frees() -> None:
    allocators = _allocators()
    with opened(allocators, 600):
        assert allocators.num_held > 0
    assert allocators.num_held == 0


def test_a_leaked_sequence_is_found_by_the_ownership_check() -> None:
    allocators = _allocators()
    first, second = opened(allocators, 100), opened(allocators, 100)
    check_ownership(allocators, [first, second])
    with pytest.raises(IntegrityError):
        check_ownership(allocators, [first])


@pytest.mark.parametrize("seed", range(5))
def test_random_requests_never_share_or_lose_a_page(seed: int) -> None:
    rng = random.Random(seed)
    allocators = _allocators(full=10, window=6, slots=3)
    live: list[SequenceKV] = []
    for _ in range(800):
        match rng.randrange(5):
            case 0:
                sequence = SequenceKV.open(allocators, window_tokens=128)
                assert (sequence is None) == (len(live) == 3)
                live += [] if sequence is None else [sequence]
            case 1 | 2 if live:
                sequence = rng.choice(live)
                target = sequence.num_tokens + rng.choice((1, 127, 128, 129, 255, 256, 700))
                window_from = rng.choice((0, max(0, target - 128)))
                full, window = sequence.pages_to_grow(target, window_from=window_from)
                room = full <= allocators.full.num_free and window <= allocators.window.num_free
                assert sequence.grow_to(target, window_from=window_from) == room
            case 3 if live:
                sequence = rng.choice(live)
                sequence.reclaim_window(rng.randint(0, sequence.num_tokens))
            case 4 if live:
                live.pop(rng.randrange(len(live))).free()
        check_ownership(allocators, live)
    for sequence in live:
        sequence.free()
    assert allocators.num_held == 0
