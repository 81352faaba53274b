"""The real model on the CPU path: bit-identical output with retracts, and every planned error of a restore shows."""

from __future__ import annotations

import functools
import random

import pytest

from tests.support.tiny import random_tokens, tiny_config
from tests.workers.retract.harness import RetractPair, retract_config
from tests.workers.runtime.pair import make_request
from workers.config import WorkerConfig
from workers.engine import Engine
from workers.messages import MUTATIONS, GenerateRequest, TokenEvent, WorkerRole
from workers.model.weights import random_named_weights
from workers.model_bundle import ModelBundle, build_engine

CONFIG = tiny_config(index_topk=16, index_n_heads=16, head_dim=128, qk_rope_head_dim=64, index_head_dim=128)
"""C4 has more entries than top-k from token 68 on."""

LENGTHS = (3, 126, 127, 128, 200, 255, 256, 380)


@functools.cache
def bundle() -> ModelBundle:
    return ModelBundle.from_named(CONFIG, random_named_weights(CONFIG, seed=3), "tiny")


def engine_of(role: WorkerRole, precision: str) -> Engine:
    config = WorkerConfig(role, "x", kv_budget_bytes=64 << 20, max_running=8, max_context=2048, precision=precision)
    return build_engine(config, bundle())


@functools.cache
def prefill_engine(precision: str) -> Engine:
    return engine_of(WorkerRole.PREFILL, precision)


def requests_of(lengths: tuple[int, ...], max_tokens: int) -> list[GenerateRequest]:
    return [
        make_request(f"r{i}", random_tokens(CONFIG, n, n)[0].tolist(), max_tokens=max_tokens, logprobs=4, seed=i,
                     temperature=float(i % 2), frequency_penalty=0.2 * (i % 3))
        for i, n in enumerate(lengths)
    ]  # fmt: skip


def outputs(
    requests: list[GenerateRequest], precision: str, *, alone: bool, **control: object
) -> list[list[TokenEvent]]:
    """Every event of every request: tokens, log-probabilities of 4 alternatives as the model's exact floats."""
    engines = {"prefill_engine": prefill_engine(precision), "decode_engine": engine_of(WorkerRole.DECODE, precision)}
    found = []
    with RetractPair(**engines) as pair:
        pair.control(**control)
        for request in requests:
            pair.start(request)
            if alone:
                found.append(pair.events.rest(request.request_id))
        if not alone:
            found = [pair.events.rest(request.request_id) for request in requests]
        events = pair.report().events
        assert events >= len(requests) if control else events == 0
    return found


@functools.cache
def plain(lengths: tuple[int, ...], max_tokens: int, precision: str) -> list[list[TokenEvent]]:
    return outputs(requests_of(lengths, max_tokens), precision, alone=True)


@pytest.mark.parametrize("precision", ["native", "fp32"])
def test_tokens_and_logprobs_are_bit_identical_with_retracts_in_a_batch(precision: str, seed: int) -> None:
    rng = random.Random(seed)
    control = {"interval": rng.randint(3, 7), "seed": seed % 997, "poison_freed": True, "other_pages": True}
    retracted = outputs(requests_of(LENGTHS, 24), precision, alone=False, **control)
    assert retracted == plain(LENGTHS, 24, precision)


def test_a_retract_after_every_single_token_is_bit_identical() -> None:
    found = outputs(requests_of((130,), 140), "native", alone=True, interval=1, poison_freed=True, other_pages=True)
    assert found == plain((130,), 140, "native")


def test_hand_offs_of_several_chunks_that_find_no_slot_are_bit_identical() -> None:
    """Their images hold one segment a chunk, each with its layers one after the other: not the order of a retract's."""
    lengths = (130, 380, 300, 260)
    decode = WorkerConfig(WorkerRole.DECODE, "x", kv_budget_bytes=64 << 20, max_running=8, max_context=2048, slots=1)
    waiting = retract_config(admission="predicted", extra_requests=8, time_slice_steps=10, min_run_steps=4)
    requests = requests_of(lengths, 24)
    engines = {"prefill_engine": prefill_engine("native"), "decode_engine": build_engine(decode, bundle())}
    with RetractPair(**engines, retract=waiting) as pair:
        images = [pair.compute(request) for request in requests]
        for request in requests:
            pair.admit(request)
        for request, image in zip(requests, images, strict=True):
            pair.land(request, image)
        found = [pair.events.rest(request.request_id) for request in requests]
        assert pair.report().by_cause["slots"] >= 3
    assert found == plain(lengths, 24, "native")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_planned_error_shows_in_tokens_or_logprobs(mutation: str) -> None:
    """Lengths at which every pool has live rows, one of them near the end of a C128 window; greedy and sampled."""
    lengths = (173, 373)
    found = outputs(requests_of(lengths, 24), "native", alone=False, interval=9, mutate=mutation)
    assert found != plain(lengths, 24, "native")
