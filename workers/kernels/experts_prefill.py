"""Routed FP4 experts of prefill: grouped products over the pairs (token, choice) of each expert, compute bound.

Owns: `expert_gate_up` and `expert_down` for chunks of many tokens, straight from the checkpoint's bytes. Does not own:
routing, decode (`experts_decode.py`), activation rounding (`quantise_rows.py`), the products that replace these on
sm_90 (`experts_prefill_sm90.py`).

An expert's pairs are cut into tiles of `tokens` pairs; a last tile of at most half of that runs at half width. A small
kernel writes the list of tiles on the device, the grid is its upper bound, so that nothing waits for the host. Weights
are the big operand and go through registers (4-bit code to bf16 with its scale, exact), activations (e4m3 values times
their scale, exact in bf16) come from shared memory in expert order; sums run over K in fp32 without further scales.

The routing weight multiplies the activation. Activations between the two products lie in the order of the pairs by
expert, which is contiguous for the second product, and in expert order of columns, because rows of w1 and w3 are read
in that order.

Every output column depends on its own pair only, with one order of K: bits do not depend on the batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels import experts_prefill_sm90
from workers.kernels.expert_numbers import UNSCALE, dot, scale_factors, slot_address
from workers.kernels.linear_prefill import Fp8Weight, PrefillWork, linear
from workers.kernels.quantise_rows import quantise_in_place, quantise_pairs, round_in_place, swiglu
from workers.kernels.tiles import tile

HEADER = tl.constexpr(6)
"""Words before the tiles of a tile list: number of tiles, number of pairs, the shifts 0, 4, 8, 12."""


class Groups(Protocol):
    """Pairs by expert as `routing.route` writes them, int32 on the device."""

    num_active: Tensor
    active_experts: Tensor
    active_begin: Tensor
    pair_order: Tensor


def max_tiles(num_pairs: int, num_experts: int, tokens: int) -> int:
    """Most tiles of `tokens` pairs that `num_pairs` pairs can need: every expert may have one that is not full."""
    return num_pairs // tokens + min(num_pairs, num_experts)


def tile_words(num_pairs: int, num_experts: int, device: Any) -> int:
    """int32 elements of the tile list."""
    return HEADER.value + 3 * max_tiles(num_pairs, num_experts, tile("experts_prefill.experts", device).m)


@triton.jit
def tile_list_kernel(tiles, num_active, active_experts, active_begin, E: tl.constexpr, M: tl.constexpr):
    """One program per possible group: writes its tiles (expert, first place, pairs) behind those of earlier groups.

    `tiles` int32: `HEADER`, then three per tile. E: a power of two above the groups.
    """
    member = tl.program_id(0)
    if member == 0:
        tl.store(tiles + 2 + tl.arange(0, 4), 4 * tl.arange(0, 4))
    active = tl.load(num_active)
    if member < active:
        at = tl.arange(0, E)
        before = at < member
        first = tl.load(active_begin + at, mask=before, other=0)
        last = tl.load(active_begin + at + 1, mask=before, other=0)
        place = tl.sum((last - first + M - 1) // M, 0)
        expert = tl.load(active_experts + member)
        begin = tl.load(active_begin + member)
        end = tl.load(active_begin + member + 1)
        while begin < end:
            tl.store(tiles + HEADER + 3 * place, expert)
            tl.store(tiles + HEADER + 1 + 3 * place, begin)
            tl.store(tiles + HEADER + 2 + 3 * place, tl.minimum(end - begin, M))
            place += 1
            begin += M
        if member == active - 1:
            tl.store(tiles, place)
            tl.store(tiles + 1, end)
    elif member == 0:
        tl.store(tiles, 0)
        tl.store(tiles + 1, 0)


@triton.jit
def _unpacked(codes, shift, factor, PACKED: tl.constexpr):
    """bf16 (exact): nibble `shift / 4` of uint16 `codes`, an e2m1 code, times `factor` bf16 and 2**-126."""
    if PACKED:
        # The product by 0x1040 puts the sign to bit 15 and exponent and mantissa to bits 8..6 of each half.
        value = tl.inline_asm_elementwise(
            """{
            .reg .b32 t, z;
            mov.b32 z, 0x80008000;
            shr.b32 t, $1, $2;
            and.b32 t, t, 0x000f000f;
            mul.lo.u32 t, t, 0x1040;
            and.b32 t, t, 0x81c081c0;
            fma.rn.bf16x2 $0, t, $4, z; // one shift serves both: not $3
            }""",
            "=r,r,r,r,r",
            [codes, shift, factor],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=2,
        )
    else:
        code = (codes.to(tl.int32) >> shift) & 0xF
        value = (((code & 0x8) << 28) | ((code & 0x7) << 22)).to(tl.float32, bitcast=True)
        value = (value * factor.to(tl.float32)).to(tl.bfloat16)
    return value


@triton.jit
def _product(words, scales, inputs, shifts, K: tl.constexpr, PACKED: tl.constexpr):
    """fp32 `[N, M]`, times 2**-32: weight rows behind `words` uint16 `[N, 32]` and `scales` u8 `[N, 4]` times
    activations behind `inputs` bf16 `[M, 128]`, all pointers at the first 128 columns.

    The operand is one block in expert order, made by views and elementwise steps alone: so the compiler loads codes
    and scales straight into the registers of the tensor-core operand and keeps products in flight while it unpacks the
    next. That is why the shifts 0, 4, 8, 12 are loaded (`shifts` int32 `[4]`): a range would break the chain.
    """
    N: tl.constexpr = words.shape[0]
    shift = tl.load(shifts + tl.arange(0, 4))
    shift = tl.reshape(tl.broadcast_to(shift[None, :, None], (N, 4, 32)), (N, 128))
    total = tl.zeros((N, inputs.shape[0]), tl.float32)
    for step in tl.range(0, K // 128):
        codes = tl.load(words + step * 32)
        codes = tl.reshape(tl.broadcast_to(codes[:, None, :], (N, 4, 32)), (N, 128))
        factor = scale_factors(tl.load(scales + step * 4))
        factor = tl.reshape(tl.broadcast_to(factor[:, None, :, None], (N, 4, 4, 8)), (N, 128))
        total = dot(_unpacked(codes, shift, factor, PACKED), tl.load(inputs + step * 128).T, total, PACKED)
    return total


@triton.jit
def _gate_up_tile(
    x, routing, hidden, pair_order, shifts, slot, block, begin, count, limit,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """`hidden [begin .. begin + count, ROWS / 2 columns at block]` of up to M pairs of one expert."""
    H: tl.constexpr = ROWS // 2
    pair_at = tl.minimum(tl.arange(0, M), count - 1) + begin
    pair = tl.load(pair_order + pair_at)
    inputs = x + (pair // CHOICES).to(tl.int64)[:, None] * D + tl.arange(0, 128)[None, :]
    # Tile rows 16a + b (b < 8) are rows of w1, 16a + 8 + b the same rows of w3: a gate and its up share a thread.
    # Column `place` of `hidden` is row `natural` of the weights: expert order for the second product.
    tile_row = tl.arange(0, ROWS)
    place = block * H + (tile_row // 16) * 8 + tile_row % 8
    natural = place // 128 * 128 + place % 32 * 4 + place % 128 // 32
    row = natural + ((tile_row // 8) % 2) * INNER
    words = slot.to(tl.pointer_type(tl.uint16)) + row[:, None] * (D // 4) + tl.arange(0, 32)[None, :]
    scales = slot + 3 * (D * INNER // 2) + row[:, None] * (D // 32) + tl.arange(0, 4)[None, :]
    total = _product(words, scales, inputs, shifts, D, PACKED) * UNSCALE
    gate, up = tl.split(tl.permute(tl.reshape(total, (H // 8, 2, 8, M)), (0, 2, 3, 1)))
    weight = tl.load(routing + pair)
    value = swiglu(tl.reshape(gate, (H, M)), tl.reshape(up, (H, M)), limit) * weight[None, :]
    column = block * H + tl.arange(0, H)
    target = hidden + pair_at.to(tl.int64)[:, None] * INNER + column[None, :]
    tl.store(target, tl.trans(value.to(tl.bfloat16)), mask=(tl.arange(0, M) < count)[:, None])


@triton.jit
def _down_tile(
    hidden, out, pair_order, shifts, slot, block, begin, count,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, ROWS: tl.constexpr, M: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """`out[token, choice, ROWS columns at block]` of up to M pairs of one expert."""
    pair_at = tl.minimum(tl.arange(0, M), count - 1) + begin
    inputs = hidden + pair_at.to(tl.int64)[:, None] * INNER + tl.arange(0, 128)[None, :]
    row = block * ROWS + tl.arange(0, ROWS)
    code_start: tl.constexpr = D * INNER
    words = (slot + code_start).to(tl.pointer_type(tl.uint16)) + row[:, None] * (INNER // 4) + tl.arange(0, 32)[None, :]
    scale_start: tl.constexpr = 3 * (D * INNER // 2) + 2 * (D * INNER // 32)
    scales = slot + scale_start + row[:, None] * (INNER // 32) + tl.arange(0, 4)[None, :]
    total = _product(words, scales, inputs, shifts, INNER, PACKED) * UNSCALE
    pair = tl.load(pair_order + pair_at)
    target = out + (pair + pair // CHOICES).to(tl.int64)[:, None] * D + row[None, :]
    tl.store(target, tl.trans(total.to(tl.bfloat16)), mask=(tl.arange(0, M) < count)[:, None])


@triton.jit
def gate_up_kernel(
    x, routing, hidden, tiles, pair_order, table, base, host, peer, limit,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, EXPERT_BYTES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, HOST: tl.constexpr, PEER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (most tiles * 2 I / ROWS): one block of rows of w1 and w3 of one tile. `x` bf16 `[T, D]` in expert order."""
    blocks: tl.constexpr = 2 * INNER // ROWS
    number = tl.program_id(0) // blocks
    if number >= tl.load(tiles):
        return
    block = tl.program_id(0) % blocks
    expert = tl.load(tiles + HEADER + 3 * number)
    begin = tl.load(tiles + HEADER + 1 + 3 * number)
    count = tl.load(tiles + HEADER + 2 + 3 * number)
    slot = slot_address(expert, table, base, host, peer, EXPERT_BYTES, HOST, PEER)
    shifts = tiles + 2
    if count > M // 2:
        _gate_up_tile(
            x, routing, hidden, pair_order, shifts, slot, block, begin, count, limit,
            D, INNER, CHOICES, ROWS, M, PACKED,
        )  # fmt: skip
    else:
        _gate_up_tile(
            x, routing, hidden, pair_order, shifts, slot, block, begin, count, limit,
            D, INNER, CHOICES, ROWS, M // 2, PACKED,
        )  # fmt: skip


