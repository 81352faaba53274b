"""Small models with the shapes that kernels need, whose weights are exactly FP8, FP4 and bf16."""

from __future__ import annotations

import dataclasses

from kvstore.pools.aggregate import KVPools
from workers.checkpoint.names import tensor_table
from workers.checkpoint.quant import decode, encode
from workers.gpu.kernel_set import MakeKernels
from workers.gpu.loading import convert
from workers.gpu.model import GpuModel
from workers.model.config import ModelConfig
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.weights import ModelWeights, random_named_weights

NATIVE = Precision.native()

TINY = dataclasses.replace(
    NANO,
    num_hidden_layers=4,
    compress_ratios=(0, 4, 128, 4),
    num_hash_layers=2,
    num_attention_heads=4,
    hidden_size=128,
    index_topk=16,
    n_routed_experts=6,
    num_experts_per_tok=2,
    vocab_size=128,
    max_position_embeddings=2048,
    num_nextn_predict_layers=0,
)
"""Every layer kind and both routers at the smallest sizes that have kernels."""


def stored_weights(config: ModelConfig, seed: int = 3) -> ModelWeights:
    """Random weights as a checkpoint would give them back: every value fits its stored form."""
    table = tensor_table(config)
    named = {}
    for name, tensor in random_named_weights(config, seed, mtp=False).items():
        pair = encode(table[name], tensor)
        named[name] = decode(pair.form, pair.weight, pair.scale)
    return ModelWeights.from_named(config, named)


def make_gpu_model(
    config: ModelConfig,
    weights: ModelWeights,
    precision: Precision,
    pools: KVPools,
    *,
    kernels: tuple[MakeKernels, MakeKernels] | None = None,
    **options: object,
) -> GpuModel:
    """A `GpuModel` of fp32 weights, as `PagedRun` makes its model."""
    more = {} if kernels is None else {"kernels": kernels}
    return GpuModel(config, convert(config, weights, pools.device), pools, **options, **more)  # type: ignore[arg-type]
