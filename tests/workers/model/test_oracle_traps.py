"""Each known way to get the model subtly wrong is noticed by the transformers comparison, or has its own test.

`test_oracle_notices` commits the mistake on purpose and checks that logits leave the tolerance; the untouched model is
within it (`test_reference_is_within_tolerance`). Where every trap of the specification, section 8, is covered:

| trap | what | where |
|---|---|---|
| 1 | comb direction | here; ops/test_mhc.py |
| 2 | sinkhorn steps and eps | ops/test_mhc.py |
| 3 | large streams, no clipping | ops/test_mhc.py |
| 4 | YaRN mscale 1 | here; ops/test_norm_rope.py |
| 5 | theta per layer kind | here; ops/test_norm_rope.py |
| 6 | entry rope at its first token | here |
| 7 | interleaved, last dimensions | here; ops/test_norm_rope.py |
| 8 | inverse rope on the output | here |
| 9 | bare q norm before rope | here |
| 10 | softmax scale; indexer scale once | here; test_full_sequence.py |
| 11 | sink in the denominator only | here; ops/test_sparse_attention.py; MTP's own: test_mtp.py |
| 12 | relu before weights; weights from x, q from the latent | here; ops/test_indexer.py |
| 13 | entry 0 has no overlap half | here; ops/test_compressor.py |
| 14 | ape phase | here; ops/test_compressor.py; across chunks test_paged_transformer.py |
| 15 | A part feeds the next entry | here; ops/test_compressor.py |
| 16 | visibility edge | here; ops/test_compressor.py |
| 17 | per-query mask although entries exist | test_full_sequence.py; chunked: test_paged_transformer.py |
| 18 | window 128 with self | here; ops/test_sparse_attention.py |
| 19 | entries overlap the window | here |
| 20, 21, 22 | scale rounding, saturation, nibbles | ops/test_quant.py; byte 0 scale too |
| 23 | table dtype, padding ids | ops/test_moe.py |
| 24 | hash layers have no bias | test_weights.py |
| 25 | clamps, shared expert too | here; ops/test_moe.py |
| 26 | router in fp32 | ops/test_moe.py |
| 27 | weights from raw scores | here; ops/test_moe.py |
| 28 | compressor in fp32 | ops/test_compressor.py; stored rows: test_paged_kv_format.py |
| 29, 30 | block-planar pages | tests/kvstore/test_pools.py; row bytes: test_paged_kv_format.py |
| 31 | 64-bit addresses | torch indexes with int64; Triton kernels are not part of this tree yet |
| 32 | masked entries hold NaN | ops/test_sparse_attention.py |
| 33 | slot reuse resets rings | test_paged_transformer.py; tests/kvstore/test_pools.py |
| 34 | stale entries after partial accept | speculative decoding is not part of this tree yet |
| 35, 36 | MTP rope and streams | test_mtp.py |
| 37 | norm rounds once | ops/test_norm_rope.py |
| 38 | racing in-place rope kernels | CUDA streams are not used; nothing ropes in place |
| 39 | equal scores | ops/test_indexer.py |
| 40 | fp8 against fp4 indexer | test_full_sequence.py |
| 41 | packed scales for Blackwell | no such kernel here |
| 42 | e8m0 tensors as uint8 | ops/test_quant.py; tests/workers/checkpoint |
| 43 | parity by an fp32 reference with switches | test_full_sequence.py |
| 44 | effort prefix, closing think | tests/router |
| 45 | transformers cannot roll back its cache | tests/support/oracle.py only ever appends |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.oracle import oracle_model, oracle_prefill
from tests.support.tiny import random_tokens, tiny_config
from tests.support.tolerances import LOGITS_FP32, worst_position_error
from workers.model import full_sequence, layers
from workers.model.config import LayerKind
from workers.model.full_sequence import forward_full
from workers.model.layers import Rope
from workers.model.precision import Precision
from workers.model.weights import ModelWeights, random_named_weights
from workers.reference import compressor, indexer, mhc, moe, norm_rope

CONFIG = tiny_config(index_topk=16, index_n_heads=16, swiglu_limit=1.0)
NAMED = random_named_weights(CONFIG, seed=11)
WEIGHTS = ModelWeights.from_named(CONFIG, NAMED)
IDS = random_tokens(CONFIG, 300, seed=11)

Patch = Callable[[Any, str, Any], None]
MISTAKES: dict[str, Callable[[Patch], None]] = {}


def mistake(commit: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MISTAKES[commit.__name__] = commit
    return commit


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return oracle_prefill(oracle_model(CONFIG, NAMED), IDS)


def our_error(expected: Tensor) -> float:
    return worst_position_error(forward_full(WEIGHTS, CONFIG, IDS, Precision.fp32()), expected)


def test_reference_is_within_tolerance(expected: Tensor) -> None:
    assert our_error(expected) <= LOGITS_FP32


@mistake
def trap_01_comb_along_its_second_index(patch: Patch) -> None:
    plain = mhc.hc_post
    patch(mhc, "hc_post", lambda out, streams, post, comb: plain(out, streams, post, comb.transpose(-1, -2)))


def scaled_tables(factor: float, *args: Any) -> tuple[Tensor, Tensor]:
    cos, sin = norm_rope.rope_cos_sin(*args)
    return cos * factor, sin * factor


@mistake
def trap_04_yarn_magnitude(patch: Patch) -> None:
    patch(layers, "rope_cos_sin", lambda *args: scaled_tables(1.2773, *args))


@mistake
def trap_05_window_keys_with_plain_theta(patch: Patch) -> None:
    plain, rope = layers.window_entry, Rope.at(CONFIG, LayerKind.SLIDING, torch.arange(IDS.shape[1]))
    patch(layers, "window_entry", lambda attn, config, x, _, precision: plain(attn, config, x, rope, precision))


@mistake
def trap_06_entry_rope_at_its_index(patch: Patch) -> None:
    plain = full_sequence.compress_finish

    def at_index(pooled: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return plain(pooled, norm, *Rope.at(CONFIG, LayerKind.C4, torch.arange(pooled.shape[1])), eps)

    patch(full_sequence, "compress_finish", at_index)


@mistake
def trap_07_half_split_rotation(patch: Patch) -> None:
    def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        plain, low, high = x.split((x.shape[-1] - 2 * cos.shape[-1], cos.shape[-1], cos.shape[-1]), dim=-1)
        return torch.cat((plain, low * cos - high * sin, high * cos + low * sin), dim=-1)

    patch(layers, "apply_rope", half_split)
    patch(compressor, "apply_rope", half_split)


@mistake
def trap_08_no_inverse_rope_on_the_output(patch: Patch) -> None:
    plain = layers.attention_output

    def rotated(attn: Any, config: Any, heads: Tensor, rope: Rope, precision: Precision) -> Tensor:
        identity = Rope(torch.ones_like(rope.cos), torch.zeros_like(rope.sin))
        return plain(attn, config, heads, identity, precision)

    patch(layers, "attention_output", rotated)


@mistake
def trap_09_no_query_norm(patch: Patch) -> None:
    plain = layers.rms_norm
    patch(layers, "rms_norm", lambda x, weight, eps: x if weight is None else plain(x, weight, eps))


def with_attention(patch: Patch, change: Callable[..., tuple[Any, ...]]) -> None:
    plain = full_sequence.windowed_attention
    patch(full_sequence, "windowed_attention", lambda *args: plain(*change(*args)))


@mistake
def trap_10_scale_of_the_nope_dimensions(patch: Patch) -> None:
    factor = (CONFIG.head_dim / CONFIG.nope_head_dim) ** 0.5
    with_attention(patch, lambda q, *rest: (q * factor, *rest))


@mistake
def trap_11_no_sink(patch: Patch) -> None:
    no_sink = torch.full((CONFIG.num_attention_heads,), -1e30)
    with_attention(patch, lambda q, kv, entries, mask, sink, window: (q, kv, entries, mask, no_sink, window))


@mistake
def trap_12_no_relu(patch: Patch) -> None:
    def linear_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        return ((q @ keys.unsqueeze(-3).transpose(-1, -2)) * weights.unsqueeze(-1)).sum(-2)

    patch(full_sequence, "index_scores", linear_scores)


@mistake
def trap_12_weights_do_not_matter(patch: Patch) -> None:
    patch(full_sequence, "index_scores", lambda q, weights, keys: indexer.index_scores(q, weights.abs(), keys))


@mistake
def trap_13_first_overlap_scored_zero(patch: Patch) -> None:
    plain = full_sequence.compress_pool

    def all_present(rows: Tensor, present: Tensor, ape: Tensor, *, ratio: int) -> Tensor:
        return plain(rows, torch.ones_like(present), ape, ratio=ratio)

    patch(full_sequence, "compress_pool", all_present)


def with_pool(patch: Patch, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    plain = full_sequence.pool_sequence
    patch(full_sequence, "pool_sequence", lambda rows, ape, ratio: plain(*change(rows, ape), ratio))


@mistake
def trap_14_ape_off_by_one(patch: Patch) -> None:
    with_pool(patch, lambda rows, ape: (rows, ape.roll(1, 0)))


@mistake
def trap_15_parts_swapped(patch: Patch) -> None:
    def swap(rows: Tensor, ape: Tensor) -> tuple[Tensor, Tensor]:
        if ape.shape[0] != LayerKind.C4.value:
            return rows, ape
        kv_a, kv_b, score_a, score_b = rows.chunk(4, -1)
        return torch.cat((kv_b, kv_a, score_b, score_a), -1), torch.cat(ape.chunk(2, -1)[::-1], -1)

    with_pool(patch, swap)


@mistake
def trap_16_entry_visible_one_token_late(patch: Patch) -> None:
    patch(full_sequence, "visible_entries", lambda positions, ratio: positions // ratio)


@mistake
def trap_16_entry_visible_early(patch: Patch) -> None:
    patch(full_sequence, "visible_entries", lambda positions, ratio: (positions + ratio) // ratio)


@mistake
def trap_18_window_without_its_oldest_token(patch: Patch) -> None:
    plain = full_sequence._band

    def narrow(num_blocks: int, window: int, device: torch.device) -> Tensor:
        band = plain(num_blocks, window, device)
        return band & ~torch.eye(window, 2 * window, dtype=torch.bool).roll(1, 1).view(1, window, 1, -1)

    patch(full_sequence, "_band", narrow)


@mistake
def trap_18_window_without_self(patch: Patch) -> None:
    def shifted(q: Tensor, kv: Tensor, *rest: Any) -> tuple[Any, ...]:
        return (q, torch.cat((kv[:, :1], kv[:, :-1]), dim=1), *rest)

    with_attention(patch, shifted)


@mistake
def trap_19_entries_inside_the_window_dropped(patch: Patch) -> None:
    window = CONFIG.sliding_window
    patch(full_sequence, "visible_entries", lambda positions, ratio: (positions + 1 - window).clamp(min=0) // ratio)


@mistake
def trap_25_shared_expert_not_clamped(patch: Patch) -> None:
    plain = moe.shared_expert
    patch(moe, "shared_expert", lambda x, shared, limit, *, act_fp8: plain(x, shared, 1e9, act_fp8=act_fp8))


@mistake
def trap_25_clamp_after_the_activation(patch: Patch) -> None:
    def late(gate: Tensor, up: Tensor, limit: float) -> Tensor:
        return torch.nn.functional.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)

    patch(moe, "swiglu", late)


@mistake
def trap_27_weights_from_biased_scores(patch: Patch) -> None:
    def biased(x: Tensor, gate: Tensor, bias: Tensor, count: int, scaling: float) -> tuple[Tensor, Tensor]:
        scores = moe.router_scores(x, gate) + bias
        top = scores.topk(count, dim=-1)
        return top.indices, top.values / top.values.sum(-1, keepdim=True) * scaling

    patch(moe, "route_learned", biased)


@pytest.mark.parametrize("name", sorted(MISTAKES))
def test_oracle_notices(name: str, expected: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    MISTAKES[name](monkeypatch.setattr)
    assert our_error(expected) > 10 * LOGITS_FP32
