"""mHC on tiles of tokens: gates and sublayer input from the four streams, and the sublayer output back into them.

The Sinkhorn iterations run with tokens as vector lanes, 16 at a time with idle lanes computed and ignored, so their
cost does not depend on the batch up to 16 and each token's arithmetic is the same in any batch.
"""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.compile import jit
from workers.cpu.rows import F0, F1, F2, ONE, ZERO, copy_row, linear, rms_factor, scale_row, sigmoid
from workers.cpu.simd import LANES, exp, f32_at

TOKENS = 16
"""Tokens of one group of lanes."""

NUM_STREAMS = 4
"""`hc_mult` of every released config; the mixing loop below is written for it."""


@jit
def softmax_lanes(comb, eps):
    """Softmax over k of each row j plus eps; element (j, k) of token r at [(4j + k) * TOKENS + r]."""
    p = f32_at(comb)
    for j in range(NUM_STREAMS):
        row = j * NUM_STREAMS * TOKENS
        for r in range(TOKENS):
            a, b, c, d = p[row + r], p[row + TOKENS + r], p[row + 2 * TOKENS + r], p[row + 3 * TOKENS + r]
            ab, cd = a if a > b else b, c if c > d else d
            top = ab if ab > cd else cd
            a, b, c, d = exp(a - top), exp(b - top), exp(c - top), exp(d - top)
            inverse = F1 / (((a + b) + c) + d)
            p[row + r], p[row + TOKENS + r] = a * inverse + eps, b * inverse + eps
            p[row + 2 * TOKENS + r], p[row + 3 * TOKENS + r] = c * inverse + eps, d * inverse + eps


@jit
def normalise_lanes(comb, group_step, member_step, eps):
    """Divide each of the 4 groups (rows or columns of the matrix) by its sum + eps."""
    p = f32_at(comb)
    for group in range(NUM_STREAMS):
        first = group * group_step * TOKENS
        step = member_step * TOKENS
        for r in range(TOKENS):
            i = first + r
            a, b, c, d = p[i], p[i + step], p[i + 2 * step], p[i + 3 * step]
            inverse = F1 / ((((a + b) + c) + d) + eps)
            p[i], p[i + step], p[i + 2 * step], p[i + 3 * step] = a * inverse, b * inverse, c * inverse, d * inverse


@jit
def sinkhorn_lanes(comb, iters, eps):
    """Logits to a nearly doubly stochastic matrix, for TOKENS tokens."""
    softmax_lanes(comb, eps)
    normalise_lanes(comb, 1, NUM_STREAMS, eps)
    for _ in range(iters - 1):
        normalise_lanes(comb, NUM_STREAMS, 1, eps)
        normalise_lanes(comb, 1, NUM_STREAMS, eps)


@jit
def weigh_streams(stream, pre, out, hidden):
    """`out = sum_j pre[j] * stream[j]`; pre of one token at [j * TOKENS]."""
    source, weights, target = f32_at(stream), f32_at(pre), f32_at(out)
    a, b, c, d = weights[0], weights[TOKENS], weights[2 * TOKENS], weights[3 * TOKENS]
    for i in range(hidden):
        low = a * source[i] + b * source[hidden + i]
        target[i] = (low + c * source[2 * hidden + i]) + d * source[3 * hidden + i]


@jit
def gather_gates(model, real, scratch, base, scale, first, count, gates):
    """Turn the mixes of `count` tokens into pre (lanes), post (gates) and Sinkhorn logits (lanes)."""
    hidden, eps = model[t.HIDDEN], real[t.HC_EPS]
    step = (NUM_STREAMS * (2 + NUM_STREAMS) + LANES - 1) // LANES * LANES * 4
    pre, comb, b, s = f32_at(scratch[t.LANES_PRE]), f32_at(scratch[t.LANES_COMB]), f32_at(base), f32_at(scale)
    for r in range(TOKENS):
        if r >= count:
            for k in range(NUM_STREAMS * NUM_STREAMS):
                comb[k * TOKENS + r] = F0
            continue
        stream = model[t.STREAM] + (first + r) * NUM_STREAMS * hidden * 4
        factor = rms_factor(stream, NUM_STREAMS * hidden, real[t.NORM_EPS])
        mix, post = f32_at(scratch[t.MIX] + r * step), f32_at(gates + r * model[t.GATES_STEP])
        for j in range(NUM_STREAMS):
            pre[j * TOKENS + r] = sigmoid(mix[j] * factor * s[0] + b[j]) + eps
            k = NUM_STREAMS + j
            post[j] = F2 * sigmoid(mix[k] * factor * s[1] + b[k])
        for j in range(NUM_STREAMS * NUM_STREAMS):
            k = 2 * NUM_STREAMS + j
            comb[j * TOKENS + r] = mix[k] * factor * s[2] + b[k]


