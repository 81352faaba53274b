"""A GPU worker's model with few experts in device memory: same bits as with all, within its budget, or a reason why."""

from __future__ import annotations

import dataclasses
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kvstore.errors import IntegrityError
from kvstore.pools.aggregate import KVPools, PoolSizes
from tests.support.paged import Tables
from tests.support.tiny import random_tokens
from tests.support.triton_interpreter import allow_loaded_bounds
from tests.workers.gpu.models import NATIVE, TINY
from tests.workers.gpu.stand_ins import stand_ins
from workers.batch import ForwardBatch
from workers.checkpoint.save import save_official
from workers.errors import BadConfig, WorkerStopping
from workers.experts.config import ExpertConfig
from workers.experts.supply import ExpertUnavailable
from workers.gpu import expert_source, serving_experts
from workers.gpu.model import GpuModel
from workers.gpu.serving_experts import ExpertDuties, GpuExperts
from workers.model.kv_layout import kv_spec
from workers.model.weights import random_named_weights
from workers.model_bundle import ModelBundle

allow_loaded_bounds()

CONFIG = dataclasses.replace(TINY, num_hidden_layers=3, compress_ratios=(0, 4, 0), num_hash_layers=1)
PAIRS = CONFIG.num_hidden_layers * CONFIG.n_routed_experts
BYTES = 3 * (128 * 128 // 2 + 128 * 128 // 32)
BOTH = ExpertDuties(max_running=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    save_official(path, CONFIG, random_named_weights(CONFIG, seed=4, mtp=False))
    return path


def limited(folder: Path, **values: object) -> ModelBundle:
    return ModelBundle.load_limited_for(folder, "cpu", NATIVE, ExpertConfig(**values), num_readers=2)  # type: ignore[arg-type]


def experts_of(bundle: ModelBundle, duties: ExpertDuties = BOTH) -> GpuExperts:
    assert bundle.supply is not None
    experts = GpuExperts(bundle.config, bundle.supply, duties, torch.device("cpu"), num_readers=2)
    experts.open()
    return experts


class Run:
    """A model over small pools: a prompt each for two sequences, then greedy steps of both."""

    def __init__(self, bundle: ModelBundle, experts: GpuExperts) -> None:
        pools = KVPools(kv_spec(CONFIG, "fp8"), PoolSizes(4, 4, 2))
        weights, options = experts.attach(bundle.weights), experts.model_options()  # type: ignore[arg-type]
        kernels = (stand_ins, stand_ins)
        self.model = GpuModel(CONFIG, weights, pools, max_context=256, kernels=kernels, **options)
        self.tables = [Tables((index,), (index,), index, 0) for index in range(2)]
        for table in self.tables:
            pools.reset_slot(table.slot)

    def logits(self, steps: int) -> torch.Tensor:
        prompts = [random_tokens(CONFIG, 21 + 2 * b, seed=b)[0].tolist() for b in range(2)]
        found = [self.model.forward(ForwardBatch.build([(t, 0, p)])) for t, p in zip(self.tables, prompts, strict=True)]
        self.model.start(ForwardBatch.build([(t, len(p), [5]) for t, p in zip(self.tables, prompts, strict=True)]))
        for _ in range(steps):
            found.append(self.model.logits().clone())
            self.model.start_next(None)
        return torch.cat(found)


@pytest.fixture(scope="module")
def expected(folder: Path) -> torch.Tensor:
    bundle = limited(folder, slots=PAIRS)
    return Run(bundle, experts_of(bundle)).logits(10)


@pytest.mark.parametrize(
    "values",
    [
        {"slots": 2},
        {"slots": 9, "preload": "prefix", "verify": True},
        {"slots": 5, "policy": "lru"},
        {"hbm_bytes": 12 * BYTES},
        {"slots": 11, "host_bytes": 9 * BYTES},
    ],
    ids=["smallest", "verified", "lru", "bytes", "short-bank"],
)
def test_logits_are_the_same_bits_at_every_budget(
    folder: Path, expected: torch.Tensor, values: dict[str, object]
) -> None:
    bundle = limited(folder, **values)
    experts = experts_of(bundle)
    found = Run(bundle, experts).logits(10)
    assert bool(found.isfinite().all()) and torch.equal(found, expected)
    experts.check_integrity()
    experts.close()


def test_kernels_are_compiled_while_the_bank_is_filled(folder: Path, expected: torch.Tensor) -> None:
    bundle = limited(folder, slots=5)
    assert bundle.supply is not None
    experts = GpuExperts(CONFIG, bundle.supply, BOTH, torch.device("cpu"), num_readers=2)
    honest, may_read = bundle.supply.disk.read, threading.Event()

    def read(pair: int, out: np.ndarray, *, stream: bool = False) -> None:
        assert may_read.wait(60)
        honest(pair, out, stream=stream)

    bundle.supply.disk.read = read  # type: ignore[method-assign]
    run = Run(bundle, experts)
    experts.begin()
    run.model.compile(decode=True, prefill=True)
    may_read.set()
    experts.finish()
    assert torch.equal(run.logits(10), expected)


def test_a_start_that_fails_stops_filling_the_bank(folder: Path) -> None:
    """As when a kernel does not compile: most of the bank is still to be read then."""
    bundle = limited(folder, slots=5)
    assert bundle.supply is not None
    experts = GpuExperts(CONFIG, bundle.supply, BOTH, torch.device("cpu"), num_readers=2)
    honest, read_pairs, may_read = bundle.supply.disk.read, [], threading.Event()

    def read(pair: int, out: np.ndarray, *, stream: bool = False) -> None:
        read_pairs.append(pair)
        assert may_read.wait(60)
        time.sleep(0.1)  # who waits for the first read hears of it before the next ones end
        honest(pair, out, stream=stream)

    bundle.supply.disk.read = read  # type: ignore[method-assign]
    experts.begin()
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(experts.close)
        while not experts._closing.is_set():
            time.sleep(0.001)
        may_read.set()
        closing.result(60)
    assert len(read_pairs) <= 4 < PAIRS
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read-experts", "expert-bank"))]
    with pytest.raises(WorkerStopping):
        experts.finish()


def test_readers_rest_once_all_slots_are_filled(folder: Path) -> None:
    names = []
    bundle = limited(folder, slots=10, host_bytes=11 * BYTES)
    assert bundle.supply is not None
    honest = bundle.supply.disk.read

    def read(pair: int, out: np.ndarray, *, stream: bool = False) -> None:
        names.append(threading.current_thread().name)
        honest(pair, out, stream=stream)

    bundle.supply.disk.read = read  # type: ignore[method-assign]
    experts = experts_of(bundle)
    assert len(names) == PAIRS and len(set(names)) <= 2, "the same threads for the bank and for all slots"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-experts")]
    experts.close()


def test_residents_change_while_steps_run(folder: Path) -> None:
    bundle = limited(folder, slots=6, preload="prefix")
    experts = experts_of(bundle)
    before = experts.cache.slots.residents().tolist()
    Run(bundle, experts).logits(28)
    counters = experts.cache.counters
    assert experts.cache.slots.residents().tolist() != before
    assert counters.moved_in and counters.evicted
    # Two tokens a step and the prompts choose two experts a layer; the last few steps are not counted yet.
    assert 0 < counters.lookups == counters.hits + counters.cold_misses + counters.capacity_misses
    assert "expert_phase_lookups" not in experts.stats_fields(), "its prompts are counted, too"


def test_a_worker_that_only_decodes_tells_its_phase(folder: Path) -> None:
    experts = experts_of(limited(folder, slots=6), ExpertDuties(prefills=False, max_running=2))
    for _ in range(9):
        experts.before_decode()
        experts._heat[:2] += 1
    found = experts.stats_fields()
    assert found["expert_phase_lookups"] == {"decode": found["expert_lookups"]} == {"decode": 8}
    assert found["expert_phase_hits"] == {"decode": found["expert_hits"]}
    assert (found["expert_distinct"]["decode/2"], found["expert_distinct"]["decode/sum"]) == (3, 2)  # type: ignore[index]
    experts.close()


def test_who_has_no_place_in_the_bank_never_leaves(folder: Path) -> None:
    bundle = limited(folder, slots=10, host_bytes=11 * BYTES + 1)
    experts = experts_of(bundle)
    bank = experts.cache.slots
    pinned = [pair for pair in range(PAIRS) if not bank.has_home(np.array([pair]))[0]]
    assert len(pinned) == PAIRS - 11 and set(pinned) <= set(bank.residents().tolist())
    Run(bundle, experts).logits(12)
    assert set(pinned) <= set(bank.residents().tolist())
    assert experts.bank_bytes == 11 * BYTES


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("spare", [0, BYTES - 1])
@pytest.mark.parametrize("held", [2, 7, PAIRS])
def test_memory_is_within_the_budget(folder: Path, held: int, spare: int, decodes: bool) -> None:
    bundle = limited(folder, slots=PAIRS)
    tables = experts_of(bundle).sizes.table_bytes
    budget = held * BYTES + tables + spare
    experts = experts_of(limited(folder, hbm_bytes=budget), ExpertDuties(decodes, not decodes, 2))
    fields = experts.stats_fields()["expert_budget_bytes"]
    assert fields["measured"] <= fields["effective"] <= fields["requested"] == budget  # type: ignore[index]
    assert experts.nbytes == fields["measured"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"slots": 1}, r"experts\.slots.*at least 2 slots"),
        ({"hbm_bytes": 2 * BYTES}, r"experts\.hbm.*at least \d+ bytes"),
        ({"slots": 4, "host_bytes": 13 * BYTES}, rf"experts\.host.*at least {14 * BYTES} bytes"),
    ],
)
def test_a_budget_that_cannot_work_is_refused_with_one_that_can(
    folder: Path, values: dict[str, object], words: str
) -> None:
    with pytest.raises(BadConfig, match=words):
        experts_of(limited(folder, **values))


