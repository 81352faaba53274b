"""Real-shape layers of V4-Flash on a GPU: a request has the same bits alone, packed, in any batch, in graphs or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools, PoolSizes
from tests.support.paged import Tables
from tests.workers.gpu.test_flash_on_gpu import LAYERS, reduced
from workers.batch import ForwardBatch
from workers.gpu.model import GpuModel
from workers.gpu.synthetic import synthetic_weights
from workers.model.config import PAGE_TOKENS, ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.presets import V4_FLASH

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

EXPERTS, VOCABULARY = 32, 2048

LENGTHS = (1500, 40, 700, 124, 5, *range(6, 36, 2))
"""Prompt tokens of each request; the fourth finishes a C128 entry in decode. Nobody enters a page in `STEPS`."""

STEPS = 8
FEW = (0, 1, 2, 3, 4)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return reduced(V4_FLASH, EXPERTS, VOCABULARY)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Iterator[GpuModel]:
    with torch.no_grad():
        weights = synthetic_weights(config, "cuda", layer_ids=LAYERS)
        pages = sum(-(-n // PAGE_TOKENS) for n in LENGTHS)
        pools = KVPools(kv_spec(config, "fp8"), PoolSizes(pages, pages, len(LENGTHS)), "cuda")
        made = GpuModel(config, weights, pools, max_running=len(LENGTHS))
        made.warm_up()
        made.warm_up_prefill()
        yield made


@pytest.fixture(scope="module")
def prompts(config: ModelConfig) -> list[list[int]]:
    ids = torch.randint(2, config.vocab_size, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(3))
    return [ids[b, :n].tolist() for b, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def alone(model: GpuModel, prompts: list[list[int]]) -> tuple[Tensor, list[Tensor]]:
    """Last logits of each prompt, prefilled by itself, and the pools afterwards."""
    _poison(model)
    logits = torch.cat([_prefill(model, prompts, [b]) for b in range(len(LENGTHS))])
    return logits, [pool.data.clone() for pool in model.pools.pools]


def _poison(model: GpuModel) -> None:
    for pool in model.pools.pools:
        pool.data.fill_(0xFF)
    for slot in range(len(LENGTHS)):
        model.pools.reset_slot(slot)  # type: ignore[arg-type]


def _tables(b: int) -> Tables:
    first = sum(-(-n // PAGE_TOKENS) for n in LENGTHS[:b])
    pages = tuple(range(first, first + -(-LENGTHS[b] // PAGE_TOKENS)))
    return Tables(pages, pages[::-1], b)


def _prefill(model: GpuModel, prompts: list[list[int]], members: Sequence[int]) -> Tensor:
    return model.forward(ForwardBatch.build([(_tables(b), 0, prompts[b]) for b in members]))


def _decode(model: GpuModel, history: list[Tensor], members: Sequence[int]) -> Tensor:
    """Logits [STEPS, B, V] of steps that feed themselves after the prompts."""
    for pool, data in zip(model.pools.pools, history, strict=True):
        pool.data.copy_(data)
    model.start(ForwardBatch.build([(_tables(b), LENGTHS[b], [7 + b]) for b in members]))
    rows = [model.logits().clone()]
    for _ in range(STEPS - 1):
        model.start_next()
        rows.append(model.logits().clone())
    return torch.stack(rows)


@torch.no_grad()
def test_packed_prompts_have_the_bits_of_prompts_alone(
    model: GpuModel, prompts: list[list[int]], alone: tuple[Tensor, list[Tensor]]
) -> None:
    _poison(model)
    logits = _prefill(model, prompts, range(len(LENGTHS)))
    for pool, expected in zip(model.pools.pools, alone[1], strict=True):
        assert torch.equal(pool.data, expected), pool.spec.name
    assert torch.isfinite(logits).all() and torch.equal(logits, alone[0])


@torch.no_grad()
def test_a_step_repeated_has_the_same_bits(model: GpuModel, alone: tuple[Tensor, list[Tensor]]) -> None:
    first = _decode(model, alone[1], range(len(LENGTHS)))
    assert torch.isfinite(first).all()
    for _ in range(5):
        assert torch.equal(_decode(model, alone[1], range(len(LENGTHS))), first)


@torch.no_grad()
def test_rows_of_every_batch_have_the_bits_of_the_batch_of_one(
    model: GpuModel, alone: tuple[Tensor, list[Tensor]]
) -> None:
    every, few = _decode(model, alone[1], range(len(LENGTHS))), _decode(model, alone[1], FEW)
    for b in FEW:
        one = _decode(model, alone[1], [b])[:, 0]
        for name, found in (("all", every[:, b]), ("few", few[:, b])):
            differ = (found != one).any(-1).nonzero().flatten().tolist()
            assert not differ, f"request {b} among {name} differs at steps {differ}"


@torch.no_grad()
def test_graphs_have_the_bits_of_eager_steps(
    config: ModelConfig, model: GpuModel, alone: tuple[Tensor, list[Tensor]]
) -> None:
    eager = GpuModel(config, model.weights, model.pools, max_running=len(LENGTHS), use_graphs=False)
    assert torch.equal(_decode(eager, alone[1], FEW), _decode(model, alone[1], FEW))
