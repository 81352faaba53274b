"""Hit rates of small traces worked out by hand, Belady's bound over every policy, and the calibrated generator."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from workers.experts.generator import PUBLISHED_HITS, UNIFORM, V4_LIKE, RoutingModel, generate
from workers.experts.policy import HEAT, LFRU, LFU, LRU, POLICIES, STATIC, Usage, highest, per_layer_floor
from workers.experts.simulate import belady, best_static, simulate
from workers.experts.trace import BadTrace, RoutingTrace

SMALL = RoutingModel(popularity=1.0, topic=1.0, topic_tokens=20.0, phrase=1.0, phrase_tokens=3.0, stray=0.1)


def trace_of(steps: list[list[int]], num_experts: int = 8) -> RoutingTrace:
    """One layer, one sequence."""
    return RoutingTrace(np.array(steps, np.int16)[:, None, None, :], num_experts)


def exhaustive_optimum(trace: RoutingTrace, slots: int) -> int:
    """Most hits of any sequence of cache contents, by dynamic programming over all of them."""
    best = {frozenset(): 0}
    for pairs in trace.all_needed():
        following: dict[frozenset[int], int] = {}
        for inside, hits in best.items():
            now = hits + sum(int(p) in inside for p in pairs)
            union = inside | {int(p) for p in pairs}
            for size in range(min(slots, len(union)) + 1):
                for content in itertools.combinations(sorted(union), size):
                    key = frozenset(content)
                    following[key] = max(following.get(key, 0), now)
        best = following
    return max(best.values())


def test_lru_by_hand() -> None:
    trace = trace_of([[0], [1], [0], [2], [1], [0]])
    hits = simulate(trace, 2, LRU)
    # 0 cold, 1 cold, 0 hit, 2 cold (1 leaves), 1 misses (0 leaves), 0 misses
    assert (hits.hits, hits.cold, hits.capacity, hits.needed) == (1, 3, 2, 6)


def test_a_step_needs_each_pair_once_whatever_the_batch() -> None:
    experts = np.array([[[[0, 1], [1, 2]]]], np.int16)
    trace = RoutingTrace(experts, 4)
    assert trace.needed(0).tolist() == [0, 1, 2]
    assert trace.histogram().tolist() == [1, 2, 1, 0]


@pytest.mark.parametrize("seed", range(6))
def test_belady_is_the_optimum_of_all_contents(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trace = trace_of([list(rng.permutation(5)[:2]) for _ in range(7)], 5)
    for slots in (1, 2, 3):
        assert belady(trace, slots).hits == exhaustive_optimum(trace, slots)


@pytest.mark.parametrize("policy", [LRU, LFU, HEAT, LFRU, STATIC], ids=lambda p: p.name)
@pytest.mark.parametrize("slots", [3, 12, 40])
def test_no_policy_beats_belady(policy, slots: int) -> None:  # type: ignore[no-untyped-def]
    trace = generate(SMALL, steps=120, layers=3, experts=16, top_k=3, seed=slots)
    profile = generate(SMALL, steps=60, layers=3, experts=16, top_k=3, seed=slots).histogram().astype(float)
    best = belady(trace, slots)
    # Both start cold here, so that the bound holds from the first step.
    found = simulate(trace, slots, policy, resident=np.empty(0, np.int64), profile=profile)
    assert found.hits <= best.hits and found.needed == best.needed
    assert found.hits + found.cold + found.capacity == found.needed


def test_everything_resident_hits_everything() -> None:
    trace = generate(SMALL, steps=50, layers=3, experts=16, top_k=3, seed=1)
    assert simulate(trace, trace.num_pairs, LRU).warm_rate == 1.0
    assert best_static(trace, trace.num_pairs).rate == 1.0


def test_every_layer_keeps_its_floor() -> None:
    busy = np.zeros((60, 2, 1, 2), np.int16)
    rng = np.random.default_rng(0)
    for step in range(60):
        busy[step, 0, 0] = rng.permutation(16)[:2]
        busy[step, 1, 0] = (0, 1)
    trace = RoutingTrace(busy, 16)
    assert per_layer_floor(8, 2, 2) == 2
    assert simulate(trace, 8, LFU).hits >= 2 * 59  # layer 1's two experts stay, however busy layer 0 is


def test_moves_bound_what_comes_in() -> None:
    trace = generate(SMALL, steps=80, layers=3, experts=16, top_k=3, seed=2)
    assert simulate(trace, 20, HEAT, moves=1).moved <= 80
    assert simulate(trace, 20, HEAT, moves=0).hits == 0


def test_values_break_ties_towards_the_lower_pair() -> None:
    usage = Usage.empty(6)
    usage.note(np.array([1, 4, 5]), 256.0)
    for policy in POLICIES.values():
        assert highest(policy.value(usage), np.array([5, 4, 1]), 2).tolist() == [1, 4]


@pytest.mark.parametrize(("share", "published"), PUBLISHED_HITS.items())
def test_generated_routing_hits_like_published_measurements(share: float, published: float) -> None:
    trace = generate(V4_LIKE, steps=1200, layers=6, seed=11)
    assert abs(simulate(trace, round(share * trace.num_pairs), LRU).rate - published) <= 0.03


def test_uniform_routing_hits_as_often_as_its_share() -> None:
    trace = generate(UNIFORM, steps=400, layers=4, seed=2)
    found = simulate(trace, trace.num_pairs // 4, LRU, warmup=100).rate
    assert abs(found - 0.25) <= 0.03


def test_a_trace_survives_its_file_and_a_damaged_one_is_named(tmp_path) -> None:  # type: ignore[no-untyped-def]
    trace = generate(SMALL, steps=5, layers=2, experts=8, top_k=2, seed=3)
    path = tmp_path / "trace.npz"
    trace.save(path)
    again = RoutingTrace.load(path)
    assert np.array_equal(again.experts, trace.experts) and again.source == trace.source
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadTrace, match="trace.npz"):
        RoutingTrace.load(path)
    with pytest.raises(BadTrace, match="int16"):
        RoutingTrace(np.zeros((1, 1, 1, 1), np.int64), 4)  # type: ignore[arg-type]
