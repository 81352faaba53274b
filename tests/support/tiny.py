"""Small model configs and seeded token ids: every layer type at sizes that run in milliseconds on one core."""

from __future__ import annotations

import dataclasses

import torch

from workers.model.config import ModelConfig, RopeScaling
from workers.model.weights import ModelWeights, random_named_weights

FLASH_MIX = (0, 0, 4, 128, 4, 128, 4)
"""Flash's order: two sliding-only layers, then C4 and C128 in turn, ending with C4."""

PRO_MIX = (128, 128, 4, 128, 4)
"""Pro's order: no sliding-only layer."""

_FLASH = ModelConfig(
    hidden_size=64,
    num_hidden_layers=len(FLASH_MIX),
    num_attention_heads=4,
    head_dim=80,
    qk_rope_head_dim=16,
    q_lora_rank=48,
    o_groups=2,
    o_lora_rank=32,
    sliding_window=128,
    index_n_heads=4,
    index_head_dim=32,
    index_topk=512,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=3,
    moe_intermediate_size=32,
    num_hash_layers=3,
    routed_scaling_factor=1.5,
    swiglu_limit=10.0,
    hc_mult=4,
    hc_sinkhorn_iters=20,
    hc_eps=1e-6,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    compress_rope_theta=160000.0,
    rope_scaling=RopeScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=256),
    max_position_embeddings=4096,
    vocab_size=96,
    bos_token_id=0,
    eos_token_id=1,
    num_nextn_predict_layers=1,
    compress_ratios=(*FLASH_MIX, 0),
)


def tiny_config(layers: tuple[int, ...] = FLASH_MIX, **changes: object) -> ModelConfig:
    """A tiny config with the given trunk compression ratios (plus one sliding-only MTP entry) and field changes."""
    mix = {"num_hidden_layers": len(layers), "compress_ratios": (*layers, 0)}
    return dataclasses.replace(_FLASH, **(mix | changes))


def tiny_pro_config(**changes: object) -> ModelConfig:
    """Pro's layer mix and ratios: more heads and groups, a larger routed scale, fewer hash layers than Flash's mix."""
    pro = {
        "num_attention_heads": 8,
        "o_groups": 4,
        "q_lora_rank": 32,
        "index_n_heads": 2,
        "routed_scaling_factor": 2.5,
        "num_hash_layers": 1,
        "n_routed_experts": 12,
        "num_experts_per_tok": 2,
    }
    return tiny_config(PRO_MIX, **(pro | changes))


def tiny_weights(config: ModelConfig, seed: int = 0) -> ModelWeights:
    """Random weights with an MTP block."""
    return ModelWeights.from_named(config, random_named_weights(config, seed))


def random_tokens(config: ModelConfig, num_tokens: int, seed: int, batch: int = 1) -> torch.Tensor:
    """`[batch, num_tokens]` uniform ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (batch, num_tokens), generator=generator)
