"""mHC at decode: write a sublayer's output back to the streams, then read the next sublayer's input from them.

Owns: `embed_streams`, `hc_pre`, `hc_post_pre` and `hc_post_head` for the tokens of a decode step. Definitions:
`workers/reference/mhc.py`. Does not own: prefill (`workers/kernels/mhc_prefill.py`).

Two launches a sublayer. The first gives every program `TILE_CHANNELS` channels of all four streams, mixes them and
stores 34 partial sums: 24 rows of `fn` and the 10 inner products of the streams with each other. The second adds the
partial sums in tile order and writes the input: the inner products give the norm over all streams (their trace) and
also the norm of the mix itself, `pre @ G @ pre`, so that no program has to see a whole row. How tokens are dealt to
programs changes no sum, as long as reductions over blocks are laid out alike (`mhc_gates._total`). At one token the
second can be a part of the launch behind (`hc_sums`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from workers.kernels.formats import hardware_formats
from workers.kernels.launch import EARLY_TOKENS, pdl_options
from workers.kernels.mhc_gates import CODES, VALUES, collapse_kernel
from workers.kernels.mhc_mix import embed_streams_kernel, mix_decode_kernel
from workers.kernels.tiles import tile

STREAMS = 4
MIXES = STREAMS * (2 + STREAMS)
"""Rows of `fn`: 4 pre, 4 post, 16 comb (row-major)."""

TOKENS = 16
"""Tokens of one program of the first launch."""

TILE_CHANNELS = 32
"""Channels of one program of the first launch. Changes the order of every sum, so the same for all batches."""

WORK_ROWS = 40
"""Partial sums per tile: `MIXES` products, then inner products (0,0)..(3,3), (0,1), (1,2), (2,3), (3,0), (0,2), (1,3);
padded."""

FEW_TOKENS = 8
"""Up to here the second launch spreads a token over many one-warp programs; beyond, four warps share what they read of
the partial sums. Changes no result."""

COLLAPSE_FEW, COLLAPSE_MANY = (128, 1), (1024, 4)
"""Channels and warps of a program of the second launch."""


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """mHC weights of one sublayer, or of the head (`fn [4, 4D]`, `base [4]`, `scale [1]`), and its constants."""

    fn: Tensor
    """fp32 [24, 4D], stream-major columns."""
    base: Tensor
    """fp32 [24]."""
    scale: Tensor
    """fp32 [3]: pre, post, comb."""
    iters: int = 20
    eps: float = 1e-6
    """`hc_eps`: of gates and Sinkhorn denominators."""
    norm_eps: float = 1e-6
    """`rms_norm_eps`: of the norm before `fn` and of the sublayer's own norm."""


class Mixed(NamedTuple):
    """What one token's sublayer input is made of by the launch that reads it, where `hc_sums` left it."""

    streams: Tensor
    """bf16 [1, 4, D]."""
    hc: HyperConnection
    norm_weight: Tensor
    """fp32 [D]."""
    work: Tensor
    post: Tensor
    """fp32 [1, 4]: the next write-back's gate, still to be made, as is `comb [1, 16]`."""
    comb: Tensor


