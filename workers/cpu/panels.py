"""Weights as the CPU matrix product reads them: column panels, k outermost, bf16 wherever that is exact.

FP4, FP8 and BF16 checkpoint tensors are exact in bf16 once multiplied by their power-of-two scales, so packing loses
nothing and halves the bytes read per token. A weight with any other value (fp32 test weights, mHC) stays fp32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workers.cpu.simd import LANES, PANEL


def padded(columns: int) -> int:
    """Columns rounded up to whole vectors: the row length that a product's output needs."""
    return -(-columns // LANES) * LANES


@dataclass(frozen=True, slots=True)
class Panels:
    """One packed weight. `memory` owns the bytes behind `address`."""

    memory: np.ndarray
    element_bytes: int
    columns: int
    size: int

    @property
    def address(self) -> int:
        """First byte; valid while this object lives."""
        return int(self.memory.ctypes.data)


def pack_panels(weight: torch.Tensor, *, keep_fp32: bool = False) -> Panels:
    """`[N, K]` fp32 to panels: `PANEL` columns (outputs) each, `[K, width]` inside, the last one of `padded` width."""
    values = np.ascontiguousarray(weight.detach().float().numpy())
    outputs, size = values.shape
    bits = values.view(np.uint32)
    exact = not keep_fp32 and not (bits & 0xFFFF).any()
    source = (bits >> 16).astype(np.uint16) if exact else values
    total = padded(outputs)
    wide = np.zeros((total, size), dtype=source.dtype)
    wide[:outputs] = source
    parts = [wide[first : min(first + PANEL, total)].T.reshape(-1) for first in range(0, total, PANEL)]
    memory = np.ascontiguousarray(np.concatenate(parts))
    return Panels(memory, 2 if exact else 4, outputs, size)
