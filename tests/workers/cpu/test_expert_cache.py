"""A CPU worker with few experts in memory computes the same bits as one with all, in its budget, or says why not."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.errors import IntegrityError
from tests.support.paged import PagedRun
from tests.support.tiny import random_tokens
from workers.checkpoint.save import save_official
from workers.cpu.expert_cache import CpuExperts
from workers.cpu.model import CpuModel
from workers.errors import BadConfig
from workers.experts.config import ExpertConfig
from workers.experts.prompt_uses import encode_uses
from workers.experts.supply import ExpertUnavailable
from workers.experts.trace import RoutingTrace
from workers.model.config import ModelConfig
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.weights import random_named_weights
from workers.model_bundle import ModelBundle

SMALL = dataclasses.replace(
    NANO, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), vocab_size=128, num_hash_layers=1, n_routed_experts=8
)
ODD = dataclasses.replace(SMALL, hidden_size=160, moe_intermediate_size=32)
"""Panels that are not whole: no e2m1 form in memory."""
FP8 = dataclasses.replace(SMALL, expert_dtype="fp8")

FORMS = {"fp4": SMALL, "odd": ODD, "fp8": FP8}
NATIVE = Precision.native()


@pytest.fixture(scope="module", params=FORMS, ids=FORMS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelConfig, Path]:
    config = FORMS[request.param]
    return config, write(config, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(SMALL, tmp_path_factory.mktemp("model"))


def write(config: ModelConfig, folder: Path) -> Path:
    save_official(folder / "m", config, random_named_weights(config, seed=4))
    return folder / "m"


def tokens(config: ModelConfig, count: int) -> list[int]:
    return random_tokens(config, count, 5)[0].tolist()


def running(bundle: ModelBundle, *, threads: int = 1, prompts: int = 1) -> PagedRun:
    def make(*args: object) -> CpuModel:
        return CpuModel(*args, num_threads=threads, supply=bundle.supply)

    prompt = tokens(bundle.config, 200)
    return PagedRun(make, bundle.config, bundle.weights, NATIVE, [prompt[n:] for n in range(prompts)])


def limited(folder: Path, **values: object) -> ModelBundle:
    return ModelBundle.load_limited(folder, ExpertConfig(**values), num_readers=2)


def logits(run: PagedRun) -> torch.Tensor:
    return run.chunks(0, [150, *[1] * 30])


@pytest.mark.parametrize("threads", [1, 2])
def test_logits_are_the_same_bits_at_every_budget(saved: tuple[ModelConfig, Path], threads: int) -> None:
    config, folder = saved
    expected = logits(running(ModelBundle.load(folder), threads=threads))
    for slots in (config.num_experts_per_tok, 7, 24):
        run = running(limited(folder, slots=slots, verify=True), threads=threads)
        assert torch.equal(logits(run), expected)
        run.model.experts.check_integrity()


@pytest.mark.parametrize("policy", ["lru", "lfu", "heat", "lfru"])
def test_every_policy_computes_the_same_and_keeps_its_slots(small: Path, policy: str) -> None:
    expected = logits(running(ModelBundle.load(small)))
    run = running(limited(small, slots=6, policy=policy, preload="prefix"))
    assert torch.equal(logits(run), expected)
    assert len(run.model.experts.slots.residents()) == 6


def test_a_limited_bundle_has_the_identity_of_the_whole(saved: tuple[ModelConfig, Path]) -> None:
    _, folder = saved
    assert limited(folder, slots=3).model_hash == ModelBundle.load(folder).model_hash


def experts_of(bundle: ModelBundle, threads: int = 1, **values: int) -> CpuExperts:
    assert bundle.supply is not None
    return CpuExperts(bundle.config, bundle.supply, num_threads=threads, **values)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_budget_in_bytes_is_never_exceeded(small: Path, threads: int) -> None:
    slot_bytes = experts_of(limited(small, slots=3)).panels.slot_bytes
    for budget in (slot_bytes * (3 + threads), slot_bytes * 9 + 17):
        experts = experts_of(limited(small, hbm_bytes=budget), threads)
        assert experts.nbytes <= experts.plan.total_bytes <= budget
        assert experts.plan.num_slots == budget // slot_bytes - threads


def test_the_smallest_budget_is_named(small: Path) -> None:
    slot_bytes = experts_of(limited(small, slots=3)).panels.slot_bytes
    with pytest.raises(BadConfig, match=rf"experts.hbm.*at least {4 * slot_bytes} bytes"):
        experts_of(limited(small, hbm_bytes=4 * slot_bytes - 1))
    with pytest.raises(BadConfig, match="experts.slots.*at least 3 slots"):
        experts_of(limited(small, slots=2))
    assert experts_of(limited(small, hbm_bytes=4 * slot_bytes)).plan.num_slots == 3


def test_few_slots_are_said_to_hardly_pay(small: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = experts_of(limited(small, slots=20))
    assert "caching no longer pays" in caplog.text and "20 slots are 6.7 a layer" in few.note
    caplog.clear()
    assert experts_of(limited(small, slots=24)).note == "" and "pays" not in caplog.text


def test_counters_follow_the_definition(small: Path) -> None:
    run = running(limited(small, slots=24))
    logits(run)
    found = run.model.experts.stats_fields()
    misses = found["expert_misses"]
    assert found["expert_lookups"] == found["expert_hits"] + sum(misses.values())
    assert misses["capacity"] and misses["prefill"]
    assert misses["cold"] <= 24 and found["expert_loads"] >= sum(misses.values())
    assert sum(found["expert_layer_lookups"].values()) == found["expert_lookups"]
    assert sum(found["expert_layer_resident"].values()) == found["expert_slots"]["used"]
    assert found["expert_bytes"]["disk"] == (found["expert_loads"] + found["expert_moves"]) * 52224


def test_phases_and_single_loads_are_told_apart(small: Path) -> None:
    run = running(limited(small, slots=24))
    logits(run)
    found = run.model.experts.stats_fields()
    lookups, hits, distinct = (found[f"expert_{name}"] for name in ("phase_lookups", "phase_hits", "distinct"))
    assert lookups["decode"] == 30 * 3 * 3 and sum(lookups.values()) == found["expert_lookups"]
    assert sum(hits.values()) == found["expert_hits"]
    assert lookups["prefill"] - hits["prefill"] == found["expert_misses"]["prefill"]
    # A token of this model chooses three experts in each of three layers; 150 tokens choose all eight.
    assert (distinct["decode/2"], distinct["decode/4"], distinct["decode/+Inf"]) == (0, 90, 90)
    assert (distinct["prefill/6"], distinct["prefill/8"], distinct["prefill/+Inf"]) == (0, 3, 3)
    assert {phase: distinct[f"{phase}/sum"] for phase in lookups} == lookups
    loads = found["expert_load_s"]
    assert (loads["disk/+Inf"], loads["host/+Inf"]) == (found["expert_loads"], 0)
    assert loads["disk/sum"] == pytest.approx(found["expert_stall_s_total"])


def test_prefill_takes_free_slots_and_no_others(small: Path) -> None:
    run = running(limited(small, slots=9), prompts=2)
    experts = run.model.experts
    run.chunks(0, [10] * 8)
    assert len(experts.slots.residents()) == 9 and not experts.counters.evicted
    assert experts.counters.prefill and not experts.counters.cold + experts.counters.capacity
    run.chunks(0, [1] * 30)
    assert experts.counters.evicted and experts.counters.capacity
    residents, heat = experts.slots.residents().tolist(), experts.residency.usage.heat.copy()
    run.chunks(1, [20] * 8)
    assert experts.slots.residents().tolist() == residents
    assert np.array_equal(experts.residency.usage.heat, heat)


def test_decode_starts_with_what_prefill_used(small: Path) -> None:
    prefill, decode = (running(limited(small, slots=9, preload="prefix")) for _ in range(2))
    prefill.chunks(0, [150])
    uses = prefill.model.experts.prompt_uses()
    assert len(uses) == 24 and prefill.model.experts.prompt_uses() == b""
    experts, wanted = decode.model.experts, [4, 5, 12, 13, 20, 21]
    experts.note_prompt(bytes(23))
    assert experts.slots.residents().tolist() == [0, 1, 2, 8, 9, 10, 16, 17, 18]
    counts = np.ones(24, np.int64)
    counts[wanted] = 100
    experts.note_prompt(encode_uses(counts))
    assert set(wanted) <= set(experts.slots.residents().tolist())
    experts.check_integrity()


def test_routes_are_recorded_as_chosen(small: Path) -> None:
    """What the kernels write equals what the experts' use says."""
    run = running(ModelBundle.load(small))
    routes = np.full((160, 3, 3), 99, np.uint16)
    run.model.record_routes(routes)
    run.chunks(0, [150])
    trace = RoutingTrace(routes[:150, :, None, :].astype(np.int16), 8)
    assert (routes[150:] == 99).all() and routes[:150].max() < 8
    assert (np.sort(routes[:150], axis=-1)[..., 1:] != np.sort(routes[:150], axis=-1)[..., :-1]).all()
    assert np.array_equal(trace.histogram() > 0, run.model._uses.sum(axis=0) > 0)
    with pytest.raises(ValueError, match="room"):
        run.model.record_routes(routes[:10])
        run.chunks(0, [20])


