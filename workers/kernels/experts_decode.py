"""Routed FP4 experts and the shared expert's down projection at decode, straight from the checkpoint's bytes.

Owns: `expert_gate_up` and `expert_down` for few tokens per expert, and `quantise_rows`. Does not own: routing, the
shared expert's first half, prefill. Reference: `workers/reference/moe.py`.

The weights are the large operand of every product, `TOKENS` pairs (token, choice) of one expert the small one, whatever
the batch is: a pair's bits depend on nothing but its own row. An expert's pairs beyond `TOKENS` take further turns.
Codes are read as 16-bit words of four columns; column j of a word is one of four bf16 operands, and the inputs are
split the same way, so that nothing is interleaved. A code with its scale is exact in bf16 and so is a fake-quantised
input, so the sums run over K in fp32 without any scale. Inputs must already be fake-quantised (`quantise_rows`).

Groups of 128 inner columns belong to several programs of `expert_gate_up`; the last of them to finish (a counter, not
the order of a sum) quantises the group for `expert_down`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.expert_layout import ExpertLayout, ExpertSlab
from workers.kernels.formats import e4m3_to_f32, f32_to_e4m3, hardware_formats, pow2_reciprocal, pow2_scale_ceil
from workers.kernels.launch import pdl_options
from workers.kernels.tiles import INTERPRETED, Tile, tile, tile_for

TOKENS = 8
"""Pairs of one product: the smallest column count of the tensor cores. Must not depend on the batch."""

GROUP = 128
"""Columns that share one activation scale."""

UNSCALE = tl.constexpr(2.0**32)
"""Products carry 2**-32, see `_scales`."""


# -- numbers ------------------------------------------------------------------------------------------------------


@triton.jit
def _column(words, J: tl.constexpr, PACKED: tl.constexpr):
    """Column `J` of uint16 words of four e2m1 codes as bf16, times 2**-126 (two bits of exponent, one of mantissa)."""
    if PACKED:
        if J == 0:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $1, 0x000f000f; mul.lo.u32 t, t, 0x1040; and.b32 $0, t, 0x81c081c0; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif J == 1:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; and.b32 t, $1, 0x00f000f0; mul.lo.u32 t, t, 0x0104; and.b32 $0, t, 0x81c081c0; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        elif J == 2:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t, u; shr.b32 t, $1, 2; and.b32 t, t, 0x01c001c0; shl.b32 u, $1, 4;"
                " lop3.b32 $0, u, 0x80008000, t, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            value = tl.inline_asm_elementwise(
                "{ .reg .b32 t; shr.b32 t, $1, 6; and.b32 t, t, 0x01c001c0; lop3.b32 $0, $1, 0x80008000, t, 0xea; }",
                "=r,r", [words], dtype=tl.bfloat16, is_pure=True, pack=2,
            )  # fmt: skip
    else:
        code = (words >> (4 * J)).to(tl.uint32) & 0xF
        value = (((code & 0x8) << 28) | ((code & 0x7) << 22)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def _scales(codes, GROUPS: tl.constexpr):
    """bf16 `[M, GROUPS * 8]` factors `2 ** (s - 33)` of e8m0 bytes `[M, GROUPS]`, one for each word of four columns.

    The codes carry 2**-126, so products carry 2**-32. Exact for scales from 2**-93 to 2**33; trained weights have
    scales near 2**-8.
    """
    factor = ((codes.to(tl.uint16) + 94) << 7).to(tl.bfloat16, bitcast=True)
    M: tl.constexpr = codes.shape[0]
    return tl.reshape(tl.broadcast_to(factor[:, :, None], (M, GROUPS, 8)), (M, GROUPS * 8))


@triton.jit
def _times(value, factor, PACKED: tl.constexpr):
    """bf16 product that is exact. The interpreter has no arithmetic in bf16 and loses its subnormals: fp32 there."""
    return value * factor if PACKED else (value.to(tl.float32) * factor.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, total, PACKED: tl.constexpr):
    """`a @ b + total` of bf16 operands, fp32 sums."""
    return tl.dot(a, b, total) if PACKED else tl.dot(a.to(tl.float32), b.to(tl.float32), total)


@triton.jit
def _part(words, J: tl.constexpr):
    """bf16 number `J` of uint64 (or uint32) words of packed bf16."""
    return ((words >> (16 * J)) & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _fp8_column(words, J: tl.constexpr, PACKED: tl.constexpr):
    """Column `J` of uint16 words of two e4m3 codes as bf16, exact."""
    code = (words >> (8 * J)) & 0xFF
    if PACKED:
        value = (((code & 0x80) << 8) | ((code & 0x7F) << 4)).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        wide = code.to(tl.uint32)
        value = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
    # bf16 has 120 more exponents below 1 than e4m3.
    return _times(value, tl.full((), 2.0**120, tl.float32).to(tl.bfloat16), PACKED)


@triton.jit
def _fake_quantised(x, HW: tl.constexpr):
    """fp32 `x [M, 128]` through e4m3 with one power-of-two scale per row, as bf16 (exact)."""
    scale, _ = pow2_scale_ceil(tl.max(tl.abs(x), 1), 448.0, 1e-4)
    codes = f32_to_e4m3(x * pow2_reciprocal(scale)[:, None], HW)
    return (e4m3_to_f32(codes, HW) * scale[:, None]).to(tl.bfloat16)


@triton.jit
def _slot(expert, table, base, host, peer, EXPERT_BYTES: tl.constexpr, HOST: tl.constexpr, PEER: tl.constexpr):
    """Address of an expert's bytes; a constant stride, so that the compiler knows it for a multiple of 16."""
    code = tl.load(table + expert)
    offset = (code & 0xFFFFFF).to(tl.int64) * EXPERT_BYTES
    slot = base + offset
    if HOST:
        slot = tl.where((code >> 24) == 1, host + offset, slot)
    if PEER:
        slot = tl.where((code >> 24) == 2, peer + offset, slot)
    return slot


