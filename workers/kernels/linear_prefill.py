"""Linear layers of prefill: many tokens, compute bound, tensor-core time is the floor.

Owns: products of 16..16384 tokens with FP8 block-scaled and BF16 weights, same functions as `linear_decode.py`. Does
not own: routed experts (`experts_prefill.py`), the quantisation passes (`quantise_rows.py`).

FP8 x FP8: activations become e4m3 codes in a pass, the product runs on FP8 tensor cores over 128 columns at a time, and
each such partial sum is multiplied by (activation scale x weight scale) and added in fp32: the official arithmetic, and
the tensor cores' own FP8 sums, which carry few bits, end after 128 columns. Before sm_89 there are no FP8 tensor cores:
weights and activations are then expanded to bf16, which holds code x scale exactly.

One tile shape whatever T is, all of K by one program in order: a row's bits do not depend on the other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from workers.kernels.formats import e4m3_to_f32, hardware_formats
from workers.kernels.quantise_rows import QuantisedRows, quantise_rows, swiglu_rows
from workers.kernels.tiles import Tile, architecture, tile

BLOCK = 128
"""Columns (and rows of a weight) that share a scale."""

NARROW_ROWS = 512
"""Outputs of at most this many columns use the narrow tile, so that they still occupy all multiprocessors."""


class Fp8Weight(Protocol):
    """An FP8 linear: `codes` uint8 or e4m3 `[N, K]`, `scales` fp32 `[N/128, K/128]`."""

    @property
    def codes(self) -> Tensor: ...

    @property
    def scales(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class PrefillWork:
    """Scratch of one chunk, reused by every layer: nothing in it outlives the call that writes it."""

    rows: QuantisedRows
    """Codes and scales of the widest FP8 linear's input."""
    rounded: Tensor
    """bf16, flat: the widest input through e4m3 and back (only where there are no FP8 tensor cores)."""
    weights: Tensor
    """bf16, flat: the largest weight that is expanded before its product (`grouped_linear`)."""
    gate_up: Tensor
    """bf16, flat: the shared expert before its activation."""

    @staticmethod
    def empty(
        tokens: int, *, columns: int, weight_elements: int, inner: int, device: torch.device | str
    ) -> PrefillWork:
        """Room for `tokens` rows: `columns` = widest K of an FP8 linear, `weight_elements` of the largest expanded
        weight (wo_a; any FP8 linear before sm_89), `inner` of the shared expert."""
        fp8 = has_fp8_tensor_cores(architecture(device))
        return PrefillWork(
            QuantisedRows.empty(tokens, columns, device),
            torch.empty(0 if fp8 else tokens * columns, dtype=torch.bfloat16, device=device),
            torch.empty(weight_elements, dtype=torch.bfloat16, device=device),
            torch.empty(tokens * 2 * inner, dtype=torch.bfloat16, device=device),
        )


def has_fp8_tensor_cores(arch: int) -> bool:
    """Whether FP8 x FP8 products run on the tensor cores of an architecture."""
    return arch >= 89


def has_tma(arch: int) -> bool:
    """Whether blocks are copied by descriptors; before sm_90 by pointers."""
    return arch >= 90


