"""The real model behind both workers and gRPC: the same tokens as one process computes from the full sequence."""

from __future__ import annotations

import asyncio
import functools
import random

import numpy as np
import pytest
import torch

from tests.support.tiny import random_tokens, tiny_config
from tests.workers.runtime.pair import make_request, tokens_of
from tests.workers.service.cluster import running_cluster
from workers.config import WorkerConfig
from workers.engine import InvalidTokens
from workers.engine_logits import engine_logits
from workers.errors import BadConfig, RequestTooLong
from workers.messages import WorkerRole
from workers.model.full_sequence import forward_full
from workers.model.weights import random_named_weights
from workers.model_bundle import ModelBundle, build_engine, identity_of, precision_of

CONFIG = tiny_config(index_topk=16, index_n_heads=16, head_dim=128, qk_rope_head_dim=64, index_head_dim=128)
"""C4 has more entries than top-k from token 68 on."""

BUDGET = 64 << 20


@functools.cache
def bundle() -> ModelBundle:
    return ModelBundle.from_named(CONFIG, random_named_weights(CONFIG, seed=3), "tiny")


def full_logits(ids: list[int], mode: str) -> torch.Tensor:
    with torch.no_grad():
        return forward_full(bundle().weights, CONFIG, torch.tensor([ids]), precision_of(mode))[0]


def engine_of(role: WorkerRole, **settings: object):  # type: ignore[no-untyped-def]
    values = {"kv_budget_bytes": BUDGET, "max_running": 8, "max_context": 2048, "chunk_tokens": 128, **settings}
    return build_engine(WorkerConfig(role, "x", **values), bundle())  # type: ignore[arg-type]


def prompt(length: int, seed: int) -> list[int]:
    return random_tokens(CONFIG, length, seed)[0].tolist()


def relative_error(found: np.ndarray, expected: torch.Tensor) -> float:
    reference = expected.numpy()
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))


@pytest.mark.parametrize(("chunk", "decode_from"), [(512, None), (100, None), (128, 260), (7, 3), (64, 0)])
def test_engine_logits_in_fp32_equal_the_full_sequence(chunk: int, decode_from: int | None) -> None:
    ids = prompt(300, 1)
    found = engine_logits(bundle(), ids, precision="fp32", prefill_chunk=chunk, decode_from=decode_from)
    assert found.shape == (300, CONFIG.vocab_size) and found.dtype == np.float32
    assert relative_error(found, full_logits(ids, "fp32")) <= 1e-4


@pytest.mark.gpu
def test_engine_logits_on_a_gpu_equal_the_full_sequence() -> None:
    ids = prompt(300, 4)
    found = engine_logits(bundle(), ids, precision="fp32", prefill_chunk=96, decode_from=280, device="cuda")
    assert relative_error(found, full_logits(ids, "fp32")) <= 1e-4


def test_engine_logits_in_native_precision_do_not_depend_on_the_chunks() -> None:
    ids = prompt(300, 2)
    whole = engine_logits(bundle(), ids, precision="native")
    pieces = engine_logits(bundle(), ids, precision="native", prefill_chunk=77, decode_from=290)
    assert relative_error(pieces, torch.from_numpy(whole)) <= 1e-4


def test_engine_logits_refuse_what_the_model_cannot_take() -> None:
    with pytest.raises(InvalidTokens):
        engine_logits(bundle(), [CONFIG.vocab_size])
    with pytest.raises(RequestTooLong):
        engine_logits(bundle(), [5] * (CONFIG.max_position_embeddings + 1))
    with pytest.raises(BadConfig, match="precision"):
        engine_logits(bundle(), [5], precision="bf16")
    with pytest.raises(ValueError, match="chunk 0"):
        engine_logits(bundle(), [5], prefill_chunk=0)


