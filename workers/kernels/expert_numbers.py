"""Device functions that both FP4 expert products share: codes and scales as bf16, and where an expert lies.

Owns: four columns of packed e2m1 (or two of e4m3) as bf16 operands, exact; e8m0 scales as bf16 factors; slot addresses.
Does not own: tiles, loops, orders of columns. Used by `experts_decode.py` and `experts_prefill.py`.

`PACKED`: two values per instruction by inline PTX (any GPU); False is for Triton's interpreter, which has no bf16
arithmetic, loses bf16 subnormals and knows no PTX.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNSCALE = tl.constexpr(2.0**32)
"""Products of `fp4_column * scale_factors` carry 2**-32: codes carry 2**-126, factors 2**94."""


@triton.jit
def fp4_column(words, J: tl.constexpr, PACKED: tl.constexpr):
    """Column `J` of uint16 words of four e2m1 codes as bf16, times 2**-126 (two bits of exponent, one of mantissa)."""
    if PACKED:
        if J == 0:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $1, 0x000f000f; mul.lo.u32 t, t, 0x1040; and.b32 $0, t, 0x81c081c0; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif J == 1:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $1, 0x00f000f0; mul.lo.u32 t, t, 0x0104; and.b32 $0, t, 0x81c081c0; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif J == 2:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 t, t, 0x000f000f; mul.lo.u32 t, t, 0x1040;"
                " and.b32 $0, t, 0x81c081c0; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 8; and.b32 t, t, 0x00f000f0; mul.lo.u32 t, t, 0x0104;"
                " and.b32 $0, t, 0x81c081c0; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        code = (words >> (4 * J)).to(tl.uint32) & 0xF
        value = (((code & 0x8) << 28) | ((code & 0x7) << 22)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def fp8_column(words, J: tl.constexpr, PACKED: tl.constexpr):
    """Column `J` of uint16 words of two e4m3 codes as bf16, exact."""
    if PACKED:
        if J == 0:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; shl.b32 t, $1, 4; and.b32 t, t, 0x07f007f0; shl.b32 u, $1, 8;"
                " lop3.b32 $0, u, 0x80008000, t, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 t, t, 0x07f007f0; lop3.b32 $0, $1, 0x80008000, t, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        code = (words >> (8 * J)).to(tl.uint32) & 0xFF
        value = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True)
    # bf16 has 120 more exponents below 1 than e4m3.
    return times(value, tl.full((), 2.0**120, tl.float32).to(tl.bfloat16), PACKED)


@triton.jit
def scale_factors(codes):
    """bf16 `2 ** (s - 33)` of e8m0 bytes. Exact for scales from 2**-93 to 2**33; trained weights have about 2**-8."""
    return ((codes.to(tl.uint16) + 94) << 7).to(tl.bfloat16, bitcast=True)


@triton.jit
def times(value, factor, PACKED: tl.constexpr):
    """Product of two bf16 that is exact in bf16."""
    return value * factor if PACKED else (value.to(tl.float32) * factor.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, total, PACKED: tl.constexpr):
    """`a @ b + total` of bf16 operands, fp32 sums."""
    return tl.dot(a, b, total) if PACKED else tl.dot(a.to(tl.float32), b.to(tl.float32), total)


@triton.jit
def slot_address(
    expert, table, base, host, peer, EXPERT_BYTES: tl.constexpr, HOST: tl.constexpr, PEER: tl.constexpr
):  # fmt: skip
    """Address of an expert's bytes; a constant stride, so that the compiler knows it for a multiple of 16."""
    code = tl.load(table + expert)
    offset = (code & 0xFFFFFF).to(tl.int64) * EXPERT_BYTES
    slot = base + offset
    if HOST:
        slot = tl.where((code >> 24) == 1, host + offset, slot)
    if PEER:
        slot = tl.where((code >> 24) == 2, peer + offset, slot)
    return slot