def test_a_profile_decides_who_is_there_first(small: Path, tmp_path: Path) -> None:
    hot = np.zeros((4, 3, 1, 3), np.int16)
    hot[:] = (1, 4, 6)
    RoutingTrace(hot, 8).save(tmp_path / "hot.npz")
    experts = experts_of(limited(small, slots=9, preload=str(tmp_path / "hot.npz"), policy="static"))
    assert experts.slots.residents().tolist() == [layer * 8 + e for layer in range(3) for e in (1, 4, 6)]
    with pytest.raises(BadConfig, match="experts.preload"):
        experts_of(limited(small, slots=9, preload=str(tmp_path / "none.npz")))
    RoutingTrace(hot, 12).save(tmp_path / "other.npz")
    with pytest.raises(BadConfig, match="12 experts"):
        experts_of(limited(small, slots=9, preload=str(tmp_path / "other.npz")))


def failing(bundle: ModelBundle, broken: Callable[[int], bool]) -> ModelBundle:
    """Reads of these pairs fail."""
    assert bundle.supply is not None
    read = bundle.supply.disk.read

    def sometimes(pair: int, out: np.ndarray, *, stream: bool = False) -> None:
        if broken(pair):
            raise OSError(5, "Input/output error")
        read(pair, out, stream=stream)

    bundle.supply.disk.read = sometimes  # type: ignore[method-assign]
    return bundle


