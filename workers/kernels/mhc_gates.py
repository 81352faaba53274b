"""Device code of mHC after the partial sums: gates, Sinkhorn matrices and the next sublayer's input.

`workers/kernels/mhc.py` says what it computes and launches it for decode, `mhc_prefill.py` for prefill.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.expert_codes import store_coded
from workers.kernels.formats import e4m3_to_f32, round_fp8_groups

VALUES, CODES = tl.constexpr(1), tl.constexpr(2)
"""What `x_experts` gets: rounded values in expert order, or coded rows (`expert_codes.py`)."""

COMB_TOKENS = tl.constexpr(32)
"""Tokens whose matrices one program finishes (`finish_comb`): one per thread of a warp."""


@triton.jit
def token_work(index, NUM_TILES: tl.constexpr):
    """Offset of a token's partial sums `[40, tiles]`."""
    return index.to(tl.int64) * (40 * NUM_TILES)


@triton.jit
def _total(sums, row: tl.constexpr, NUM_TILES: tl.constexpr, W: tl.constexpr):
    """Sum of one row of partial sums, as a block `[W]` of equal values: each of the program's W warps adds for itself,
    which saves the exchange between warps.

    NOTE: the order of the sum must not depend on W. A block of 128 is four values a thread for one warp and for four;
    of wider or narrower ones Triton would give a row to several warps, or several rows to a warp.
    """
    WIDTH: tl.constexpr = 128
    lane = tl.arange(0, WIDTH)[None, :] + 0 * tl.arange(0, W)[:, None]
    source = sums + row * NUM_TILES + lane
    values = tl.load(source, mask=lane < NUM_TILES, other=0.0)
    for start in tl.static_range(WIDTH, NUM_TILES, WIDTH):
        values += tl.load(source + start, mask=lane < NUM_TILES - start, other=0.0)
    return tl.sum(values, axis=1)


@triton.jit
def sinkhorn_rows(c, ITERS: tl.constexpr, EPS: tl.constexpr):
    """Row softmax, then column and row steps, of 16 logits (row-major; scalars or equal blocks)."""
    c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33 = c
    c00, c01, c02, c03 = _softmax4(c00, c01, c02, c03, EPS)
    c10, c11, c12, c13 = _softmax4(c10, c11, c12, c13, EPS)
    c20, c21, c22, c23 = _softmax4(c20, c21, c22, c23, EPS)
    c30, c31, c32, c33 = _softmax4(c30, c31, c32, c33, EPS)
    c00, c10, c20, c30 = _normalised4(c00, c10, c20, c30, EPS)
    c01, c11, c21, c31 = _normalised4(c01, c11, c21, c31, EPS)
    c02, c12, c22, c32 = _normalised4(c02, c12, c22, c32, EPS)
    c03, c13, c23, c33 = _normalised4(c03, c13, c23, c33, EPS)
    for _ in range(ITERS - 1):
        c00, c01, c02, c03 = _normalised4(c00, c01, c02, c03, EPS)
        c10, c11, c12, c13 = _normalised4(c10, c11, c12, c13, EPS)
        c20, c21, c22, c23 = _normalised4(c20, c21, c22, c23, EPS)
        c30, c31, c32, c33 = _normalised4(c30, c31, c32, c33, EPS)
        c00, c10, c20, c30 = _normalised4(c00, c10, c20, c30, EPS)
        c01, c11, c21, c31 = _normalised4(c01, c11, c21, c31, EPS)
        c02, c12, c22, c32 = _normalised4(c02, c12, c22, c32, EPS)
        c03, c13, c23, c33 = _normalised4(c03, c13, c23, c33, EPS)
    return c00, c01, c02, c03, c10, c11, c12, c13, c20, c21, c22, c23, c30, c31, c32, c33


