"""The position-wise parts of one block, shared by the full-sequence form and the paged form.

Everything here acts on `x [..., D]` with any leading axes and knows nothing of how keys are stored or found. `Rope`
holds the tables of the tokens at hand for the layer's kind.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from workers.model.config import LayerKind, ModelConfig
from workers.model.precision import Precision
from workers.model.weights import AttentionWeights, FfnWeights, HyperConnectionWeights, IndexerWeights, ModelWeights
from workers.reference import indexer as indexer_ops
from workers.reference import mhc, moe
from workers.reference.linear import grouped_linear, linear
from workers.reference.norm_rope import apply_rope, rms_norm, rope_cos_sin
from workers.reference.quant import fp4_fake_quant, indexer_fp8_fake_quant, kv_entry_fake_quant


class Rope(NamedTuple):
    """fp32 tables `[..., rope/2]` of some positions for one layer kind."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(cls, config: ModelConfig, kind: LayerKind, positions: Tensor) -> Rope:
        """Tables of integer positions."""
        return cls(*rope_cos_sin(config, kind, positions))

    def per_head(self) -> Rope:
        """With a head axis before the last."""
        return Rope(self.cos.unsqueeze(-2), self.sin.unsqueeze(-2))


def store_entry(entry: Tensor, config: ModelConfig, precision: Precision) -> Tensor:
    """A KV entry as attention will read it back from the cache."""
    return kv_entry_fake_quant(entry, config.qk_rope_head_dim) if precision.kv_fp8 else entry


def store_index_vector(vector: Tensor, precision: Precision) -> Tensor:
    """An indexer query or key after rope: Hadamard transform, then the indexer's number format."""
    rotated = indexer_ops.hadamard(vector.float())
    if precision.indexer == "fp8":
        return indexer_fp8_fake_quant(rotated)
    return fp4_fake_quant(rotated) if precision.indexer == "fp4" else rotated


def attention_queries(
    attn: AttentionWeights, config: ModelConfig, x: Tensor, rope: Rope, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Latent `[..., q_lora]` (the indexer reads it too) and queries `[..., H, hd]`: bare norm per head, then rope."""
    eps = config.rms_norm_eps
    latent = rms_norm(linear(x, attn.wq_a, act_fp8=precision.act_fp8), attn.q_norm, eps)
    q = linear(latent, attn.wq_b, act_fp8=precision.act_fp8).unflatten(-1, (config.num_attention_heads, -1))
    return latent, apply_rope(rms_norm(q, None, eps), *rope.per_head())


def window_entry(attn: AttentionWeights, config: ModelConfig, x: Tensor, rope: Rope, precision: Precision) -> Tensor:
    """The token's own KV vector `[..., hd]`, as stored."""
    kv = rms_norm(linear(x, attn.wkv, act_fp8=precision.act_fp8), attn.kv_norm, config.rms_norm_eps)
    return store_entry(apply_rope(kv, *rope), config, precision)


def index_queries(
    indexer: IndexerWeights, config: ModelConfig, x: Tensor, latent: Tensor, rope: Rope, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Indexer queries `[..., Hi, Di]` and head weights `[..., Hi]` with both scales folded in."""
    q = linear(latent, indexer.wq_b, act_fp8=precision.act_fp8).unflatten(-1, (config.index_n_heads, -1))
    q = store_index_vector(apply_rope(q, *rope.per_head()), precision)
    scale = config.index_head_dim**-0.5 * config.index_n_heads**-0.5
    return q, linear(x, indexer.weights_proj, act_fp8=False) * scale


def attention_output(
    attn: AttentionWeights, config: ModelConfig, heads: Tensor, rope: Rope, precision: Precision
) -> Tensor:
    """`[..., H, hd]` attention results to `[..., D]`: inverse rope at the query, grouped low-rank projection."""
    cos, sin = rope.per_head()
    unrotated = apply_rope(heads, cos, -sin)
    grouped = unrotated.flatten(-2).unflatten(-1, (config.o_groups, -1))  # [..., G, H*hd/G]
    latent = grouped_linear(grouped, attn.wo_a.unflatten(0, (config.o_groups, -1)))
    return linear(latent.flatten(-2), attn.wo_b, act_fp8=precision.act_fp8)


def route(ffn: FfnWeights, config: ModelConfig, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Expert ids and weights `[..., k]` by the layer's router."""
    gate = ffn.gate
    if gate.tid2eid is not None:
        return moe.route_hash(x, gate.weight, gate.tid2eid, token_ids, config.routed_scaling_factor)
    assert gate.bias is not None
    return moe.route_learned(x, gate.weight, gate.bias, config.num_experts_per_tok, config.routed_scaling_factor)


def stream_mix(hc: HyperConnectionWeights, config: ModelConfig, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`mhc.hc_pre` with the config's constants."""
    return mhc.hc_pre(
        streams,
        hc.fn,
        hc.base,
        hc.scale,
        iters=config.hc_sinkhorn_iters,
        eps=config.hc_eps,
        norm_eps=config.rms_norm_eps,
    )


def collapse_streams(hc: HyperConnectionWeights, config: ModelConfig, streams: Tensor) -> Tensor:
    """`mhc.hc_head` with the config's constants."""
    return mhc.hc_head(streams, hc.fn, hc.base, hc.scale, eps=config.hc_eps, norm_eps=config.rms_norm_eps)


def embed_streams(weights: ModelWeights, config: ModelConfig, token_ids: Tensor) -> Tensor:
    """`[...]` token ids to the initial streams `[..., S, D]`: S copies of the embedding."""
    return weights.embed[token_ids].float().unsqueeze(-2).expand(*token_ids.shape, config.hc_mult, -1)


def head_logits(weights: ModelWeights, config: ModelConfig, streams: Tensor) -> Tensor:
    """fp32 logits `[..., V]` of final streams `[..., S, D]`."""
    collapsed = collapse_streams(weights.hc_head, config, streams)
    return linear(rms_norm(collapsed, weights.norm, config.rms_norm_eps), weights.head, act_fp8=False)
