"""Linear layers with the official activation quantisation as an option."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from workers.reference.quant import fp8_fake_quant

ACTIVATION_GROUP = 128
"""Input columns that share one activation scale (official `act_quant` block)."""


def linear(x: Tensor, weight: Tensor, *, act_fp8: bool) -> Tensor:
    """`x [..., K] @ weight [N, K].T`; with `act_fp8` the input first passes e4m3 with a power-of-two scale per 128.

    FP8 and FP4 weights times their scales are exact in fp32, so a dequantised weight here is the official GEMM up to
    its bf16 output rounding.
    """
    return F.linear(fp8_fake_quant(x, ACTIVATION_GROUP) if act_fp8 else x, weight)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Block-diagonal product of the output projection: `x [..., G, K]`, `weight [G, N, K]` to `[..., G, N]`.

    Its activations are never quantised (the official code runs wo_a dequantised, per group).
    """
    tokens = x.reshape(-1, *x.shape[-2:]).transpose(0, 1)  # [G, T, K]
    out = tokens @ weight.transpose(-1, -2)  # [G, T, N]
    return out.transpose(0, 1).reshape(*x.shape[:-1], weight.shape[-2])
