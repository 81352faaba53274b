"""Linear layers of a decode step: few tokens, every weight byte read once, time = bytes over memory bandwidth.

Owns: the products with FP8 block-scaled and BF16 weights at T = 1..64 or so, one launch each. Does not own: the
arithmetic (`row_products.py`), prefill shapes (`linear_prefill.py`), routed experts. All launchers write into given
outputs, allocate nothing and can be captured. A program owns BN rows of a weight and all of K, for every T in the same
order of sums.

On sm_90 and sm_100, products of one token and, up to K = 1,536, of any number are left to `linear_stream.py`, whose
bits are the same. The kernels here serve all else, and let their successor start when their own sums are done, not
earlier (`launch.py`). One token has tiles by op: equal work for every multiprocessor, and shared memory that keeps more
programs than its share off each.

FP8 weights see activations through e4m3 in groups of 128 (official `act_quant`). Up to `ROUNDED_TOKENS` tokens the
programs round `x` themselves; beyond, that work would cost more than the product, so a caller gives `x_quantised`
(bf16, already rounded; `hc_pre` writes it). The bits are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.formats import (
    e4m3_to_f16,
    e4m3_to_f32,
    f32_to_e4m3,
    hardware_formats,
    pow2_reciprocal,
    pow2_scale_ceil,
)
from workers.kernels.launch import num_sms, pdl_options
from workers.kernels.linear_stream import ARCHITECTURES, SHORT, Signal, serves, stream_cases, stream_rows, streams
from workers.kernels.mhc import Mixed
from workers.kernels.row_products import bf16_rows, fp8_rows, inputs_of, spread, store_rows, tokens_of, total_of
from workers.kernels.tiles import Tile, tile

BLOCK = 128
"""Columns that share a weight scale and an activation scale."""

WIDE_TOKENS = 16
"""Largest token tile of the wide kernel: its operand takes 2 * K bytes of shared memory a token."""

MORE_ROWS = 2048
"""From here on the first projections have more tiles than a GPU has multiprocessors (`linear_stream.py`)."""

LESS_ROWS = 8192
"""Rows of `SHORT` columns whose bytes all find room in shared memory of the GPU: every copy starts at once."""

ROUNDED_TOKENS = 8
"""Most tokens whose activations every program rounds for itself although rounded ones are at hand."""


class Weight(NamedTuple):
    """An FP8 linear: `codes` uint8 or e4m3 `[N, K]`, `scales` fp32 `[N/128, K/128]`. Any object with these will do."""

    codes: Tensor
    scales: Tensor


@triton.jit
def _project_kernel(
    x, x_fp8, codes, scales, weight, out_fp8, out_bf16, num_tokens, out_fp8_stride, out_bf16_stride,
    X_STRIDE: tl.constexpr,
    N_BF16: tl.constexpr, K: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    R: tl.constexpr, ACT: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (row tile, token tile): first the bf16 rows, twice as heavy, then the FP8 rows.

    Rows of group g (`row // GROUP_ROWS`) see the input columns from `g * GROUP_COLUMNS` on.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    BF16_TILES: tl.constexpr = (N_BF16 + BN - 1) // BN
    start = tl.program_id(1) * BT
    token, valid_token = tokens_of(start, num_tokens, R)
    pid = tl.program_id(0)
    if pid < BF16_TILES:
        if BF16_TILES > 0:
            row = pid * BN + tl.arange(0, BN)
            valid = row < N_BF16
            sums = bf16_rows(x, X_STRIDE, token, valid_token, weight, row, valid, K, KW, PAIR, BN, BT, STAGES, WIDEN)
            if PDL:
                tl.extra.cuda.gdc_launch_dependents()
            store_rows(out_bf16, out_bf16_stride, sums, row, valid, start, num_tokens, BT)
    else:
        begin = (pid - BF16_TILES) * BN
        row = begin + tl.arange(0, BN)
        valid = row >= 0
        inputs = x_fp8 + (begin // GROUP_ROWS) * GROUP_COLUMNS
        sums = fp8_rows(
            inputs, X_STRIDE, token, valid_token, codes, scales, row, begin // 128, 0,
            K, KW, PAIR, BN, BT, False, ACT, HW, STAGES, WIDEN,
        )  # fmt: skip
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        store_rows(out_fp8, out_fp8_stride, sums, row, valid, start, num_tokens, BT)


@triton.jit
def _shared_kernel(
    x, codes, scales, out, num_tokens, limit,
    X_STRIDE: tl.constexpr,
    INNER: tl.constexpr, K: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    R: tl.constexpr, ACT: tl.constexpr, STAGES: tl.constexpr, WIDEN: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (row tile, token tile): BN/2 rows of w1 over the same BN/2 rows of w3."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    HALF: tl.constexpr = BN // 2
    start = tl.program_id(1) * BT
    token, valid_token = tokens_of(start, num_tokens, R)
    begin = tl.program_id(0) * HALF
    lane = tl.arange(0, BN)
    row = begin + tl.where(lane < HALF, lane, lane - HALF + INNER)
    sums = fp8_rows(
        x, X_STRIDE, token, valid_token, codes, scales, row, begin // 128, (begin + INNER) // 128,
        K, KW, PAIR, BN, BT, True, ACT, HW, STAGES, WIDEN,
    )  # fmt: skip
    if R == 1:
        w1, w3 = tl.split(tl.permute(tl.reshape(sums, (2, HALF)), (1, 0)))
    else:
        w1, w3 = tl.split(tl.permute(tl.reshape(sums, (2, HALF, BT)), (1, 2, 0)))
    w1 = tl.minimum(w1, limit)
    hidden = w1 / (1.0 + tl.exp(-w1)) * tl.minimum(tl.maximum(w3, -limit), limit)
    inner = begin + tl.arange(0, HALF)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    store_rows(out, INNER, hidden, inner, inner >= 0, start, num_tokens, BT)


@triton.jit
def _head_kernel(
    x, weight, out, num_tokens, N,
    X_STRIDE: tl.constexpr,
    K: tl.constexpr, KW: tl.constexpr, PAIR: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
    STAGES: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs (row tile, token tile) of a bf16 weight."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    start = tl.program_id(1) * BT
    token, valid_token = tokens_of(start, num_tokens, R)
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    valid = row < N
    sums = bf16_rows(x, X_STRIDE, token, valid_token, weight, row, valid, K, KW, PAIR, BN, BT, STAGES, WIDEN)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    store_rows(out, N, sums, row, valid, start, num_tokens, BT)


@triton.jit
def _wide_kernel(
    x, codes, scales, out, num_tokens, out_stride,
    X_STRIDE: tl.constexpr,
    TILES: tl.constexpr, STEPS: tl.constexpr, K: tl.constexpr, KC: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
    R: tl.constexpr, ACT: tl.constexpr,
    STAGES: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Many rows of few columns: a program keeps its tokens' operand in registers and walks row tiles.

    Programs (walker, token tile). K is cut into chunks of KC blocks of 128; a warp holds the same blocks of each.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    CHUNKS: tl.constexpr = K // (KC * 128)
    start = tl.program_id(1) * BT
    token, valid_token = tokens_of(start, num_tokens, R)
    lane = tl.arange(0, BN)
    block = tl.arange(0, KC)
    column = block[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    walker = tl.program_id(0)
    walkers = tl.num_programs(0)
    values = ()
    factors = ()
    for c in tl.static_range(CHUNKS):
        inputs = x + token[None, :, None] * X_STRIDE + column + c * KC * 128
        value = tl.load(inputs, mask=valid_token[None, :, None], other=0.0)
        value, scale = inputs_of(value, HW, ACT, False)
        values = values + (spread(value, BT),)
        factors = factors + (scale,)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        index = walker + step * walkers
        row = index * BN + lane
        valid = row < TILES * BN
        sums = tl.zeros([KC, BN, BT], tl.float32)
        for c in tl.static_range(CHUNKS):
            w = tl.load(codes + row[None, :, None] * K + column + c * KC * 128, mask=valid[None, :, None], other=0)
            s = tl.load(scales + tl.minimum(index, TILES - 1) * BN // 128 * (K // 128) + c * KC + block)
            sums += tl.dot(e4m3_to_f16(w, HW), values[c]) * (s[:, None] * factors[c])[:, None, :]
        store_rows(out, out_stride, total_of(sums, sums, R, KC, False), row, valid, start, num_tokens, BT)


@triton.jit
def _round_kernel(
    x, rounded, X_STRIDE: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr
):
    """Programs (token, GROUPS groups of 128 columns): `rounded` bf16 `[T, K]` = `x` through e4m3, exact in bf16."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    token = tl.program_id(0).to(tl.int64)
    value = tl.load(x + token * X_STRIDE + column).to(tl.float32)
    scale, _ = pow2_scale_ceil(tl.max(tl.abs(value), 1), 448.0, 1e-4)
    codes = f32_to_e4m3(value * pow2_reciprocal(scale)[:, None], HW)
    tl.store(rounded + token * K + column, (e4m3_to_f32(codes, HW) * scale[:, None]).to(tl.bfloat16))


