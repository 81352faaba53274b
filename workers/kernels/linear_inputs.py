"""Activations of linears that stream (`linear_stream.py`): from memory to shared memory, as their products take them.

A program holds all K columns of its tokens, in blocks of 128 columns `[places, KW, R, 128]`: KW blocks for each slot of
weights, R tokens. One token's may still have to be mixed of mHC's streams, and what FP8 rows see may have to pass RMS
norm. FP8 rows see e4m3 codes and a scale for each block, or f16; bf16 rows see bf16, in halves of blocks.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from workers.kernels.formats import pow2_reciprocal


@gluon.jit
def operand(held, index, BT: gl.constexpr, L: gl.constexpr):
    """`[KW, C, BT]`: one place of activations `held [places, KW, R, C]`; one token (R = 1) in every column."""
    KW: gl.constexpr = held.shape[1]
    C: gl.constexpr = held.shape[3]
    if held.shape[2] == 1:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 1, [1, 0])
        value = held._reinterpret(held.dtype, [held.shape[0], KW, C], FLAT).index(index).load(gl.SliceLayout(2, L))
        value, _ = gl.broadcast(gl.expand_dims(value, 2), gl.full([KW, C, BT], 0.0, held.dtype, L))
    else:
        VEC: gl.constexpr = 128 // held.dtype.primitive_bitwidth
        ROWS: gl.constexpr = gl.SwizzledSharedLayout(VEC, 1, 8, [2, 1, 0])
        value = held._reinterpret(held.dtype, held.shape, ROWS).index(index).permute([0, 2, 1]).load(L)
    return value


@gluon.jit
def room(DTYPE: gl.constexpr, PLACES: gl.constexpr, KW: gl.constexpr, R: gl.constexpr, C: gl.constexpr):
    """Shared memory for activations `[PLACES, KW, R, C]`, rows swizzled where there are several."""
    VEC: gl.constexpr = 128 // DTYPE.primitive_bitwidth
    L: gl.constexpr = gl.SwizzledSharedLayout(VEC, 1, 8 if R > 1 else 1, [3, 2, 1, 0])
    return gl.allocate_shared_memory(DTYPE, [PLACES, KW, R, C], L)


@gluon.jit
def _scale_of(amax):
    """fp32 scale of e4m3 codes: `formats.pow2_scale_ceil(amax, 448, 1e-4)`, whose constants have no layout."""
    bits = gl.maximum(amax, 1e-4).to(gl.uint32, bitcast=True)
    above = ((bits & 0x7FFFFF) > 0x600000).to(gl.uint32)
    return (((bits >> 23) + above - 8) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _inputs(x, begin, num_tokens, held, X_STRIDE: gl.constexpr, K: gl.constexpr, L: gl.constexpr):
    """bf16 activations `[places, KW, R, C]`, C = 128, or 64: first halves of blocks, then second halves, in turn.
    Of tokens from `begin` on. Tokens and places past the last repeat it."""
    KW: gl.constexpr = held.shape[1]
    C: gl.constexpr = held.shape[3]
    L3: gl.constexpr = gl.SliceLayout(3, L)
    place = gl.arange(0, held.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, L3)))[:, None, None, None]
    block = gl.arange(0, KW, gl.SliceLayout(0, gl.SliceLayout(2, L3)))[None, :, None, None]
    token = gl.arange(0, held.shape[2], gl.SliceLayout(0, gl.SliceLayout(1, L3)))[None, None, :, None]
    lane = gl.arange(0, C, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, L))))[None, None, None, :]
    PARTS: gl.constexpr = 128 // C
    place = gl.minimum(place, K // (KW * C) - 1)
    column = (place // PARTS * KW + block) * 128 + place % PARTS * C + lane
    return gl.load(x + gl.minimum(begin + token, num_tokens - 1) * X_STRIDE + column)


@gluon.jit
def _mixed(streams, mixing, held, K: gl.constexpr, L: gl.constexpr):
    """`_inputs` of one token, made of its `streams [4, K]`. mixing: weights of the norm, then `mhc_stream.mix_factors`.
    Operations and their order are those of `mhc_gates`, as are the bits."""
    x0 = _inputs(streams, 0, 1, held, 0, K, L).to(gl.float32)
    x1 = _inputs(streams + K, 0, 1, held, 0, K, L).to(gl.float32)
    x2 = _inputs(streams + 2 * K, 0, 1, held, 0, K, L).to(gl.float32)
    x3 = _inputs(streams + 3 * K, 0, 1, held, 0, K, L).to(gl.float32)
    gamma = _inputs(mixing[0], 0, 1, held, 0, K, L)
    value = gl.fma(_spread(mixing[2], L) + gl.zeros_like(x1), x1, _spread(mixing[1], L) * x0)
    value = gl.fma(_spread(mixing[3], L) + gl.zeros_like(x2), x2, value)
    value = gl.fma(_spread(mixing[4], L) + gl.zeros_like(x3), x3, value)
    return (value * _spread(mixing[5], L) * gamma).to(gl.bfloat16)


@gluon.jit
def _spread(factor, L: gl.constexpr):
    """`[1]` in every thread to `[1, 1, 1, 1]`."""
    ONE: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, L)))
    return gl.convert_layout(factor, ONE, assert_trivial=True)[:, None, None, None]


@gluon.constexpr_function
def _layout(KW, warps):
    """Of activations `[places, KW, R, 128]`: half a warp has a block of 128 columns, whatever R."""
    return gl.BlockedLayout([1, 1, 1, 8], [1, 2, 1, 16], [warps * 2 // KW, KW // 2, 1, 1], [3, 1, 2, 0])


@gluon.jit
def norm_weights(weights, PLACES: gl.constexpr, KW: gl.constexpr, K: gl.constexpr):
    """fp32 `[places, KW, 1, 128]`: weights `[K]` of a norm, as `hold` takes them; places past the last repeat it."""
    L: gl.constexpr = gl.SliceLayout(2, _layout(KW, gl.num_warps()))
    place = gl.arange(0, PLACES, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    block = gl.arange(0, KW, gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    lane = gl.arange(0, 128, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    place = gl.minimum(place, K // (KW * 128) - 1)
    return gl.expand_dims(gl.load(weights + (place * KW + block) * 128 + lane), 2)


@gluon.jit
def _normed(value, gamma, EPS: gl.constexpr, squares, K: gl.constexpr):
    """fp32 `value [places, KW, R, 128]` after RMS norm over K columns, rounded to bf16. squares: shared memory
    `[places, KW, R]`.

    Squares of bf16 are exact. Those of 128 columns are added, then these sums in the order in which the warps of
    `kv_store.store_latent` add theirs, whatever R: 1,024 columns or more.
    """
    BLOCKS: gl.constexpr = value.shape[0] * value.shape[1]
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TOKEN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, value.type.layout)))
    squares.store(gl.sum(value * value, 3))
    gl.thread_barrier()
    blocks = squares._reinterpret(gl.float32, [BLOCKS, value.shape[2]], ROWS)
    sums = ()
    for b in gl.static_range(8):
        part = blocks.index(b).load(TOKEN)
        if b + 8 < K // 128:
            part += blocks.index(b + 8).load(TOKEN)
        sums += (part,)
    total = ((sums[0] + sums[1]) + (sums[4] + sums[5])) + ((sums[2] + sums[3]) + (sums[6] + sums[7]))
    factor = gl.rsqrt(total / K + EPS)
    return (value * factor[None, None, :, None] * gamma).to(gl.bfloat16).to(gl.float32)


@gluon.jit
def hold(
    x, mixing, gamma, num_tokens, codes, scales, X_STRIDE: gl.constexpr, K: gl.constexpr, ROUND: gl.constexpr,
    NORM: gl.constexpr, EPS: gl.constexpr,
):  # fmt: skip
    """Activations of FP8 rows into shared memory, `codes [places, KW, R, 128]` and `scales [places, KW, R]`.

    ROUND: e4m3 in groups of 128 (as `row_products.inputs_of`), else as they are in f16. mixing: as `_mixed` takes it
    where `x` is the streams of one token, or (). NORM: rows pass RMS norm first, weights `gamma` of `norm_weights`.
    """
    KW: gl.constexpr = codes.shape[1]
    L: gl.constexpr = _layout(KW, gl.num_warps())
    R: gl.constexpr = codes.shape[2]
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    MOST: gl.constexpr = 16 if R > 16 else R  # more at once would not fit in registers
    for begin in gl.static_range(0, R, MOST):
        some, some_scales = codes.slice(begin, MOST, 2), scales.slice(begin, MOST, 2)
        if len(mixing) > 0:
            value = _mixed(x, mixing, some, K, L)
        else:
            value = _inputs(x, begin, num_tokens, some, X_STRIDE, K, L)
        if ROUND:
            value = value.to(gl.float32)
            if NORM:
                squares = gl.allocate_shared_memory(gl.float32, [codes.shape[0], KW, MOST], FLAT)
                value = _normed(value, gamma, EPS, squares, K)
            scale = _scale_of(gl.max(gl.abs(value), 3))
            some_scales.store(scale)
            some.store((value * gl.expand_dims(pow2_reciprocal(scale), 3)).to(codes.dtype))
        else:
            some.store(value.to(codes.dtype))
            some_scales.store(gl.full(some_scales.shape, 1.0, gl.float32, gl.SliceLayout(3, L)))


@gluon.jit
def hold_words(x, mixing, num_tokens, words, X_STRIDE: gl.constexpr, K: gl.constexpr):
    """Activations of bf16 rows into shared memory, `words [2 * places, KW, R, 64]`. mixing: as in `hold`."""
    KW: gl.constexpr = words.shape[1]
    WARPS: gl.constexpr = gl.num_warps()
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 4, 1, 8], [WARPS * 4 // KW, KW // 4, 1, 1], [3, 1, 2, 0])
    if len(mixing) > 0:
        words.store(_mixed(x, mixing, words, K, L))
    else:
        words.store(_inputs(x, 0, num_tokens, words, X_STRIDE, K, L))
