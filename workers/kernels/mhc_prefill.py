"""mHC for the many tokens of a prefill step: the same functions as `workers/kernels/mhc.py`, three launches each.

Owns: `hc_pre`, `hc_post_pre`, `hc_post_head` for up to 16K tokens. `embed_streams` is shared with decode.

All launches are bound by memory: the first reads streams and parts and writes the streams (its products with `fn` hide
behind the copies), the second computes gates, a token a thread, the third reads the streams again and writes the input.
`fn` is multiplied exactly: streams are bf16, and an fp32 weight is the sum of three bf16 numbers, so three tensor-core
products with fp32 accumulation lose nothing. Tiles and the split over channels are the same for every token count.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.formats import hardware_formats
from workers.kernels.launch import pdl_options
from workers.kernels.mhc import STREAMS, WORK_ROWS, HyperConnection
from workers.kernels.mhc_decode import collapse_kernel, sinkhorn_rows
from workers.kernels.tiles import Tile, tile

SPLIT = 4
"""Parts of the channel axis, each with partial sums of its own; changes the order of every sum."""

GATE_TOKENS = 128
"""Tokens of one program of the second launch."""


def work_floats(num_tokens: int) -> int:
    """fp32 elements of the scratch tensor `work` for steps of up to `num_tokens` tokens."""
    return num_tokens * WORK_ROWS * SPLIT


@triton.jit
def _bf16_parts(x):
    """Three bf16 blocks whose exact sum is fp32 `x`."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_products(acc, x, fn, column, D: tl.constexpr, NUM_FN: tl.constexpr, WIDEN: tl.constexpr):
    """`acc [TM, 32] += x [TM, C] @ fn[:, column].T`, exactly but for the fp32 accumulation.

    WIDEN: fp32 operands, for the interpreter, whose `tl.dot` takes bf16 for integers.
    """
    row = tl.arange(0, 32)[None, :]
    weight = tl.load(fn + row * (4 * D) + column[:, None], mask=row < NUM_FN, other=0.0)  # [C, 32]
    if WIDEN:
        return tl.dot(x.to(tl.float32), weight, acc, input_precision="ieee")
    else:
        high, middle, low = _bf16_parts(weight)
        acc = tl.dot(x, low, acc)
        acc = tl.dot(x, middle, acc)
        return tl.dot(x, high, acc)


@triton.jit
def _mixed_row(post, out, c0, c1, c2, c3, r0, r1, r2, r3):
    """One new stream `[TM, C]` in bf16."""
    new = post[:, None] * out
    new = tl.fma(tl.broadcast_to(c0[:, None], r0.shape), r0, new)
    new = tl.fma(tl.broadcast_to(c1[:, None], r0.shape), r1, new)
    new = tl.fma(tl.broadcast_to(c2[:, None], r0.shape), r2, new)
    new = tl.fma(tl.broadcast_to(c3[:, None], r0.shape), r3, new)
    return new.to(tl.bfloat16)