def test_a_lost_expert_fails_the_step_and_the_next_one_is_right(small: Path) -> None:
    expected = logits(running(ModelBundle.load(small)))
    lost = {True}
    run = running(failing(limited(small, slots=3), lambda pair: True in lost and pair % 8 == 2))
    with pytest.raises(ExpertUnavailable, match="Input/output error"):
        run.chunks(0, [150])
    lost.clear()
    run.pools.reset_slot(run.tables[0].slot)
    assert torch.equal(logits(run), expected)
    assert run.model.experts.stats_fields()["expert_io_errors"] >= 3


def test_a_passing_read_error_is_tried_again_and_counted(small: Path) -> None:
    expected = logits(running(ModelBundle.load(small)))
    draw = random.Random(1)
    run = running(failing(limited(small, slots=5), lambda pair: draw.random() < 0.02))
    assert torch.equal(logits(run), expected)
    assert run.model.experts.stats_fields()["expert_io_errors"] > 0


def test_moves_at_every_step_of_the_smallest_cache_never_lose_an_expert(small: Path) -> None:
    """Eviction races nothing: residency after each step is consistent, whatever the policy wants."""
    run = running(limited(small, slots=3, verify=True, policy="lru"), prompts=3)
    run.model.experts._interval = 1
    expected = running(ModelBundle.load(small), prompts=3)
    for counts in [{0: 60, 1: 1}, {0: 1, 1: 30, 2: 2}, *[{0: 1, 1: 1, 2: 1}] * 30]:
        assert torch.equal(run.step(counts), expected.step(counts))
        run.model.experts.check_integrity()
    assert run.model.experts.counters.evicted > 10


def test_a_wrong_slot_is_noticed(small: Path) -> None:
    experts = experts_of(limited(small, slots=6, preload="prefix"))
    experts.check_integrity()
    experts.homes[int(experts.slots.residents()[0])] += 64
    with pytest.raises(IntegrityError):
        experts.check_integrity()


def test_the_bank_takes_reads_from_the_disk(small: Path) -> None:
    run = running(limited(small, slots=3, host_bytes=2**21))
    logits(run)
    found = run.model.experts.stats_fields()
    assert found["expert_bytes"]["host"] > 0 and found["expert_host_bytes"]["bank"] == 24 * 53248
    assert found["expert_bytes"]["disk"] == 24 * 52224
    assert (found["expert_load_s"]["host/+Inf"], found["expert_load_s"]["disk/+Inf"]) == (found["expert_loads"], 0)
