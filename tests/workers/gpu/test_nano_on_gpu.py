"""dsv4-nano on a GPU through the Triton path: logits, answers, graphs and batches against the CPU reference."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from cluster.tasks import arithmetic
from cluster.tasks.sample import Split
from kvstore.pools.aggregate import KVPools, PoolSizes
from kvstore.sequence_kv import SequenceIndices
from tests.support.paged import Tables
from tests.workers.runtime.pair import Pair, make_request, tokens_of
from workers.batch import ForwardBatch
from workers.gpu.model import GpuModel
from workers.model.config import PAGE_TOKENS
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.transformer import ReferenceTransformer
from workers.model_bundle import ModelBundle, make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

BUNDLED = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "dsv4-nano"
NATIVE = Precision.native()
SIZES = PoolSizes(24, 24, 8)
USER, ASSISTANT, THINK = 3, 4, 13

LOGITS = 0.05
"""Median relative error of logits over positions of real text: bf16 between ops, and e4m3 codes that it flips."""


@pytest.fixture(scope="module")
def on_gpu() -> ModelBundle:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(name)s %(message)s")
    return ModelBundle.load_for(BUNDLED, "cuda", NATIVE)


@pytest.fixture(scope="module")
def on_cpu() -> ModelBundle:
    return ModelBundle.load(BUNDLED)


@pytest.fixture(scope="module")
def model(on_gpu: ModelBundle) -> GpuModel:
    """Decode in graphs, up to four sequences."""
    made = _model(on_gpu)
    made.warm_up()
    made.warm_up_prefill()
    return made


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    samples = itertools.islice(arithmetic.generate(Split.HELD_OUT, 1), 16)
    texts = [sample.turns[-1].user for sample in samples]
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [[0, USER, *ids, ASSISTANT, THINK] for ids in encoded]


def _pools(bundle: ModelBundle, device: str) -> KVPools:
    pools = KVPools(kv_spec(bundle.config), SIZES, device)
    for pool in pools.pools:
        pool.data.fill_(0xFF)
    for slot in range(SIZES.slots):
        pools.reset_slot(slot)  # type: ignore[arg-type]
    return pools


def _model(bundle: ModelBundle, **options: object) -> GpuModel:
    arguments = {"max_running": 4, "max_context": 2048, **options}
    return GpuModel(bundle.config, bundle.weights, _pools(bundle, "cuda"), **arguments)  # type: ignore[arg-type]


def _tables(index: int) -> Tables:
    return Tables((3 * index + 1, 3 * index), (3 * index + 2, 3 * index + 1), index)


def _text(prompts: list[list[int]], count: int) -> list[int]:
    return list(itertools.islice(itertools.chain.from_iterable(prompts), count))


def _history(model: GpuModel, prompts: list[list[int]], lengths: list[int]) -> list[Tables]:
    """Sequences of these lengths in the model's pools, their last token not computed."""
    tables = [_tables(i) for i in range(len(lengths))]
    for b, (t, length) in enumerate(zip(tables, lengths, strict=True)):
        model.pools.reset_slot(t.slot)  # type: ignore[arg-type]
        if length:
            model.forward(ForwardBatch.build([(t, 0, _text(prompts[b:], length))]))
        t.num_tokens = length
    return tables


def _decode(model: GpuModel, tables: list[Tables], first: list[int], steps: int) -> Iterator[torch.Tensor]:
    """Logits of greedy steps that feed themselves, but where a sequence enters a page that the tables do not name."""
    tokens = first
    for step in range(steps):
        positions = [t.num_tokens + step for t in tables]
        if step and all(position % PAGE_TOKENS for position in positions):
            model.start_next(None)
        else:
            model.start(ForwardBatch.build([(t, p, [i]) for t, p, i in zip(tables, positions, tokens, strict=True)]))
        yield model.logits().clone()
        tokens = model.greedy()[0]


def test_prefill_logits_are_near_the_reference(model: GpuModel, on_cpu: ModelBundle, prompts: list[list[int]]) -> None:
    ids = _text(prompts, 400)
    found = model.forward(ForwardBatch.build([(_tables(0), 0, ids)]), "all").cpu()
    reference = ReferenceTransformer(on_cpu.config, on_cpu.weights, NATIVE, _pools(on_cpu, "cpu"))  # type: ignore[arg-type]
    expected = reference.forward(ForwardBatch.build([(_tables(0), 0, ids)]), "all")
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    print(f"prefill 400: median {errors.median():.4f} p90 {errors.quantile(0.9):.4f} worst {errors.max():.4f} {agree=}")
    assert errors.isfinite().all() and errors.median() < LOGITS and agree > 0.95


