"""The order of table changes, slot writes and steps, on lanes that run late and in any legal order."""

from __future__ import annotations

import random
from collections import deque

import numpy as np
import pytest
import torch
from torch import Tensor

from kvstore.errors import IntegrityError
from workers.experts.cache import ExpertCache
from workers.experts.generator import RoutingModel, generate
from workers.experts.layout import Tier, code_of
from workers.experts.policy import LFRU
from workers.experts.residency import Residency
from workers.experts.slots import SlotTable

LAYERS, EXPERTS, CHOSEN, BYTES = 3, 16, 3, 8
PAIRS = LAYERS * EXPERTS


class LateLanes:
    """Two queues of device work that advance only when the test lets them: each in order, the two in any order."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.steps: deque[tuple[str, object]] = deque()
        self.sides: deque[tuple[str, object]] = deque()

    def _mark(self, queue: deque[tuple[str, object]]):  # type: ignore[no-untyped-def]
        state = {"done": False}
        queue.append(("mark", state))
        lanes = self

        class Late:
            def passed(self) -> bool:
                lanes.run(lanes._rng.randrange(3))
                return state["done"]

        return Late()

    def step_mark(self):  # type: ignore[no-untyped-def]
        return self._mark(self.steps)

    def side_mark(self):  # type: ignore[no-untyped-def]
        return self._mark(self.sides)

    def step_copy(self, target: Tensor, source: Tensor) -> None:
        self.steps.append(("copy", (target, source)))

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        # Two halves, so that a step can meet a slot in the middle of its copy.
        half = target.shape[0] // 2
        self.sides.append(("copy", (target[:half], source[:half])))
        self.sides.append(("copy", (target[half:], source[half:])))

    def run(self, count: int) -> None:
        for _ in range(count):
            queue = self._rng.choice([self.steps, self.sides])
            if not queue:
                continue
            kind, what = queue.popleft()
            if kind == "copy":
                what[0].copy_(what[1])  # type: ignore[index]
            elif kind == "mark":
                what["done"] = True  # type: ignore[index]
            else:
                what()  # type: ignore[operator]


class Memory:
    """A bank in which expert p is the bytes p."""

    def __init__(self) -> None:
        self.lost: set[int] = set()

    def expert(self, pair: int) -> Tensor:
        if pair in self.lost:
            raise OSError(f"expert {pair} cannot be read")
        return torch.full((BYTES,), pair, dtype=torch.uint8)


class Rig:
    """A cache, and steps that read through its table as kernels do."""

    def __init__(self, num_slots: int, seed: int, **options: object) -> None:
        homes = np.array([code_of(Tier.HOST, pair) for pair in range(PAIRS)], np.int32)
        self.bank, self.lanes = Memory(), LateLanes(random.Random(seed))
        self.slab = torch.full((num_slots, BYTES), 255, dtype=torch.uint8)
        self.table, self.heat = torch.from_numpy(homes.copy()), torch.zeros(PAIRS, dtype=torch.int32)
        self.slots = SlotTable(homes, num_slots)
        residency = Residency(LAYERS, EXPERTS, CHOSEN, LFRU)
        self.cache = ExpertCache(
            self.slab, self.table, self.heat, self.bank, self.slots, residency, self.lanes, **options  # type: ignore[arg-type]
        )  # fmt: skip
        self.wrong: list[int] = []

    def step(self, pairs: np.ndarray) -> None:
        self.cache.before_step()

        def run() -> None:
            for pair in pairs.tolist():
                code = int(self.table[pair])
                index = code & 0xFFFFFF
                found = self.slab[index] if code >> 24 == Tier.SLAB else torch.full((BYTES,), index, dtype=torch.uint8)
                if not bool((found == pair).all()):
                    self.wrong.append(pair)
                self.heat[pair] += 1

        self.lanes.steps.append(("run", run))
        self.cache.check_integrity()
        self.lanes.run(self.lanes._rng.randrange(12))


def routing(seed: int, steps: int = 700) -> list[np.ndarray]:
    model = RoutingModel(popularity=1.0, topic=1.5, topic_tokens=60.0, phrase=0.5, phrase_tokens=4.0, stray=0.1)
    return generate(model, steps=steps, layers=LAYERS, experts=EXPERTS, top_k=CHOSEN, seed=seed).all_needed()


@pytest.mark.parametrize("num_slots", [1, CHOSEN, 9, 30, PAIRS])
@pytest.mark.parametrize("seed", range(3))
def test_no_step_ever_reads_a_wrong_expert(num_slots: int, seed: int) -> None:
    rig = Rig(num_slots, seed, interval=3, moves=4, verify=True)
    prompts = np.random.default_rng(seed)
    for pairs in routing(seed):
        if prompts.random() < 0.1:
            rig.cache.note_prompt(prompts.random(PAIRS) * (prompts.random(PAIRS) < 0.3))
        rig.step(pairs)
    rig.lanes.run(10_000)
    assert not rig.wrong
    assert rig.cache.counters.moved_in > 0


def test_residents_follow_a_change_of_topic() -> None:
    rig = Rig(12, 7, interval=4, moves=12)
    first, second = np.arange(0, 10), np.arange(20, 30)
    for pairs in [first] * 200 + [second] * 1500:
        rig.step(pairs)
    rig.lanes.run(10_000)
    assert set(second.tolist()) <= set(rig.slots.residents().tolist())
    counters = rig.cache.counters
    assert counters.hits + counters.cold_misses + counters.capacity_misses == counters.lookups
    assert counters.evicted > 0 and counters.cold_misses <= 20
    assert counters.moved_in >= counters.useful + counters.wasted and counters.useful >= 20
    assert rig.cache.residency.heat_share(np.isin(np.arange(PAIRS), second)) > 0.99


def test_experts_that_a_step_needs_of_a_layer_are_counted() -> None:
    rig = Rig(12, 5, interval=4)
    for _ in range(200):
        rig.step(np.array([0, 1, 2, 3, EXPERTS, EXPERTS + 1]))
        rig.lanes.run(100)
    found = rig.cache.counters.distinct.fields("decode")
    looks = found["decode/+Inf"] // LAYERS
    assert looks >= 40
    # Four of the first layer, two of the second, none of the third.
    assert (found["decode/2"], found["decode/4"], found["decode/+Inf"]) == (2 * looks, 3 * looks, 3 * looks)
    assert found["decode/sum"] == 6 * looks


def test_who_leaves_unused_was_brought_in_for_nothing() -> None:
    rig = Rig(2, 12, interval=2, moves=2)
    for topic in ([1, 2], [21, 22]):
        shares = np.zeros(PAIRS)
        shares[topic] = 1.0
        rig.cache.note_prompt(shares)
        for _ in range(40):
            rig.lanes.run(10_000)
            rig.step(np.array([21, 22]))
    counters = rig.cache.counters
    assert set(rig.slots.residents().tolist()) == {21, 22}
    assert counters.wasted == 2 and counters.useful == 2


def test_what_a_prompt_used_is_there_a_few_steps_later() -> None:
    rig = Rig(12, 11, interval=2, moves=1)
    for pairs in [np.arange(0, 10)] * 60:
        rig.step(pairs)
    rig.lanes.run(10_000)
    shares = np.zeros(PAIRS)
    shares[20:30] = 0.9
    rig.cache.note_prompt(shares)
    for _ in range(12):
        rig.lanes.run(10_000)
        rig.step(np.arange(20, 30))
    rig.lanes.run(10_000)
    assert set(range(20, 30)) <= set(rig.slots.residents().tolist()) and not rig.wrong


def test_a_lost_expert_is_counted_and_never_resident() -> None:
    rig = Rig(12, 8, interval=3, moves=6)
    rig.bank.lost = {4}
    for pairs in [np.arange(0, 8)] * 300:
        rig.step(pairs)
    rig.lanes.run(10_000)
    assert rig.cache.counters.io_errors > 0 and 4 not in rig.slots.residents() and not rig.wrong


def test_bytes_that_changed_on_the_way_stop_a_verifying_cache() -> None:
    rig = Rig(6, 9, interval=2, moves=2, verify=True)
    honest = rig.lanes.side_copy
    rig.lanes.side_copy = lambda target, source: honest(target, source ^ 1)  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match="does not hold"):
        for pairs in routing(1, 200):
            rig.step(pairs)


def test_filling_before_the_first_step_is_bounded_by_the_slots() -> None:
    rig = Rig(4, 10)
    rig.cache.fill([3, 5, 7])
    rig.lanes.run(100)
    assert rig.slots.residents().tolist() == [3, 5, 7] and int(rig.table[5]) >> 24 == Tier.SLAB
    with pytest.raises(ValueError, match="2 experts for 1"):
        rig.cache.fill([8, 9])
