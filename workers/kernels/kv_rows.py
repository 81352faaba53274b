"""Rows of fp8 KV pools inside Triton kernels: from (sequence, row number) to addresses, and from stored bytes to bf16.

Owns: the row layout of `workers/reference/kv_format.py` and the block-split unit of `kvstore/spec.py`, as device code.
Does not own: which rows are read or written.

A unit (page) of P rows is P data rows (e4m3 nope, then bf16 rope), then P rows of 8 scale bytes (one e8m0 byte per 64
nope dimensions, zero padded). All addresses are int64. A pool is passed twice, as uint8 and as bf16 words of the same
memory, so that the compiler sees how both are aligned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.formats import e4m3_to_f16, e8m0_to_f32

NOPE_DIMS = (64, 448)
"""Nope sizes the kernels know: dsv4-nano's, and that of V4-Flash and V4-Pro."""

ROPE_DIMS = 64


@triton.jit
def as_bf16(x, WIDEN: tl.constexpr):
    """Nearest bf16 of fp32, ties to even. WIDEN: for the interpreter, whose own cast cuts the low bits off."""
    if WIDEN:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, rounded, bits).to(tl.uint32).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def unit_and_offset(pages, row, live, shift):
    """Page and row inside the page of `row`, of pages of `1 << shift` rows; rows of unmapped pages come back not live.

    Both int32: cast the page to int64 before it is multiplied.
    """
    clamped = tl.where(live, row, 0)
    page = tl.load(pages + (clamped >> shift), mask=live, other=-1)
    return tl.maximum(page, 0), clamped & ((1 << shift) - 1), page >= 0


@triton.jit
def load_nope(codes, scales, live, FIRST: tl.constexpr, GROUPS: tl.constexpr, HW: tl.constexpr):
    """bf16 `[N, GROUPS * 64]`: nope columns from FIRST on, exact. Dead rows are 0.

    codes, scales: uint8 pointers [N] to the first byte of each row's data and scales; live: bool [N].
    """
    N: tl.constexpr = live.shape[0]
    group = tl.arange(0, GROUPS)
    column = group[None, :, None] * 64 + tl.arange(0, 64)[None, None, :]
    code = tl.load(codes[:, None, None] + (column + FIRST), mask=live[:, None, None], other=0)
    byte = tl.load(scales[:, None] + (group[None, :] + FIRST // 64), mask=live[:, None], other=0)
    value = (e4m3_to_f16(code, HW).to(tl.float32) * e8m0_to_f32(byte)[:, :, None]).to(tl.bfloat16)
    return tl.reshape(value, (N, GROUPS * 64))


@triton.jit
def load_rope(words, live):
    """bf16 `[N, 64]`: the rope part. words: bf16 pointers [N] to its first element; dead rows are 0."""
    return tl.load(words[:, None] + tl.arange(0, 64)[None, :], mask=live[:, None], other=0.0)


@triton.jit
def rotate(x, cos, sin):
    """Rotate the interleaved pairs of fp32 `x [N, 64]` by angles given as cos, sin `[N or 1, 32]`.

    The fma is explicit: kernels that must agree to the last bit rotate in different places.
    """
    N: tl.constexpr = x.shape[0]
    even, odd = tl.split(tl.reshape(x, (N, 32, 2)))
    return tl.reshape(tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin)), (N, 64))
