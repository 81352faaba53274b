"""A model small enough to write in milliseconds, with every layer type and dimensions beside the block sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from workers.checkpoint.names import Encoding, tensor_table
from workers.checkpoint.save import save_official
from workers.model.config import ModelConfig
from workers.model.presets import NANO

TINY = dataclasses.replace(
    NANO,
    hidden_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=96,
    qk_rope_head_dim=32,
    q_lora_rank=48,
    o_lora_rank=40,
    index_head_dim=32,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hash_layers=1,
    vocab_size=96,
    compress_ratios=(0, 4, 128, 0),
    model_name="tiny",
)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """fp32 values for every tensor of the config (int64 for tables)."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, spec in tensor_table(config).items():
        if spec.encoding is Encoding.I64:
            tensors[name] = torch.randint(0, config.n_routed_experts, spec.shape, generator=generator)
        else:
            tensors[name] = torch.randn(spec.shape, generator=generator) * 0.05
    return tensors


@pytest.fixture
def tiny_tensors(seed: int) -> dict[str, Tensor]:
    return random_tensors(TINY, seed)


@pytest.fixture
def tiny_dir(tmp_path: Path, tiny_tensors: dict[str, Tensor]) -> Path:
    """A sound checkpoint of TINY, one shard per block."""
    save_official(tmp_path / "tiny", TINY, tiny_tensors)
    return tmp_path / "tiny"


@pytest.fixture
def file_bytes() -> Callable[[Path], dict[str, bytes]]:
    """Reads all files of a directory by name."""
    return lambda directory: {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
