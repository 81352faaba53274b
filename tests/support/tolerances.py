"""How close is close enough, per recipe, and the measures it is stated in."""

from __future__ import annotations

import torch
from torch import Tensor

LOGITS_FP32 = 1e-4
"""Largest relative error of any position's logits between two fp32 implementations of the model."""

OP_FP32 = 1e-5
"""Largest relative error between two fp32 formulations of one op."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`|actual - expected| / |expected|` over everything."""
    return float((actual - expected).norm() / expected.norm())


def worst_position_error(actual: Tensor, expected: Tensor) -> float:
    """Largest relative error of one position of logits `[..., T, V]`; NaN anywhere yields infinity."""
    error = (actual - expected).norm(dim=-1) / expected.norm(dim=-1)
    return float(torch.nan_to_num(error, nan=float("inf")).max())
