"""`ModelConfig` to `KVSpec`: the one place where the model tells the KV store which rows it keeps."""

from __future__ import annotations

from kvstore.spec import KVFormat, KVSpec, build_kv_spec
from workers.model.config import ModelConfig


def kv_spec(config: ModelConfig, fmt: KVFormat = "fp8") -> KVSpec:
    """Manifest of the trunk's pools: `fp8` is the stored format of the official release, `fp32` the exactness mode."""
    return build_kv_spec(
        [kind.value for kind in config.layer_kinds],
        head_dim=config.head_dim,
        rope_dim=config.qk_rope_head_dim,
        index_head_dim=config.index_head_dim,
        window=config.sliding_window,
        fmt=fmt,
    )
