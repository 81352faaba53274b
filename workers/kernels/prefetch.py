"""Weights on their way to L2 while kernels that wait for each other leave memory idle.

Owns: the device functions that ask for a prefetch, and the launch arguments that say of what. Does not own: which
kernel asks for whose weights (the step does).

A bulk prefetch is one instruction for kilobytes: it takes a place in no queue of loads, holds no register and is not
waited for. What it brings must lie still for as long as a graph lives: weights. So it may stand before `gdc_wait`.
GPUs before sm_90 do not know it; a kernel launched without PDL, and the interpreter, ask for nothing.

    @triton.jit
    def kernel(..., ahead, ahead_bytes, ..., PDL: tl.constexpr):
        if PDL:
            prefetch_share(ahead, ahead_bytes, tl.program_id(0))
            tl.extra.cuda.gdc_wait()

    kernel[(programs,)](..., *ahead_of(weight, x, programs), ..., **pdl_options(x, pdl))
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

AHEAD_BYTES = 24 << 20
"""Most bytes brought ahead of one linear: what stays in L2 (50 MB on an H200) until it is read."""

SHARE_STEP = 2048
"""A program's share is a multiple of this."""

SHARE_LIMIT = (1 << 20) - SHARE_STEP
"""Most bytes of one instruction: its machine form counts 16-byte units in 16 bits."""


@triton.jit
def prefetch_bytes(pointer, num_bytes):
    """Bring the bytes behind one pointer to L2; one thread of the program asks and none waits.

    `num_bytes` int32: a multiple of 16, at most `SHARE_LIMIT`, 0 for nothing; the pointer is aligned to 16. Only under
    `PDL`: sm_90 and later know the instruction.
    """
    tl.inline_asm_elementwise(
        """{
        .reg .pred %wanted, %first;
        .reg .b32 %thread;
        mov.u32 %thread, %tid.x;
        setp.eq.u32 %first, %thread, 0;
        setp.gt.and.s32 %wanted, $2, 0, %first;
        @%wanted cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.b32 $0, $2;
        }""",
        "=r,l,r",
        [pointer, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def prefetch_share(ahead, share, program):
    """Program number `program` brings its `share` (bytes) of what stands at `ahead` (u8): see `ahead_of`."""
    prefetch_bytes(ahead + program.to(tl.int64) * share, share)


def ahead_of(weight: Tensor | None, stand_in: Tensor, programs: int) -> tuple[Tensor, int]:
    """Launch arguments of `prefetch_share` for a grid of `programs`: bytes u8, and how many each program brings.

    Args:
        weight: contiguous, any dtype; None brings nothing.
        stand_in: any tensor on the device with contiguous last dimension, passed in place of None.

    Together the programs bring the first `AHEAD_BYTES` of the weight, less what does not divide among them. Raises
    `ValueError` for a weight with gaps.
    """
    if weight is None:
        return stand_in.view(torch.uint8), 0
    if not weight.is_contiguous():
        raise ValueError("only contiguous bytes can be brought ahead")
    share = min(weight.nbytes, AHEAD_BYTES) // programs // SHARE_STEP * SHARE_STEP
    return weight.view(torch.uint8), min(share, SHARE_LIMIT)