@jit
def mix_streams(model, real, scratch, fn, element, base, scale, norm, lo, hi):
    """Tokens [lo, hi), at most TILE: the normed sublayer input to scratch X, post and comb to the tokens' gates."""
    hidden = model[t.HIDDEN]
    size = NUM_STREAMS * hidden
    columns = NUM_STREAMS * (2 + NUM_STREAMS)
    step = (columns + LANES - 1) // LANES * LANES * 4
    comb = f32_at(scratch[t.LANES_COMB])
    for first in range(lo, hi, TOKENS):
        count = min(TOKENS, hi - first)
        rows = model[t.STREAM] + first * size * 4
        linear(rows, size * 4, fn, element, scratch[t.MIX], step, count, size, columns)
        gates = model[t.GATES] + first * model[t.GATES_STEP]
        gather_gates(model, real, scratch, base, scale, first, count, gates)
        sinkhorn_lanes(scratch[t.LANES_COMB], model[t.SINKHORN_ITERS], real[t.HC_EPS])
        for r in range(count):
            kept = f32_at(gates + r * model[t.GATES_STEP])
            for k in range(NUM_STREAMS * NUM_STREAMS):
                kept[NUM_STREAMS + k] = comb[k * TOKENS + r]
            x = scratch[t.X] + (first - lo + r) * hidden * 4
            weigh_streams(rows + r * size * 4, scratch[t.LANES_PRE] + r * 4, x, hidden)
            scale_row(x, rms_factor(x, hidden, real[t.NORM_EPS]), norm, x, hidden)


@jit
def spread_row(out, stream, gates, old, hidden):
    """One token: `stream[k] = post[k] * out + sum_j comb[j, k] * stream[j]`; `old` is room for the old streams."""
    copy_row(stream, old, NUM_STREAMS * hidden)
    y, source, g = f32_at(out), f32_at(old), f32_at(gates)
    for k in range(NUM_STREAMS):
        target = f32_at(stream + k * hidden * 4)
        post, a, b, c, d = g[k], g[4 + k], g[8 + k], g[12 + k], g[16 + k]
        for i in range(hidden):
            low = a * source[i] + b * source[hidden + i]
            target[i] = post * y[i] + ((low + c * source[2 * hidden + i]) + d * source[3 * hidden + i])


@jit
def spread_output(model, scratch, lo, hi):
    """Sublayer outputs of tokens [lo, hi) (scratch OUT) into their streams."""
    hidden = model[t.HIDDEN]
    for token in range(lo, hi):
        stream = model[t.STREAM] + token * NUM_STREAMS * hidden * 4
        gates = model[t.GATES] + token * model[t.GATES_STEP]
        spread_row(scratch[t.OUT] + (token - lo) * scratch[t.OUT_STEP], stream, gates, scratch[t.OLD_STREAMS], hidden)


@jit
def collapse_streams(model, real, stream, out, mix):
    """hc_head and the final norm of one token: `stream [4, hidden]` to `out [hidden]`."""
    hidden = model[t.HIDDEN]
    size = NUM_STREAMS * hidden
    linear(stream, size * 4, model[t.HC_HEAD], model[t.HC_HEAD_ELEMENT], mix, ZERO, ONE, size, ZERO + NUM_STREAMS)
    factor = rms_factor(stream, size, real[t.NORM_EPS])
    m, b, s = f32_at(mix), f32_at(model[t.HC_HEAD_BASE]), f32_at(model[t.HC_HEAD_SCALE])
    source, target = f32_at(stream), f32_at(out)
    for i in range(hidden):
        target[i] = F0
    for j in range(NUM_STREAMS):
        weight = np.float32(sigmoid(m[j] * factor * s[0] + b[j]) + real[t.HC_EPS])
        for i in range(hidden):
            target[i] += weight * source[j * hidden + i]
    scale_row(out, rms_factor(out, hidden, real[t.NORM_EPS]), model[t.NORM], out, hidden)