def test_host_memory_that_others_hold_is_not_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank that does not fit is refused while that is still an error, not the end of a process."""
    monkeypatch.setattr(serving_experts, "available_bytes", lambda: 16 * BYTES)
    with pytest.raises(BadConfig, match=rf"experts\.host.*unset.*at least {15 * BYTES} bytes"):
        experts_of(limited(folder, slots=3))
    # What nobody asked for is as much as the host can spare.
    assert experts_of(limited(folder, slots=4)).bank_bytes == 14 * BYTES


def test_filling_stops_before_the_hosts_memory_is_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process takes the host's memory while the bank is filled."""
    left = iter([4 << 30, 2 << 30, 1 << 20])
    monkeypatch.setattr(expert_source, "available_bytes", lambda: next(left))
    monkeypatch.setattr(expert_source, "LOOK_BYTES", 3 * BYTES)
    with pytest.raises(BadConfig, match=rf"experts\.host.*{1 << 20} left on the host after {9 * BYTES}"):
        experts_of(limited(folder, slots=4))


def test_experts_that_are_not_fp4_are_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, expert_dtype="fp8")
    save_official(tmp_path / "m", config, random_named_weights(config, seed=4, mtp=False))
    with pytest.raises(BadConfig, match="FP8"):
        limited(tmp_path / "m", slots=4)