def work_floats(num_tokens: int, hidden: int) -> int:
    """fp32 elements of the scratch tensor `work` for steps of up to `num_tokens` tokens."""
    return num_tokens * WORK_ROWS * (hidden // TILE_CHANNELS)


def embed_streams(token_ids: Tensor, embed: Tensor, streams: Tensor, *, pdl: bool | None = None) -> None:
    """Four copies of each token's embedding: `streams [T, 4, D] bf16` of `token_ids [T] int32`, `embed [V, D] bf16`.

    A negative id marks a padding row: its streams become zero, and stay finite through the layers.
    """
    num_tokens, _, hidden = streams.shape
    if num_tokens == 0:
        return
    block = min(1024, triton.next_power_of_2(hidden))
    grid = (num_tokens, triton.cdiv(hidden, block))
    options = pdl_options(streams, pdl)
    embed_streams_kernel[grid](token_ids, embed, streams, embed.shape[0], D=hidden, BLOCK=block, num_warps=4, **options)


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
    finish: bool = True,
    pdl: bool | None = None,
) -> None:
    """The first sublayer's input: `x [T, D] bf16` = rmsnorm(mix of `streams [T, 4, D] bf16`), and the gates of the
    write-back, `post [T, 4]` and `comb [T, 16]` fp32. `work`: `work_floats` elements. `x_quantised [T, D] bf16`, if
    given: `x` through e4m3 with one power-of-two scale per 128 channels (exact in bf16), as FP8 linears want it.
    `finish`: as in `hc_post_pre`."""
    _sums(None, streams, post, comb, hc.fn, None, work, streams.shape[0], pdl)
    _collapsed(streams, None, hc, norm_weight, work, x, x_quantised, None, post, comb, pdl, finish)


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
    finish: bool = True,
    pdl: bool | None = None,
) -> None:
    """Writes a sublayer's output back and reads the next one's input.

    `sub_out [T, R, D] bf16`: R parts that are added in order in fp32. `streams`, `post` and `comb` are updated in
    place; `hc`, `norm_weight` belong to the next sublayer, whose input is `x [T, D] bf16` (and `x_quantised`, as in
    `hc_pre`). `x_experts [T, D] bf16`, if given: the same values in expert order (`experts_decode.expert_gate_up`):
    inside each 128 channels, place 32 j + h holds channel 4 h + j; or, of uint8, coded rows (`expert_codes.py`). With
    `finish` False, `comb` is left as logits, and a launch before the next write-back must turn them into matrices
    (`mhc_gates.finish_comb`; `routing_gate.gate_route` and `kv_step.store_and_compress` can).
    """
    _sums(sub_out, streams, post, comb, hc.fn, None, work, streams.shape[0], pdl)
    _collapsed(streams, None, hc, norm_weight, work, x, x_quantised, x_experts, post, comb, pdl, finish)


def hc_sums(
    sub_out: Tensor | None,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    hc: HyperConnection,
    work: Tensor,
    *,
    pdl: bool | None = None,
) -> None:
    """The first launch of `hc_post_pre` (or, `sub_out` None, of `hc_pre`) alone.

    Behind it `linear_decode.project_x` makes the next sublayer's input from `streams` and `work`, and
    `kv_step.store_and_compress` the new `post` and `comb`, for steps of one token on GPUs whose linears stream.
    """
    _sums(sub_out, streams, post, comb, hc.fn, None, work, streams.shape[0], pdl, early=True)


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
    """Writes the last sublayer's output back and collapses the streams for the head: `x [B, D] bf16`, normed.

    Only `rows [B] int32` of the step (None: all) are computed; the streams of other rows stay as they were.
    """
    num_rows = streams.shape[0] if rows is None else rows.shape[0]
    _sums(sub_out, streams, post, comb, hc.fn, rows, work, num_rows, pdl)
    _collapsed(streams, rows, hc, norm_weight, work, x, None, None, post, comb, pdl)


