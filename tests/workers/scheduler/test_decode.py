"""Continuous batching: admission, growth, shortage, random operations."""

from __future__ import annotations

import random

import pytest

from kvstore.allocator import KVAllocators
from kvstore.errors import IntegrityError
from tests.workers.scheduler.requests import make_sequence
from workers.errors import RequestTooLong, WorkerFull
from workers.messages import GenerateRequest
from workers.scheduler.admission import Need, pages_spanned
from workers.scheduler.decode import DecodeLimits, DecodeScheduler
from workers.scheduler.queue import MAX_OVERTAKES
from workers.sequence import SeqState, Sequence

LIMITS = DecodeLimits(max_waiting=64, max_context=8192, window_tokens=128)


def make_scheduler(*, full: int = 16, window: int = 8, slots: int = 4, **kwargs: object) -> DecodeScheduler:
    allocators = KVAllocators.of_sizes(full_pages=full, window_pages=window, slots=slots)
    return DecodeScheduler(allocators, LIMITS, **kwargs)  # type: ignore[arg-type]


def start(scheduler: DecodeScheduler, sequence: Sequence) -> None:
    """Submits a request that fits and brings it into the batch."""
    scheduler.submit(sequence)
    assert scheduler.admit() == [sequence]
    scheduler.place(sequence, sequence.num_prompt)
    sequence.to(SeqState.RESTORING)
    scheduler.join(sequence, sequence.num_prompt)
    sequence.output_ids.append(5)


def advance(sequence: Sequence) -> None:
    sequence.num_computed += 1
    sequence.output_ids.append(5)


def test_requests_join_and_leave_at_any_step() -> None:
    scheduler = make_scheduler()
    a, b = make_sequence("a", 10), make_sequence("b", 20)
    start(scheduler, a)
    plan = scheduler.plan()
    assert plan is not None and plan.sequences == (a,)
    start(scheduler, b)
    joined = scheduler.plan()
    assert joined is not None and set(joined.sequences) == {a, b} and joined.composition != plan.composition
    scheduler.drop(a)
    left = scheduler.plan()
    assert left is not None and left.sequences == (b,)
    scheduler.drop(b)
    assert scheduler.plan() is None
    assert scheduler.allocators.num_held == 0 and len(scheduler.ledger) == 0


def test_the_composition_only_changes_at_page_boundaries() -> None:
    scheduler = make_scheduler()
    a = make_sequence("a", 250, max_tokens=300)
    start(scheduler, a)
    seen = []
    for _ in range(12):
        plan = scheduler.plan()
        assert plan is not None
        seen.append(plan.composition)
        advance(a)
    assert len(set(seen[:6])) == 1 and len(set(seen[6:])) <= 2 and seen[5] != seen[7]


def test_a_running_request_holds_at_most_two_window_pages() -> None:
    scheduler = make_scheduler(full=16, window=2, slots=1)
    a = make_sequence("a", 100, max_tokens=1500)
    start(scheduler, a)
    for _ in range(1499):
        plan = scheduler.plan()
        assert plan is not None and not plan.victims
        advance(a)
    scheduler.check_integrity()


def test_with_full_reservation_nobody_runs_dry() -> None:
    scheduler = make_scheduler(full=6, window=8, slots=4)
    first, second, third = (make_sequence(n, 300, max_tokens=300) for n in "abc")
    start(scheduler, first)
    start(scheduler, second)
    scheduler.submit(third)
    assert scheduler.admit() == []
    for _ in range(299):
        plan = scheduler.plan()
        assert plan is not None and not plan.victims and len(plan.sequences) == 2
        for sequence in plan.sequences:
            advance(sequence)
    scheduler.drop(first)
    assert scheduler.admit() == [third]


