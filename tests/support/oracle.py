"""transformers' `DeepseekV4ForCausalLM` carrying our weights: the independent implementation that logits are held to.

In fp32 with eager attention it computes the same function as ours except that it has no Hadamard transform on indexer
vectors (orthonormal on both sides, so scores agree up to rounding), adds 1e-20 to the routing sum, and applies the
routing weight after the down projection. It has no MTP block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from workers.model.config import ModelConfig

_RENAMES = (
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^hc_head_(fn|base|scale)$", r"model.hc_head.hc_\1"),
    (r"^layers\.", "model.layers."),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.self_attn\.wkv\.", ".self_attn.kv_proj."),
    (r"\.wo_a\.", ".o_a_proj."),
    (r"\.wo_b\.", ".o_b_proj."),
    (r"\.indexer\.compressor\.", ".compressor.indexer."),
    (r"\.self_attn\.indexer\.weights_proj\.", ".self_attn.compressor.indexer.scorer.weights_proj."),
    (r"\.self_attn\.indexer\.", ".self_attn.compressor.indexer."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"(\.compressor\..*?)\bwkv\.", r"\1kv_proj."),
    (r"(\.compressor\..*?)\bwgate\.", r"\1gate_proj."),
    (r"(\.compressor\..*?)\bape$", r"\1position_bias"),
    (r"(\.compressor\.(?:indexer\.)?)norm\.", r"\1kv_norm."),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
)
_EXPERT = re.compile(r"^layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight$")


def oracle_config(config: ModelConfig) -> DeepseekV4Config:
    """The same architecture as a transformers config."""
    scaling = config.rope_scaling
    return DeepseekV4Config(
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        head_dim=config.head_dim,
        qk_rope_head_dim=config.qk_rope_head_dim,
        q_lora_rank=config.q_lora_rank,
        o_groups=config.o_groups,
        o_lora_rank=config.o_lora_rank,
        sliding_window=config.sliding_window,
        index_n_heads=config.index_n_heads,
        index_head_dim=config.index_head_dim,
        index_topk=config.index_topk,
        n_routed_experts=config.n_routed_experts,
        n_shared_experts=config.n_shared_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        num_hash_layers=config.num_hash_layers,
        routed_scaling_factor=config.routed_scaling_factor,
        swiglu_limit=config.swiglu_limit,
        hc_mult=config.hc_mult,
        hc_sinkhorn_iters=config.hc_sinkhorn_iters,
        hc_eps=config.hc_eps,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope_theta,
        compress_rope_theta=config.compress_rope_theta,
        rope_parameters={
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        max_position_embeddings=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        compress_ratios=list(config.compress_ratios),
        attn_implementation="eager",
        experts_implementation="eager",
    )


def oracle_state_dict(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names to transformers names; MTP tensors are dropped, experts stacked as gate-up and down."""
    state: dict[str, Tensor] = {}
    experts: dict[tuple[int, str], dict[int, Tensor]] = {}
    for name, tensor in named.items():
        if name.startswith("mtp."):
            continue
        if expert := _EXPERT.match(name):
            experts.setdefault((int(expert[1]), expert[3]), {})[int(expert[2])] = tensor
            continue
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        state[name] = tensor
    stacked = {key: torch.stack([by_id[i] for i in sorted(by_id)]) for key, by_id in experts.items()}
    for layer in {layer for layer, _ in stacked}:
        prefix = f"model.layers.{layer}.mlp.experts"
        state[f"{prefix}.gate_up_proj"] = torch.cat((stacked[layer, "w1"], stacked[layer, "w3"]), dim=1)
        state[f"{prefix}.down_proj"] = stacked[layer, "w2"]
    return state


def oracle_model(config: ModelConfig, named: Mapping[str, Tensor]) -> DeepseekV4ForCausalLM:
    """The transformers model in fp32 with our named weights (official names, dequantised), matched one to one."""
    model = DeepseekV4ForCausalLM(oracle_config(config)).float().eval()
    model.load_state_dict(oracle_state_dict(named), strict=True)
    return model


@torch.no_grad()
def oracle_prefill(model: DeepseekV4ForCausalLM, token_ids: Tensor) -> Tensor:
    """Logits `[B, T, V]` of whole sequences without a cache."""
    return model(token_ids, use_cache=False).logits


@torch.no_grad()
def oracle_chunks(model: DeepseekV4ForCausalLM, token_ids: Tensor, chunks: list[int]) -> Tensor:
    """Logits `[B, T, V]` computed through transformers' cache in chunks of the given sizes (all 1: decode)."""
    cache, logits = None, []
    for chunk in token_ids.split(chunks, dim=1):
        out = model(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
