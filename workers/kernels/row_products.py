"""Device functions of the decode linears: a few weight rows times a few tokens over all of K.

Owns: how a product is computed, for every number of tokens the same, so that a token's bits do not depend on its batch.
Block b of 128 columns belongs to partial sum b % P (P = 8 where K allows). Per block a 16-bit tensor-core product with
fp32 sums over 128 columns, then `sum += product * (activation scale * weight scale)` in fp32. At the end partial sums w
and w + 4 are added, then those of the four warps. The weight is the big operand (M = 16 rows) and tokens the small one
(N = 8 an instruction), and an output column depends on its own token only. Weights come by asynchronous 16-byte copies,
STAGES - 1 steps ahead.

A step of the loop takes KW blocks. With KW = 8 a warp has blocks w and w + 4 at once: their chains of instructions
overlap. Where the activations of 8 blocks would not fit, KW = 4 and PAIR: two sums take turns. The bits are the same.

Shapes: BN rows, BT tokens of which R are loaded (1 or BT), K columns, KW blocks.
WIDEN: fp32 operands instead of bf16, for the interpreter, whose `tl.dot` takes bf16 for integers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.formats import e4m3_to_f16, f32_to_e4m3, pow2_reciprocal, pow2_scale_ceil


@triton.jit
def inputs_of(x, HW: tl.constexpr, ACT: tl.constexpr, WIDEN: tl.constexpr):
    """16-bit operand `[KW, R, 128]` and scale fp32 `[KW, R]` of bf16 activations, one group per last axis.

    ACT "round": e4m3 codes in f16. "rounded": x is code * scale already, exact in bf16. "plain": x in f16.
    The first two give the same sums: their scales are powers of two.
    """
    scale = tl.full([x.shape[0], x.shape[1]], 1.0, tl.float32)
    if ACT == "round":
        x = x.to(tl.float32)
        scale, _ = pow2_scale_ceil(tl.max(tl.abs(x), 2), 448.0, 1e-4)
        x = e4m3_to_f16(f32_to_e4m3(x * pow2_reciprocal(scale)[:, :, None], HW), HW)
    elif ACT == "plain":
        x = x.to(tl.float16)
    elif WIDEN:
        x = x.to(tl.float32)
    return x, scale


@triton.jit
def weights_of(codes, HW: tl.constexpr, ACT: tl.constexpr, WIDEN: tl.constexpr):
    """The operand of e4m3 codes that goes with `inputs_of`; exact."""
    w = e4m3_to_f16(codes, HW)
    if ACT == "rounded":
        w = w.to(tl.float32)
        if not WIDEN:
            w = w.to(tl.bfloat16)
    return w


@triton.jit
def spread(value, BT: tl.constexpr):
    """`[KW, R, C]` to `[KW, C, BT]`: the small operand. One row (R = 1) stands in every column."""
    if value.shape[1] != BT:
        value = tl.broadcast_to(value, (value.shape[0], BT, value.shape[2]))
    return tl.permute(value, (0, 2, 1))


@triton.jit
def fp8_rows(
    x, x_stride, token, valid_token, codes, scales, row, block_row, other_row,
    K: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, TWO: tl.constexpr,
    ACT: tl.constexpr, HW: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """fp32 `[BN, BT]`, or `[BN]` where R is 1: FP8 weight rows `row [BN]` times tokens.

    `block_row` is their row of scales. TWO: of the first half of the rows, and `other_row` of the second.
    """
    warp = tl.arange(0, KW)
    column = warp[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    weights = codes + row[None, :, None] * K + column
    inputs = x + token[None, :, None] * x_stride + column
    first = scales + block_row * (K // 128) + warp
    second = scales + other_row * (K // 128) + warp
    half = (tl.arange(0, BN) < BN // 2)[None, :, None]
    sums = tl.zeros([KW, BN, BT], tl.float32)
    others = tl.zeros([KW, BN, BT], tl.float32)
    for step in tl.range(0, K // (KW * 128), num_stages=STAGES):
        w = tl.load(weights)
        value = tl.load(inputs, mask=valid_token[None, :, None], other=0.0)
        value, scale = inputs_of(value, HW, ACT, WIDEN)
        product = tl.dot(weights_of(w, HW, ACT, WIDEN), spread(value, BT), input_precision="ieee")
        if TWO:
            factor = tl.where(half, tl.load(first)[:, None, None], tl.load(second)[:, None, None])
            product *= factor * scale[:, None, :]
            second += KW
        else:
            product *= (tl.load(first)[:, None] * scale)[:, None, :]
        if PAIR:
            added = tl.where(step % 2 == 0, sums, others) + product
            sums, others = in_turn(step, added, sums, others)
        else:
            sums += product
        weights += KW * 128
        inputs += KW * 128
        first += KW
    return total_of(sums, others, token.shape[0], KW, PAIR)


@triton.jit
def bf16_rows(
    x, x_stride, token, valid_token, weight, row, valid_row,
    K: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """fp32 `[BN, BT]`, or `[BN]` where R is 1: bf16 rows times bf16 tokens, no rounding of either."""
    column = tl.arange(0, KW)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    weights = weight + row[None, :, None] * K + column
    inputs = x + token[None, :, None] * x_stride + column
    sums = tl.zeros([KW, BN, BT], tl.float32)
    others = tl.zeros([KW, BN, BT], tl.float32)
    for step in tl.range(0, K // (KW * 128), num_stages=STAGES):
        w = tl.load(weights, mask=valid_row[None, :, None], other=0.0)
        value = tl.load(inputs, mask=valid_token[None, :, None], other=0.0)
        added = tl.where(step % 2 == 0, sums, others) if PAIR else sums
        if WIDEN:
            added = tl.dot(w.to(tl.float32), spread(value.to(tl.float32), BT), added, input_precision="ieee")
        else:
            added = tl.dot(w, spread(value, BT), added)
        if PAIR:
            sums, others = in_turn(step, added, sums, others)
        else:
            sums = added
        weights += KW * 128
        inputs += KW * 128
    return total_of(sums, others, token.shape[0], KW, PAIR)


@triton.jit
def in_turn(step, added, sums, others):
    """The two partial sums after a step: even steps have added to the first. Exchanging names instead would be a
    dependence over two steps, and Triton does not pipeline such loops (nor notice it where both began as one value)."""
    even = step % 2 == 0
    return tl.where(even, added, sums), tl.where(even, others, added)


@triton.jit
def total_of(sums, others, R: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr):
    """Partial sums `[KW, BN, BT]` to their total, in one order: w and w + 4 first. With R = 1 all columns are equal,
    and one of them is kept: `[BN]`."""
    if PAIR:
        sums += others
    elif KW == 8:
        halves = tl.reshape(sums, (2, 4, sums.shape[1], sums.shape[2]))
        sums, others = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        sums += others
    if R == 1:
        sums = tl.max(sums, 2)
    return tl.sum(sums, 0)


@triton.jit
def tokens_of(start, num_tokens, R: tl.constexpr):
    token = start + tl.arange(0, R)
    return token, token < num_tokens


@triton.jit
def store_rows(out, out_stride, value, row, valid_row, start, num_tokens, BT: tl.constexpr):
    """`value [BN, BT]` into `out [T, N]`, transposed; `[BN]` is token `start` alone."""
    if len(value.shape) == 1:
        pointers = out + tl.cast(start, tl.int64) * out_stride + row
        tl.store(pointers, value.to(out.dtype.element_ty), mask=valid_row)
    else:
        token = start + tl.arange(0, BT)
        pointers = out + token[None, :].to(tl.int64) * out_stride + row[:, None]
        tl.store(pointers, value.to(out.dtype.element_ty), mask=(token < num_tokens)[None, :] & valid_row[:, None])
