"""Slots and residency: legal lives, random operations with integrity after each, decisions by hand."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest

from kvstore.errors import IntegrityError
from workers.experts.generator import RoutingModel, generate
from workers.experts.layout import Tier, code_of
from workers.experts.policy import HEAT, LFRU, STATIC
from workers.experts.residency import Residency
from workers.experts.simulate import belady
from workers.experts.slots import SlotState, SlotTable

NOBODY = lambda pairs: np.zeros(len(pairs), bool)  # noqa: E731


def homes(num_pairs: int) -> np.ndarray:
    return np.array([code_of(Tier.HOST, pair) for pair in range(num_pairs)], np.int32)


def test_a_pair_is_read_from_its_slot_only_while_resident() -> None:
    table = SlotTable(homes(4), 1)
    slot = table.fill(2)
    assert slot == 0 and table.codes[2] == code_of(Tier.HOST, 2) and table.fill(3) is None
    assert table.arrived(2).code == table.codes[2] == code_of(Tier.SLAB, 0)
    left, change = table.leave(2)
    assert (left, change.code) == (0, code_of(Tier.HOST, 2)) and table.num_free == 0
    table.quiet(0)
    assert table.fill(3) == 0


def test_illegal_lives_are_refused() -> None:
    table = SlotTable(homes(4), 2)
    for call in (lambda: table.arrived(0), lambda: table.leave(0), lambda: table.quiet(0)):
        with pytest.raises(IntegrityError):
            call()
    table.fill(0)
    with pytest.raises(ValueError, match="already"):
        table.fill(0)
    with pytest.raises(ValueError, match="slab"):
        SlotTable(np.array([code_of(Tier.SLAB, 0)], np.int32), 1)


@pytest.mark.parametrize("seed", range(4))
def test_random_lives_keep_slots_and_codes_together(seed: int) -> None:
    rng = random.Random(seed)
    table, leaving = SlotTable(homes(9), 3), []
    for _ in range(2000):
        pair = rng.randrange(9)
        state = table.state_of(pair)
        action = rng.random()
        if state is None and action < 0.5:
            table.fill(pair)
        elif state is SlotState.FILLING and action < 0.5:
            table.arrived(pair)
        elif state is SlotState.FILLING and action < 0.6:
            table.failed(pair)
        elif state is SlotState.RESIDENT and action < 0.4:
            leaving.append(table.leave(pair)[0])
        elif leaving and action > 0.8:
            table.quiet(leaving.pop(rng.randrange(len(leaving))))
        elif action > 0.95:
            tier = rng.choice([Tier.HOST, Tier.PEER])
            table.rehome(np.array([code_of(tier, rng.randrange(9)) for _ in range(9)], np.int32))
        table.check_integrity()


def test_the_hottest_come_in_for_the_coldest() -> None:
    residency = Residency(1, 6, 1, HEAT)
    residency.note(np.array([5, 4, 0, 3, 9, 0]), 10)
    moves = residency.decide(np.array([1, 2, 5]), 0, 8, keep=NOBODY)
    assert moves.enter.tolist() == [4, 0] and sorted(moves.leave.tolist()) == [2, 5]
    one = residency.decide(np.array([1, 2, 5]), 0, 1, keep=NOBODY)
    assert one.enter.tolist() == [4] and len(one.leave) == 1
    kept = residency.decide(np.array([1, 2, 5]), 0, 8, keep=lambda pairs: pairs == 2)
    assert kept.enter.tolist() == [4] and kept.leave.tolist() == [5]


def test_moves_are_named_with_their_reason(caplog: pytest.LogCaptureFixture) -> None:
    residency = Residency(2, 3, 1, HEAT)
    residency.note(np.array([5, 4, 0, 3, 9, 0]), 10)
    with caplog.at_level("DEBUG"):
        residency.decide(np.array([1, 2]), 0, 1, keep=NOBODY)
    assert "experts: in 1/1=9.0; out 0/2=0.0" in caplog.text


def test_nobody_moves_when_the_best_are_inside_or_the_policy_is_static() -> None:
    uses = np.array([5, 4, 0, 3, 9, 0])
    for policy, held in ((HEAT, [0, 4]), (STATIC, [2, 5])):
        residency = Residency(1, 6, 1, policy)
        residency.note(uses, 10)
        assert not len(residency.decide(np.array(held), 0, 8, keep=NOBODY).enter)


def test_free_slots_fill_without_anyone_leaving() -> None:
    residency = Residency(1, 6, 1, HEAT)
    residency.note(np.array([0, 4, 0, 3, 0, 0]), 5)
    moves = residency.decide(np.array([0]), 2, 8, keep=NOBODY)
    assert moves.enter.tolist() == [1, 3] and not len(moves.leave)


def test_a_slab_without_profile_starts_with_an_equal_share_of_each_layer() -> None:
    residency = Residency(3, 8, 2, LFRU)
    assert residency.first_residents(6).tolist() == [0, 1, 8, 9, 16, 17]


def test_decisions_every_sixteen_steps_stay_near_the_optimum() -> None:
    """Table and residency together, fed as a device feeds them: counters of 16 steps, arrivals one interval late."""
    model = RoutingModel(
        popularity=1.154, topic=0.564, topic_tokens=172.0, phrase=0.469, phrase_tokens=8.68, stray=0.137
    )
    trace = generate(model, steps=1600, layers=4, experts=64, top_k=4, seed=5)
    slots = round(0.7 * trace.num_pairs)
    table, residency = SlotTable(homes(trace.num_pairs), slots), Residency(4, 64, 4, LFRU)
    for pair in residency.first_residents(slots):
        table.fill(int(pair))
        table.arrived(int(pair))
    needed, on_the_way, hits, total = trace.all_needed(), [], 0, 0
    for begin in range(0, trace.num_steps, 16):
        uses = np.zeros(trace.num_pairs, np.int64)
        resident = np.zeros(trace.num_pairs, bool)
        resident[table.residents()] = True
        for pairs in needed[begin : begin + 16]:
            uses[pairs] += 1
            if begin >= 800:
                hits, total = hits + int(resident[pairs].sum()), total + len(pairs)
        for pair in on_the_way:
            table.arrived(pair)
        residency.note(uses, 16)
        moves = residency.decide(table.held(), table.num_free, 16, keep=NOBODY)
        for pair in moves.leave:
            table.quiet(table.leave(int(pair))[0])
        on_the_way = [int(pair) for pair in moves.enter]
        assert all(table.fill(pair) is not None for pair in on_the_way)
        table.check_integrity()
    best = belady(trace, slots, warmup=800, needed=needed)
    assert hits / total >= 0.95 * best.rate


def test_one_stray_use_does_not_displace_whom_a_profile_knows() -> None:
    residency = Residency(1, 6, 1, HEAT, np.array([0.5, 0.4, 0.3, 0.01, 0.0, 0.0]))
    residency.note(np.array([1, 0, 0, 0, 1, 0]), 4)
    assert not len(residency.decide(np.array([0, 1, 2]), 0, 8, keep=NOBODY).enter)
    residency.note(np.array([0, 0, 0, 0, 90, 0]), 90)
    moves = residency.decide(np.array([0, 1, 2]), 0, 8, keep=NOBODY)
    assert moves.enter.tolist() == [4] and moves.leave.tolist() == [2]


def test_a_layers_best_few_come_before_hotter_experts_of_other_layers() -> None:
    residency = Residency(2, 4, 1, HEAT)
    residency.note(np.array([9, 8, 7, 6, 2, 1, 0, 0]), 10)
    moves = residency.decide(np.array([0, 1, 2, 3]), 0, 8, keep=NOBODY)
    assert moves.enter.tolist() == [4] and moves.leave.tolist() == [3]


def test_a_move_must_be_worth_more_than_a_use_or_two() -> None:
    residency = Residency(1, 4, 1, dataclasses.replace(HEAT, margin=3.0))
    residency.note(np.array([9, 4, 6, 8]), 9)
    assert not len(residency.decide(np.array([0, 1]), 0, 1, keep=lambda pairs: pairs == 1).enter)
    moves = residency.decide(np.array([0, 1]), 0, 8, keep=NOBODY)
    assert moves.enter.tolist() == [3] and moves.leave.tolist() == [1]


def test_another_kind_of_text_moves_more_than_usual() -> None:
    residency = Residency(1, 8, 1, dataclasses.replace(HEAT, urgent=8.0))
    residency.note(np.array([5, 5, 5, 5, 6, 6, 6, 6]), 6)
    calm = residency.decide(np.array([0, 1, 2, 3]), 0, 1, keep=NOBODY)
    assert len(calm.enter) == len(calm.leave) == 1
    residency.note(np.array([0, 0, 0, 0, 20, 20, 20, 0]), 20)
    moves = residency.decide(np.array([0, 1, 2, 3]), 0, 1, keep=NOBODY)
    assert moves.enter.tolist() == [4, 5, 6] and moves.leave.tolist() == [3, 2, 1]
    two = residency.decide(np.array([0, 1, 2, 3]), 0, 1, keep=NOBODY, urgent_moves=2)
    assert two.enter.tolist() == [4, 5] and two.leave.tolist() == [3, 2]
    free = residency.decide(np.array([0, 1]), 2, 1, keep=NOBODY)
    assert free.enter.tolist() == [4, 5, 6] and free.leave.tolist() == [1]


def test_of_residents_that_are_worth_the_same_some_leave() -> None:
    residency = Residency(1, 6, 1, HEAT)
    residency.note(np.array([1, 1, 1, 9, 9, 0]), 9)
    moves = residency.decide(np.array([0, 1, 2]), 0, 8, keep=NOBODY)
    assert moves.enter.tolist() == [3, 4] and sorted(moves.leave.tolist()) == [1, 2]
