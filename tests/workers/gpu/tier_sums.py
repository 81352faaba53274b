"""A kernel that reads every expert where a table says, as the expert products do, and sums its bytes."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _sum_experts(table, host, peer, sums, EXPERT_BYTES: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (experts, blocks of an expert)."""
    expert = tl.program_id(0)
    code = tl.load(table + expert)
    offset = (code & 0xFFFFFF).to(tl.int64) * EXPERT_BYTES
    start = tl.where((code >> 24) == 2, peer + offset, host + offset)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(sums + expert, tl.sum(tl.load(start + at).to(tl.int64), 0))


def sum_experts(table: Tensor, host: Tensor, peer: Tensor, sums: Tensor, expert_bytes: int) -> None:
    """`sums` int64 [E] grows by the bytes of each expert of `table` int32 [E]."""
    grid = (table.numel(), expert_bytes // BLOCK)
    _sum_experts[grid](table, host, peer, sums, EXPERT_BYTES=expert_bytes, BLOCK=BLOCK)
