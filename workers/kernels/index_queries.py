"""Indexer queries as the scores read them: rope, Hadamard, e4m3 codes, and head weights with the scales folded in.

Owns: the arithmetic of one token's queries (`layers.index_queries`), used inside the decode kernel of scores and by the
prefill kernel here, which stores the codes as f16 (every e4m3 number is one) so that tensor cores take them as they
are. The rotated vector is rounded to bf16 before the transform, as the official release does.
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
    sign = (0x6996 >> (bits & 15)) & 1  # parity of four bits, from a table
    return (0x3F80 | (sign << 15)).to(tl.uint16).to(tl.bfloat16, bitcast=True)


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
    DI: tl.constexpr,
    RD: tl.constexpr,
    HW: tl.constexpr,
):
    """f16 codes [HP, DI] and fp32 weights [HP] of one token; heads from HEADS on are zero.

    q: bf16 pointer to HEADS * DI values; head_weights: fp32 pointer to HEADS values; matrix: `hadamard_matrix(DI)`.
    SCALE = Di ** -0.5 * Hi ** -0.5; each weight also carries its query's fp8 scale, which is positive.
    """
    head = tl.arange(0, HP)
    live = head < HEADS
    x = tl.load(q + head[:, None] * DI + tl.arange(0, DI)[None, :], mask=live[:, None], other=0.0).to(tl.float32)
    weight = tl.load(head_weights + head, mask=live, other=0.0)
    pair = tl.arange(0, DI // 2) - (DI - RD) // 2
    at = rope_table + position * RD + pair
    cos = tl.load(at, mask=pair >= 0, other=1.0)[None, :]
    sin = tl.load(at + RD // 2, mask=pair >= 0, other=0.0)[None, :]
    even, odd = tl.split(tl.reshape(x, (HP, DI // 2, 2)))
    x = tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (HP, DI))
    x = to_bf16(x, HW)
    if HW:
        x = tl.dot(x, matrix)  # products with +-1: exact up to the sum
    else:  # exact in tf32 too; the interpreter multiplies the bits of bf16 as integers
        x = tl.dot(x.to(tl.float32), matrix.to(tl.float32), input_precision="tf32")
    x *= DI**-0.5
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-4) / 448.0  # [HP]
    codes = e4m3_to_f16(f32_to_e4m3(x * (1.0 / scale)[:, None], HW), HW)
    return codes, weight * scale * SCALE


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
    DI: tl.constexpr,
    RD: tl.constexpr,
    HW: tl.constexpr,
):
    """Prefill, grid (ceil(T / TOKENS),): codes f16 [T, HP, DI] and weights fp32 [T, HP]."""
    matrix = hadamard_matrix(DI)
    head = tl.arange(0, HP)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for i in range(0, min(TOKENS, num_tokens - tl.program_id(0) * TOKENS)):
        token = first + i
        position = tl.maximum(tl.load(positions + token), 0)
        code, weight = query_codes(
            q + token * Q_ROW,
            head_weights + token * WEIGHT_ROW,
            rope_table,
            position,
            matrix,
            SCALE,
            HEADS,
            HP,
            DI,
            RD,
            HW,
        )
        tl.store(codes + token * (HP * DI) + head[:, None] * DI + tl.arange(0, DI)[None, :], code)
        tl.store(weights + token * HP + head, weight)
