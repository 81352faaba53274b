"""transformers' DeepseekV4 in the same process on the same GPU: what anyone gets who installs it. Imports it lazily.

Owns: a model of a few real-shape layers with random bf16 weights, timed per layer. It has a small vocabulary, so that
embedding and head take next to nothing; ours are counted. Every expert implementation that runs is measured. A host
without transformers gets a `Peer` that says so.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from cluster.bench.floors import trunk
from cluster.bench.results import Peer
from workers.checkpoint.synth import cut_layers
from workers.model.config import ModelConfig

LAYERS = (3, 4)
"""A C128 and a C4 layer of V4-Flash, both with learned routing."""

EXPERTS = ("grouped_mm", "batched_mm", "eager")
VOCABULARY = 1024
DECODE_STEPS = 9
PREFILL_RUNS = 3

SAME_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "num_hash_layers",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
    "max_position_embeddings",
)
"""Fields whose names and meanings are transformers' too."""


def measure_peer(config: ModelConfig, *, context: int, prefill_tokens: int, seed: int = 0) -> Peer:
    """Milliseconds per layer; device memory is free again afterwards. Never raises for what transformers cannot do."""
    try:
        import transformers
    except ImportError as exc:
        return Peer(version="", failure=f"transformers cannot be imported: {exc}")
    layers = [i for i in LAYERS if i < config.num_hidden_layers]
    kinds = [config.layer_kinds[i].value for i in layers]
    torch.cuda.reset_peak_memory_stats()
    model, failure = None, ""
    decode: dict[str, float] = {}
    prefill: dict[str, float] = {}
    try:
        model = _model(cut_layers(trunk(config), layers), seed)
        decode, prefill = _variants(model, context, prefill_tokens)
    except Exception as exc:  # any error of the library ends the comparison, not the benchmark
        failure = f"{type(exc).__name__}: {exc}"[:400]
    peak = torch.cuda.max_memory_allocated()
    del model
    gc.collect()
    torch.cuda.empty_cache()
    if failure:
        return Peer(version=transformers.__version__, failure=failure)
    return Peer(
        version=transformers.__version__,
        layer_kinds=kinds,
        context=context,
        decode_ms={name: ms / len(layers) for name, ms in decode.items()},
        prefill_tokens=prefill_tokens,
        prefill_ms={name: ms / len(layers) for name, ms in prefill.items()},
        peak_bytes=peak,
    )


def transformers_config(config: ModelConfig) -> Any:
    """The same shape with a small vocabulary."""
    from transformers import DeepseekV4Config

    scaling = config.rope_scaling
    make: Any = DeepseekV4Config
    return make(
        **{name: getattr(config, name) for name in SAME_NAMES},
        vocab_size=VOCABULARY,
        compress_ratios=list(config.compress_ratios),
        rope_parameters={
            "rope_type": "yarn",
            "factor": scaling.factor,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        },
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="eager",
    )


def _model(config: ModelConfig, seed: int, device: str = "cuda") -> Any:
    """Built without initialisation, then filled in place: the library's own takes minutes at these shapes."""
    from transformers import DeepseekV4ForCausalLM

    with torch.device("meta"):
        model: Any = DeepseekV4ForCausalLM(transformers_config(config))
    model = model.to(torch.bfloat16).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.dtype.is_floating_point and "inv_freq" not in name:
            std = 0.02 if value.dim() < 2 else value.shape[-1] ** -0.5
            value.data.normal_(1.0 if name.endswith("norm.weight") else 0.0, std, generator=generator)
        elif not value.dtype.is_floating_point:
            value.data.zero_()
    _restore_rotary(model, config, device)
    return model.eval()


def _restore_rotary(model: Any, config: ModelConfig, device: str) -> None:
    """Rotary frequencies are buffers that the constructor computes, which `meta` leaves out."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

    fresh = modeling.DeepseekV4RotaryEmbedding(transformers_config(config))
    values = dict(fresh.named_buffers())
    for name, buffer in model.named_buffers():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in values and buffer.shape == values[leaf].shape:
            buffer.data.copy_(values[leaf].to(device))


def _variants(model: Any, context: int, prefill_tokens: int) -> tuple[dict[str, float], dict[str, float]]:
    """(decode, prefill) milliseconds of the whole small model with each expert implementation that can run."""
    prefill = _by_variant(model, lambda: _prefill_ms(model, prefill_tokens))
    model.set_experts_implementation(min(prefill, key=lambda name: prefill[name]))
    with torch.inference_mode():
        cache = model(_ids(model, context), use_cache=True, logits_to_keep=1).past_key_values
    return _by_variant(model, lambda: _decode_ms(model, cache)), prefill


def _by_variant(model: Any, measure: Callable[[], float]) -> dict[str, float]:
    """Milliseconds with each expert implementation that can run."""
    found, failures = {}, []
    for name in EXPERTS:
        try:
            model.set_experts_implementation(name)
            found[name] = measure()
        except Exception as exc:  # a variant that cannot run is not a competitor; the others still are
            failures.append(f"{name}: {type(exc).__name__}: {exc}")
    if not found:
        raise RuntimeError("; ".join(failures))
    return found


def _ids(model: Any, tokens: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (1, tokens), device=model.device)


@torch.inference_mode()
def _prefill_ms(model: Any, tokens: int) -> float:
    ids = _ids(model, tokens)
    return min(_wall_ms(model, lambda: model(ids, use_cache=True, logits_to_keep=1)) for _ in range(PREFILL_RUNS))


@torch.inference_mode()
def _decode_ms(model: Any, cache: Any) -> float:
    ids = _ids(model, 1)
    times = [_wall_ms(model, lambda: model(ids, past_key_values=cache, use_cache=True)) for _ in range(DECODE_STEPS)]
    return statistics.median(times)


def _wall_ms(model: Any, action: Callable[[], Any]) -> float:
    _synchronize(model)
    began = time.perf_counter()
    action()
    _synchronize(model)
    return 1e3 * (time.perf_counter() - began)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
