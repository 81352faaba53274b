"""Experts as the checkpoint's tensors in tests: views of an expert's bytes by name, and their fp32 values."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from workers.experts.layout import ExpertShape
from workers.reference.quant import fp4_dequant


def parts_of(shape: ExpertShape, expert: Tensor) -> dict[str, Tensor]:
    """Views of `expert` uint8 `[expert_bytes]`: `w1.weight` (codes `[N, K/2]`), `w1.scale` (`[N, K/32]`), and so on."""
    views = {}
    for name, (codes, scales) in shape.offsets().items():
        rows = shape.hidden if name == "w2" else shape.inner
        views[f"{name}.weight"] = expert[codes : codes + shape.codes_bytes].view(rows, -1)
        views[f"{name}.scale"] = expert[scales : scales + shape.scales_bytes].view(rows, -1)
    return views


def write_expert(shape: ExpertShape, tensors: Mapping[str, Tensor], expert: Tensor) -> None:
    """Writes tensors named as in `parts_of`, of any 1-byte dtype, into `expert` uint8 `[expert_bytes]`."""
    for name, view in parts_of(shape, expert).items():
        view.copy_(tensors[name].view(torch.uint8))


def matrix_of(shape: ExpertShape, expert: Tensor, name: str) -> Tensor:
    """fp32 `[N, K]` of matrix `name` of `expert` uint8 `[expert_bytes]`."""
    views = parts_of(shape, expert)
    return fp4_dequant(views[f"{name}.weight"].view(torch.int8), views[f"{name}.scale"])
