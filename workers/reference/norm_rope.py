"""RMSNorm and the partial interleaved rotary embedding with YaRN.

Rotation acts on interleaved pairs (2i, 2i+1) of the LAST `2 * cos.shape[-1]` dimensions of a head. Frequencies belong
to the layer kind, not to the tensor: in C4 and C128 layers the queries, window keys, compressed keys and indexer
vectors all use `compress_rope_theta` with YaRN; sliding-only layers (and MTP) use plain `rope_theta`. There is no
magnitude scaling (mscale is 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from workers.model.config import LayerKind, ModelConfig


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last axis, computed in fp32 with one rounding to the dtype of `x`."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed if weight is None else normed * weight.float()).to(x.dtype)


def rope_frequencies(config: ModelConfig, kind: LayerKind) -> Tensor:
    """fp32 `[rope/2]` radians per position of a layer kind, on the CPU. Source: official `precompute_freqs_cis`."""
    dim = config.qk_rope_head_dim
    theta = config.rope_theta if kind is LayerKind.SLIDING else config.compress_rope_theta
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if kind is LayerKind.SLIDING:
        return frequencies
    scaling = config.rope_scaling

    def turns_dim(turns: float) -> float:
        """Dimension whose wavelength makes `turns` turns within the original context."""
        return dim * math.log(scaling.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_dim(scaling.beta_fast)), 0)
    high = min(math.ceil(turns_dim(scaling.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / scaling.factor * ramp


def rope_cos_sin(config: ModelConfig, kind: LayerKind, positions: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 `(cos, sin)`, each `[..., rope/2]`, of integer `positions [...]`.

    NOTE: the angle is an fp32 product on purpose; fp64 angles differ from the official tables at positions near 1e6.
    """
    frequencies = rope_frequencies(config, kind).to(positions.device)
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the last `2 * cos.shape[-1]` dimensions of `x`; `apply_rope(x, cos, -sin)` undoes it.

    `cos` and `sin` `[..., rope/2]` broadcast against the leading axes of `x` (insert a head axis where `x` has one).
    """
    rope_dim = 2 * cos.shape[-1]
    plain, rotary = x[..., : x.shape[-1] - rope_dim], x[..., x.shape[-1] - rope_dim :]
    even, odd = rotary.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)
    return torch.cat((plain, rotated.to(x.dtype)), dim=-1)