def test_a_limited_bundle_has_the_identity_of_the_whole(folder: Path) -> None:
    assert limited(folder, slots=3).model_hash == ModelBundle.load(folder).model_hash


def test_a_read_that_fails_once_is_tried_again(
    folder: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = limited(folder, slots=4)
    assert bundle.supply is not None
    honest, failed = bundle.supply.disk.read, []

    def read(pair: int, out: np.ndarray, *, stream: bool = False) -> None:
        if pair == 7 and not failed:
            failed.append(pair)
            raise OSError("bad sector")
        honest(pair, out, stream=stream)

    monkeypatch.setattr(bundle.supply.disk, "read", read)
    experts = experts_of(bundle)
    assert experts.stats_fields()["expert_io_errors"] == 1
    assert torch.equal(Run(bundle, experts).logits(10), expected)


def test_a_shard_that_ends_early_is_named_at_start(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "m")
    bundle = limited(tmp_path / "m", slots=4)
    shard = max((tmp_path / "m").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with pytest.raises(ExpertUnavailable, match=rf"{shard.name}.*truncated"):
        experts_of(bundle)


def test_wrong_bytes_in_a_slot_stop_a_verifying_cache(folder: Path) -> None:
    bundle = limited(folder, slots=4, verify=True)
    experts = experts_of(bundle)
    run = Run(bundle, experts)
    # Whatever comes into a slot from now on is not what the bank holds.
    lanes = experts.cache._lanes
    honest = lanes.side_copy
    lanes.side_copy = lambda target, source: honest(target, source ^ 1)  # type: ignore[method-assign]
    with pytest.raises(IntegrityError, match="does not hold"):
        run.logits(16)