@triton.jit
def _tile_origin(num_rows, num_columns, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """First row and column of this program's tile: GROUP row tiles are walked together, so that they share weights."""
    tiles = tl.cdiv(num_rows, BM)
    span = GROUP * tl.cdiv(num_columns, BN)
    first = tl.program_id(0) // span * GROUP
    height = tl.minimum(tiles - first, GROUP)
    inside = tl.program_id(0) % span
    return (first + inside % height) * BM, inside // height * BN


@triton.jit
def _operand(source, row, column, num_rows, stride, R: tl.constexpr, C: tl.constexpr, TMA: tl.constexpr):
    """Block `[R, C]` of a row-major matrix at `row`, `column`: by descriptor, or by pointer (before sm_90)."""
    if TMA:
        block = source.load([row, column])
    else:
        rows = row + tl.arange(0, R)
        place = rows.to(tl.int64)[:, None] * stride + (column + tl.arange(0, C))[None, :]
        block = tl.load(source + place, mask=(rows < num_rows)[:, None], other=0.0)
    return block


@triton.jit
def _result(out, value, row, column, num_rows, num_columns, stride, TMA: tl.constexpr):
    """Store `value [R, C]` at `row`, `column`, inside the first `num_columns` columns."""
    if TMA:
        out.store([row, column], value.to(out.dtype))
    else:
        rows = row + tl.arange(0, value.shape[0])
        columns = column + tl.arange(0, value.shape[1])
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tl.store(out + rows.to(tl.int64)[:, None] * stride + columns[None, :], value.to(out.dtype.element_ty), inside)


@triton.jit
def fp8_product_kernel(
    a, b, a_scales, b_scales, out, T, N, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """`out` bf16 `[T, N]` = codes `a [T, K]` @ codes `b [N, K]`.T, scaled per 128 columns; BN at most 128.

    `a_scales` fp32 `[K/128, T]`, `b_scales` fp32 `[N/128, K/128]`. TMA: `a`, `b` and `out` are tensor descriptors.
    """
    m, n = _tile_origin(T, N, BM, BN, GROUP)
    row = m + tl.arange(0, BM)
    b_scales += n // 128 * (K // 128)
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K // 128):
        part_a = _operand(a, m, k * 128, T, K, BM, 128, TMA)
        part_b = _operand(b, n, k * 128, N, K, BN, 128, TMA)
        scale = tl.load(a_scales + k * T + row, mask=row < T, other=0.0) * tl.load(b_scales + k)
        total += tl.dot(part_a, part_b.T) * scale[:, None]
    _result(out, total, m, n, T, N, N, TMA)


@triton.jit
def bf16_product_kernel(
    a, b, out, T, N, G, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, TMA_OUT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """`out [T, G * N]` (bf16 or fp32) = bf16 `a [T, G * K]` @ bf16 `b [G * N, K]`.T, per group.

    The grid's second axis is G. With several groups N is a multiple of BN: a tile may not reach into the next group.
    TMA: `a` and `b` are tensor descriptors; TMA_OUT: `out` is one (not for fp32: its block would not fit).
    WIDEN: fp32 operands, for the interpreter, whose `tl.dot` takes bf16 for integers.
    """
    m, n = _tile_origin(T, N, BM, BN, GROUP)
    group = tl.program_id(1)
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K // BK):
        part_a = _operand(a, m, group * K + k * BK, T, G * K, BM, BK, TMA)
        part_b = _operand(b, group * N + n, k * BK, G * N, K, BN, BK, TMA)
        if WIDEN:
            part_a, part_b = part_a.to(tl.float32), part_b.to(tl.float32)
        total = tl.dot(part_a, part_b.T, total, input_precision="ieee")
    _result(out, total, m, group * N + n, T, G * N, G * N, TMA_OUT)


@triton.jit
def expand_kernel(codes, scales, out, K: tl.constexpr, HW: tl.constexpr):
    """bf16 `out [N, K]` (exact) of e4m3 `codes` u8 `[N, K]` and `scales` fp32 `[N/128, K/128]`; one block a program."""
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    column = tl.program_id(1) * 128 + tl.arange(0, 128)
    place = row.to(tl.int64)[:, None] * K + column[None, :]
    scale = tl.load(scales + tl.program_id(0) * (K // 128) + tl.program_id(1))
    tl.store(out + place, (e4m3_to_f32(tl.load(codes + place), HW) * scale).to(tl.bfloat16))


def project_x(
    x: Tensor, x_fp8: Fp8Weight, x_bf16: Tensor | None, out_fp8: Tensor, out_bf16: Tensor | None, *, work: PrefillWork
) -> None:
    """Every product of the attention input `x` bf16 `[T, D]`: `out_fp8` bf16 `[T, N1]`, `out_bf16` fp32 `[T, N2]`."""
    linear(x, x_fp8, out_fp8, work=work)
    if x_bf16 is not None and out_bf16 is not None:
        bf16_product(x, x_bf16, out_bf16)


def linear(x: Tensor, weight: Fp8Weight, out: Tensor, act_fp8: bool = True, *, work: PrefillWork) -> None:
    """`out` bf16 `[T, N]` = `x` bf16 `[T, K]` @ weight.T; `act_fp8` rounds the input to e4m3 per 128 columns."""
    if not act_fp8:
        bf16_product(x, expand(weight, work), out)
    elif has_fp8_tensor_cores(architecture(x.device)):
        rows = quantise_rows(x, work.rows)
        assert rows is not None
        fp8_product(rows, weight, out)
    else:
        rounded = work.rounded[: x.numel()].view(x.shape)
        quantise_rows(x, None, rounded)
        bf16_product(rounded, expand(weight, work), out)


def grouped_linear(x: Tensor, weight: Fp8Weight, out: Tensor, *, work: PrefillWork) -> None:
    """wo_a: `out` bf16 `[T, G * N]` of `x` bf16 `[T, G, K]` and weight `[G * N, K]`; activations are not quantised."""
    bf16_product(x.flatten(1), expand(weight, work), out, groups=x.shape[1])


def router_logits(x: Tensor, gate: Tensor, out: Tensor) -> None:
    """fp32 `out [T, E]` of `x` bf16 `[T, D]` and bf16 `gate [E, D]`."""
    bf16_product(x, gate, out)


def shared_gate_up(x: Tensor, w13: Fp8Weight, limit: float, out: Tensor, *, work: PrefillWork) -> None:
    """The shared expert's activation, bf16 `out [T, I]` of `x` bf16 `[T, D]`."""
    tokens, inner = out.shape
    gate_up = work.gate_up[: tokens * 2 * inner].view(tokens, 2 * inner)
    linear(x, w13, gate_up, work=work)
    swiglu_rows(gate_up, out, limit)


def head(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Logits fp32 `[B, V]` of `x` bf16 `[B, D]` and bf16 `weight [V, D]`."""
    bf16_product(x, weight, out)


def expand(weight: Fp8Weight, work: PrefillWork) -> Tensor:
    """bf16 `[N, K]` in the scratch, exact."""
    rows, columns = weight.codes.shape
    out = work.weights[: rows * columns].view(rows, columns)
    hardware = hardware_formats(out.device)
    grid = (rows // BLOCK, columns // BLOCK)
    expand_kernel[grid](weight.codes.view(torch.uint8), weight.scales, out, K=columns, HW=hardware, num_warps=8)
    return out


def fp8_product(rows: QuantisedRows, weight: Fp8Weight, out: Tensor) -> None:
    """`out` bf16 `[T, N]` of quantised rows (views of one shape) and an FP8 weight."""
    tokens, columns = rows.codes.shape
    num_out = weight.codes.shape[0]
    shape = tile("linear_prefill.fp8_product", out.device)
    if not tokens:
        return
    codes, tma = weight.codes.view(torch.float8_e4m3fn), has_tma(architecture(out.device))
    fp8_product_kernel[(-(-tokens // shape.m) * -(-num_out // shape.n),)](
        _blocks(rows.codes, shape.m, BLOCK, tma), _blocks(codes, shape.n, BLOCK, tma), rows.scales, weight.scales,
        _blocks(out, shape.m, shape.n, tma), tokens, num_out,
        K=columns, BM=shape.m, BN=shape.n, GROUP=shape.group, TMA=tma, **shape.options,
    )  # fmt: skip


def bf16_product(x: Tensor, weight: Tensor, out: Tensor, *, groups: int = 1) -> None:
    """`out [T, G * N]` fp32 or bf16 of bf16 `x [T, G * K]` and bf16 `weight [G * N, K]`, block-diagonal over groups."""
    tokens, columns, num_out = x.shape[0], weight.shape[1], weight.shape[0] // groups
    shape = bf16_tile(num_out, x.device)
    assert groups == 1 or num_out % shape.n == 0
    if not tokens:
        return
    tma = has_tma(architecture(out.device))
    tma_out = tma and out.dtype == torch.bfloat16
    bf16_product_kernel[(-(-tokens // shape.m) * -(-num_out // shape.n), groups)](
        _blocks(x, shape.m, shape.k, tma), _blocks(weight, shape.n, shape.k, tma),
        _blocks(out, shape.m, shape.n, tma_out), tokens, num_out, groups,
        K=columns, BM=shape.m, BN=shape.n, BK=shape.k, GROUP=shape.group, TMA=tma, TMA_OUT=tma_out,
        WIDEN=not out.is_cuda, **shape.options,
    )  # fmt: skip


def bf16_tile(num_out: int, device: Any) -> Tile:
    """The tile for an output of `num_out` columns a group."""
    return tile(f"linear_prefill.bf16_{'narrow' if num_out <= NARROW_ROWS else 'wide'}", device)


def _blocks(matrix: Tensor, rows: int, columns: int, tma: bool) -> TensorDescriptor | Tensor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns]) if tma else matrix


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations that V4-Flash needs."""
    tma = has_tma(arch)
    cases = []
    if has_fp8_tensor_cores(arch):
        t = tile("linear_prefill.fp8_product", arch)
        types = {"a": _type("fp8e4nv", t.m, BLOCK, tma), "b": _type("fp8e4nv", t.n, BLOCK, tma)}
        types |= {"a_scales": "*fp32", "b_scales": "*fp32", "out": _type("bf16", t.m, t.n, tma), "T": "i32", "N": "i32"}
        values = {"K": 4096, "BM": t.m, "BN": t.n, "GROUP": t.group, "TMA": tma}
        cases.append(("fp8_product", fp8_product_kernel, types, values, t.options))
    for name, num_out, out in (("narrow", 256, "fp32"), ("wide", 2624, "fp32"), ("grouped", 1024, "bf16")):
        t = bf16_tile(num_out, arch)
        tma_out = tma and out == "bf16"
        types = {"a": _type("bf16", t.m, t.k, tma), "b": _type("bf16", t.n, t.k, tma)}
        types |= {"out": _type(out, t.m, t.n, tma_out), "T": "i32", "N": "i32", "G": "i32"}
        values = {"K": 4096, "BM": t.m, "BN": t.n, "BK": t.k, "GROUP": t.group, "TMA": tma}
        values |= {"TMA_OUT": tma_out, "WIDEN": False}
        cases.append((f"bf16_{name}", bf16_product_kernel, types, values, t.options))
    types = {"codes": "*u8", "scales": "*fp32", "out": "*bf16"}
    cases.append(("expand", expand_kernel, types, {"K": 4096, "HW": arch >= 89}, {"num_warps": 8}))
    return cases


def _type(kind: str, rows: int, columns: int, tma: bool) -> str:
    return f"tensordesc<{kind}[{rows},{columns}]>" if tma else f"*{kind}"