def test_a_small_request_fills_in_behind_a_big_one_but_not_for_ever() -> None:
    scheduler = make_scheduler(full=8, window=64, slots=64)
    blocker = make_sequence("blocker", 256, max_tokens=1)
    start(scheduler, blocker)
    big = make_sequence("big", 2000, max_tokens=1, arrival_s=1.0)
    scheduler.submit(big)
    assert scheduler.admit() == []
    for number in range(MAX_OVERTAKES):
        small = make_sequence(f"s{number}", 10, arrival_s=2.0 + number)
        scheduler.submit(small)
        assert scheduler.admit() == [small]
        scheduler.drop(small)
    late = make_sequence("late", 10, arrival_s=1000.0)
    scheduler.submit(late)
    assert scheduler.admit() == []
    scheduler.drop(blocker)
    assert scheduler.admit() == [big]


def test_requests_that_can_never_fit_are_refused_and_others_go_on() -> None:
    scheduler = make_scheduler(full=2)
    with pytest.raises(RequestTooLong, match="KV pages"):
        scheduler.submit(make_sequence("a", 300, max_tokens=300))
    with pytest.raises(RequestTooLong, match="at most 8192"):
        scheduler.submit(make_sequence("a", 8000, max_tokens=300))
    start(scheduler, make_sequence("b", 10))


def test_a_full_queue_refuses_with_worker_full() -> None:
    scheduler = make_scheduler(slots=1)
    start(scheduler, make_sequence("a", 10))
    for number in range(LIMITS.max_waiting):
        scheduler.submit(make_sequence(f"w{number}", 10))
    with pytest.raises(WorkerFull):
        scheduler.submit(make_sequence("last", 10))


def test_shortage_reclaims_first_then_names_victims_and_the_rest_go_on() -> None:
    def prompt_only(request: GenerateRequest, window_tokens: int) -> Need:
        return Need(1, pages_spanned(window_tokens + 1))

    scheduler = make_scheduler(full=2, window=4, slots=2, need=prompt_only)
    old, new = make_sequence("old", 254, max_tokens=200), make_sequence("new", 254, max_tokens=200, arrival_s=1.0)
    start(scheduler, old)
    start(scheduler, new)
    for _ in range(2):
        plan = scheduler.plan()
        assert plan is not None and not plan.victims
        for sequence in plan.sequences:
            advance(sequence)
    plan = scheduler.plan()
    assert plan is not None and plan.victims == (new,) and plan.sequences == ()
    new.to(SeqState.DRAINING)
    scheduler.drop(new)
    plan = scheduler.plan()
    assert plan is not None and plan.sequences == (old,) and not plan.victims
    scheduler.check_integrity()


def test_a_double_promise_is_an_integrity_error() -> None:
    scheduler = make_scheduler()
    a = make_sequence("a", 10)
    scheduler.submit(a)
    scheduler.admit()
    with pytest.raises(IntegrityError):
        scheduler.ledger.promise(a.key, Need(1, 1))


def test_random_life_of_many_requests_leaks_nothing(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make_scheduler(full=12, window=10, slots=4)
    alive: list[Sequence] = []
    for number in range(4000):
        action = rng.random()
        if action < 0.1 and scheduler.num_waiting < 8:
            sequence = make_sequence(
                f"r{number}",
                rng.choice([1, 127, 128, 255, 256, 257, 700]),
                max_tokens=rng.randint(1, 600),
                arrival_s=float(number),
            )
            scheduler.submit(sequence)
            alive.append(sequence)
        elif action < 0.2:
            scheduler.admit()
        elif action < 0.3:
            granted = [s for s in alive if s.state is SeqState.WAITING_KV]
            if granted:
                sequence = rng.choice(granted)
                scheduler.place(sequence, sequence.num_prompt)
                sequence.to(SeqState.RESTORING)
                scheduler.join(sequence, sequence.num_prompt)
                sequence.output_ids.append(5)
        elif action < 0.34 and alive:
            victim = rng.choice(alive)
            alive.remove(victim)
            scheduler.drop(victim)
        else:
            plan = scheduler.plan()
            for sequence in plan.sequences if plan else ():
                advance(sequence)
                if len(sequence.output_ids) >= sequence.request.sampling.max_tokens:
                    alive.remove(sequence)
                    scheduler.drop(sequence)
        scheduler.check_integrity()
    for sequence in alive:
        scheduler.drop(sequence)
    assert scheduler.allocators.num_held == 0 and len(scheduler.ledger) == 0
