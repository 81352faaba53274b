"""Whole-sequence logits against transformers' `DeepseekV4ForCausalLM` on random weights, fp32 on both sides.

Where the indexer drops entries both sides must drop the same ones, and exact ties (all relus zero) are broken
differently by the two; 16 index heads make such ties at the boundary rare, and `test_selection_is_not_decided_by_ties`
checks that the seeds used here have none.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from transformers import DeepseekV4ForCausalLM

from tests.support.oracle import oracle_chunks, oracle_model, oracle_prefill
from tests.support.tiny import random_tokens, tiny_config, tiny_pro_config
from tests.support.tolerances import LOGITS_FP32, worst_position_error
from workers.model import full_sequence
from workers.model.config import ModelConfig
from workers.model.full_sequence import FullOptions, forward_full
from workers.model.precision import Precision
from workers.model.weights import ModelWeights, random_named_weights

CONFIGS = {
    "flash": tiny_config(),
    "flash_topk": tiny_config(index_topk=16, index_n_heads=16),
    "pro": tiny_pro_config(),
    "pro_topk": tiny_pro_config(index_topk=8, index_n_heads=16),
    "wide_head": tiny_config((0, 4, 128), head_dim=128, qk_rope_head_dim=64, index_head_dim=64, num_attention_heads=2),
    "one_head_per_group": tiny_config((128, 4, 4), num_attention_heads=6, o_groups=6, head_dim=32, num_hash_layers=0),
    "all_hashed": tiny_config((4, 128, 0), num_hash_layers=3, num_experts_per_tok=1, swiglu_limit=0.5),
}
LENGTHS = (3, 4, 5, 127, 128, 129, 255, 256, 257, 511, 512, 513)


@cache
def both(name: str) -> tuple[ModelConfig, ModelWeights, DeepseekV4ForCausalLM]:
    config = CONFIGS[name]
    named = random_named_weights(config, seed=7)
    return config, ModelWeights.from_named(config, named), oracle_model(config, named)


def assert_agrees(name: str, num_tokens: int, batch: int = 1) -> None:
    config, weights, oracle = both(name)
    ids = random_tokens(config, num_tokens, seed=num_tokens, batch=batch)
    expected = oracle_prefill(oracle, ids)
    actual = forward_full(weights, config, ids, Precision.fp32())
    assert worst_position_error(actual, expected) <= LOGITS_FP32


@pytest.mark.parametrize("num_tokens", LENGTHS)
@pytest.mark.parametrize("name", ["flash", "pro"])
def test_prefill_agrees_at_every_edge_length(name: str, num_tokens: int) -> None:
    assert_agrees(name, num_tokens)


@pytest.mark.parametrize("num_tokens", [63, 64, 65, 68, 257, 513])
@pytest.mark.parametrize("name", ["flash_topk", "pro_topk"])
def test_prefill_agrees_where_the_indexer_drops_entries(name: str, num_tokens: int) -> None:
    assert_agrees(name, num_tokens)


@pytest.mark.parametrize("name", ["wide_head", "one_head_per_group", "all_hashed"])
def test_prefill_agrees_for_other_shapes(name: str) -> None:
    assert_agrees(name, 261)


def test_prefill_agrees_past_the_real_topk() -> None:
    """2100 tokens have 525 entries, more than Flash's 512."""
    config = tiny_config((4,), index_topk=512, index_n_heads=16, max_position_embeddings=4096, num_hash_layers=0)
    named = random_named_weights(config, seed=3)
    ids = random_tokens(config, 2100, seed=4)
    expected = oracle_prefill(oracle_model(config, named), ids)
    weights = ModelWeights.from_named(config, named)
    assert worst_position_error(forward_full(weights, config, ids, Precision.fp32()), expected) <= LOGITS_FP32
    dense = forward_full(weights, config, ids, Precision.fp32(), FullOptions(dense_c4=True))
    assert worst_position_error(dense, expected) > LOGITS_FP32


def test_rows_of_a_batch_agree() -> None:
    assert_agrees("flash", 131, batch=3)


@pytest.mark.parametrize("chunks", [[1] * 12, [5, 124, 3, 128, 1]])
def test_cached_chunks_of_the_oracle_agree_with_our_whole_sequence(chunks: list[int]) -> None:
    config, weights, oracle = both("flash_topk")
    ids = random_tokens(config, sum(chunks), seed=len(chunks))
    expected = oracle_chunks(oracle, ids, chunks)
    assert worst_position_error(forward_full(weights, config, ids, Precision.fp32()), expected) <= LOGITS_FP32


def test_selection_is_not_decided_by_ties(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gap between the last chosen and the first dropped score is far above rounding at every query."""
    gaps: list[float] = []
    plain = full_sequence.select_topk

    def measured(scores: torch.Tensor, visible: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ranked = scores.masked_fill(~visible, float("-inf")).sort(-1, descending=True).values
        contested = ranked[..., k] > float("-inf")
        gaps.append(float((ranked[..., k - 1] - ranked[..., k])[contested].min()))
        return plain(scores, visible, k)

    monkeypatch.setattr(full_sequence, "select_topk", measured)
    for name in ("flash_topk", "pro_topk"):
        config, weights, _ = both(name)
        forward_full(weights, config, random_tokens(config, 513, seed=513), Precision.fp32())
    assert len(gaps) == 5
    assert min(gaps) > 1e-7