def test_decode_logits_are_near_those_of_prefill(model: GpuModel, prompts: list[list[int]]) -> None:
    ids = _text(prompts, 300)
    expected = model.forward(ForwardBatch.build([(_tables(0), 0, ids)]), "all")
    tables = _history(model, prompts, [250])[0]
    rows = []
    for at in range(250, 300):
        rows.append(model.decode(ForwardBatch.build([(tables, at, [ids[at]])]))[0].clone())
    errors = (torch.stack(rows) - expected[250:]).norm(dim=-1) / expected[250:].norm(dim=-1)
    print(f"decode 250..300 against prefill: median {errors.median():.4f} worst {errors.max():.4f}")
    assert errors.isfinite().all() and errors.median() < LOGITS


def test_prefill_does_not_depend_on_what_its_memory_held(
    on_gpu: ModelBundle, model: GpuModel, prompts: list[list[int]]
) -> None:
    """A used model and a fresh one, whose pools hold NaN and whose buffers hold anything, give the same KV."""
    fresh = _model(on_gpu)
    for length in (250, 7, 129):
        images, logits = [], []
        for either in (model, fresh):
            tables = _tables(0)
            either.pools.reset_slot(tables.slot)  # type: ignore[arg-type]
            logits.append(either.forward(ForwardBatch.build([(tables, 0, _text(prompts, length))])))
            pages = -(-length // 256)
            full, window = tables.full_pages[:pages], tables.window_pages[:pages]
            indices = SequenceIndices(full, window, tables.slot, length)  # type: ignore[arg-type]
            images.append(either.pools.get_cpu_copy(indices).payload.clone())
        assert torch.equal(logits[0], logits[1]), length
        assert torch.equal(images[0], images[1]), length


def test_graphs_give_the_bits_of_eager_steps(on_gpu: ModelBundle, model: GpuModel, prompts: list[list[int]]) -> None:
    """Both start from the same bytes in the pools, so that only the decode steps are compared."""
    eager = _model(on_gpu, use_graphs=False)
    tables = _history(model, prompts, [250, 7, 129])
    for pool, other in zip(eager.pools.pools, model.pools.pools, strict=True):
        pool.data.copy_(other.data)
    both = [torch.stack(list(_decode(either, tables, [5, 6, 7], 12))) for either in (model, eager)]
    assert torch.isfinite(both[0]).all()
    for b in range(3):
        differ = (both[0][:, b] != both[1][:, b]).any(-1).nonzero().flatten().tolist()
        assert not differ, f"row {b} differs at steps {differ}"


def test_a_row_of_a_batch_is_bitwise_the_batch_of_one(model: GpuModel, prompts: list[list[int]]) -> None:
    lengths, first = [250, 7, 129, 0], [5, 6, 7, 0]
    together = torch.stack(list(_decode(model, _history(model, prompts, lengths), first, 10)))
    for b in range(4):
        tables = _history(model, prompts, lengths)
        alone = torch.stack(list(_decode(model, tables[b : b + 1], first[b : b + 1], 10)))
        assert torch.equal(alone[:, 0], together[:, b]), b


def test_answers_over_the_hand_off_equal_the_reference(
    on_gpu: ModelBundle, on_cpu: ModelBundle, prompts: list[list[int]]
) -> None:
    """Both workers on the GPU, eight requests at a time, greedy; the reference computes the same tokens in fp32."""
    engines = [make_engine(on_gpu, NATIVE, SIZES, device="cuda", max_context=2048) for _ in range(2)]
    assert all(engine.model.backend == "triton" for engine in engines)  # type: ignore[attr-defined]
    requests = [make_request(f"r{i}", p, max_tokens=40, ignore_eos=False) for i, p in enumerate(prompts[:8])]
    with Pair(prefill_engine=engines[0], decode_engine=engines[1]) as pair:
        began = time.perf_counter()
        for request in requests:
            pair.start(request)
        found = [tokens_of(pair.events.rest(request.request_id)) for request in requests]
        seconds = time.perf_counter() - began
        times = pair.decode_engine.times
        print(
            f"8 requests: {sum(map(len, found)) / seconds:.0f} tok/s, step {times.last_s * 1e3:.2f} ms, {times.count}"
        )
    expected = _reference_answers(on_cpu, prompts[:8], 40)
    equal = sum(a == b for a, b in zip(found, expected, strict=True))
    print(f"equal answers: {equal} of 8")
    assert equal >= 6


def _reference_answers(bundle: ModelBundle, prompts: list[list[int]], most: int) -> list[list[int]]:
    reference = ReferenceTransformer(bundle.config, bundle.weights, NATIVE, _pools(bundle, "cpu"))  # type: ignore[arg-type]
    tables = [_tables(i) for i in range(len(prompts))]
    ids, answers = [list(p) for p in prompts], [[] for _ in prompts]
    running = list(range(len(prompts)))
    while running:
        items = [(tables[b], tables[b].num_tokens, ids[b][tables[b].num_tokens :]) for b in running]
        best = reference.forward(ForwardBatch.build(items)).argmax(-1).tolist()
        for b, token in zip(tuple(running), best, strict=True):
            tables[b].num_tokens = len(ids[b])
            ids[b].append(token)
            answers[b].append(token)
            if token == 1 or len(answers[b]) == most:
                running.remove(b)
    return answers
