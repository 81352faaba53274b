"""Chunked prefill: budgets, fairness, pages."""

from __future__ import annotations

import random

import pytest

from kvstore.allocator import KVAllocators
from tests.workers.scheduler.requests import make_sequence
from workers.errors import RequestTooLong, WorkerFull
from workers.scheduler.policy import CHUNK_ALIGN, split_budget
from workers.scheduler.prefill import PrefillLimits, PrefillScheduler
from workers.sequence import SeqState

WINDOW = 128


def make_scheduler(
    *, full: int = 64, window: int = 16, slots: int = 4, chunk: int = 512, max_waiting: int = 8, max_context: int = 8192
) -> PrefillScheduler:
    allocators = KVAllocators.of_sizes(full_pages=full, window_pages=window, slots=slots)
    return PrefillScheduler(allocators, PrefillLimits(chunk, max_waiting, max_context, WINDOW))


def run_to_end(scheduler: PrefillScheduler) -> list[list[tuple[str, int, int]]]:
    """Runs plans until nothing computes; per step the (request, start, end) of its chunks."""
    steps = []
    while (plan := scheduler.plan()) is not None:
        assert plan.num_tokens <= scheduler.limits.chunk_tokens
        steps.append([(c.sequence.request.request_id, c.start, c.end) for c in plan.chunks])
        for chunk in plan.chunks:
            scheduler.commit(chunk)
            if chunk.is_last:
                chunk.sequence.to(SeqState.DRAINING)
                scheduler.drop(chunk.sequence)
        scheduler.check_integrity()
    return steps


def test_a_long_prompt_runs_in_aligned_chunks_that_cover_it_once() -> None:
    scheduler = make_scheduler(chunk=300)
    scheduler.submit(make_sequence("a", 1000))
    chunks = [chunk for step in run_to_end(scheduler) for chunk in step]
    assert [c[1] for c in chunks] == [0] + [c[2] for c in chunks[:-1]]
    assert chunks[-1][2] == 1000
    assert all(end % CHUNK_ALIGN == 0 for _, _, end in chunks[:-1])
    assert scheduler.allocators.num_held == 0 and len(scheduler.ledger) == 0


def test_a_budget_below_the_alignment_still_advances() -> None:
    scheduler = make_scheduler(chunk=7)
    scheduler.submit(make_sequence("a", 20))
    assert [c[2] for step in run_to_end(scheduler) for c in step] == [7, 14, 20]


def test_a_short_prompt_overtakes_a_long_one_without_stopping_it() -> None:
    scheduler = make_scheduler(chunk=512)
    scheduler.submit(make_sequence("long", 4096, arrival_s=0.0))
    scheduler.submit(make_sequence("short", 100, arrival_s=1.0))
    first = run_to_end(scheduler)[0]
    assert ("short", 0, 100) in first
    assert any(name == "long" and end >= 256 for name, _, end in first)


def test_the_oldest_prompt_advances_in_every_step_under_a_stream_of_short_ones() -> None:
    scheduler = make_scheduler(chunk=512, slots=32, window=96, full=256, max_waiting=64)
    scheduler.submit(make_sequence("long", 4096, arrival_s=0.0))
    number = 0
    while (plan := scheduler.plan()) is not None and "long" in {c.sequence.request.request_id for c in plan.chunks}:
        for chunk in plan.chunks:
            scheduler.commit(chunk)
            if chunk.is_last:
                chunk.sequence.to(SeqState.DRAINING)
                scheduler.drop(chunk.sequence)
        for _ in range(6):
            number += 1
            scheduler.submit(make_sequence(f"s{number}", 60, arrival_s=float(number)))
    assert number <= 6 * (4096 // 256)


def test_split_budget_never_exceeds_the_budget_and_never_stands_still(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2000):
        count = rng.randint(1, 6)
        remaining = [rng.randint(1, 1500) for _ in range(count)]
        starts = [rng.choice([0, 5, 128, 300]) for _ in range(count)]
        budget = rng.randint(1, 1024)
        grants = split_budget(remaining, starts, budget)
        assert 0 < sum(grants) <= budget
        assert all(0 <= g <= r for g, r in zip(grants, remaining, strict=True))


def test_window_pages_of_a_long_prompt_stay_bounded() -> None:
    scheduler = make_scheduler(chunk=256, window=4, full=64)
    scheduler.submit(make_sequence("a", 8000))
    assert run_to_end(scheduler)[-1] == [("a", 7936, 8000)]


def test_prompts_that_can_never_fit_are_refused() -> None:
    scheduler = make_scheduler(full=4, max_context=8192)
    with pytest.raises(RequestTooLong, match="KV pages"):
        scheduler.submit(make_sequence("a", 5 * 256))
    with pytest.raises(RequestTooLong, match="at most 8192"):
        scheduler.submit(make_sequence("b", 8193))


def test_a_full_queue_refuses_with_worker_full() -> None:
    scheduler = make_scheduler(max_waiting=1)
    scheduler.submit(make_sequence("a", 10))
    with pytest.raises(WorkerFull):
        scheduler.submit(make_sequence("b", 10))


def test_a_prompt_waits_while_pages_are_promised_and_starts_when_they_return() -> None:
    scheduler = make_scheduler(full=4, slots=4)
    first, second = make_sequence("a", 900), make_sequence("b", 900, arrival_s=1.0)
    scheduler.submit(first)
    scheduler.submit(second)
    plan = scheduler.plan()
    assert plan is not None and [c.sequence for c in plan.chunks] == [first]
    assert scheduler.num_waiting == 1
    scheduler.drop(first)
    plan = scheduler.plan()
    assert plan is not None and [c.sequence for c in plan.chunks] == [second]
    scheduler.drop(second)
    scheduler.check_integrity()
    assert scheduler.allocators.num_held == 0


def test_higher_priority_goes_first() -> None:
    scheduler = make_scheduler(slots=1)
    scheduler.submit(make_sequence("low", 10, priority=0, arrival_s=0.0))
    scheduler.submit(make_sequence("high", 10, priority=5, arrival_s=1.0))
    assert [step[0][0] for step in run_to_end(scheduler)] == ["high", "low"]
