"""Indexer queries as the scores read them: rope, Hadamard, e4m3 codes, and head weights with the scales folded in.

Owns: the arithmetic of one token's queries (`layers.index_queries`; heads of 128, 64 of them rotary), used inside the
decode kernel of scores for few tokens and by the kernel here, for many. That one stores the codes as e4m3, or as f16
(every e4m3 number is one) where tensor cores shall take those. The rotated half is rounded to bf16 before the
transform, as the official release does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.compressor_entry import to_bf16
from workers.kernels.formats import e4m3_to_f16, f32_to_e4m3


@triton.jit
def hadamard_matrix(SIZE: tl.constexpr):
    """bf16 [SIZE, SIZE] of (-1) ** popcount(i & j), for sizes up to 256."""
    bits = tl.arange(0, SIZE)[:, None] & tl.arange(0, SIZE)[None, :]
    bits ^= bits >> 4
    parity = (0x6996 >> (bits & 15)) & 1  # of four bits, from a table
    return (0x3F80 | (parity << 15)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _transformed(x, matrix, HW: tl.constexpr):
    """fp32 x @ matrix of bf16 operands. Products with +-1 are exact, in tf32 too."""
    if not HW:  # the interpreter multiplies the bits of bf16 as integers
        return tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision="tf32")
    return tl.dot(x, matrix)


@triton.jit
def query_codes(
    q,
    head_weights,
    rope_table,
    position,
    matrix,
    SCALE: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    HW: tl.constexpr,
):
    """One token's f16 codes of dimensions 0..63 and 64..127, [HP, 64] each, and fp32 weights [HP].

    q: bf16 pointer to HEADS * 128 values, the last 64 of each 128 rotary; head_weights: fp32 pointer to HEADS values;
    matrix: `hadamard_matrix(64)`, as H[128] x = (H[64] a + H[64] b, H[64] a - H[64] b) of the halves a, b of x.
    SCALE = Di ** -0.5 * Hi ** -0.5; each weight also carries its query's fp8 scale, which is positive. Heads from HEADS
    on are zero.
    """
    head = tl.arange(0, HP)
    live = head < HEADS
    at = q + head[:, None] * 128 + tl.arange(0, 64)[None, :]
    a = tl.load(at, mask=live[:, None], other=0.0)
    b = tl.load(at + 64, mask=live[:, None], other=0.0).to(tl.float32)
    weight = tl.load(head_weights + head, mask=live, other=0.0)
    angle = rope_table + position * 64 + tl.arange(0, 32)[None, :]
    cos, sin = tl.load(angle), tl.load(angle + 32)
    even, odd = tl.split(tl.reshape(b, (HP, 32, 2)))
    # Explicit: another kernel's compiler might fuse the other product.
    b = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
    b = tl.reshape(b, (HP, 64))
    a = _transformed(a, matrix, HW)
    b = _transformed(to_bf16(b, HW), matrix, HW)
    low, high = (a + b) * (128**-0.5), (a - b) * (128**-0.5)
    scale = tl.maximum(tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1), 1e-4) / 448.0  # [HP]
    inverse = (1.0 / scale)[:, None]
    low = e4m3_to_f16(f32_to_e4m3(low * inverse, HW), HW)
    high = e4m3_to_f16(f32_to_e4m3(high * inverse, HW), HW)
    return low, high, weight * scale * SCALE


@triton.jit
def index_queries_tile(
    q,
    head_weights,
    rope_table,
    positions,
    codes,
    weights,
    num_tokens,
    TOKENS: tl.constexpr,
    SCALE: tl.constexpr,
    Q_ROW: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    HW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (ceil(T / TOKENS),): codes f16 or e4m3 [T, HP, 128] and weights fp32 [T, HP]."""
    matrix = hadamard_matrix(64)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()  # the scores' pages are older than this launch
    head = tl.arange(0, HP)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for i in range(min(TOKENS, num_tokens - tl.program_id(0) * TOKENS)):
        token = first + i
        position = tl.maximum(tl.load(positions + token), 0)
        low, high, weight = query_codes(
            q + token * Q_ROW,
            head_weights + token * WEIGHT_ROW,
            rope_table,
            position,
            matrix,
            SCALE,
            HEADS,
            HP,
            HW,
        )
        at = codes + token * (HP * 128) + head[:, None] * 128 + tl.arange(0, 64)[None, :]
        tl.store(at, low.to(codes.dtype.element_ty))
        tl.store(at + 64, high.to(codes.dtype.element_ty))
        tl.store(weights + token * HP + head, weight)