class _Launch(NamedTuple):
    """Constants of one launch that follow from its sizes."""

    constants: dict[str, Any]
    options: dict[str, Any]
    token_tiles: int


def _plan(x: Tensor, K: int, pdl: bool | None, op: str, *, fp8: bool = True) -> _Launch:
    """What all kernels share. `K` is a multiple of 128; how many partial sums there are depends on the op and K alone,
    so that sums keep their order. One token has the tile of its `op`."""
    if x.stride(-1) != 1:
        raise ValueError("columns of the activations must be contiguous")
    T = x.shape[0]
    chosen: Tile = tile(f"linear_decode.{_tile_row(op, T)}", x.device)
    BT = min(chosen.m, max(8, triton.next_power_of_2(T)))
    sums = _partial_sums(K, 4 if op == "head" or K <= SHORT else 8)
    constants: dict[str, Any] = {
        "X_STRIDE": x.stride(0),
        "K": K,
        "KW": sums if T == 1 else min(4, sums),
        "PAIR": T > 1 and sums == 8,
        "BN": chosen.n,
        "BT": BT,
        "R": 1 if T == 1 else BT,
        "STAGES": chosen.stages,
        "WIDEN": x.device.type == "cpu",
    }
    if fp8:
        constants["HW"] = hardware_formats(x.device)
    return _Launch(constants, {"num_warps": min(4, sums)} | pdl_options(x, pdl), -(-T // BT))


def _tile_row(op: str, T: int) -> str:
    """Row of the tile table. Beyond 8 tokens a program's activations are more bytes than its weights."""
    if T <= 8:
        return op if T == 1 else "few_fp8" if op in ("linear", "grouped") else "few"
    if {"grouped": 8, "project": 16, "linear": 32}.get(op, T) < T:
        return "many_rows"
    return "some" if op == "linear" and T <= 16 else "many"


def _fp8_input(x: Tensor, x_quantised: Tensor | None) -> tuple[Tensor, str]:
    """What the FP8 rows read, and how (`row_products.inputs_of`)."""
    if x_quantised is None or x.shape[0] <= ROUNDED_TOKENS:
        return x, "round"
    if x_quantised.stride() != x.stride():
        raise ValueError("x_quantised must be laid out as x")
    return x_quantised, "rounded"


def _partial_sums(K: int, most: int) -> int:
    blocks = K // BLOCK
    return min(most, blocks & -blocks)


def _bytes(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8)


def mixes_x(x: Tensor, rows: int) -> bool:
    """Whether `project_x` with so many FP8 rows can make `x [T, D]` itself: one token, on GPUs whose linears stream."""
    return x.shape[0] == 1 and streams(x, rows, x.shape[1])


def project_x(
    x: Tensor,
    x_fp8: Weight,
    x_bf16: Tensor | None,
    out_fp8: Tensor,
    out_bf16: Tensor | None,
    *,
    x_quantised: Tensor | None = None,
    mixed: Mixed | None = None,
    pdl: bool | None = None,
) -> None:
    """All products with the normed hidden state `x [T, D]` bf16, in one launch.

    `out_fp8` bf16 `[T, N1]`: the FP8 rows (latent | kv), activations rounded. `out_bf16` fp32 `[T, N2]`: the bf16 rows
    (compressor and indexer), activations as they are; None where the layer has none. `mixed`: what `x` is made of, by
    the launch itself, so that nobody need have written it; only where `mixes_x` says so.
    """
    if x.shape[0] == 0:
        return
    N1, K = x_fp8.codes.shape
    N2 = 0 if x_bf16 is None else x_bf16.shape[0]
    if mixes_x(x, N1):
        op = "project" if N1 + N2 > MORE_ROWS else "project_less"
        stream_rows(op, x, x_fp8, out_fp8, words=x_bf16, out_words=out_bf16, signal="waited", mixed=mixed, pdl=pdl)
        return
    assert mixed is None
    plan = _plan(x, K, pdl, "project")
    BN = plan.constants["BN"]
    inputs, act = _fp8_input(x, x_quantised)
    weight, out = (x_fp8.scales, out_fp8) if x_bf16 is None else (x_bf16, out_bf16)
    _project_kernel[(-(-N2 // BN) + N1 // BN, plan.token_tiles)](
        x, inputs, _bytes(x_fp8.codes), x_fp8.scales, weight, out_fp8, out,
        x.shape[0], out_fp8.stride(0), out.stride(0),
        N_BF16=N2, ACT=act, GROUP_ROWS=N1, GROUP_COLUMNS=0, **plan.constants, **plan.options,
    )  # fmt: skip


def linear(
    x: Tensor,
    weight: Weight,
    out: Tensor,
    *,
    act_fp8: bool = True,
    norm: tuple[Tensor, float] | None = None,
    rounded: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """`out [T, N]` bf16 = `x [T, K]` bf16 times an FP8 weight; with `act_fp8` the input first passes e4m3.

    `norm`: weights fp32 [K] and eps of an RMS norm before that. Raises ValueError where no product does (`norms`).

    `rounded`: room for T * K bf16. With it, more than `ROUNDED_TOKENS` tokens are rounded once, by a launch of its own,
    and not by every program: the same bits, sooner. Without `act_fp8` the input is taken in f16: exact for magnitudes
    from 6e-5 to 65504.
    """
    if x.shape[0] == 0:
        return
    N, K = weight.codes.shape
    if act_fp8 and (K <= SHORT or x.shape[0] == 1) and streams(x, N, K):
        signal: Signal = "waited" if x.shape[0] == 1 else "last"
        op = "long" if K > SHORT else "short_less" if N <= LESS_ROWS and x.shape[0] == 1 else "short"
        stream_rows(op, x, weight, out, norm=norm, signal=signal, pdl=pdl)
        return
    if norm is not None:
        raise ValueError(f"no product norms {K} columns on {x.device}")
    act = "round" if act_fp8 else "plain"
    if act_fp8 and rounded is not None and x.shape[0] > (WIDE_TOKENS if K <= SHORT else ROUNDED_TOKENS):
        x, act = _round(x, rounded, pdl), "rounded"
    plan = _plan(x, K, pdl, "linear")
    if K <= SHORT and plan.constants["BT"] <= WIDE_TOKENS:
        _wide(x, weight, out, plan, act)
        return
    _project_kernel[(N // plan.constants["BN"], plan.token_tiles)](
        x, x, _bytes(weight.codes), weight.scales, weight.scales, out, out,
        x.shape[0], out.stride(0), out.stride(0),
        N_BF16=0, ACT=act, GROUP_ROWS=N, GROUP_COLUMNS=0, **plan.constants, **plan.options,
    )  # fmt: skip


def norms(device: torch.device, rows: int, K: int) -> bool:
    """Whether `linear` norms inputs of any number of tokens for a weight `[rows, K]`."""
    return 1024 <= K <= SHORT and serves(device, rows, K)


def _round(x: Tensor, room: Tensor, pdl: bool | None) -> Tensor:
    T, K = x.shape
    rounded = room[: T * K].view(T, K)
    groups = K // BLOCK
    each = min(8, groups & -groups)
    _round_kernel[(T, groups // each)](
        x, rounded, X_STRIDE=x.stride(0), K=K, GROUPS=each, HW=hardware_formats(x.device), **pdl_options(x, pdl)
    )
    return rounded


def _wide(x: Tensor, weight: Weight, out: Tensor, plan: _Launch, act: str) -> None:
    chosen = tile("linear_decode.wide", x.device)
    constants = plan.constants | {"BN": chosen.n, "STAGES": chosen.stages}
    constants["KC"] = constants.pop("KW")
    del constants["WIDEN"], constants["PAIR"]
    tiles = weight.codes.shape[0] // chosen.n
    walkers = min(tiles, chosen.group * num_sms(x.device))
    _wide_kernel[(walkers, plan.token_tiles)](
        x, _bytes(weight.codes), weight.scales, out, x.shape[0], out.stride(0),
        TILES=tiles, STEPS=-(-tiles // walkers), ACT=act, **constants, **plan.options,
    )  # fmt: skip


def grouped_linear(x: Tensor, weight: Weight, out: Tensor, *, pdl: bool | None = None) -> None:
    """Block-diagonal product: `x [T, G, K]` bf16, `weight` FP8 `[G*N, K]`, `out [T, G*N]` bf16.

    The output projection's first half (wo_a). Its activations are not rounded to e4m3; see `linear` for their range.
    """
    if x.shape[0] == 0:
        return
    G, K = x.shape[1:]
    rows = weight.codes.shape[0]
    if x.stride(1) != K:
        raise ValueError("groups of the activations must be contiguous")
    if x.shape[0] == 1 and streams(x, rows, K):
        stream_rows("grouped", x, weight, out, groups=G, signal="first", pdl=pdl)
        return
    plan = _plan(x, K, pdl, "grouped")
    _project_kernel[(rows // plan.constants["BN"], plan.token_tiles)](
        x, x, _bytes(weight.codes), weight.scales, weight.scales, out, out,
        x.shape[0], out.stride(0), out.stride(0),
        N_BF16=0, ACT="plain", GROUP_ROWS=rows // G, GROUP_COLUMNS=K, **plan.constants, **plan.options,
    )  # fmt: skip


def shared_gate_up(
    x: Tensor,
    w13: Weight,
    limit: float,
    out: Tensor,
    *,
    x_quantised: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """The shared expert's hidden activations of `x [T, D]` bf16: `out [T, I]` bf16 = silu(min(w1 x, limit)) *
    clamp(w3 x, -limit, limit), with `w13` = w1 | w3 FP8 `[2I, D]` and activations rounded to e4m3."""
    if x.shape[0] == 0:
        return
    rows, K = w13.codes.shape
    plan = _plan(x, K, pdl, "gate")
    inputs, act = _fp8_input(x, x_quantised)
    _shared_kernel[(rows // plan.constants["BN"], plan.token_tiles)](
        inputs, _bytes(w13.codes), w13.scales, out, x.shape[0], float(limit),
        INNER=rows // 2, ACT=act, **plan.constants, **plan.options,
    )  # fmt: skip


def head(x: Tensor, weight: Tensor, out: Tensor, *, pdl: bool | None = None) -> None:
    """fp32 logits `out [B, V]` of `x [B, D]` bf16 and `weight [V, D]` bf16."""
    if x.shape[0] == 0:
        return
    N, K = weight.shape
    plan = _plan(x, K, pdl, "head", fp8=False)
    grid = (-(-N // plan.constants["BN"]), plan.token_tiles)
    _head_kernel[grid](x, weight, out, x.shape[0], N, **plan.constants, **plan.options)


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations that V4-Flash needs: one token, a few, and the largest token tile."""
    pdl, hw = arch >= 90, arch >= 89
    options = {"num_warps": 4, "launch_pdl": True} if pdl else {"num_warps": 4}

    def shape(op: str, K: int = 4096, tokens: int = 1, sums: int = 8) -> dict[str, Any]:
        chosen, one = tile(f"linear_decode.{op}", arch), tokens == 1
        constants = {"X_STRIDE": K, "K": K, "KW": sums if one else 4, "PAIR": not one and sums == 8, "BN": chosen.n}
        constants |= {"BT": max(8, tokens), "R": tokens, "STAGES": chosen.stages, "WIDEN": False, "PDL": pdl}
        return constants

    x = {"x": "*bf16", "num_tokens": "i32"}
    fp8 = {"codes": "*u8", "scales": "*fp32"}
    project = x | fp8 | {"x_fp8": "*bf16", "weight": "*bf16", "out_fp8": "*bf16", "out_bf16": "*fp32"}
    project |= {"out_fp8_stride": "i32", "out_bf16_stride": "i32"}
    rows = {"N_BF16": 2624, "ACT": "round", "GROUP_ROWS": 1536, "GROUP_COLUMNS": 0, "HW": hw}
    plain = rows | {"N_BF16": 0, "ACT": "plain", "GROUP_ROWS": 1024, "GROUP_COLUMNS": 4096}
    shared = x | fp8 | {"out": "*bf16", "limit": "fp32"}
    inner = {"ACT": "round", "INNER": 2048, "HW": hw}
    walk = shape("wide", 1024, sums=4) | {"KC": 4, "ACT": "round", "HW": hw, "TILES": 40960 // 32, "STEPS": 5}
    for name in ("KW", "PAIR", "WIDEN"):
        del walk[name]
    q = x | fp8 | {"out": "*bf16", "out_stride": "i32"}
    words = x | {"weight": "*bf16", "out": "*fp32", "N": "i32"}
    rounding = {"X_STRIDE": 8192, "K": 8192, "GROUPS": 8, "HW": hw, "PDL": pdl}
    return [
        ("round", _round_kernel, {"x": "*bf16", "rounded": "*bf16"}, rounding, options),
        ("project_x one", _project_kernel, project, shape("project") | rows, options),
        ("project_x few", _project_kernel, project, shape("few", tokens=8) | rows, options),
        ("project_x many", _project_kernel, project, shape("many", tokens=64) | rows | {"ACT": "rounded"}, options),
        ("shared_gate_up one", _shared_kernel, shared, shape("gate") | inner, options),
        ("linear one", _project_kernel, project, shape("linear", 8192) | rows | {"N_BF16": 0}, options),
        ("linear few", _project_kernel, project, shape("few_fp8", 8192, 8) | rows | {"N_BF16": 0}, options),
        ("linear wide one", _wide_kernel, q, walk, options),
        ("linear wide 16", _wide_kernel, q, walk | {"BT": 16, "R": 16}, options),
        ("grouped_linear one", _project_kernel, project, shape("grouped") | plain, options),
        ("grouped_linear many", _project_kernel, project, shape("many_rows", tokens=32) | plain, options),
        (
            "linear many",
            _project_kernel,
            project,
            shape("many_rows", 8192, 32) | rows | {"N_BF16": 0, "ACT": "rounded"},
            options,
        ),
        ("head one", _head_kernel, words, shape("head", sums=4), options),
        ("head many", _head_kernel, words, shape("many", tokens=64, sums=4), options),
        *(stream_cases(arch) if arch in ARCHITECTURES else []),
    ]
