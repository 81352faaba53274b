"""Rotation tables on a device: fp32 `[P, rope]` = cos | sin of every position, one per family of layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.config import LayerKind, ModelConfig
from workers.reference.norm_rope import rope_cos_sin

BLOCK_POSITIONS = 1 << 16
"""Positions computed at a time: bounds host memory at 64 MiB whatever the context."""


@dataclass(frozen=True, slots=True)
class RopeTables:
    """`plain` for sliding-only layers, `compressed` (YaRN) for C4 and C128; rows are positions."""

    plain: Tensor
    compressed: Tensor

    @classmethod
    def build(cls, config: ModelConfig, num_positions: int, device: torch.device | str) -> RopeTables:
        """Tables of positions [0, num_positions), computed on the host as the reference does."""
        kinds = (LayerKind.SLIDING, LayerKind.C4)
        return cls(*(_table(config, kind, num_positions, device) for kind in kinds))

    def of(self, kind: LayerKind) -> Tensor:
        """The table of a layer kind."""
        return self.plain if kind is LayerKind.SLIDING else self.compressed


def _table(config: ModelConfig, kind: LayerKind, num_positions: int, device: torch.device | str) -> Tensor:
    table = torch.empty(num_positions, config.qk_rope_head_dim, device=device)
    for start in range(0, num_positions, BLOCK_POSITIONS):
        positions = torch.arange(start, min(start + BLOCK_POSITIONS, num_positions))
        table[start : start + len(positions)] = torch.cat(rope_cos_sin(config, kind, positions), dim=-1)
    return table
