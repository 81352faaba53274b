"""Brings weights to the L2 cache ahead of the kernel that reads them: no result, no copy, a hint to the memory system.

Floor: the bytes at copy bandwidth, beside whatever else runs. A program is one warp that issues bulk prefetches of 4
KiB and ends, so the launch takes next to nothing of the multiprocessors. Before sm_90 there are no bulk prefetches and
one instruction brings a line of 128 bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import L2_LINE_BYTES, has_pdl, prefetch_l2

BULK_BYTES = 4096
"""Bytes of one bulk prefetch; also written out in the kernel's inline PTX."""

LANES = 32
"""Prefetches of one program, one a thread."""


@triton.jit
def prefetch_kernel(base, last, PIECE: tl.constexpr, PIECES: tl.constexpr, BULK: tl.constexpr):
    """Grid (bytes / (PIECE * PIECES)). `last`: byte at which the last whole piece begins."""
    piece = tl.program_id(0).to(tl.int64) * PIECES + tl.arange(0, PIECES)
    address = base + tl.minimum(piece * PIECE, last)
    if BULK:
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 4096; // dummy $0",
            "=r,l",
            [address],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        prefetch_l2(address)


def prefetch(tensor: Tensor, limit_bytes: int | None = None) -> None:
    """Start bringing the first `limit_bytes` (default: all) of a contiguous tensor on a GPU to L2."""
    count = tensor.numel() * tensor.element_size()
    count = count if limit_bytes is None else min(count, limit_bytes)
    bulk = has_pdl(tensor.device)
    piece = BULK_BYTES if bulk else L2_LINE_BYTES
    if count < piece:
        return
    flat = tensor.view(torch.uint8) if tensor.dtype is not torch.uint8 else tensor
    grid = (triton.cdiv(count, piece * LANES),)
    prefetch_kernel[grid](flat, count // piece * piece - piece, PIECE=piece, PIECES=LANES, BULK=bulk, num_warps=1)


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """For the check that every architecture compiles."""
    bulk = arch >= 90
    sizes = {"PIECE": BULK_BYTES if bulk else L2_LINE_BYTES, "PIECES": LANES, "BULK": bulk}
    return [("prefetch", prefetch_kernel, {"base": "*u8", "last": "i64"}, sizes, {"num_warps": 1})]
