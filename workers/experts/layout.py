"""Where experts' bytes lie: the parts of one expert, and the codes that say where an expert is. Torch-free.

Owns: sizes and offsets of an expert, tiers and codes of places, the operands by which kernels find a layer's experts.
Does not own: which expert is where (`slots.py`), bytes. One expert is w1 codes | w3 codes | w2 codes | w1 scales |
w3 scales | w2 scales, each row-major and byte for byte as in the checkpoint, so that a place can be filled straight
from disk (V4-Flash: 13,369,344 bytes).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers.checkpoint.names import FP4_GROUP

if TYPE_CHECKING:
    from torch import Tensor

SIZE_UNIT = 128
"""What sizes must be multiples of: then every part starts at a multiple of 16 bytes, the width of one load."""

TIER_SHIFT = 24
"""A code is `tier << 24 | index`: up to 2^24 places a tier."""


class Tier(enum.IntEnum):
    """Where a kernel finds an expert; the values are those that the kernels compare with."""

    SLAB = 0
    """Slot of this GPU's slab."""
    HOST = 1
    """Index into the pinned host bank, read over the host link."""
    PEER = 2
    """Slot of the other GPU's slab, read over NVLink."""


def code_of(tier: Tier, index: int) -> int:
    """The table entry of a place. Raises ValueError for an index that does not fit."""
    if not 0 <= index < 1 << TIER_SHIFT:
        raise ValueError(f"index {index} does not fit {TIER_SHIFT} bits")
    return int(tier) << TIER_SHIFT | index


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """Sizes of one expert of hidden size `hidden` (D) and inner size `inner` (I)."""

    hidden: int
    inner: int

    def __post_init__(self) -> None:
        if self.hidden % SIZE_UNIT or self.inner % SIZE_UNIT:
            raise ValueError(f"expert of {self.hidden} x {self.inner}: sizes must be multiples of {SIZE_UNIT}")

    @property
    def codes_bytes(self) -> int:
        """Bytes of one matrix's packed e2m1 codes; all three matrices have D * I elements."""
        return self.hidden * self.inner // 2

    @property
    def scales_bytes(self) -> int:
        """Bytes of one matrix's e8m0 scales."""
        return self.hidden * self.inner // FP4_GROUP

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert."""
        return 3 * (self.codes_bytes + self.scales_bytes)

    def offsets(self) -> dict[str, tuple[int, int]]:
        """(codes, scales): where each matrix begins inside an expert, bytes."""
        codes, scales = self.codes_bytes, self.scales_bytes
        order = ("w1", "w3", "w2")
        return {name: (i * codes, 3 * codes + i * scales) for i, name in enumerate(order)}


@dataclass(frozen=True, slots=True)
class ExpertSlab:
    """Where one layer's experts are: what `code_of` gives, in `table`, and the memory of every tier.

    `base` uint8 `[slots * expert_bytes]` belongs to the whole model; a layer's table points into it. Tables may change
    between steps, the memory may not move.
    """

    base: Tensor
    table: Tensor
    """int32 `[E]` on the device."""
    host: Any = None
    """Pinned host memory mapped for the device, places of the same size; None without that tier."""
    peer: Any = None
    """Another GPU's slab: anything with `data_ptr()` and `dtype`; None without that tier."""
    heat: Tensor | None = None
    """int32 `[E]` on the device, the steps that needed each expert; None where nobody asks."""
    first_scratch: int = 0
    num_scratch: int = 0
    """Places of `base` to which a decode step brings experts of the host tier; whoever finds none is read in place."""
