"""A row of e4m3 codes as decode's expert products on sm_90 take it: rounded once, by who makes the row.

Owns: where codes and scales stand. A coded row of D columns is D bytes of codes, then D / 128 fp32 scales, powers of
two. Inside each 32 columns the even ones come first, as the tensor cores' operand has them. Values:
`formats.round_fp8_groups`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.formats import hardware_formats, round_fp8_groups
from workers.kernels.launch import pdl_options

GROUP = tl.constexpr(128)
"""Columns that share one scale."""


def coded_bytes(columns: int) -> int:
    """Bytes of a coded row."""
    return columns + columns // GROUP.value * 4


def coded_room(rows: Tensor) -> Tensor:
    """Room for coded rows, uint8 `[T, coded_bytes(D)]`, in contiguous bf16 `rows [T, D]`."""
    tokens, columns = rows.shape
    size = coded_bytes(columns)
    return rows.view(torch.uint8).flatten()[: tokens * size].view(tokens, size)


@triton.jit
def store_coded(row, values, column, D: tl.constexpr, HW: tl.constexpr):
    """Writes whole groups of a coded row (pointer to uint8). values: fp32 `[1, C]`; column: `[1, C]`, beyond D none."""
    codes, scale = round_fp8_groups(values, GROUP, HW)
    within = column % 32
    place = column - within + within % 2 * 16 + within // 2
    tl.store(row + place, codes, mask=column < D)
    groups = tl.reshape(column, (1, column.shape[1] // GROUP, GROUP))
    group = tl.min(groups, 2) // GROUP
    scales = (row + D).to(tl.pointer_type(tl.float32))
    tl.store(scales + group, scale, mask=group < D // GROUP)


@triton.jit
def _code_rows(x, out, D: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, D / 128)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + token * D + column).to(tl.float32)
    store_coded(out + token * (D + D // GROUP * 4), values, column, D, HW)


def code_rows(x: Tensor, out: Tensor, *, pdl: bool | None = None) -> None:
    """Coded rows, uint8 `out [T, coded_bytes(D)]`, of bf16 `x [T, D]`."""
    tokens, columns = x.shape
    if tokens:
        grid = (tokens, columns // GROUP.value)
        _code_rows[grid](x, out, columns, hardware_formats(x.device), num_warps=1, **pdl_options(x, pdl))


def compile_cases(arch: int) -> list[tuple[str, object, dict[str, str], dict[str, object], dict[str, object]]]:
    """V4-Flash, for the check that every architecture compiles."""
    constants = {"D": 4096, "HW": arch >= 89, "PDL": arch >= 90}
    return [("rows", _code_rows, {"x": "*bf16", "out": "*u8"}, constants, {"num_warps": 1})]
