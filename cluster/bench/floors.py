"""What one step of a model must at least move and compute, from its config alone. Torch-free.

Owns: bytes of a decode step (every weight it needs once, each distinct expert once, the KV rows it attends to) and
multiply-adds of a prompt. Does not own: bandwidths, which are measured in the run that uses them. Activations are not
counted: they stay in the L2 cache. For V4-Flash the figures are those of DeepSeek's published shapes: 11.22 GB a token
at batch 1, 26.55 GFLOP a token without attention over the context.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from workers.checkpoint.names import Organ, total_by_organ
from workers.model.config import LayerKind, ModelConfig

READ_WHOLE = (
    Organ.ATTENTION,
    Organ.COMPRESSOR,
    Organ.MHC,
    Organ.ROUTER,
    Organ.NORM,
    Organ.SHARED_EXPERTS,
    Organ.HEAD,
)
"""Organs that every step reads completely; the embedding and the hash table are read by row, experts by choice."""


@dataclass(frozen=True, slots=True)
class Rates:
    """Ceilings measured on this device in this run."""

    copy_gb_s: float
    """Device-to-device copy, bytes read plus bytes written."""
    bf16_tflop_s: float
    fp8_tflop_s: float | None = None
    """None where the library has no FP8 product."""

    def floor_ms(self, nbytes: float, bf16_flops: float, fp8_flops: float = 0.0) -> float:
        """Least time for so many bytes and operations when moving and computing overlap perfectly."""
        fp8 = self.fp8_tflop_s if self.fp8_tflop_s is not None else self.bf16_tflop_s
        return max(nbytes / self.copy_gb_s / 1e6, bf16_flops / self.bf16_tflop_s / 1e9 + fp8_flops / fp8 / 1e9)


def trunk(config: ModelConfig) -> ModelConfig:
    """The config without draft blocks, which this engine does not run."""
    ratios = config.compress_ratios[: config.num_hidden_layers]
    return dataclasses.replace(config, compress_ratios=ratios, num_nextn_predict_layers=0, draft=None)


def distinct_experts(config: ModelConfig, batch: int) -> float:
    """Expected experts of one layer that at least one of `batch` tokens chooses, when choices are uniform."""
    experts = config.n_routed_experts
    return experts * (1 - (1 - config.num_experts_per_tok / experts) ** batch)


def kv_row_bytes(config: ModelConfig) -> int:
    """Bytes of one stored KV entry: e4m3 and bf16 columns, then scales padded to 8 bytes."""
    nope = config.head_dim - config.qk_rope_head_dim
    return nope + 2 * config.qk_rope_head_dim + -(-(nope // 64) // 8) * 8


def index_row_bytes(config: ModelConfig) -> int:
    """Bytes of one stored indexer key: e4m3 codes and an fp32 scale."""
    return config.index_head_dim + 4


def attended(config: ModelConfig, kind: LayerKind, tokens: int) -> int:
    """KV entries that the last of `tokens` tokens attends to in one layer."""
    window = min(config.sliding_window, tokens)
    match kind:
        case LayerKind.C4:
            return window + min(config.index_topk, tokens // 4)
        case LayerKind.C128:
            return window + tokens // 128
        case _:
            return window


def kv_bytes(config: ModelConfig, tokens: int) -> int:
    """Bytes of KV and indexer keys that one decode token reads at a context of `tokens`, itself included."""
    total = 0
    for kind in config.layer_kinds:
        total += attended(config, kind, tokens) * kv_row_bytes(config)
        if kind is LayerKind.C4:
            total += tokens // 4 * index_row_bytes(config)
    return total


def decode_bytes(config: ModelConfig, batch: int, context: int, experts: float | None = None) -> float:
    """Bytes of one decode step of `batch` sequences at `context` tokens; `experts` distinct ones a layer."""
    organs = total_by_organ(trunk(config))
    whole = sum(organs[organ].bytes for organ in READ_WHOLE if organ in organs)
    chosen = distinct_experts(config, batch) if experts is None else experts
    routed = organs[Organ.ROUTED_EXPERTS].bytes * chosen / config.n_routed_experts
    rows = batch * config.hidden_size * 2
    return whole + routed + rows + batch * kv_bytes(config, context)


def token_flops(config: ModelConfig) -> float:
    """Operations (2 per multiply-add) of one token's matrices in all layers, without head and attention."""
    hidden, inner, streams = config.hidden_size, config.moe_intermediate_size, config.hc_mult
    heads = config.num_attention_heads * config.head_dim
    mixes = 2 * (2 + streams) * streams * streams * hidden
    attention = config.q_lora_rank * (hidden + heads) + config.head_dim * hidden
    attention += config.o_lora_rank * heads + hidden * config.o_groups * config.o_lora_rank
    moe = 3 * hidden * inner * (config.num_experts_per_tok + config.n_shared_experts)
    moe += config.n_routed_experts * hidden
    total = (mixes + attention + moe) * config.num_hidden_layers
    index = config.index_n_heads * config.index_head_dim
    for kind in config.layer_kinds:
        if kind is LayerKind.C4:
            total += hidden * 4 * config.head_dim + hidden * 4 * config.index_head_dim
            total += index * config.q_lora_rank + config.index_n_heads * hidden
        elif kind is LayerKind.C128:
            total += hidden * 2 * config.head_dim
    return 2.0 * total


def context_flops(config: ModelConfig, tokens: int) -> float:
    """Operations of attention and indexer scores of one token that sees `tokens`, itself included."""
    per_key = 4 * config.num_attention_heads * config.head_dim
    total = 0.0
    for kind in config.layer_kinds:
        total += per_key * attended(config, kind, tokens)
        if kind is LayerKind.C4:
            total += (2 * config.index_head_dim + 2) * config.index_n_heads * (tokens // 4)
    return total


def head_flops(config: ModelConfig) -> float:
    """Operations of one row of logits."""
    return 2.0 * config.hidden_size * config.vocab_size


def prompt_flops(config: ModelConfig, start: int, tokens: int) -> float:
    """Operations of `tokens` prompt tokens after `start` others, and of one row of logits."""
    middle = [start + round((i + 0.5) * tokens / 64) for i in range(64)]
    context = sum(context_flops(config, max(1, n)) for n in middle) / 64
    return tokens * (token_flops(config) + context) + head_flops(config)
