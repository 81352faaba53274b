"""Activation quantisation as a pass of its own: bf16 rows to e4m3 codes and one power-of-two scale per 128 columns.

Owns: the passes before prefill's products (decode kernels round inside their loops) and the column order of the operand
of the FP4 experts. Does not own: the rounding rule (`formats.py`), products.

Memory bound: 2 bytes read and 1 (codes) or 2 (rounded values) written per element.

Fragment order is that of `experts_prefill_sm90.py`, which multiplies codes: inside each 128 columns, place
`32 b + 16 h + 4 t + i` holds column `32 t + 8 b + 2 i + h`.

Expert order: an int16 of packed FP4 weights holds columns 4h..4h+3. Unpacking gives four blocks of columns, one per
nibble, so the activations stand in that order: inside each 128 columns, place `32 * j + h` holds column `4 * h + j`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.formats import e4m3_to_f32, hardware_formats, round_fp8_groups
from workers.kernels.tiles import tile

GROUP = 128
"""Columns that share an activation scale, and that the expert order permutes among themselves."""


PLACES = 1024
"""Pairs of a program that only writes places."""


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """Room for rows of e4m3: `codes` float8_e4m3fn and `scales` fp32, flat; `view` cuts the shapes of one product."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def empty(tokens: int, columns: int, device: torch.device | str) -> QuantisedRows:
        """Room for `tokens` rows of `columns` and for any smaller product."""
        codes = torch.empty(tokens * columns, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        return QuantisedRows(codes, torch.empty(tokens * columns // GROUP, device=device))

    def view(self, tokens: int, columns: int) -> QuantisedRows:
        """`codes [T, K]` and `scales [K/128, T]` (a column of scales is read at once by a block of rows)."""
        codes = self.codes[: tokens * columns].view(tokens, columns)
        return QuantisedRows(codes, self.scales[: tokens * columns // GROUP].view(columns // GROUP, tokens))


@triton.jit
def _expert_order(value, R: tl.constexpr, C: tl.constexpr):
    """`[R, C]` with the columns of each 128 in expert order."""
    value = tl.permute(tl.reshape(value, (R, C // 128, 32, 4)), (0, 1, 3, 2))
    return tl.reshape(value, (R, C))


@triton.jit
def _fragment_order(code, R: tl.constexpr, C: tl.constexpr):
    """`[R, C]` with the columns of each 128 in fragment order."""
    code = tl.permute(tl.reshape(code, (R, C // 128, 4, 4, 4, 2)), (0, 1, 3, 5, 2, 4))
    return tl.reshape(code, (R, C))


@triton.jit
def quantise_kernel(
    x, codes, scales, rounded, T, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    CODES: tl.constexpr, ROUNDED: tl.constexpr, REORDER: tl.constexpr, HW: tl.constexpr,
):  # fmt: skip
    """One program: `R` rows and `C` columns of `x` bf16 `[T, K]`.

    CODES writes `codes` u8 `[T, K]` and `scales` fp32 `[K/128, T]`; ROUNDED writes `rounded` bf16 `[T, K]` (code *
    scale, exact), with REORDER in expert order.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    place = row.to(tl.int64)[:, None] * K + column[None, :]
    inside = (row < T)[:, None]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    code, scale = round_fp8_groups(value, 128, HW)
    if CODES:
        group = tl.program_id(1) * (C // 128) + tl.arange(0, C // 128)
        tl.store(codes + place, code, mask=inside)
        tl.store(scales + group[None, :] * T + row[:, None], scale, mask=inside)
    if ROUNDED:
        back = tl.reshape(e4m3_to_f32(code, HW), (R, C // 128, 128)) * scale[:, :, None]
        back = tl.reshape(back, (R, C)).to(tl.bfloat16)
        if REORDER:
            back = _expert_order(back, R, C)
        tl.store(rounded + place, back, mask=inside)


@triton.jit
def round_in_place_kernel(x, num_rows, T, K: tl.constexpr, R: tl.constexpr, C: tl.constexpr, HW: tl.constexpr):
    """`R` rows and `C` columns of `x` bf16 `[T, K]` through e4m3 and back; only the first `num_rows[0]` rows."""
    first = tl.program_id(0) * R
    if first >= tl.load(num_rows):
        return
    row = first + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    place = row.to(tl.int64)[:, None] * K + column[None, :]
    inside = (row < T)[:, None]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    code, scale = round_fp8_groups(value, 128, HW)
    back = tl.reshape(e4m3_to_f32(code, HW), (R, C // 128, 128)) * scale[:, :, None]
    tl.store(x + place, tl.reshape(back, (R, C)).to(tl.bfloat16), mask=inside)


@triton.jit
def quantise_in_place_kernel(x, codes, scales, num_rows, K: tl.constexpr, HW: tl.constexpr):
    """A row of `x` bf16 `[T, K]` to codes u8 and scales fp32 in the same memory; only the first `num_rows[0]` rows.

    Of a row's 2 K bytes the first K are codes in fragment order, the next K / 32 scales.
    """
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(num_rows):
        return
    column = tl.arange(0, K)[None, :]
    value = tl.load(x + row * K + column).to(tl.float32)
    tl.debug_barrier()  # all threads have read what codes are about to replace
    code, scale = round_fp8_groups(value, 128, HW)
    tl.store(codes + row * (2 * K) + column, _fragment_order(code, 1, K))
    tl.store(scales + row * (K // 2) + K // 4 + tl.arange(0, K // 128)[None, :], scale)


@triton.jit
def places_kernel(pair_order, num_pairs, places, BLOCK: tl.constexpr):
    """`places` int32 `[T * k]`: where a pair stands in `pair_order`. Pairs that stand nowhere are left alone."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < tl.load(num_pairs)
    tl.store(places + tl.load(pair_order + place, mask=inside, other=0), place, mask=inside)


@triton.jit
def quantise_pairs_kernel(
    x, pair_order, num_pairs, places, codes, scales, K: tl.constexpr, CHOICES: tl.constexpr, HW: tl.constexpr
):  # fmt: skip
    """A token's row of `x` bf16 `[T, K]` to the places of its pairs: `codes` u8 `[T * k, K]` in fragment order,
    `scales` fp32 `[T * k, K / 128]`."""
    token = tl.program_id(0)
    column = tl.arange(0, K)[None, :]
    group = tl.arange(0, K // 128)[None, :]
    code, scale = round_fp8_groups(tl.load(x + token.to(tl.int64) * K + column).to(tl.float32), 128, HW)
    code = _fragment_order(code, 1, K)
    last = tl.load(num_pairs)
    for choice in tl.static_range(CHOICES):
        pair = token * CHOICES + choice
        place = tl.load(places + pair)
        # A padding token's pairs have no place: what stands there is another's, or nothing that was written.
        used = (place >= 0) & (place < last)
        used = used & (tl.load(pair_order + tl.where(used, place, 0)) == pair)
        row = tl.where(used, place, 0).to(tl.int64)
        tl.store(codes + row * K + column, code, mask=used)
        tl.store(scales + row * (K // 128) + group, scale, mask=used)


@triton.jit
def swiglu_kernel(gate_up, hidden, limit, T, I: tl.constexpr, R: tl.constexpr, C: tl.constexpr):  # noqa: E741
    """`hidden` bf16 `[T, I]` = silu(min(gate, limit)) * clamp(up, -limit, limit) of `gate_up` bf16 `[T, 2 I]`."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    inside = (row < T)[:, None]
    place = row.to(tl.int64)[:, None] * (2 * I) + column[None, :]
    gate = tl.load(gate_up + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + place + I, mask=inside, other=0.0).to(tl.float32)
    value = swiglu(gate, up, limit).to(tl.bfloat16)
    tl.store(hidden + row.to(tl.int64)[:, None] * I + column[None, :], value, mask=inside)


@triton.jit
def swiglu(gate, up, limit):
    """fp32 clamped SwiGLU: the gate is clamped above only. NaN passes through the clamps."""
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    small = tl.exp(-tl.abs(gate))
    return gate * tl.where(gate < 0, small, 1.0) / (1.0 + small) * up


def quantise_rows(
    x: Tensor, rows: QuantisedRows | None, rounded: Tensor | None = None, *, reorder: bool = False
) -> QuantisedRows | None:
    """Quantise bf16 `x [T, K]` into `rows` (returned as views of its shape), into bf16 `rounded [T, K]`, or into both.

    `reorder` puts `rounded` in expert order.
    """
    tokens, columns = x.shape
    views = None if rows is None else rows.view(tokens, columns)
    shape = tile("quantise_rows.quantise", x.device).fitted(n=columns)
    if tokens:
        quantise_kernel[(-(-tokens // shape.m), columns // shape.n)](
            x, *((x, x) if views is None else (views.codes.view(torch.uint8), views.scales)),
            x if rounded is None else rounded, tokens, K=columns, R=shape.m, C=shape.n,
            CODES=views is not None, ROUNDED=rounded is not None, REORDER=reorder, HW=hardware_formats(x.device),
            **shape.options,
        )  # fmt: skip
    return views


def round_in_place(x: Tensor, num_rows: Tensor) -> None:
    """The first `num_rows` (int32 `[1]` on the device) rows of bf16 `x [T, K]` through e4m3 and back, in place."""
    rows, columns = x.shape
    shape = tile("quantise_rows.quantise", x.device).fitted(n=columns)
    if rows:
        round_in_place_kernel[(-(-rows // shape.m), columns // shape.n)](
            x, num_rows, rows, K=columns, R=shape.m, C=shape.n, HW=hardware_formats(x.device), **shape.options
        )


def quantise_in_place(x: Tensor, num_rows: Tensor) -> None:
    """The first `num_rows` (int32 `[1]` on the device) rows of bf16 `x [T, K]` to codes and scales, where they are.

    A row's first K bytes become e4m3 codes in fragment order, the next K / 32 its fp32 scales. K: a power of two.
    """
    rows, columns = x.shape
    if rows:
        quantise_in_place_kernel[(rows,)](
            x, x.view(torch.uint8), x.view(torch.float32), num_rows, K=columns, HW=hardware_formats(x.device),
            num_warps=2,
        )  # fmt: skip


def quantise_pairs(
    x: Tensor, pair_order: Tensor, num_pairs: Tensor, choices: int, room: Tensor
) -> tuple[Tensor, Tensor]:
    """e4m3 `[T * k, K]` in fragment order and scales fp32 `[T * k, K / 128]` of bf16 `x [T, K]`: row p is that of the
    token of pair `pair_order[p]`, for the first `num_pairs` (int32 `[1]` on the device) places. K: a power of two.

    The results lie in `room`, uint8 of `T * k * (K + K / 32 + 4)` bytes.
    """
    tokens, columns = x.shape
    pairs = tokens * choices
    codes, scales, places, _ = room.split(
        [pairs * columns, pairs * columns // 32, 4 * pairs, room.numel() - pairs * (columns + columns // 32 + 4)]
    )
    codes, scales, places = codes.view(pairs, columns), scales.view(torch.float32), places.view(torch.int32)
    if tokens:
        hardware = hardware_formats(x.device)
        places_kernel[(-(-pairs // PLACES),)](pair_order, num_pairs, places, BLOCK=PLACES, num_warps=4)
        quantise_pairs_kernel[(tokens,)](
            x, pair_order, num_pairs, places, codes, scales, K=columns, CHOICES=choices, HW=hardware, num_warps=4
        )
    return codes.view(torch.float8_e4m3fn), scales.view(pairs, columns // GROUP)


def swiglu_rows(gate_up: Tensor, hidden: Tensor, limit: float) -> None:
    """bf16 `hidden [T, I]` of bf16 `gate_up [T, 2 I]` (gate first), with the official clamps."""
    tokens, inner = hidden.shape
    shape = tile("quantise_rows.quantise", hidden.device).fitted(n=inner)
    if tokens:
        swiglu_kernel[(-(-tokens // shape.m), inner // shape.n)](
            gate_up, hidden, limit, tokens, I=inner, R=shape.m, C=shape.n, **shape.options
        )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations that V4-Flash needs."""
    shape = tile("quantise_rows.quantise", arch)
    hardware = arch >= 89
    quantise = {"x": "*bf16", "codes": "*u8", "scales": "*fp32", "rounded": "*bf16", "T": "i32"}
    size = {"R": shape.m, "C": shape.n}
    both = {"K": 4096, "CODES": True, "ROUNDED": True, "REORDER": True, "HW": hardware, **size}
    in_place = {"x": "*bf16", "num_rows": "*i32", "T": "i32"}
    whole = {"x": "*bf16", "codes": "*u8", "scales": "*fp32", "num_rows": "*i32"}
    indices = dict.fromkeys(("pair_order", "num_pairs", "places"), "*i32")
    pairs = {"x": "*bf16", **indices, "codes": "*u8", "scales": "*fp32"}
    warps = {"num_warps": 4}
    glu = {"gate_up": "*bf16", "hidden": "*bf16", "limit": "fp32", "T": "i32"}
    return [
        ("quantise", quantise_kernel, quantise, both, shape.options),
        ("round_in_place", round_in_place_kernel, in_place, {"K": 2048, "HW": hardware, **size}, shape.options),
        ("in_place", quantise_in_place_kernel, whole, {"K": 2048, "HW": hardware}, {"num_warps": 2}),
        ("places", places_kernel, indices, {"BLOCK": PLACES}, warps),
        ("pairs", quantise_pairs_kernel, pairs, {"K": 4096, "CHOICES": 6, "HW": hardware}, warps),
        ("swiglu", swiglu_kernel, glu, {"I": 2048, **size}, shape.options),
    ]