def assert_greedy(logits: torch.Tensor, tokens: list[int], *, slack: float = 0.0) -> None:
    """Each token is the argmax of its row of `logits` [len(tokens), V], up to `slack` standard deviations."""
    chosen = logits[torch.arange(len(tokens)), torch.tensor(tokens)]
    assert bool((logits.max(dim=-1).values - chosen <= slack * logits.std(dim=-1)).all())


@pytest.mark.parametrize("mode", ["fp32", "native"])
async def test_greedy_tokens_over_grpc_equal_those_of_one_process(mode: str) -> None:
    lengths = [3, 127, 128, 257, 400]
    requests = [make_request(f"r{n}", prompt(n, n), max_tokens=24) for n in lengths]
    engines = {"prefill_engine": engine_of(WorkerRole.PREFILL, precision=mode)}
    engines["decode_engine"] = engine_of(WorkerRole.DECODE, precision=mode)
    async with running_cluster(**engines) as cluster:
        await asyncio.gather(*(cluster.start(r) for r in requests))
        for request in requests:
            tokens = tokens_of(await cluster.router.end_of(request.request_id))
            ids, n = [*request.prompt_ids, *tokens], len(request.prompt_ids)
            here = engine_logits(bundle(), ids, precision=mode, prefill_chunk=100, decode_from=n)
            assert_greedy(torch.from_numpy(here[n - 1 : -1]), tokens)
            if mode == "fp32":
                assert_greedy(full_logits(ids, mode)[n - 1 : -1], tokens, slack=1e-3)


async def test_a_request_gets_the_same_tokens_alone_and_joining_a_batch_at_any_step(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        make_request(f"r{i}", prompt(rng.choice([9, 130, 255]), i), max_tokens=rng.randint(20, 40), seed=i,
                     temperature=i % 2, top_p=0.95)
        for i in range(6)
    ]  # fmt: skip
    engines = {
        "prefill_engine": engine_of(WorkerRole.PREFILL),
        "decode_engine": engine_of(WorkerRole.DECODE),
    }
    alone = []
    async with running_cluster(**engines) as cluster:
        for request in requests:
            await cluster.start(request)
            alone.append(tokens_of(await cluster.router.end_of(request.request_id)))
    engines = {
        "prefill_engine": engine_of(WorkerRole.PREFILL, chunk_tokens=300),
        "decode_engine": engine_of(WorkerRole.DECODE),
    }
    async with running_cluster(chunk_tokens=300, **engines) as cluster:
        await asyncio.gather(*(cluster.start(r) for r in requests))
        together = [tokens_of(await cluster.router.end_of(r.request_id)) for r in requests]
    assert together == alone


def test_the_model_identity_changes_with_any_tensor() -> None:
    named = random_named_weights(CONFIG, seed=3)
    before = identity_of(named)
    named["norm.weight"] = named["norm.weight"] + 1e-3
    assert identity_of(named) != before == identity_of(random_named_weights(CONFIG, seed=3))


def test_pools_keep_within_their_budget_and_too_small_a_budget_is_refused() -> None:
    engine = engine_of(WorkerRole.DECODE)
    assert engine.pools.nbytes <= BUDGET
    assert engine.allocators.slots.num_slots == 8
    with pytest.raises(BadConfig, match="kv_budget_bytes.*at least [0-9]+ bytes"):
        engine_of(WorkerRole.DECODE, kv_budget_bytes=1 << 20)
    with pytest.raises(BadConfig, match="max_context"):
        engine_of(WorkerRole.DECODE, max_context=CONFIG.max_position_embeddings + 1)


def test_the_smallest_budget_that_is_accepted_serves_the_longest_request() -> None:
    with pytest.raises(BadConfig) as caught:
        engine_of(WorkerRole.DECODE, kv_budget_bytes=1, max_running=1)
    needed = int(str(caught.value).split("at least ")[1].split()[0])
    engine = engine_of(WorkerRole.DECODE, kv_budget_bytes=needed, max_running=1)
    assert engine.pools.nbytes == needed and engine.allocators.full.num_pages == 8
