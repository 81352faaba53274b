"""Pure choices: victims, forecasts, forced offsets."""

from __future__ import annotations

import random

import pytest

from tests.workers.scheduler.requests import make_sequence
from workers.messages import MUTATIONS, RetractControl
from workers.retract.forced import ForcedRetracts, offset_of
from workers.retract.forecast import MIN_SAMPLES, OutputForecast
from workers.retract.victims import (
    Candidate,
    VictimLimits,
    choose_victims,
    growth,
    is_protected,
    score,
    shortfall,
    total,
)
from workers.scheduler.admission import Need, decode_need, pages_of

LIMITS = VictimLimits(horizon_steps=64, max_retracts=3, min_run_steps=16)
NONE = Need(0, 0, 0)


def candidate(name: str, num_tokens: int = 256, **values: object) -> Candidate:
    defaults: dict[str, object] = {
        "priority": 0,
        "age_s": 10.0,
        "held": Need(pages_of(num_tokens), 1, 1),
        "move_bytes": num_tokens * 4096,
        "remaining": 500,
    }
    return Candidate((name, 0), num_tokens=num_tokens, **{**defaults, **values})  # type: ignore[arg-type]


def names(chosen: list[Candidate]) -> list[str]:
    return [c.key[0] for c in chosen]


def test_nobody_leaves_while_the_next_step_has_pages() -> None:
    assert choose_victims([candidate("a"), candidate("b")], Need(2, 2, 0), LIMITS) == []


def test_one_request_always_stays() -> None:
    assert choose_victims([candidate("a")], NONE, LIMITS) == []
    assert len(choose_victims([candidate(n) for n in "abcd"], NONE, LIMITS)) < 4


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        ({"move_bytes": 1 << 20}, {"move_bytes": 1 << 30}),
        ({"num_retracts": 0}, {"num_retracts": 2}),
        ({"age_s": 1.0}, {"age_s": 55.0}),
        ({"remaining": 400}, {"remaining": 5}),
        ({"priority": 0}, {"priority": 1, "move_bytes": 1}),
        ({"move_bytes": 1 << 30}, {"move_bytes": 1, "steps_since_resume": 3}),
        ({"move_bytes": 1 << 30}, {"move_bytes": 1, "num_retracts": 3}),
    ],
)
def test_what_makes_a_victim(worse: dict[str, object], better: dict[str, object]) -> None:
    batch = [candidate("keep", **better), candidate("take", **worse)]
    assert names(choose_victims(batch, NONE, LIMITS)) == ["take"]
    assert names(choose_victims(batch[::-1], NONE, LIMITS)) == ["take"]


def test_protection_gives_way_when_all_are_protected() -> None:
    batch = [candidate(n, steps_since_resume=1, move_bytes=i) for i, n in enumerate("ab")]
    assert all(is_protected(c, LIMITS) for c in batch)
    assert names(choose_victims(batch, NONE, LIMITS)) == ["a"]


def test_a_shortage_frees_enough_for_the_horizon_and_no_more(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(300):
        batch = [
            candidate(f"c{i}", rng.randrange(1, 3000), remaining=rng.randrange(1, 300), priority=rng.randrange(2),
                      num_retracts=rng.randrange(5), age_s=rng.uniform(0, 100))
            for i in range(rng.randrange(2, 9))
        ]  # fmt: skip
        free = Need(rng.randrange(3), rng.randrange(4), 0)
        chosen = choose_victims(batch, free, LIMITS)
        rest = [c for c in batch if c not in chosen]
        now = shortfall(batch, free, 1)
        assert bool(chosen) == bool(now.full_pages or now.window_pages) or len(batch) == 1
        assert rest
        if chosen and len(rest) > 1:
            enough = total([free, *(c.held for c in chosen)])
            assert shortfall(rest, enough, LIMITS.horizon_steps) == NONE
        for spared in chosen if len(chosen) > 1 else ():
            fewer = [c for c in chosen if c is not spared]
            without = total([free, *(c.held for c in fewer)])
            assert shortfall([*rest, spared], without, LIMITS.horizon_steps) != NONE


def test_growth_counts_new_pages_of_the_next_steps() -> None:
    full = candidate("a", 256, held=Need(1, 1, 1))
    assert growth(full, 1) == Need(1, 1, 0) and growth(full, 256) == Need(1, 1, 0) and growth(full, 257).full_pages == 2
    assert growth(candidate("b", 255), 1) == NONE and growth(candidate("b", 255), 2) == Need(1, 1, 0)
    assert growth(candidate("c", 256, remaining=1, held=Need(2, 2, 1)), 64).full_pages == 0


def test_the_score_of_an_ordinary_request_is_small() -> None:
    assert 0 <= score(candidate("a"), LIMITS) < 1


def test_the_forecast_takes_max_tokens_at_its_word_until_it_knows_better() -> None:
    forecast = OutputForecast(0.8, 1.0)
    request = make_sequence("a", 100, max_tokens=4000).request
    assert forecast.need(request, 128) == decode_need(request, 128)
    for n in range(MIN_SAMPLES):
        forecast.observe(10 + n % 5)
    assert 10 <= forecast.expected(4000) <= 14
    assert forecast.need(request, 128).full_pages == 1
    assert forecast.expected(12) == 12


def test_a_shortage_makes_the_forecast_careful_and_quiet_brings_it_back() -> None:
    forecast = OutputForecast(0.5, 1.2)
    for _ in range(MIN_SAMPLES):
        forecast.observe(100)
    before = forecast.expected(10_000)
    forecast.on_shortage()
    assert forecast.expected(10_000) > before
    for _ in range(400):
        forecast.observe(100)
    assert forecast.expected(10_000) <= before + 1


def test_a_request_past_its_forecast_is_promised_more() -> None:
    forecast = OutputForecast(0.5, 1.0, initial=4)
    assert forecast.expected(1000) == 4
    assert [forecast.expected(1000, n) > n for n in (4, 50, 900)] == [True] * 3
    assert forecast.expected(1000, 999) == 1000


def test_offsets_repeat_with_the_seed_and_spread_over_the_interval() -> None:
    sequences = [make_sequence(f"r{i}", 3 + i) for i in range(200)]
    offsets = [offset_of(s, 1, 40) for s in sequences]
    assert offsets == [offset_of(s, 1, 40) for s in sequences] != [offset_of(s, 2, 40) for s in sequences]
    assert len(set(offsets)) > 30


def test_a_request_leaves_once_at_each_count_of_its_own_tokens() -> None:
    forced = ForcedRetracts(RetractControl(interval=4))
    sequence = make_sequence("a", 9, max_tokens=40)
    left = []
    for n in range(1, 41):
        sequence.output_ids.append(5)
        for _ in range(3):
            left += [n] * len(forced.due([sequence], lambda running: running[0]))
    assert len(left) == 10 and {b - a for a, b in zip(left, left[1:], strict=False)} == {4}


def test_named_requests_leave_alone() -> None:
    forced = ForcedRetracts(RetractControl(interval=1, victim="named", names=("b",)))
    batch = [make_sequence(n, 5) for n in ("a", "b1", "c")]
    assert [s.request.request_id for s in forced.due(batch, lambda r: r[0])] == ["b1"]


def test_mutation_names_follow_the_manifest() -> None:
    from kvstore.spec import PoolName

    assert {name.partition(":")[2] for name in MUTATIONS if ":" in name} == {pool.value for pool in PoolName}