@triton.jit
def _gate(gates, token, inside, index: tl.constexpr, width: tl.constexpr):
    return tl.load(gates + token * width + index, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def mix_kernel(
    sub_out,
    streams,
    post,
    comb,
    fn,
    rows,
    work,
    num_rows,
    D: tl.constexpr,
    R: tl.constexpr,
    NUM_FN: tl.constexpr,
    TM: tl.constexpr,
    C: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / TM, SPLIT). Writes streams and partial sums `work [T, 40, SPLIT]`; R = 0 writes no streams."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    index = tl.program_id(0) * TM + tl.arange(0, TM)
    split = tl.program_id(1)
    inside = index < num_rows
    token = index.to(tl.int64)
    if HAS_ROWS:
        token = tl.maximum(tl.load(rows + index, mask=inside, other=0), 0).to(tl.int64)
    if R > 0:
        p0, p1 = _gate(post, token, inside, 0, 4), _gate(post, token, inside, 1, 4)
        p2, p3 = _gate(post, token, inside, 2, 4), _gate(post, token, inside, 3, 4)
        c00, c01 = _gate(comb, token, inside, 0, 16), _gate(comb, token, inside, 1, 16)
        c02, c03 = _gate(comb, token, inside, 2, 16), _gate(comb, token, inside, 3, 16)
        c10, c11 = _gate(comb, token, inside, 4, 16), _gate(comb, token, inside, 5, 16)
        c12, c13 = _gate(comb, token, inside, 6, 16), _gate(comb, token, inside, 7, 16)
        c20, c21 = _gate(comb, token, inside, 8, 16), _gate(comb, token, inside, 9, 16)
        c22, c23 = _gate(comb, token, inside, 10, 16), _gate(comb, token, inside, 11, 16)
        c30, c31 = _gate(comb, token, inside, 12, 16), _gate(comb, token, inside, 13, 16)
        c32, c33 = _gate(comb, token, inside, 14, 16), _gate(comb, token, inside, 15, 16)
    acc = tl.zeros((TM, 32), tl.float32)
    g00 = tl.zeros((TM,), tl.float32)
    g11 = tl.zeros((TM,), tl.float32)
    g22 = tl.zeros((TM,), tl.float32)
    g33 = tl.zeros((TM,), tl.float32)
    g01 = tl.zeros((TM,), tl.float32)
    g12 = tl.zeros((TM,), tl.float32)
    g23 = tl.zeros((TM,), tl.float32)
    g30 = tl.zeros((TM,), tl.float32)
    g02 = tl.zeros((TM,), tl.float32)
    g13 = tl.zeros((TM,), tl.float32)
    mask = inside[:, None]
    for start in range(0, D // SPLIT, C):
        channel = split * (D // SPLIT) + start + tl.arange(0, C)
        source = streams + token[:, None] * (4 * D) + channel[None, :]
        x0 = tl.load(source, mask=mask, other=0.0)
        x1 = tl.load(source + D, mask=mask, other=0.0)
        x2 = tl.load(source + 2 * D, mask=mask, other=0.0)
        x3 = tl.load(source + 3 * D, mask=mask, other=0.0)
        if R > 0:
            r0, r1, r2, r3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
            part = sub_out + token[:, None] * (R * D) + channel[None, :]
            out = tl.load(part, mask=mask, other=0.0).to(tl.float32)
            for i in tl.static_range(1, R):
                out += tl.load(part + i * D, mask=mask, other=0.0).to(tl.float32)
            x0 = _mixed_row(p0, out, c00, c10, c20, c30, r0, r1, r2, r3)
            x1 = _mixed_row(p1, out, c01, c11, c21, c31, r0, r1, r2, r3)
            x2 = _mixed_row(p2, out, c02, c12, c22, c32, r0, r1, r2, r3)
            x3 = _mixed_row(p3, out, c03, c13, c23, c33, r0, r1, r2, r3)
            tl.store(source, x0, mask=mask)
            tl.store(source + D, x1, mask=mask)
            tl.store(source + 2 * D, x2, mask=mask)
            tl.store(source + 3 * D, x3, mask=mask)
        acc = _add_products(acc, x0, fn, channel, D, NUM_FN, WIDEN)
        acc = _add_products(acc, x1, fn, channel + D, D, NUM_FN, WIDEN)
        acc = _add_products(acc, x2, fn, channel + 2 * D, D, NUM_FN, WIDEN)
        acc = _add_products(acc, x3, fn, channel + 3 * D, D, NUM_FN, WIDEN)
        y0, y1, y2, y3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
        g00 += tl.sum(y0 * y0, 1)
        g11 += tl.sum(y1 * y1, 1)
        g22 += tl.sum(y2 * y2, 1)
        g33 += tl.sum(y3 * y3, 1)
        g01 += tl.sum(y0 * y1, 1)
        g12 += tl.sum(y1 * y2, 1)
        g23 += tl.sum(y2 * y3, 1)
        g30 += tl.sum(y3 * y0, 1)
        g02 += tl.sum(y0 * y2, 1)
        g13 += tl.sum(y1 * y3, 1)
    target = work + index.to(tl.int64) * (40 * SPLIT) + split
    row = tl.arange(0, 32)[None, :]
    tl.store(target[:, None] + row * SPLIT, acc, mask=mask & (row < NUM_FN))
    tl.store(target + 24 * SPLIT, g00, mask=inside)
    tl.store(target + 25 * SPLIT, g11, mask=inside)
    tl.store(target + 26 * SPLIT, g22, mask=inside)
    tl.store(target + 27 * SPLIT, g33, mask=inside)
    tl.store(target + 28 * SPLIT, g01, mask=inside)
    tl.store(target + 29 * SPLIT, g12, mask=inside)
    tl.store(target + 30 * SPLIT, g23, mask=inside)
    tl.store(target + 31 * SPLIT, g30, mask=inside)
    tl.store(target + 32 * SPLIT, g02, mask=inside)
    tl.store(target + 33 * SPLIT, g13, mask=inside)


@triton.jit
def _total(sums, row: tl.constexpr, inside, SPLIT: tl.constexpr):
    """Sum of one row of partial sums for every token of a block."""
    total = tl.load(sums + row * SPLIT, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLIT):
        total += tl.load(sums + row * SPLIT + split, mask=inside, other=0.0)
    return total


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
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = token < num_rows
    sums = work + token * (40 * SPLIT)
    trace = _total(sums, 24, inside, SPLIT) + _total(sums, 25, inside, SPLIT)
    trace += _total(sums, 26, inside, SPLIT) + _total(sums, 27, inside, SPLIT)
    inverse_rms = tl.rsqrt(trace / (4 * D) + NORM_EPS)
    post_scale = tl.load(scale + 1) * inverse_rms
    comb_scale = tl.load(scale + 2) * inverse_rms
    for k in tl.static_range(4):
        gate = tl.sigmoid(_total(sums, 4 + k, inside, SPLIT) * post_scale + tl.load(base + 4 + k))
        tl.store(post + token * 4 + k, 2.0 * gate, mask=inside)
    logits = ()
    for i in tl.static_range(16):
        logits = logits + (_total(sums, 8 + i, inside, SPLIT) * comb_scale + tl.load(base + 8 + i),)
    matrix = sinkhorn_rows(logits, ITERS, EPS)
    for i in tl.static_range(16):
        tl.store(comb + token * 16 + i, matrix[i], mask=inside)


# -- launchers ----------------------------------------------------------------------------------------------------


def hc_pre(
    streams: Tensor,
    hc: HyperConnection,
    norm_weight: Tensor,
    x: Tensor,
    post: Tensor,
    comb: Tensor,
    work: Tensor,
    *,
    x_quantised: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """As `mhc.hc_pre`, for many tokens. `work`: `work_floats` elements."""
    _mix(None, streams, post, comb, hc, None, work, streams.shape[0], pdl)
    _gates(hc, work, post, comb, pdl)
    _collapse(streams, None, hc, norm_weight, work, x, x_quantised, pdl)


def hc_post_pre(
    sub_out: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    hc: HyperConnection,
    norm_weight: Tensor,
    x: Tensor,
    work: Tensor,
    *,
    x_quantised: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """As `mhc.hc_post_pre`, for many tokens."""
    _mix(sub_out, streams, post, comb, hc, None, work, streams.shape[0], pdl)
    _gates(hc, work, post, comb, pdl)
    _collapse(streams, None, hc, norm_weight, work, x, x_quantised, pdl)


def hc_post_head(
    sub_out: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    hc: HyperConnection,
    norm_weight: Tensor,
    rows: Tensor | None,
    x: Tensor,
    work: Tensor,
    *,
    pdl: bool | None = None,
) -> None:
    """As `mhc.hc_post_head`, for many tokens (of which few may be wanted)."""
    _mix(sub_out, streams, post, comb, hc, rows, work, x.shape[0], pdl)
    _collapse(streams, rows, hc, norm_weight, work, x, None, pdl)


def _mix(
    sub_out: Tensor | None,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    hc: HyperConnection,
    rows: Tensor | None,
    work: Tensor,
    num_rows: int,
    pdl: bool | None,
) -> None:
    hidden = streams.shape[-1]
    assert work.numel() >= work_floats(num_rows)
    if num_rows == 0:
        return
    shape = tile("mhc_prefill.mix", streams.device)
    mix_kernel[(triton.cdiv(num_rows, shape.m), SPLIT)](
        streams if sub_out is None else sub_out,
        streams,
        post,
        comb,
        hc.fn,
        hc.fn if rows is None else rows,
        work,
        num_rows,
        D=hidden,
        R=0 if sub_out is None else sub_out.shape[1],
        NUM_FN=hc.fn.shape[0],
        TM=shape.m,
        C=shape.fitted(k=hidden // SPLIT).k,
        SPLIT=SPLIT,
        HAS_ROWS=rows is not None,
        WIDEN=streams.device.type == "cpu",
        **shape.options,
        **pdl_options(streams, pdl),
    )


def _gates(hc: HyperConnection, work: Tensor, post: Tensor, comb: Tensor, pdl: bool | None) -> None:
    num_rows = post.shape[0]
    if num_rows == 0:
        return
    gates_kernel[(triton.cdiv(num_rows, GATE_TOKENS),)](
        hc.base,
        hc.scale,
        work,
        post,
        comb,
        num_rows,
        D=hc.fn.shape[1] // STREAMS,
        SPLIT=SPLIT,
        TOKENS=GATE_TOKENS,
        ITERS=hc.iters,
        EPS=hc.eps,
        NORM_EPS=hc.norm_eps,
        num_warps=4,
        **pdl_options(post, pdl),
    )


def _collapse(
    streams: Tensor,
    rows: Tensor | None,
    hc: HyperConnection,
    norm_weight: Tensor,
    work: Tensor,
    x: Tensor,
    x_quantised: Tensor | None,
    pdl: bool | None,
) -> None:
    num_rows, hidden = x.shape
    if num_rows == 0:
        return
    shape = tile("mhc_prefill.collapse", streams.device)
    block = min(shape.n, triton.next_power_of_2(hidden))
    collapse_kernel[(num_rows, triton.cdiv(hidden, block))](
        streams,
        hc.fn if rows is None else rows,
        hc.base,
        hc.scale,
        norm_weight,
        work,
        x,
        x if x_quantised is None else x_quantised,
        work,
        work,
        D=hidden,
        NUM_TILES=SPLIT,
        TILES_POW2=SPLIT,
        BLOCK=block,
        W=shape.warps,
        HEAD=True,
        HAS_ROWS=rows is not None,
        QUANTISE=x_quantised is not None,
        HW=hardware_formats(x.device),
        ITERS=hc.iters,
        EPS=hc.eps,
        NORM_EPS=hc.norm_eps,
        **shape.options,
        **pdl_options(x, pdl),
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash, for the check that every architecture compiles."""
    pdl = {"PDL": arch >= 90}
    mix: Tile = tile("mhc_prefill.mix", arch)
    floats = ("post", "comb", "fn", "work", "base", "scale", "norm_weight")
    types = dict.fromkeys(floats, "*fp32") | {"sub_out": "*bf16", "streams": "*bf16", "rows": "*i32"}
    types |= {"x": "*bf16", "x_quantised": "*bf16", "num_rows": "i32"}

    def case(name: str, kernel: Any, options: dict[str, Any], **constexprs: Any) -> Any:
        names = [name for name in kernel.arg_names if name in types]
        return name, kernel, {name: types[name] for name in names}, {**constexprs, **pdl}, options

    shape = {"D": 4096, "SPLIT": SPLIT, "NUM_FN": 24, "TM": mix.m, "C": mix.k, "WIDEN": False}
    constants = {"ITERS": 20, "EPS": 1e-6, "NORM_EPS": 1e-6}
    return [
        case("mix R=0", mix_kernel, mix.options, **shape, R=0, HAS_ROWS=False),
        case("mix R=1", mix_kernel, mix.options, **shape, R=1, HAS_ROWS=False),
        case("mix R=7", mix_kernel, mix.options, **shape, R=7, HAS_ROWS=False),
        case("gates", gates_kernel, {"num_warps": 4}, D=4096, SPLIT=SPLIT, TOKENS=GATE_TOKENS, **constants),
    ]