@triton.jit
def _fp4_product(
    words,  # uint16 pointers [M, BLOCK_K / 4] to codes of the first step
    scales,  # uint8 pointers [M, BLOCK_K / 32]
    inputs,  # uint64 pointers [BLOCK_K / 4, N]
    live,  # bool [N]
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACKED: tl.constexpr,
):
    """fp32 `[M, N]` products over K, times 2**-32."""
    M: tl.constexpr = words.shape[0]
    N: tl.constexpr = inputs.shape[1]
    total = tl.zeros((M, N), tl.float32)
    for step in range(0, K // 4, BLOCK_K // 4):
        codes = tl.load(words + step)
        factor = _scales(tl.load(scales + step // 8), BLOCK_K // 32)
        x = tl.load(inputs + step, mask=live[None, :], other=0)
        for j in tl.static_range(4):
            weight = _times(_column(codes, j, PACKED), factor, PACKED)
            total = _dot(weight, _part(x, j), total, PACKED)
    return total


# -- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _quantise_rows(x, out, K: tl.constexpr, BLOCK: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, K / BLOCK)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start = tl.program_id(0).to(tl.int64) * K + tl.program_id(1) * BLOCK
    at = start + tl.arange(0, BLOCK // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(out + at, _fake_quantised(tl.load(x + at).to(tl.float32), HW))


@triton.jit(do_not_specialize=["num_tokens"])
def _gate_up(
    x, routing, hidden, num_active, active_experts, active_begin, pair_order, table, base, host, peer,
    shared_hidden, counters, num_tokens, limit,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, EXPERT_BYTES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr,
    HOST: tl.constexpr, PEER: tl.constexpr, PACKED: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (I / ROWS, most active experts + 1): `ROWS` rows of w1 and of w3 of one expert; the last column of programs
    quantises the shared expert's hidden rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: the successor reads the groups, which this kernel's predecessors wrote, before its own wait.
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    member = tl.program_id(1)
    if member == tl.num_programs(1) - 1:
        if block < INNER // 128:
            first = 0
            while first < num_tokens:
                row = first + tl.arange(0, N)
                at = row.to(tl.int64)[:, None] * INNER + block * 128 + tl.arange(0, 128)[None, :]
                inside = (row < num_tokens)[:, None]
                value = tl.load(shared_hidden + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(shared_hidden + at, _fake_quantised(value, HW), mask=inside)
                first += N
        return
    if member >= tl.load(num_active):
        return
    expert = tl.load(active_experts + member)
    begin = tl.load(active_begin + member)
    end = tl.load(active_begin + member + 1)
    slot = _slot(expert, table, base, host, peer, EXPERT_BYTES, HOST, PEER)

    # Tile rows 16a + b (b < 8) are rows 8a + b of w1, tile rows 16a + 8 + b the same rows of w3: a pair of gate and up
    # then is in one thread.
    tile_row = tl.arange(0, 2 * ROWS)
    row = block * ROWS + (tile_row // 16) * 8 + tile_row % 8 + ((tile_row // 8) % 2) * INNER
    words = slot.to(tl.pointer_type(tl.uint16)) + row[:, None] * (D // 4) + tl.arange(0, BLOCK_K // 4)[None, :]
    scales = slot + 3 * (D * INNER // 2) + row[:, None] * (D // 32) + tl.arange(0, BLOCK_K // 32)[None, :]
    out_row = block * ROWS + tl.arange(0, ROWS)
    first = begin
    while first < end:
        at = first + tl.arange(0, N)
        live = at < end
        pair = tl.load(pair_order + at, mask=live, other=0)
        inputs = x.to(tl.pointer_type(tl.uint64)) + (pair // CHOICES).to(tl.int64)[None, :] * (D // 4)
        inputs += tl.arange(0, BLOCK_K // 4)[:, None]
        total = _fp4_product(words, scales, inputs, live, D, BLOCK_K, PACKED) * UNSCALE
        halves = tl.permute(tl.reshape(total, (ROWS // 8, 2, 8, N)), (0, 2, 3, 1))
        gate, up = tl.split(halves)
        gate = tl.minimum(tl.reshape(gate, (ROWS, N)), limit)
        up = tl.minimum(tl.maximum(tl.reshape(up, (ROWS, N)), -limit), limit)
        weight = tl.load(routing + pair, mask=live, other=0.0)
        value = gate / (1.0 + tl.exp(-gate)) * up * weight[None, :]
        target = hidden + pair.to(tl.int64)[None, :] * INNER + out_row[:, None]
        tl.store(target, value.to(tl.bfloat16), mask=live[None, :])
        first += N

    tl.debug_barrier()
    group = block // (128 // ROWS)
    counter = counters + member * (INNER // 128) + group
    if tl.atomic_add(counter, 1) == 128 // ROWS - 1:
        tl.store(counter, 0)
        first = begin
        while first < end:
            at = first + tl.arange(0, N)
            inside = (at < end)[:, None]
            pair = tl.load(pair_order + at, mask=at < end, other=0).to(tl.int64)
            target = hidden + pair[:, None] * INNER + group * 128 + tl.arange(0, 128)[None, :]
            value = tl.load(target, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(target, _fake_quantised(value, HW), mask=inside)
            first += N


@triton.jit
def _shared_down(
    codes, weight_scales, inputs, live, INNER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """fp32 `[M, N]`: uint16 pointers `[M, 64]` to e4m3 codes times uint32 pointers `[64, N]` to inputs."""
    M: tl.constexpr = codes.shape[0]
    N: tl.constexpr = inputs.shape[1]
    total = tl.zeros((M, N), tl.float32)
    for step in range(INNER // 128):
        words = tl.load(codes + step * 64)
        x = tl.load(inputs + step * 64, mask=live[None, :], other=0)
        part = _dot(_fp8_column(words, 0, PACKED), _part(x, 0), tl.zeros((M, N), tl.float32), PACKED)
        part = _dot(_fp8_column(words, 1, PACKED), _part(x, 1), part, PACKED)
        total += part * tl.load(weight_scales + step)
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _down(
    hidden, shared_hidden, shared_codes, shared_scales, out, num_active, active_experts, active_begin, pair_order,
    table, base, host, peer, num_tokens,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, EXPERT_BYTES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, N: tl.constexpr,
    HOST: tl.constexpr, PEER: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (D / ROWS, 1 + most active experts): `ROWS` rows of w2. The first column of programs, whose codes are twice
    as wide, is the shared expert's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    member = tl.program_id(1) - 1
    row = block * ROWS + tl.arange(0, ROWS)
    if member < 0:
        codes = shared_codes.to(tl.pointer_type(tl.uint16)) + row[:, None] * (INNER // 2) + tl.arange(0, 64)[None, :]
        scales = shared_scales + (block * ROWS // 128) * (INNER // 128)
        first = 0
        while first < num_tokens:
            token = first + tl.arange(0, N)
            live = token < num_tokens
            inputs = shared_hidden.to(tl.pointer_type(tl.uint32)) + token.to(tl.int64)[None, :] * (INNER // 2)
            inputs += tl.arange(0, 64)[:, None]
            total = _shared_down(codes, scales, inputs, live, INNER, PACKED)
            target = out + (token.to(tl.int64) * (CHOICES + 1) + CHOICES)[None, :] * D + row[:, None]
            tl.store(target, total.to(tl.bfloat16), mask=live[None, :])
            first += N
        return
    if member >= tl.load(num_active):
        return
    expert = tl.load(active_experts + member)
    begin = tl.load(active_begin + member)
    end = tl.load(active_begin + member + 1)
    slot = _slot(expert, table, base, host, peer, EXPERT_BYTES, HOST, PEER)
    words = (slot + D * INNER).to(tl.pointer_type(tl.uint16)) + row[:, None] * (INNER // 4)
    words += tl.arange(0, BLOCK_K // 4)[None, :]
    scales = slot + 3 * (D * INNER // 2) + 2 * (D * INNER // 32) + row[:, None] * (INNER // 32)
    scales += tl.arange(0, BLOCK_K // 32)[None, :]
    first = begin
    while first < end:
        at = first + tl.arange(0, N)
        live = at < end
        pair = tl.load(pair_order + at, mask=live, other=0)
        inputs = hidden.to(tl.pointer_type(tl.uint64)) + pair.to(tl.int64)[None, :] * (INNER // 4)
        inputs += tl.arange(0, BLOCK_K // 4)[:, None]
        total = _fp4_product(words, scales, inputs, live, INNER, BLOCK_K, PACKED) * UNSCALE
        target = out + (pair + pair // CHOICES).to(tl.int64)[None, :] * D + row[:, None]
        tl.store(target, total.to(tl.bfloat16), mask=live[None, :])
        first += N


# -- launchers ----------------------------------------------------------------------------------------------------


def num_counters(num_tokens: int, choices: int, num_experts: int, inner: int) -> int:
    """int32 zeros that `expert_gate_up` needs; it leaves them zero."""
    return min(num_tokens * choices, num_experts) * (inner // GROUP)


def quantise_rows(x: Tensor, out: Tensor, *, pdl: bool | None = None) -> None:
    """`out [T, K] = dequant(quant(x))` in bf16 (exact): e4m3, one power-of-two scale per 128. May be in place."""
    tokens, width = x.shape
    if tokens:
        block = next(size for size in (1024, 512, 256, 128) if width % size == 0)
        grid = (tokens, width // block)
        _quantise_rows[grid](x, out, width, block, hardware_formats(x.device), num_warps=4, **pdl_options(x, pdl))


def expert_gate_up(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    groups: Any,
    slab: ExpertSlab,
    hidden: Tensor,
    limit: float,
    *,
    shared_hidden: Tensor,
    counters: Tensor,
    pdl: bool | None = None,
) -> None:
    """`hidden [T, k, I]` bf16, fake-quantised: clamped SwiGLU of w1 and w3 of the chosen experts times `weights`.

    `x [T, D]` bf16 is fake-quantised already; `ids` int32 and `weights` fp32 `[T, k]`; `groups` from `route`.
    `shared_hidden [T, I]` bf16 is fake-quantised in place. `counters`: int32 zeros, `num_counters` of them.
    """
    tokens, choices, inner = hidden.shape
    if not tokens:
        return
    shape = _tile("experts_decode.gate_up", x, n=inner, k=x.shape[1])
    most = min(ids.numel(), slab.table.numel())
    _gate_up[(inner // shape.n, most + 1)](
        x, weights, hidden, groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order,
        slab.table, slab.base, _or_base(slab.host, slab), _or_base(slab.peer, slab), shared_hidden, counters,
        tokens, float(limit),
        D=x.shape[1], INNER=inner, CHOICES=choices, EXPERT_BYTES=ExpertLayout(x.shape[1], inner).expert_bytes,
        ROWS=shape.n, BLOCK_K=shape.k, N=TOKENS, HOST=slab.host is not None,
        PEER=slab.peer is not None, PACKED=x.is_cuda, HW=hardware_formats(x.device), **shape.options,
        **pdl_options(x, pdl),
    )  # fmt: skip


def expert_down(
    hidden: Tensor,
    shared_hidden: Tensor,
    shared_w2: Any,
    ids: Tensor,
    groups: Any,
    slab: ExpertSlab,
    out: Tensor,
    *,
    pdl: bool | None = None,
) -> None:
    """`out [T, k + 1, D]` bf16: w2 of the chosen experts, then the shared expert's, of fake-quantised inputs.

    `hidden [T, k, I]` and `shared_hidden [T, I]` as `expert_gate_up` leaves them; `shared_w2` has `codes [D, I]` (e4m3
    or uint8) and `scales` fp32 `[D/128, I/128]`.
    """
    tokens, choices, inner = hidden.shape
    if not tokens:
        return
    wide = out.shape[2]
    shape = _tile("experts_decode.down", hidden, n=wide, k=inner)
    most = min(ids.numel(), slab.table.numel())
    _down[(wide // shape.n, 1 + most)](
        hidden, shared_hidden, shared_w2.codes.view(torch.uint8), shared_w2.scales, out, groups.num_active,
        groups.active_experts, groups.active_begin, groups.pair_order, slab.table, slab.base,
        _or_base(slab.host, slab), _or_base(slab.peer, slab), tokens,
        D=wide, INNER=inner, CHOICES=choices, EXPERT_BYTES=ExpertLayout(wide, inner).expert_bytes,
        ROWS=shape.n, BLOCK_K=shape.k, N=TOKENS, HOST=slab.host is not None, PEER=slab.peer is not None,
        PACKED=hidden.is_cuda, **shape.options, **pdl_options(hidden, pdl),
    )  # fmt: skip


def _or_base(tensor: Any, slab: ExpertSlab) -> Any:
    return slab.base if tensor is None else tensor


def _tile(kernel: str, tensor: Tensor, *, n: int, k: int) -> Tile:
    found = tile(kernel, tensor.device) if tensor.is_cuda else tile_for(kernel, INTERPRETED)
    return found.fitted(n=n, k=k)


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations of V4-Flash for `arch`: name, function, signature, constants, options."""
    wide, inner, choices = 4096, 2048, 6
    common = {
        "D": wide, "INNER": inner, "CHOICES": choices, "EXPERT_BYTES": ExpertLayout(wide, inner).expert_bytes,
        "N": TOKENS, "PACKED": True, "PDL": arch >= 90,
    }  # fmt: skip
    groups = dict.fromkeys(("num_active", "active_experts", "active_begin", "pair_order", "table"), "*i32")
    slab = dict.fromkeys(("base", "host", "peer"), "*u8")
    gate_up, down = tile_for("experts_decode.gate_up", arch), tile_for("experts_decode.down", arch)
    cases = []
    for tiers in (False, True):
        name = "tiers" if tiers else "resident"
        both = {"HOST": tiers, "PEER": tiers}
        cases.append(
            (
                f"gate_up_{name}",
                _gate_up,
                {"x": "*bf16", "routing": "*fp32", "hidden": "*bf16", "shared_hidden": "*bf16", "counters": "*i32"}
                | groups | slab | {"num_tokens": "i32", "limit": "fp32"},
                common | both | {"ROWS": gate_up.n, "BLOCK_K": gate_up.k, "HW": arch >= 89},
                gate_up.options,
            )
        )  # fmt: skip
        cases.append(
            (
                f"down_{name}",
                _down,
                {"hidden": "*bf16", "shared_hidden": "*bf16", "shared_codes": "*u8", "shared_scales": "*fp32"}
                | {"out": "*bf16", "num_tokens": "i32"} | groups | slab,
                common | both | {"ROWS": down.n, "BLOCK_K": down.k},
                down.options,
            )
        )  # fmt: skip
    return cases