@triton.jit
def down_kernel(
    hidden, out, tiles, pair_order, table, base, host, peer,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, EXPERT_BYTES: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, HOST: tl.constexpr, PEER: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (most tiles * D / ROWS): one block of rows of w2 of one tile. `out` bf16 `[T, CHOICES + 1, D]`."""
    blocks: tl.constexpr = D // ROWS
    number = tl.program_id(0) // blocks
    if number >= tl.load(tiles):
        return
    block = tl.program_id(0) % blocks
    expert = tl.load(tiles + HEADER + 3 * number)
    begin = tl.load(tiles + HEADER + 1 + 3 * number)
    count = tl.load(tiles + HEADER + 2 + 3 * number)
    slot = slot_address(expert, table, base, host, peer, EXPERT_BYTES, HOST, PEER)
    shifts = tiles + 2
    if count > M // 2:
        _down_tile(hidden, out, pair_order, shifts, slot, block, begin, count, D, INNER, CHOICES, ROWS, M, PACKED)
    else:
        _down_tile(hidden, out, pair_order, shifts, slot, block, begin, count, D, INNER, CHOICES, ROWS, M // 2, PACKED)


def rounds_inputs(device: torch.device, wide: int, inner: int) -> bool:
    """Whether `expert_gate_up` rounds its input itself."""
    return experts_prefill_sm90.serves(device, wide, inner)


def expert_gate_up(
    x: Tensor,
    weights: Tensor,
    groups: Groups,
    slab: ExpertSlab,
    hidden: Tensor,
    limit: float,
    *,
    tiles: Tensor,
    room: Tensor,
) -> None:
    """`hidden` `[T, k, I]`: SwiGLU of w1 and w3 times the routing weight, as e4m3, pairs by expert, for `expert_down`.

    `x` bf16 `[T, D]`: where `rounds_inputs` says so, as it is; else rounded to e4m3 values, in expert order
    (`quantise_rows(..., reorder=True)`). `weights` fp32 `[T, k]`: routing weights. `tiles` int32 `[tile_words]`: the
    tile list, written here and read by `expert_down`. `room`: scratch, the parts `[T, k + 1, D]` that `expert_down`
    will write.
    """
    tokens, choices, inner = hidden.shape
    if not tokens:
        return
    list_tiles(groups, hidden, tiles, slab)
    rows = hidden.view(tokens * choices, inner)
    if rounds_inputs(x.device, x.shape[1], inner):
        inputs = quantise_pairs(x, groups.pair_order, tiles[1:2], choices, room.view(-1).view(torch.uint8))
        most = _most_tiles(hidden, slab)
        experts_prefill_sm90.gate_up(*inputs, weights, groups, slab, hidden, tiles, most, limit)
        quantise_in_place(rows, tiles[1:2])
    else:
        gate_up(x, weights, groups, slab, hidden, tiles, limit)
        round_in_place(rows, tiles[1:2])


def expert_down(
    hidden: Tensor,
    shared_hidden: Tensor,
    shared_w2: Fp8Weight,
    groups: Groups,
    slab: ExpertSlab,
    out: Tensor,
    *,
    tiles: Tensor,
    work: PrefillWork,
) -> None:
    """Parts of the mixture, `out` bf16 `[T, k + 1, D]`: the chosen experts' outputs, then the shared expert's.

    `hidden` and `tiles` as `expert_gate_up` leaves them, `shared_hidden` bf16 `[T, I]` as
    `linear_prefill.shared_gate_up` does.
    Padding tokens have no pairs: what their parts 0..k-1 hold is of no use.
    """
    if not hidden.shape[0]:
        return
    if rounds_inputs(out.device, out.shape[2], hidden.shape[2]):
        experts_prefill_sm90.down(hidden, groups, slab, out, tiles, _most_tiles(hidden, slab))
    else:
        down(hidden, groups, slab, out, tiles)
    linear(shared_hidden, shared_w2, out[:, -1], work=work)


def list_tiles(groups: Groups, hidden: Tensor, tiles: Tensor, slab: ExpertSlab) -> None:
    """Write the tile list of this chunk."""
    most = min(hidden.shape[0] * hidden.shape[1], slab.table.numel())
    shape = tile("experts_prefill.experts", hidden.device)
    tile_list_kernel[(most,)](
        tiles, groups.num_active, groups.active_experts, groups.active_begin,
        E=triton.next_power_of_2(most), M=shape.m, num_warps=4,
    )  # fmt: skip


def gate_up(
    x: Tensor, weights: Tensor, groups: Groups, slab: ExpertSlab, hidden: Tensor, tiles: Tensor, limit: float
) -> None:
    """`hidden` bf16 `[T * k, I]` by place of the pair: SwiGLU of w1 and w3 times the routing weight, unrounded."""
    choices, inner, wide = *hidden.shape[1:], x.shape[1]
    shape = tile("experts_prefill.experts", hidden.device).fitted(n=2 * inner)
    most = _most_tiles(hidden, slab)
    gate_up_kernel[(most * (2 * inner // shape.n),)](
        x, weights, hidden, tiles, groups.pair_order, *_tiers(slab), limit,
        D=wide, INNER=inner, CHOICES=choices, EXPERT_BYTES=ExpertShape(wide, inner).expert_bytes, ROWS=shape.n,
        M=shape.m, HOST=slab.host is not None, PEER=slab.peer is not None, PACKED=hidden.is_cuda, **shape.options,
    )  # fmt: skip


def down(hidden: Tensor, groups: Groups, slab: ExpertSlab, out: Tensor, tiles: Tensor) -> None:
    """Parts 0..k-1 of `out [T, k + 1, D]`: w2 of `hidden` as rounded in place."""
    choices, inner, wide = *hidden.shape[1:], out.shape[2]
    shape = tile("experts_prefill.experts", hidden.device).fitted(n=wide)
    most = _most_tiles(hidden, slab)
    down_kernel[(most * (wide // shape.n),)](
        hidden, out, tiles, groups.pair_order, *_tiers(slab),
        D=wide, INNER=inner, CHOICES=choices, EXPERT_BYTES=ExpertShape(wide, inner).expert_bytes, ROWS=shape.n,
        M=shape.m, HOST=slab.host is not None, PEER=slab.peer is not None, PACKED=hidden.is_cuda, **shape.options,
    )  # fmt: skip


def _most_tiles(hidden: Tensor, slab: ExpertSlab) -> int:
    shape = tile("experts_prefill.experts", hidden.device)
    return max_tiles(hidden.shape[0] * hidden.shape[1], slab.table.numel(), shape.m)


def _tiers(slab: ExpertSlab) -> tuple[Tensor, Tensor, Any, Any]:
    host = slab.base if slab.host is None else slab.host
    return slab.table, slab.base, host, slab.base if slab.peer is None else slab.peer


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations that V4-Flash needs."""
    wide, inner = 4096, 2048
    shape = tile("experts_prefill.experts", arch)
    slab = {"tiles": "*i32", "pair_order": "*i32", "table": "*i32", "base": "*u8", "host": "*u8", "peer": "*u8"}
    sizes = {
        "D": wide, "INNER": inner, "CHOICES": 6, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes,
        "ROWS": shape.n, "M": shape.m, "PACKED": True,
    }  # fmt: skip
    cases = []
    for name, tiers in (("resident", False), ("tiers", True)):
        values = sizes | {"HOST": tiers, "PEER": tiers}
        types = {"x": "*bf16", "routing": "*fp32", "hidden": "*bf16", "limit": "fp32"} | slab
        cases.append((f"gate_up_{name}", gate_up_kernel, types, values, shape.options))
        cases.append((f"down_{name}", down_kernel, {"hidden": "*bf16", "out": "*bf16"} | slab, values, shape.options))
    types = dict.fromkeys(("tiles", "num_active", "active_experts", "active_begin"), "*i32")
    cases += experts_prefill_sm90.compile_list() if arch == 90 else []
    cases.append(("tile_list", tile_list_kernel, types, {"E": 256, "M": shape.m}, {"num_warps": 4}))
    return cases
