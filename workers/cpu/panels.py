"""Weights as the CPU matrix product reads them: column panels, k outermost, in the smallest form that is exact.

FP4, FP8 and BF16 checkpoint tensors are exact in bf16 once multiplied by their power-of-two scales, and FP4 tensors go
back to e2m1 codes with a scale per 32: packing loses nothing. A decode step is bound by these bytes as soon as its
weights outgrow the caches. A weight with any other value (fp32 test weights, mHC) stays fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workers.cpu.block_product import BF16, FP4, FP32, HAS_FP4, PANEL
from workers.cpu.simd import LANES
from workers.reference.quant import fp4_dequant, fp4_quant

FP4_GROUP = 32
"""Inputs that share one e8m0 scale in an FP4 weight."""


def padded(columns: int) -> int:
    """Columns rounded up to whole vectors: the row length that a product's output needs."""
    return -(-columns // LANES) * LANES


@dataclass(frozen=True, slots=True)
class Panels:
    """One packed weight. `memory` owns the bytes behind `address`."""

    memory: np.ndarray
    element: int
    columns: int
    size: int

    @property
    def address(self) -> int:
        """First byte; valid while this object lives."""
        return int(self.memory.ctypes.data)


def pack_panels(weight: torch.Tensor, *, allow_fp4: bool = False, widest: bool = False) -> Panels:
    """`[N, K]` fp32 to panels: `PANEL` columns (outputs) each, `[K, width]` inside, the last one of `padded` width.

    `allow_fp4` tries e2m1 codes first (whole panels only); `widest` keeps fp32.
    """
    values = weight.detach().float().contiguous()
    outputs, size = values.shape
    if allow_fp4 and HAS_FP4 and not widest and size % FP4_GROUP == 0 and outputs % PANEL == 0:
        codes, scales = fp4_quant(values, FP4_GROUP)
        if torch.equal(fp4_dequant(codes, scales, FP4_GROUP), values):
            halves = (codes.view(torch.uint8).numpy(), scales.numpy())  # [N, K/2] as stored, [N, K/32]
            return Panels(_columns(halves), FP4, outputs, size)
    bits = values.numpy().view(np.uint32)
    if widest or (bits & 0xFFFF).any():
        return Panels(_columns((values.numpy(),)), FP32, outputs, size)
    return Panels(_columns(((bits >> 16).astype(np.uint16),)), BF16, outputs, size)


def _columns(parts: tuple[np.ndarray, ...]) -> np.ndarray:
    """Panels of one or more `[N, X]` arrays of one dtype; in a panel the parts follow each other as `[X, width]`."""
    total = padded(parts[0].shape[0])
    pieces = []
    for first in range(0, total, PANEL):
        for part in parts:
            wide = np.zeros((min(PANEL, total - first), part.shape[1]), dtype=part.dtype)
            rows = part[first : first + PANEL]
            wide[: len(rows)] = rows
            pieces.append(wide.T.reshape(-1))
    return np.ascontiguousarray(np.concatenate(pieces))
