"""Latent norms of a step's tokens, and their window rows into the fp8 pages, in one launch.

Owns: both RMS norms behind the fused projection `wq_a || wkv`, rope of the KV vector, its quantisation and its place.
Does not own: the row layout (`kv_rows.py`) or compressed entries (compressor).

Roundings are the official ones: the norm to bf16, the rotation to bf16, then e4m3 with one power-of-two scale per 64
nope dimensions, from the bf16 values.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.formats import f32_to_e4m3, hardware_formats, pow2_reciprocal, pow2_scale_ceil
from workers.kernels.kv_rows import NOPE_DIMS, ROPE_DIMS, as_bf16, rotate
from workers.kernels.launch import pdl_options


class StepMetadata(Protocol):
    """What the store reads of a step; int32 on the device."""

    positions: Tensor  # [T], -1 = padding
    sequence_of_token: Tensor  # [T]
    window_pages: Tensor  # [B, S], -1 = none


@triton.jit
def store_latent(row, q_norm, latent, token, eps, LATENT: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr):
    """RMS norm of the first LATENT columns of a raw row into row `token` of `latent [T, LATENT]`.

    Squares are added over 128 columns first, as where a product norms its input (`linear_inputs.py`).
    """
    BLOCK: tl.constexpr = triton.next_power_of_2(LATENT)
    at = tl.arange(0, BLOCK)
    inside = at < LATENT
    gamma = tl.load(q_norm + at, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    y = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    squares = tl.sum(tl.reshape(y * y, (BLOCK // 128, 128)), 1)
    y = y * tl.rsqrt(tl.sum(squares, 0) / LATENT + eps) * gamma
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(latent + token.to(tl.int64) * LATENT + at, as_bf16(y, WIDEN), mask=inside)


@triton.jit
def store_window_row(
    row, kv_norm, rope_table, position, pages, pool, eps,
    NOPE: tl.constexpr, UNIT_STRIDE: tl.constexpr, HW: tl.constexpr, WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Norm, rope and fp8 of a raw row of NOPE + 64 columns, to its place in the pages of its sequence.

    pool: the same memory as u8 and as bf16. Without a position or a page nothing is stored.
    """
    codes, words = pool
    page = tl.load(pages + position // 256, mask=position >= 0, other=-1)
    GROUPS: tl.constexpr = NOPE // 64 + 1  # the last one is rope
    group = tl.arange(0, GROUPS)
    column = group[:, None] * 64 + tl.arange(0, 64)[None, :]
    last = NOPE + tl.arange(0, 64)[None, :]
    gamma, gamma_last = tl.load(kv_norm + column), tl.load(kv_norm + last)
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64 + tl.arange(0, 32)[None, :]
    cos, sin = tl.load(angle), tl.load(angle + 32)
    if PDL:
        tl.extra.cuda.gdc_wait()
    x = tl.load(row + column).to(tl.float32)
    rope = tl.load(row + last).to(tl.float32)
    factor = tl.rsqrt(tl.sum(x * x) / (NOPE + 64) + eps)
    nope = as_bf16(x * factor * gamma, WIDEN).to(tl.float32)
    scale, byte = pow2_scale_ceil(tl.max(tl.abs(nope), 1), 448.0, 1e-4)
    code = f32_to_e4m3(nope * pow2_reciprocal(scale)[:, None], HW)
    rope = rotate(as_bf16(rope * factor * gamma_last, WIDEN).to(tl.float32), cos, sin)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if page >= 0:
        offset = position % 256
        unit = page.to(tl.int64) * UNIT_STRIDE
        tl.store(codes + unit + offset * (NOPE + 128) + column, code, mask=(group < GROUPS - 1)[:, None])
        to = words + (unit + offset * (NOPE + 128) + NOPE) // 2 + tl.arange(0, 64)[None, :]
        tl.store(to, as_bf16(rope, WIDEN))
        scales = codes + unit + (256 * (NOPE + 128) + offset * 8)
        tl.store(scales + group, byte, mask=group < GROUPS - 1)
        pad = tl.arange(0, 8)
        tl.store(scales + pad, tl.zeros((8,), tl.uint8), mask=pad >= GROUPS - 1)


@triton.jit
def _norm_and_store(
    rows,  # bf16 [T, ROW_STRIDE]: LATENT columns, then NOPE + 64
    q_norm,  # fp32 [LATENT]
    kv_norm,  # fp32 [NOPE + 64]
    rope_table,  # fp32 [P, 64]
    positions,
    sequence_of_token,
    window_pages,
    num_pages,
    codes,  # uint8, and the same memory as bf16: one layer of the window pool
    words,
    latent,  # bf16 [T, LATENT]
    eps,
    LATENT: tl.constexpr,
    NOPE: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (2, T): program 0 of a token does the latent, program 1 the window row."""
    token = tl.program_id(1)
    row = rows + token.to(tl.int64) * ROW_STRIDE
    if tl.program_id(0) == 0:
        store_latent(row, q_norm, latent, token, eps, LATENT, WIDEN, PDL)
    else:
        position = tl.load(positions + token)
        pages = window_pages + tl.load(sequence_of_token + token).to(tl.int64) * num_pages
        pool = (codes, words)
        row += LATENT
        store_window_row(row, kv_norm, rope_table, position, pages, pool, eps, NOPE, UNIT_STRIDE, HW, WIDEN, PDL)


def norm_and_store(
    out_fp8: Tensor,
    q_norm: Tensor,
    kv_norm: Tensor,
    rope_table: Tensor,
    meta: StepMetadata,
    window_pool: Tensor,
    latent: Tensor,
    eps: float,
    *,
    pdl: bool | None = None,
) -> None:
    """`latent` = RMS norm of the first columns; the window row of each token = norm, rope and fp8 of the others.

    Padding tokens and tokens whose window page is not mapped write no row; their latent is computed all the same.

    Args:
        out_fp8: bf16 [T, q_lora + hd], raw rows of `wq_a || wkv`.
        q_norm, kv_norm: fp32 [q_lora], [hd].
        rope_table: fp32 [P, 64], cos | sin of each position.
        window_pool: uint8 [units, stride], one layer of the window pool. Mutated.
        latent: bf16 [T, q_lora], written.
    """
    num_tokens, q_lora = latent.shape
    nope = kv_norm.shape[0] - ROPE_DIMS
    if nope not in NOPE_DIMS or rope_table.shape[1] != ROPE_DIMS or out_fp8.shape[1] != q_lora + kv_norm.shape[0]:
        raise ValueError(f"no store kernel for rows {tuple(out_fp8.shape)}, kv {kv_norm.shape[0]}, latent {q_lora}")
    if not num_tokens:
        return
    _norm_and_store[(2, num_tokens)](
        out_fp8,
        q_norm,
        kv_norm,
        rope_table,
        meta.positions,
        meta.sequence_of_token,
        meta.window_pages,
        meta.window_pages.shape[1],
        window_pool,
        window_pool.view(torch.bfloat16),
        latent,
        eps,
        LATENT=q_lora,
        NOPE=nope,
        ROW_STRIDE=out_fp8.stride(0),
        UNIT_STRIDE=window_pool.shape[1],
        HW=hardware_formats(out_fp8.device),
        WIDEN=not out_fp8.is_cuda,
        num_warps=4 if nope == 448 else 1,
        **pdl_options(out_fp8, pdl),
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash's shapes for the check that every kernel compiles."""
    signature = {
        "rows": "*bf16",
        "q_norm": "*fp32",
        "kv_norm": "*fp32",
        "rope_table": "*fp32",
        "positions": "*i32",
        "sequence_of_token": "*i32",
        "window_pages": "*i32",
        "num_pages": "i32",
        "codes": "*u8",
        "words": "*bf16",
        "latent": "*bf16",
        "eps": "fp32",
    }
    constants = {
        "LATENT": 1024,
        "NOPE": 448,
        "ROW_STRIDE": 1536,
        "UNIT_STRIDE": 149_760,
        "HW": arch >= 89,
        "WIDEN": False,
        "PDL": arch >= 90,
    }
    launch = {"launch_pdl": True} if arch >= 90 else {}
    return [("norm_and_store", _norm_and_store, signature, constants, {"num_warps": 4} | launch)]