@triton.jit
def _reciprocal(x):
    """1 / x of a positive number within 2 units in the last place: a third of the latency of a division."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def _softmax4(a, b, c, d, EPS: tl.constexpr):
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    scale = _reciprocal((a + b) + (c + d))
    return a * scale + EPS, b * scale + EPS, c * scale + EPS, d * scale + EPS


@triton.jit
def _normalised4(a, b, c, d, EPS: tl.constexpr):
    scale = _reciprocal((a + b) + (c + (d + EPS)))
    return a * scale, b * scale, c * scale, d * scale


@triton.jit
def _inverse_rms(g00, g11, g22, g33, D: tl.constexpr, NORM_EPS: tl.constexpr):
    """1 / rms over all channels of the four streams."""
    return tl.rsqrt(((g00 + g11) + (g22 + g33)) / (4 * D) + NORM_EPS)


@triton.jit
def _read_input(
    streams, weights, gamma, sums, outputs, token, index, channel,
    SIZES: tl.constexpr, QUANTISE: tl.constexpr, EXPERTS: tl.constexpr, HW: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Channels `channel [W, C]` of the normed mix. `token`: row of the streams; `index`: row of `x`.

    weights: (base, scale); outputs: (x, x_quantised, x_experts); SIZES: (D, tiles, W, EPS, NORM_EPS).
    """
    D: tl.constexpr = SIZES[0]
    NUM_TILES: tl.constexpr = SIZES[1]
    W: tl.constexpr = SIZES[2]
    EPS: tl.constexpr = SIZES[3]
    NORM_EPS: tl.constexpr = SIZES[4]
    base, scale = weights
    x, x_quantised, x_experts = outputs
    inside = channel < D
    source = streams + token * (4 * D) + channel
    x0 = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(source + D, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(source + 2 * D, mask=inside, other=0.0).to(tl.float32)
    x3 = tl.load(source + 3 * D, mask=inside, other=0.0).to(tl.float32)
    g00 = _total(sums, 24, NUM_TILES, W)
    g11 = _total(sums, 25, NUM_TILES, W)
    g22 = _total(sums, 26, NUM_TILES, W)
    g33 = _total(sums, 27, NUM_TILES, W)
    inverse_rms = _inverse_rms(g00, g11, g22, g33, D, NORM_EPS)
    pre_scale = tl.load(scale) * inverse_rms
    a0 = tl.sigmoid(tl.fma(_total(sums, 0, NUM_TILES, W), pre_scale, tl.load(base))) + EPS
    a1 = tl.sigmoid(tl.fma(_total(sums, 1, NUM_TILES, W), pre_scale, tl.load(base + 1))) + EPS
    a2 = tl.sigmoid(tl.fma(_total(sums, 2, NUM_TILES, W), pre_scale, tl.load(base + 2))) + EPS
    a3 = tl.sigmoid(tl.fma(_total(sums, 3, NUM_TILES, W), pre_scale, tl.load(base + 3))) + EPS
    squares = tl.fma(a3 * a3, g33, tl.fma(a2 * a2, g22, tl.fma(a1 * a1, g11, a0 * a0 * g00)))
    products = a0 * a1 * _total(sums, 28, NUM_TILES, W)
    products = tl.fma(a1 * a2, _total(sums, 29, NUM_TILES, W), products)
    products = tl.fma(a2 * a3, _total(sums, 30, NUM_TILES, W), products)
    products = tl.fma(a3 * a0, _total(sums, 31, NUM_TILES, W), products)
    products = tl.fma(a0 * a2, _total(sums, 32, NUM_TILES, W), products)
    products = tl.fma(a1 * a3, _total(sums, 33, NUM_TILES, W), products)
    # The sum of squares of the mix; rounding may leave a tiny negative number where the streams cancel.
    inverse = tl.rsqrt(tl.maximum(squares + 2.0 * products, 0.0) / D + NORM_EPS)
    # Fused as written, not as each compilation likes: `linear_inputs.py` computes the same elsewhere.
    mixed = tl.fma(a1[:, None], x1, a0[:, None] * x0)
    mixed = tl.fma(a3[:, None], x3, tl.fma(a2[:, None], x2, mixed))
    normed = (mixed * inverse[:, None] * gamma).to(tl.bfloat16)
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(x + index * D + channel, normed, mask=inside)
    SHAPE: tl.constexpr = normed.shape
    BLOCK: tl.constexpr = SHAPE[0] * SHAPE[1]
    if QUANTISE or EXPERTS == VALUES:
        codes, group_scale = round_fp8_groups(tl.reshape(normed.to(tl.float32), (1, BLOCK)), 128, HW)
        values = tl.reshape(e4m3_to_f32(codes, HW), (BLOCK // 128, 128)) * tl.reshape(group_scale, (BLOCK // 128, 1))
        rounded = tl.reshape(values, SHAPE).to(tl.bfloat16)
        if QUANTISE:
            tl.store(x_quantised + index * D + channel, rounded, mask=inside)
        if EXPERTS == VALUES:
            place = channel % 128
            place = channel - place + (place % 4) * 32 + place // 4
            tl.store(x_experts + index * D + place, rounded, mask=inside)
    if EXPERTS == CODES:
        coded = x_experts + index * (D + D // 32)
        store_coded(coded, tl.reshape(normed.to(tl.float32), (1, BLOCK)), tl.reshape(channel, (1, BLOCK)), D, HW)


@triton.jit
def write_gates(
    weights, sums, post, comb, token,
    SIZES: tl.constexpr, FINISH: tl.constexpr, ITERS: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """The post gates and the Sinkhorn matrix of one token, or its logits for `finish_comb`. As in `_read_input`."""
    D: tl.constexpr = SIZES[0]
    NUM_TILES: tl.constexpr = SIZES[1]
    W: tl.constexpr = SIZES[2]
    EPS: tl.constexpr = SIZES[3]
    NORM_EPS: tl.constexpr = SIZES[4]
    base, scale = weights
    g00 = _total(sums, 24, NUM_TILES, W)
    g11 = _total(sums, 25, NUM_TILES, W)
    g22 = _total(sums, 26, NUM_TILES, W)
    g33 = _total(sums, 27, NUM_TILES, W)
    inverse_rms = _inverse_rms(g00, g11, g22, g33, D, NORM_EPS)
    post_scale = tl.load(scale + 1) * inverse_rms
    comb_scale = tl.load(scale + 2) * inverse_rms
    same = tl.zeros((W,), tl.int32)  # equal values to one address
    logits = ()
    for i in tl.static_range(16):
        total = _total(sums, 8 + i, NUM_TILES, W)
        logits = logits + (total * comb_scale + tl.load(base + 8 + i),)
    for k in tl.static_range(4):
        gate = tl.sigmoid(_total(sums, 4 + k, NUM_TILES, W) * post_scale + tl.load(base + 4 + k))
        tl.store(post + token * 4 + k + same, 2.0 * gate)
    if FINISH:
        logits = sinkhorn_rows(logits, ITERS, EPS)
    if LATE:
        tl.extra.cuda.gdc_launch_dependents()
    for i in tl.static_range(16):
        tl.store(comb + token * 16 + i + same, logits[i])


@triton.jit
def finish_comb(comb, first, num_tokens, TOKENS: tl.constexpr, ITERS: tl.constexpr, EPS: tl.constexpr):
    """Logits to Sinkhorn matrices in place, `comb [T, 16]`, for TOKENS tokens from `first` on.

    For a program of its own in any launch between `hc_post_pre(finish=False)` and the next write-back: there nobody
    waits for the steps of Sinkhorn, which depend on each other.
    # measured: they take 1.8 us (H200, 2026-11-21).
    """
    token = (first + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < num_tokens
    logits = ()
    for i in tl.static_range(16):
        logits = logits + (tl.load(comb + token * 16 + i, mask=inside, other=0.0),)
    # Every warp computes the same: all must have read before one writes.
    tl.debug_barrier()
    matrix = sinkhorn_rows(logits, ITERS, EPS)
    for i in tl.static_range(16):
        tl.store(comb + token * 16 + i, matrix[i], mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def finish_comb_kernel(comb, num_tokens, ITERS: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr):
    """Grid (T / COMB_TOKENS): `finish_comb` where no other launch has a program for it."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    finish_comb(comb, tl.program_id(0) * COMB_TOKENS, num_tokens, COMB_TOKENS, ITERS, EPS)


@triton.jit
def collapse_kernel(
    streams,
    rows,
    base,
    scale,
    norm_weight,
    work,
    x,
    x_quantised,
    x_experts,
    post,
    comb,
    D: tl.constexpr,
    NUM_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    W: tl.constexpr,
    HEAD: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    QUANTISE: tl.constexpr,
    EXPERTS: tl.constexpr,
    HW: tl.constexpr,
    FINISH: tl.constexpr,
    ITERS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, D / BLOCK + 1), or without the + 1 for the head: its first program computes the gates of `hc_post`,
    which take longest. EARLY: the launch behind streams weights, and may start at once."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    LATE: tl.constexpr = PDL and not EARLY
    SIZES: tl.constexpr = (D, NUM_TILES, W, EPS, NORM_EPS)
    index = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) + HEAD - 1
    channel = tl.arange(0, W)[:, None] * (BLOCK // W) + tl.arange(0, BLOCK // W)[None, :] + block * BLOCK
    gamma = tl.load(norm_weight + channel, mask=(channel >= 0) & (channel < D), other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    sums = work + token_work(index, NUM_TILES)
    if block >= 0:
        token = index
        if HAS_ROWS:
            token = tl.maximum(tl.load(rows + index), 0).to(tl.int64)
        outputs = (x, x_quantised, x_experts)
        _read_input(
            streams, (base, scale), gamma, sums, outputs, token, index, channel, SIZES, QUANTISE, EXPERTS, HW, LATE
        )
    elif not HEAD:
        write_gates((base, scale), sums, post, comb, index, SIZES, FINISH, ITERS, LATE)


@triton.jit
def _token_rows(sums, inside, SPLIT: tl.constexpr):
    """Partial sums 4..27 (post, comb, squares of the streams) of one part, for every token of a block."""
    rows = ()
    for i in tl.static_range(24):
        rows = rows + (tl.load(sums + (4 + i) * SPLIT, mask=inside, other=0.0),)
    return rows


@triton.jit(do_not_specialize=["num_rows"])
def gates_kernel(
    base,
    scale,
    work,
    post,
    comb,
    num_rows,
    D: tl.constexpr,
    SPLIT: tl.constexpr,
    TOKENS: tl.constexpr,
    ITERS: tl.constexpr,
    EPS: tl.constexpr,
    NORM_EPS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / TOKENS): post gates and Sinkhorn matrices, one thread a token."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < num_rows
    sums = work + token * (40 * SPLIT)
    totals = _token_rows(sums, inside, SPLIT)
    for split in range(1, SPLIT):
        rows = _token_rows(sums + split, inside, SPLIT)
        added = ()
        for i in tl.static_range(24):
            added = added + (totals[i] + rows[i],)
        totals = added
    inverse_rms = tl.rsqrt(((totals[20] + totals[21]) + (totals[22] + totals[23])) / (4 * D) + NORM_EPS)
    post_scale = tl.load(scale + 1) * inverse_rms
    comb_scale = tl.load(scale + 2) * inverse_rms
    for k in tl.static_range(4):
        gate = tl.sigmoid(totals[k] * post_scale + tl.load(base + 4 + k))
        tl.store(post + token * 4 + k, 2.0 * gate, mask=inside)
    logits = ()
    for i in tl.static_range(16):
        logits = logits + (totals[4 + i] * comb_scale + tl.load(base + 8 + i),)
    matrix = sinkhorn_rows(logits, ITERS, EPS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for i in tl.static_range(16):
        tl.store(comb + token * 16 + i, matrix[i], mask=inside)
