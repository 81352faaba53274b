"""`ModelConfig`: the shape of one DeepSeek-V4 model, read strictly from `config.json`.

Owns: field names and cross-checks of the architecture; the layer kinds derived from `compress_ratios`; RoPE parameters
per layer kind. Does not own: tensor names (`workers/checkpoint/names.py`), KV byte layouts (`workers/model/kv_layout.py`).
Torch-free. Field names are those of the official `config.json` (DeepSeek-V4-Flash and -Pro releases).
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import BadConfig

WEIGHT_BLOCK = 128
"""Rows and columns that share one FP8 weight scale, and columns of one activation scale (official release)."""

PAGE_TOKENS = 256
"""Tokens of one logical KV page: divisible by 4 and 128, so one page table serves every compressed pool."""


class LayerKind(enum.Enum):
    """How one layer attends beyond its sliding window; the value is its compression ratio."""

    SLIDING = 0
    C4 = 4
    C128 = 128


class RouterKind(enum.Enum):
    """How a layer's MoE picks experts: by token-id table or by learned scores."""

    HASH = "hash"
    LEARNED = "learned"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN parameters of the compressed layers (`rope_scaling` in config.json)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model's architecture. Raises `BadConfig` naming the key when fields contradict each other."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    num_nextn_predict_layers: int
    compress_ratios: tuple[int, ...]
    expert_dtype: str | None = "fp4"
    model_name: str = "deepseek-v4"

    @property
    def nope_head_dim(self) -> int:
        """Dimensions of a head that carry no rotary position."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each trunk layer (the entries of `compress_ratios` beyond them belong to MTP or draft stages)."""
        return tuple(LayerKind(r) for r in self.compress_ratios[: self.num_hidden_layers])

    def layers_of(self, *kinds: LayerKind) -> tuple[int, ...]:
        """Trunk layer indices of the given kinds, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind in kinds)

    def router_kind(self, layer: int) -> RouterKind:
        """`HASH` for the first `num_hash_layers` layers."""
        return RouterKind.HASH if layer < self.num_hash_layers else RouterKind.LEARNED
