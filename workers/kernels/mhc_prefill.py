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
from torch import Tensor

from workers.kernels.formats import hardware_formats
from workers.kernels.launch import pdl_options
from workers.kernels.mhc import STREAMS, WORK_ROWS, HyperConnection, experts_form
from workers.kernels.mhc_gates import collapse_kernel, gates_kernel
from workers.kernels.mhc_mix import mix_prefill_kernel
from workers.kernels.tiles import Tile, tile

PART_CHANNELS = 1024
"""Channels of one program of the first launch, at most. Changes the order of every sum, so the same for all batches.
measured at 8,192 tokens (H200, 2026-11-21), us: 1,024 and 64 channels a step 303 (one part) and 366 (seven), gates 11;
256 and 32 channels 329, 408 and 28."""

GATE_TOKENS = 32
"""Tokens of one program (one warp) of the second launch."""


def num_parts(hidden: int) -> int:
    """Parts of the channel axis, each with partial sums of its own."""
    return triton.cdiv(hidden, PART_CHANNELS)


def work_floats(num_tokens: int, hidden: int = 7168) -> int:
    """fp32 elements of the scratch tensor `work` for steps of up to `num_tokens` tokens."""
    return num_tokens * WORK_ROWS * num_parts(hidden)


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
    _collapse(streams, None, hc, norm_weight, work, x, x_quantised, None, pdl)


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
    x_experts: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """As `mhc.hc_post_pre`, for many tokens."""
    _mix(sub_out, streams, post, comb, hc, None, work, streams.shape[0], pdl)
    _gates(hc, work, post, comb, pdl)
    _collapse(streams, None, hc, norm_weight, work, x, x_quantised, x_experts, pdl)


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
    _collapse(streams, rows, hc, norm_weight, work, x, None, None, pdl)


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
    assert work.numel() >= work_floats(num_rows, hidden)
    if num_rows == 0:
        return
    shape = tile("mhc_prefill.mix", streams.device)
    parts = num_parts(hidden)
    mix_prefill_kernel[(parts, triton.cdiv(num_rows, shape.m))](
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
        C=shape.fitted(k=hidden // parts).k,
        PARTS=parts,
        HAS_ROWS=rows is not None,
        WIDEN=streams.device.type == "cpu",
        **shape.options,
        **pdl_options(streams, pdl),
    )


def _gates(hc: HyperConnection, work: Tensor, post: Tensor, comb: Tensor, pdl: bool | None) -> None:
    num_rows, hidden = post.shape[0], hc.fn.shape[1] // STREAMS
    if num_rows == 0:
        return
    gates_kernel[(triton.cdiv(num_rows, GATE_TOKENS),)](
        hc.base,
        hc.scale,
        work,
        post,
        comb,
        num_rows,
        D=hidden,
        SPLIT=num_parts(hidden),
        TOKENS=GATE_TOKENS,
        ITERS=hc.iters,
        EPS=hc.eps,
        NORM_EPS=hc.norm_eps,
        num_warps=1,
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
    x_experts: Tensor | None,
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
        x if x_experts is None else x_experts,
        work,
        work,
        D=hidden,
        NUM_TILES=num_parts(hidden),
        BLOCK=block,
        W=shape.warps,
        HEAD=True,
        HAS_ROWS=rows is not None,
        QUANTISE=x_quantised is not None,
        EXPERTS=experts_form(x_experts),
        HW=hardware_formats(x.device),
        FINISH=True,
        ITERS=hc.iters,
        EPS=hc.eps,
        NORM_EPS=hc.norm_eps,
        EARLY=False,
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

    shape = {"D": 4096, "PARTS": num_parts(4096), "NUM_FN": 24, "TM": mix.m, "C": mix.k, "WIDEN": False}
    constants = {"ITERS": 20, "EPS": 1e-6, "NORM_EPS": 1e-6}
    return [
        case("mix R=0", mix_prefill_kernel, mix.options, **shape, R=0, HAS_ROWS=False),
        case("mix R=1", mix_prefill_kernel, mix.options, **shape, R=1, HAS_ROWS=False),
        case("mix R=7", mix_prefill_kernel, mix.options, **shape, R=7, HAS_ROWS=False),
        case("gates", gates_kernel, {"num_warps": 1}, D=4096, SPLIT=num_parts(4096), TOKENS=GATE_TOKENS, **constants),
    ]
