"""The paged model equals the full-sequence form and transformers at every chunking, batching and page placement."""

from __future__ import annotations

import pytest
import torch

from tests.support.oracle import oracle_chunks, oracle_model
from tests.support.paged import PagedRun, chunk_sizes, relative_error
from tests.support.tiny import random_tokens, tiny_config, tiny_pro_config
from workers.model.config import ModelConfig
from workers.model.full_sequence import forward_full
from workers.model.precision import Precision
from workers.model.transformer import ReferenceTransformer
from workers.model.weights import ModelWeights, random_named_weights

LIMIT = 1e-4
"""Largest relative error of fp32 logits."""

FLASH = tiny_config(index_topk=16, index_n_heads=16)
"""Flash's layer mix; C4 has more entries than top-k from token 68 on. With few index heads many scores are exactly 0
(every head below the relu), and transformers breaks such ties otherwise than we do."""

PRO = tiny_pro_config(index_topk=512)

FP32 = Precision.fp32()


def _weights(config: ModelConfig) -> ModelWeights:
    return ModelWeights.from_named(config, random_named_weights(config, seed=3))


def _full(config: ModelConfig, tokens: list[int], precision: Precision = FP32) -> torch.Tensor:
    with torch.no_grad():
        return forward_full(_weights(config), config, torch.tensor([tokens]), precision)[0]


def _run(config: ModelConfig, prompts: list[list[int]], precision: Precision = FP32, seed: int = 0) -> PagedRun:
    return PagedRun(ReferenceTransformer, config, _weights(config), precision, prompts, seed)


def _tokens(config: ModelConfig, count: int, seed: int = 5) -> list[int]:
    return random_tokens(config, count, seed)[0].tolist()


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
@pytest.mark.parametrize("sizes", [[600], [1, 3, 5, 7, 127], [128], [129, 2], [255, 257, 1]])
def test_any_chunking_gives_the_full_sequence_logits(config: ModelConfig, sizes: list[int]) -> None:
    tokens = _tokens(config, 600)
    found = _run(config, [tokens]).chunks(0, chunk_sizes(600, sizes))
    assert relative_error(found, _full(config, tokens)) <= LIMIT


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_token_by_token_decode_gives_the_full_sequence_logits(config: ModelConfig) -> None:
    tokens = _tokens(config, 264)
    found = _run(config, [tokens]).chunks(0, [1] * 264)
    assert relative_error(found, _full(config, tokens)) <= LIMIT


@pytest.mark.parametrize("config", [FLASH, PRO], ids=["flash", "pro"])
def test_chunks_agree_with_transformers(config: ModelConfig) -> None:
    tokens = _tokens(config, 300)
    model = oracle_model(config, random_named_weights(config, seed=3))
    expected = oracle_chunks(model, torch.tensor([tokens]), [300])[0]
    for sizes in ([300], [7, 129, 1], [131, 1, 1, 1, 1]):
        assert relative_error(_run(config, [tokens]).chunks(0, chunk_sizes(300, sizes)), expected) <= LIMIT


@pytest.mark.parametrize("length", [1, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 257, 511, 512, 513])
def test_prefill_then_decode_equals_one_longer_prefill(length: int) -> None:
    tokens = _tokens(FLASH, length + 1)
    longer = _run(FLASH, [tokens]).step({0: length + 1})
    run = _run(FLASH, [tokens], seed=1)
    run.step({0: length})
    assert relative_error(run.step({0: 1})[0], longer[-1]) <= LIMIT


def test_mixed_batch_equals_each_sequence_alone() -> None:
    lengths = [5, 133, 300, 64]
    prompts = [_tokens(FLASH, length, seed=b) for b, length in enumerate(lengths)]
    run = _run(FLASH, prompts)
    rows = [run.step({0: 4, 1: 100, 2: 259})]
    rows.append(run.step({2: 1, 0: 1, 3: 60, 1: 28}))  # decode of two, prefill of two, other order
    rows.append(run.step({1: 1, 3: 1, 2: 40}))
    found = [torch.cat((rows[0][:4], rows[1][1:2]))]
    found.append(torch.cat((rows[0][4:104], rows[1][62:90], rows[2][:1])))
    found.append(torch.cat((rows[0][104:], rows[1][:1], rows[2][2:])))
    found.append(torch.cat((rows[1][2:62], rows[2][1:2])))
    for prompt, logits in zip(prompts, found, strict=True):
        assert relative_error(logits, _full(FLASH, prompt[: len(logits)])) <= LIMIT


def test_last_logits_are_the_rows_of_all_logits() -> None:
    prompts = [_tokens(FLASH, 9, seed=1), _tokens(FLASH, 4, seed=2)]
    every = _run(FLASH, prompts).step({0: 9, 1: 4})
    last = _run(FLASH, prompts).step({0: 9, 1: 4}, logits_for="last")
    assert torch.allclose(last, every[[8, 12]], atol=1e-5)


def test_native_precision_equals_the_full_form_before_quantised_choices_can_differ() -> None:
    """A rounding difference may move a value over an fp8 step, so the bound is looser than fp32's."""
    tokens = _tokens(FLASH, 300)
    found = _run(FLASH, [tokens], Precision.native()).chunks(0, chunk_sizes(300, [100, 1, 7]))
    expected = _full(FLASH, tokens, Precision.native())
    error = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).median()
    assert error <= 0.02


def test_a_reused_slot_and_pages_give_the_same_logits() -> None:
    first, second = _tokens(FLASH, 200, seed=7), _tokens(FLASH, 200, seed=8)
    run = _run(FLASH, [first])
    run.chunks(0, [150, 50])
    run.prompts[0], run.tables[0].num_tokens = second, 0
    run.pools.reset_slot(run.tables[0].slot)
    assert relative_error(run.chunks(0, [3, 197]), _full(FLASH, second)) <= LIMIT


def test_reclaimed_window_pages_are_not_read() -> None:
    tokens = _tokens(FLASH, 520)
    run = _run(FLASH, [tokens])
    run.chunks(0, [500])
    tables = run.tables[0]
    gone = tables.window_pages[0]
    run.pools.pools[0].data[:, gone] = 0xFF
    tables.window_pages = (None, *tables.window_pages[1:])
    assert relative_error(run.step({0: 20}), _full(FLASH, tokens)[500:]) <= LIMIT


def test_memory_is_bounded_by_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    import workers.model.paged_attention as module

    tokens = _tokens(FLASH, 300)
    monkeypatch.setattr(module, "BLOCK_FLOATS", {"cpu": 1 << 15})
    assert relative_error(_run(FLASH, [tokens]).step({0: 300}), _full(FLASH, tokens)) <= LIMIT


def test_pools_narrower_than_the_precision_are_refused() -> None:
    run = _run(FLASH, [[1]], Precision.native())
    with pytest.raises(ValueError, match="fp32"):
        ReferenceTransformer(FLASH, _weights(FLASH), FP32, run.pools)