def _sums(
    sub_out: Tensor | None,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    rows: Tensor | None,
    work: Tensor,
    num_rows: int,
    pdl: bool | None,
    *,
    early: bool = False,
) -> None:
    hidden = streams.shape[-1]
    assert hidden % TILE_CHANNELS == 0 and work.numel() >= work_floats(num_rows, hidden)
    if num_rows == 0:
        return
    shape, options = tile("mhc.mix", streams.device), pdl_options(streams, pdl)
    mix_decode_kernel[(hidden // TILE_CHANNELS, triton.cdiv(num_rows, TOKENS))](
        streams if sub_out is None else sub_out,
        streams,
        post,
        comb,
        fn,
        fn if rows is None else rows,
        work,
        num_rows,
        D=hidden,
        R=0 if sub_out is None else sub_out.shape[1],
        NUM_FN=fn.shape[0],
        TM=TOKENS,
        C=TILE_CHANNELS,
        HAS_ROWS=rows is not None,
        WIDEN=streams.device.type == "cpu",
        EARLY=early and options["PDL"],
        **shape.options,
        **options,
    )


def experts_form(x_experts: Tensor | None) -> int:
    """EXPERTS of `collapse_kernel`."""
    if x_experts is None:
        return 0
    return (CODES if x_experts.dtype == torch.uint8 else VALUES).value


def _collapsed(
    streams: Tensor,
    rows: Tensor | None,
    hc: HyperConnection,
    norm_weight: Tensor,
    work: Tensor,
    x: Tensor,
    x_quantised: Tensor | None,
    x_experts: Tensor | None,
    post: Tensor,
    comb: Tensor,
    pdl: bool | None,
    finish: bool = True,
) -> None:
    num_rows, hidden = x.shape
    if num_rows == 0:
        return
    head = hc.fn.shape[0] == STREAMS
    num_tiles = hidden // TILE_CHANNELS
    channels, warps = COLLAPSE_FEW if num_rows <= FEW_TOKENS else COLLAPSE_MANY
    block = min(channels, triton.next_power_of_2(hidden))
    options = pdl_options(x, pdl)
    collapse_kernel[(num_rows, triton.cdiv(hidden, block) + (not head))](
        streams,
        hc.fn if rows is None else rows,
        hc.base,
        hc.scale,
        norm_weight,
        work,
        x,
        x if x_quantised is None else x_quantised,
        x if x_experts is None else x_experts,
        post,
        comb,
        D=hidden,
        NUM_TILES=num_tiles,
        BLOCK=block,
        W=warps,
        HEAD=head,
        HAS_ROWS=rows is not None,
        QUANTISE=x_quantised is not None,
        EXPERTS=experts_form(x_experts),
        HW=hardware_formats(x.device),
        FINISH=finish,
        ITERS=hc.iters,
        EPS=hc.eps,
        NORM_EPS=hc.norm_eps,
        EARLY=options["PDL"] and num_rows <= EARLY_TOKENS and not head,
        num_warps=warps,
        **options,
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash, for the check that every architecture compiles."""
    pdl = {"PDL": arch >= 90}
    hidden, num_tiles = 4096, 4096 // TILE_CHANNELS
    floats = ("post", "comb", "fn", "work", "base", "scale", "norm_weight")
    halves = ("sub_out", "streams", "x", "x_quantised", "x_experts", "embed")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(halves, "*bf16")
    types |= {"rows": "*i32", "token_ids": "*i32", "num_rows": "i32", "vocab": "i32"}

    def case(name: str, kernel: Any, options: dict[str, Any], **constexprs: Any) -> Any:
        signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
        if constexprs.get("EXPERTS") == CODES.value:
            signature["x_experts"] = "*u8"
        return name, kernel, signature, {"D": hidden, **constexprs, **pdl}, options

    mix = {"NUM_FN": 24, "TM": TOKENS, "C": TILE_CHANNELS, "HAS_ROWS": False, "WIDEN": False}
    sums = {"NUM_TILES": num_tiles, "HW": arch >= 89}
    gates = {"ITERS": 20, "EPS": 1e-6, "NORM_EPS": 1e-6, "HEAD": False, "HAS_ROWS": False, "FINISH": True}
    options = tile("mhc.mix", arch).options
    return [
        case("embed_streams", embed_streams_kernel, {"num_warps": 4}, BLOCK=1024),
        case("mix R=1", mix_decode_kernel, options, **mix, R=1, EARLY=False),
        case("mix R=7", mix_decode_kernel, options, **mix, R=7, EARLY=arch >= 90),
        *(
            case(
                f"collapse {n} {form}",
                collapse_kernel,
                {"num_warps": w},
                **(sums | gates | {"BLOCK": n, "W": w, "QUANTISE": n > 128, "EARLY": n == 128 and arch >= 90}),
                EXPERTS=form,
            )
            for (n, w), form in (
                (COLLAPSE_FEW, VALUES.value),
                (COLLAPSE_FEW, CODES.value),
                (COLLAPSE_MANY, VALUES.value),
            )
        ),
    ]
