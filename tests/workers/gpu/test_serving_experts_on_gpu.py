"""dsv4-nano served by two GPU workers with few experts in device memory: the tokens of all of them, in the budget."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from cluster.tasks import arithmetic
from cluster.tasks.sample import Split
from kvstore.pools.aggregate import PoolSizes
from tests.workers.runtime.pair import Pair, make_request, tokens_of
from workers.config import WorkerConfig
from workers.engine import Engine
from workers.errors import BadConfig
from workers.experts.config import ExpertConfig
from workers.experts.layout import ExpertShape
from workers.gpu.device_budget import CONTEXT_BYTES, LATER_BYTES
from workers.gpu.serving_experts import ExpertDuties, GpuExperts
from workers.messages import WorkerRole
from workers.model.precision import Precision
from workers.model_bundle import ModelBundle, build_engine, make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

BUNDLED = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "dsv4-nano"
NATIVE = Precision.native()
SIZES = PoolSizes(24, 24, 8)
ROLES = (WorkerRole.PREFILL, WorkerRole.DECODE)
BYTES = ExpertShape(256, 128).expert_bytes


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    samples = itertools.islice(arithmetic.generate(Split.HELD_OUT, 1), 16)
    encoded = [tokenizer.encode(sample.turns[-1].user, add_special_tokens=False).ids for sample in samples]
    return [[0, 3, *ids, 4, 13] for ids in encoded]


def limited(**values: object) -> ModelBundle:
    config = ExpertConfig(**values)  # type: ignore[arg-type]
    return ModelBundle.load_limited_for(BUNDLED, "cuda", NATIVE, config, num_readers=4)


def answers(bundle: ModelBundle, prompts: list[list[int]]) -> tuple[list[list[int]], list[Engine]]:
    """Greedy tokens of all prompts, decoded together, and the engines of prefill and decode."""
    engines = [
        make_engine(bundle, NATIVE, SIZES, device="cuda", max_context=2048, num_threads=4, role=role) for role in ROLES
    ]
    for engine, role in zip(engines, ROLES, strict=True):  # with an empty kernel cache longer than requests wait
        engine.warm_up(decode=role is WorkerRole.DECODE)
    requests = [make_request(f"r{i}", p, max_tokens=60, ignore_eos=True) for i, p in enumerate(prompts[:8])]
    with Pair(prefill_engine=engines[0], decode_engine=engines[1]) as pair:
        for request in requests:
            pair.start(request)
        return [tokens_of(pair.events.rest(request.request_id)) for request in requests], engines


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    return answers(ModelBundle.load_for(BUNDLED, "cuda", NATIVE), prompts)[0]


@pytest.mark.parametrize(
    "values",
    [
        {"slots": 3, "verify": True},
        {"slots": 9, "preload": "prefix", "verify": True},
        {"hbm_bytes": 40 * BYTES, "policy": "lru"},
        {"slots": 60, "host_bytes": 50 * BYTES},
    ],
    ids=["smallest", "tenth", "bytes", "short-bank"],
)
def test_tokens_are_those_of_full_residency(
    values: dict[str, object], prompts: list[list[int]], expected: list[list[int]]
) -> None:
    bundle = limited(**values)
    assert bundle.model_hash == ModelBundle.load_for(BUNDLED, "cuda", NATIVE).model_hash
    found, engines = answers(bundle, prompts)
    prefill, experts = (engine.experts for engine in engines)
    assert isinstance(prefill, GpuExperts) and isinstance(experts, GpuExperts)
    assert found == expected
    experts.check_integrity()
    fields = experts.stats_fields()
    print(values, {key: value for key, value in fields.items() if "layer" not in key})
    lookups, misses = fields["expert_lookups"], fields["expert_misses"]
    assert fields["expert_hits"] + sum(misses.values()) == lookups > 0  # type: ignore[operator, union-attr]
    for either in (prefill, experts):
        either.close()


@pytest.fixture
def whole_gpu() -> Iterator[None]:
    """Afterwards torch may take all of the GPU again."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("role", ROLES)
def test_a_worker_keeps_the_total_that_it_was_given(role: WorkerRole) -> None:
    """Experts get what the rest leaves of a total that is nearly used up, and torch cannot pass it."""
    settings = {"model_dir": str(BUNDLED), "device": "cuda", "num_threads": 4, "max_context": 2048, "max_running": 4}
    base = WorkerConfig(role, "w", kv_budget_bytes=64 << 20, **settings)  # type: ignore[arg-type]
    with pytest.raises(BadConfig, match=r"experts\.total_gpu.*at least (\d+) bytes") as refused:
        build_engine(dataclasses.replace(base, experts=ExpertConfig(total_gpu_bytes=1 << 20)))
    least = int(re.search(r"at least (\d+) bytes", str(refused.value))[1])  # type: ignore[index]
    torch.cuda.empty_cache()
    # Two builds of one worker differ by what the allocator has kept of the first.
    total = least + 20 * BYTES + (256 << 20)
    engine = build_engine(dataclasses.replace(base, experts=ExpertConfig(total_gpu_bytes=total)))
    fields = engine.experts.stats_fields()["expert_budget_bytes"]  # type: ignore[union-attr]
    print(role.value, "least", least, fields, "torch", torch.cuda.memory_reserved())
    assert fields["measured"] <= fields["effective"] <= fields["requested"]  # type: ignore[index]
    assert fields["requested"] <= total - CONTEXT_BYTES - LATER_BYTES  # type: ignore[index]
    with pytest.raises(torch.cuda.OutOfMemoryError):
        torch.empty(2 * LATER_BYTES, dtype=torch.uint8, device="cuda")
    engine.experts.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("budget", [8 * BYTES, 31 * BYTES + 5])
def test_device_memory_of_experts_is_within_the_budget(role: WorkerRole, budget: int) -> None:
    bundle = limited(hbm_bytes=budget)
    assert bundle.supply is not None
    duties = ExpertDuties(role is WorkerRole.DECODE, role is WorkerRole.PREFILL, max_running=8)
    before = torch.cuda.memory_allocated()
    experts = GpuExperts(bundle.config, bundle.supply, duties, torch.device("cuda"), num_readers=4)
    experts.open()
    taken = torch.cuda.memory_allocated() - before
    print(f"{role.value} budget {budget}: {taken} taken, {experts.places}")
    assert experts.nbytes <= taken <= budget
    experts.close()
