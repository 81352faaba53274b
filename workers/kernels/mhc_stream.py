"""mHC's second launch inside a linear that streams: factors of a sublayer's input, by every program for itself. Gluon.

Owns: the factors, from the partial sums that `mhc.hc_sums` leaves. Does not own: the input itself, which
`linear_inputs.py` makes of streams and factors where it would read it. One token; bits are those of `mhc_gates.py`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

ROWS = gl.constexpr(16)
"""Room for the partial sums that the input depends on: rows 0 .. 3 and 24 .. 33 of `mhc.WORK_ROWS`, then two unused."""


@gluon.jit
def _totals(sums, TILES: gl.constexpr):
    """fp32 `[ROWS]` of partial sums `[40, TILES]`, two rows a warp. The order of a sum is that of `mhc_gates._total`:
    four neighbours a thread, then the threads of a warp."""
    L: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]], [[1, 0], [2, 0], [4, 0]], [], [ROWS, 128]
    )
    row = gl.arange(0, ROWS, gl.SliceLayout(1, L))[:, None]
    lane = gl.arange(0, 128, gl.SliceLayout(0, L))[None, :]
    source = sums + gl.where(row < 4, row, row + 20) * TILES + lane
    values = gl.load(source, mask=lane < TILES, other=0.0)
    for start in gl.static_range(128, TILES, 128):
        values += gl.load(source + start, mask=lane < TILES - start, other=0.0)
    return gl.sum(values, 1)


@gluon.jit
def _sigmoid(x):
    return 1 / (1 + gl.exp(-x))


@gluon.jit
def mix_factors(weights, sums, K: gl.constexpr, TILES: gl.constexpr, EPS: gl.constexpr, NORM_EPS: gl.constexpr):
    """Five `[1]`, in every thread: what the four streams of K channels are multiplied by, and then their mix.

    weights: scale and the first four of base (`mhc.HyperConnection`).
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    room = gl.allocate_shared_memory(gl.float32, [ROWS], FLAT)
    room.store(_totals(sums, TILES))
    gl.thread_barrier()
    totals = room._reinterpret(gl.float32, [ROWS, 1], FLAT)
    g00, g11 = totals.index(4).load(ONE), totals.index(5).load(ONE)
    g22, g33 = totals.index(6).load(ONE), totals.index(7).load(ONE)
    pre_scale = weights[0] * gl.rsqrt(((g00 + g11) + (g22 + g33)) / (4 * K) + NORM_EPS)
    nothing = gl.zeros_like(g00)
    a0 = _sigmoid(gl.fma(totals.index(0).load(ONE), pre_scale, weights[1] + nothing)) + EPS
    a1 = _sigmoid(gl.fma(totals.index(1).load(ONE), pre_scale, weights[2] + nothing)) + EPS
    a2 = _sigmoid(gl.fma(totals.index(2).load(ONE), pre_scale, weights[3] + nothing)) + EPS
    a3 = _sigmoid(gl.fma(totals.index(3).load(ONE), pre_scale, weights[4] + nothing)) + EPS
    squares = gl.fma(a3 * a3, g33, gl.fma(a2 * a2, g22, gl.fma(a1 * a1, g11, a0 * a0 * g00)))
    products = a0 * a1 * totals.index(8).load(ONE)
    products = gl.fma(a1 * a2, totals.index(9).load(ONE), products)
    products = gl.fma(a2 * a3, totals.index(10).load(ONE), products)
    products = gl.fma(a3 * a0, totals.index(11).load(ONE), products)
    products = gl.fma(a0 * a2, totals.index(12).load(ONE), products)
    products = gl.fma(a1 * a3, totals.index(13).load(ONE), products)
    inverse = gl.rsqrt(gl.maximum(squares + 2.0 * products, 0.0) / K + NORM_EPS)
    return a0, a1, a2, a3, inverse
