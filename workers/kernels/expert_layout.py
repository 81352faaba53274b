"""Where the six parts of one expert lie inside a slot of the expert slab. Torch only.

Owns: sizes and offsets of a slot, and packing the checkpoint's tensors into one. Does not own: which expert is in which
slot. A slot is w1 codes | w3 codes | w2 codes | w1 scales | w3 scales | w2 scales, each row-major and byte for byte as
in the checkpoint, so that a slot can be read straight from disk (V4-Flash: 13,369,344 bytes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SCALE_GROUP = 32
"""Columns that share one e8m0 scale."""

SLOT_ALIGNMENT = 16
"""Every part starts at a multiple of this, which is the width of one load."""

TIER_SHIFT = 24
"""A code of `ExpertSlab.table` is `tier << TIER_SHIFT | index`."""

TIER_DEVICE, TIER_HOST, TIER_PEER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Sizes of one expert of hidden size `hidden` (D) and inner size `inner` (I), both multiples of 128."""

    hidden: int
    inner: int

    def __post_init__(self) -> None:
        if self.hidden % 128 or self.inner % 128:
            raise ValueError(f"expert of {self.hidden} x {self.inner}: sizes must be multiples of 128")

    @property
    def code_bytes(self) -> int:
        """Bytes of one projection's packed codes; w1 starts at 0, w3 after it, then w2."""
        return self.hidden * self.inner // 2

    @property
    def scale_bytes(self) -> int:
        """Bytes of one projection's scales."""
        return self.hidden * self.inner // SCALE_GROUP

    @property
    def expert_bytes(self) -> int:
        return 3 * (self.code_bytes + self.scale_bytes)

    @property
    def parts(self) -> tuple[tuple[str, int, tuple[int, int]], ...]:
        """Name, first byte and shape in bytes of every part, in order."""
        wide, inner = self.hidden, self.inner
        shapes = {
            "w1.weight": (inner, wide // 2),
            "w3.weight": (inner, wide // 2),
            "w2.weight": (wide, inner // 2),
            "w1.scale": (inner, wide // SCALE_GROUP),
            "w3.scale": (inner, wide // SCALE_GROUP),
            "w2.scale": (wide, inner // SCALE_GROUP),
        }
        found, start = [], 0
        for name, shape in shapes.items():
            found.append((name, start, shape))
            start += shape[0] * shape[1]
        return tuple(found)

    def pack(self, tensors: dict[str, Tensor], out: Tensor) -> None:
        """Write the checkpoint tensors `w1.weight` .. `w2.scale` (any 1-byte dtype) of one expert into slot `out`."""
        for name, start, shape in self.parts:
            part = tensors[name]
            if tuple(part.shape) != shape:
                raise ValueError(f"{name} of an expert has shape {tuple(part.shape)}, expected {shape}")
            raw = part.contiguous().view(torch.uint8).flatten()
            out[start : start + raw.numel()].copy_(raw)

    def unpack(self, slot: Tensor) -> dict[str, Tensor]:
        """Views of the parts of one slot (uint8)."""
        return {name: slot[at : at + shape[0] * shape[1]].view(shape) for name, at, shape in self.parts}


@dataclass(frozen=True, slots=True)
class ExpertSlab:
    """Where the experts of one layer are. `table` may change between steps; the tensors may not move."""

    base: Tensor
    """uint8 device tensor [num_slots * expert_bytes]."""
    table: Tensor
    """int32 device tensor [E]: `tier << 24 | index` per expert; index counts slots of that tier."""
    host: Any = None
    """Pinned host memory mapped for the device, the same slots; None without that tier."""
    peer: Any = None
    """Another GPU's slab: anything with `data_ptr()` and `dtype`; None without that tier."""
