"""The two launches of decode's experts on sm_90: persistent programs that never stop reading weights, Gluon.

Owns: which program multiplies which rows, when it may read what, and the launches. Does not own: the products
(`experts_tiles.py`), the form for other GPUs, which this one replaces where `serves` says so (`experts_decode.py`).

The tiles of a launch, expert by expert, are cut into as many runs as programs fit on the GPU. A program quantises its
inputs once per expert and has the next tile's copies on their way while it multiplies; so a launch begins and ends
once, however many experts there are. A tile's pairs beyond eight take further turns over its weights. The shared expert
comes first, 16 rows a program, because its weights are there before the launch's wait. An expert that is not in the
slab is read where it is: copies of whole lines, many on their way, each byte once per eight pairs. Between the launches
`hidden` and `shared_hidden` are natural columns, not rounded: `down` quantises what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from workers.experts.layout import TIER_SHIFT, ExpertShape, ExpertSlab, Tier
from workers.kernels.experts_tiles import (
    ROWS,
    SLOTS,
    SUM_ROWS,
    SUM_TOKENS,
    TOKENS,
    WARPS,
    WIDE_STEP,
    fill_inputs,
    input_buffers,
    issue_first,
    issue_first_rows,
    issue_row_scales,
    row_scale_buffer,
    rows_product,
    slots_of_steps,
    tile_product,
)
from workers.kernels.launch import num_sms, pdl_options

gdc_wait = tl.extra.cuda.gdc_wait
gdc_launch_dependents = tl.extra.cuda.gdc_launch_dependents

OPTIONS = {"num_warps": 4, "maxnreg": 168}
"""Three programs share a multiprocessor."""

SHARED_BYTES = 227 * 1024
"""Shared memory of a multiprocessor that programs can have, each 1 KB more than it asks for."""

MOST_PROGRAMS = 3
"""Of a multiprocessor."""

UNIT = 1024
"""Columns that `SLOTS` steps of a tile take: sizes must be multiples."""

PLACE = gl.constexpr((1 << TIER_SHIFT) - 1)
SHIFT = gl.constexpr(TIER_SHIFT)
HOST_TIER = gl.constexpr(Tier.HOST.value)
PEER_TIER = gl.constexpr(Tier.PEER.value)


# -- kernels ------------------------------------------------------------------------------------------------------


@gluon.jit
def _tile_of(
    unit, units, active_experts, active_begin, table, base, host, peer,
    BLOCKS: gl.constexpr, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr,
):  # fmt: skip
    """Where the expert of a tile lies, and the first and last of its pairs; harmless beyond the last tile."""
    inside = unit < units
    member = unit // BLOCKS
    expert = gl.load(active_experts + member, mask=inside, other=0)
    begin = gl.load(active_begin + member, mask=inside, other=0)
    end = gl.load(active_begin + member + 1, mask=inside, other=0)
    code = gl.load(table + expert)
    offset = (code & PLACE).to(gl.int64) * EXPERT_BYTES
    slot = base + offset
    if HOST:
        slot = gl.where(code >> SHIFT == HOST_TIER, host + offset, slot)
    if PEER:
        slot = gl.where(code >> SHIFT == PEER_TIER, peer + offset, slot)
    return slot, begin, end


@gluon.jit
def _swiglu(gate, up, limit):
    gate = gl.minimum(gate, limit)
    up = gl.minimum(gl.maximum(up, -limit), limit)
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def _shared_gate_up(
    slots, inputs, input_scales, row_scales, x, pair_order, codes, scales, out, num_tokens, limit,
    D: gl.constexpr, INNER: gl.constexpr,
):  # fmt: skip
    """The shared expert's hidden rows: eight columns of `out [T, INNER]` a program and turn."""
    piece = gl.program_id(0)
    while piece < INNER // 8:
        rows = codes + (piece * 8).to(gl.int64) * D
        gate_scales = scales + piece // 16 * (D // 128)
        first = 0
        while first < num_tokens:
            issue_row_scales(row_scales, gate_scales, gate_scales + INNER // 128 * (D // 128), D)
            issue_first_rows(slots, rows, INNER, D)
            fill_inputs(inputs, input_scales, x, pair_order, first, gl.minimum(num_tokens - first, TOKENS), 0, D)
            both = rows_product(slots, inputs, input_scales, row_scales, rows, rows, rows, False, INNER, D, False)
            gate, up = gl.split(gl.permute(gl.reshape(both, [2, 8, TOKENS]), [1, 2, 0]))
            value = _swiglu(gate, up, limit)
            token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, value.type.layout))
            column = piece * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, value.type.layout))
            target = out + token.to(gl.int64)[None, :] * INNER + column[:, None]
            gl.store(target, value.to(gl.bfloat16), mask=(token < num_tokens)[None, :])
            first += TOKENS
        piece += gl.num_programs(0)


@gluon.jit(do_not_specialize=["num_tokens"])
def gate_up_kernel(
    x, routing, hidden, num_active, active_experts, active_begin, pair_order, table, base, host, peer,
    shared_codes, shared_scales, shared_hidden, num_tokens, limit,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr,
    PEER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Any number of programs. A tile is 32 rows of w1 and the same 32 of w3."""
    BLOCKS: gl.constexpr = INNER // (ROWS // 2)
    SCALES: gl.constexpr = 3 * (D * INNER // 2)
    slots = slots_of_steps()
    inputs, input_scales = input_buffers(D)
    # `x` is older than the predecessor, `gate_route`, which lets this kernel start only after its own wait.
    _shared_gate_up(
        slots, inputs, input_scales, row_scale_buffer(D), x, pair_order, shared_codes, shared_scales, shared_hidden,
        num_tokens, limit, D, INNER,
    )  # fmt: skip
    if PDL:
        gdc_wait()
        # All programs are here: the successor may take the room of those that end first. It reads the groups before its
        # own wait.
        gdc_launch_dependents()
    tiles = gl.load(num_active) * BLOCKS
    unit = gl.program_id(0) * tiles // gl.num_programs(0)
    units = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)
    slot, first, end = _tile_of(
        unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
    )
    codes = slot + unit % BLOCKS * (ROWS // 2 * (D // 2))
    scales = slot + SCALES + unit % BLOCKS * (ROWS // 2 * (D // 32))
    if unit < units:
        issue_first(slots, 0, codes, scales, INNER, D)
    filled = -1
    while unit < units:
        more = first + TOKENS < end
        next_unit = gl.where(more, unit, unit + 1)
        slot, next_first, next_end = _tile_of(
            next_unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
        )
        next_first = gl.where(more, first + TOKENS, next_first)
        next_codes = slot + next_unit % BLOCKS * (ROWS // 2 * (D // 2))
        next_scales = slot + SCALES + next_unit % BLOCKS * (ROWS // 2 * (D // 32))
        if first != filled:
            fill_inputs(inputs, input_scales, x, pair_order, first, gl.minimum(end - first, TOKENS), CHOICES, D)
            fence_async_shared()
            filled = first
        total = tile_product(
            slots, 0, inputs, input_scales, codes, scales, next_codes, next_scales, next_unit < units, INNER, D
        )
        gate, up = gl.split(gl.permute(gl.reshape(total, [WARPS, 2, 8, TOKENS]), [0, 2, 3, 1]))
        value = _swiglu(gate, up, limit)
        LAYOUT: gl.constexpr = value.type.layout
        at = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
        pair = gl.load(pair_order + gl.minimum(at, end - 1))
        value *= gl.load(routing + pair)[None, None, :]
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
        row = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
        column = unit % BLOCKS * (ROWS // 2) + warp * 8 + row
        target = hidden + pair.to(gl.int64)[None, None, :] * INNER + column
        gl.store(target, value.to(gl.bfloat16), mask=(at < end)[None, None, :])
        unit, first, end, codes, scales = next_unit, next_first, next_end, next_codes, next_scales


@gluon.jit
def _shared_down(
    slots, inputs, input_scales, row_scales, hidden, pair_order, codes, scales, out, num_tokens,
    next_codes, next_scales, has_next, D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr,
):  # fmt: skip
    """The shared expert's part of `out [T, CHOICES + 1, D]`, 16 rows a program and turn, the first steps of the first
    on their way already. Leaves the first steps of the program's tiles on their way, if it has any."""
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    piece = pid
    while piece < D // 16:
        rows = codes + (piece * 16).to(gl.int64) * INNER
        first = 0
        while first < num_tokens:
            if first + piece > pid:
                issue_row_scales(
                    row_scales, scales + piece // 8 * (INNER // 128), scales + piece // 8 * (INNER // 128), INNER
                )
                issue_first_rows(slots, rows, 0, INNER)
            last = (first + TOKENS >= num_tokens) & (piece + programs >= D // 16)
            count = gl.minimum(num_tokens - first, TOKENS)
            fill_inputs(inputs, input_scales, hidden, pair_order, first, count, 0, INNER)
            value = rows_product(
                slots, inputs, input_scales, row_scales, rows, next_codes, next_scales, last & has_next, 0, INNER, True
            )
            token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, value.type.layout))
            row = piece * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, value.type.layout))
            target = out + (token.to(gl.int64) * (CHOICES + 1) + CHOICES)[None, :] * D + row[:, None]
            gl.store(target, value.to(gl.bfloat16), mask=(token < num_tokens)[None, :])
            first += TOKENS
        piece += programs


@gluon.jit(do_not_specialize=["num_tokens"])
def down_kernel(
    hidden, shared_hidden, shared_codes, shared_scales, out, num_active, active_experts, active_begin, pair_order,
    table, base, host, peer, num_tokens,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr,
    PEER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Any number of programs. A tile is 64 rows of w2."""
    BLOCKS: gl.constexpr = D // ROWS
    CODES: gl.constexpr = D * INNER
    SCALES: gl.constexpr = 3 * (D * INNER // 2) + 2 * (D * INNER // 32)
    BEGIN: gl.constexpr = INNER // WIDE_STEP // 2  # turns of the slots that the shared expert's rows take
    slots = slots_of_steps()
    inputs, input_scales = input_buffers(INNER)
    row_scales = row_scale_buffer(INNER)
    # Weights and groups are older than the predecessor, `gate_up_kernel`, which lets this kernel start only after its
    # own wait.
    tiles = gl.load(num_active) * BLOCKS
    unit = gl.program_id(0) * tiles // gl.num_programs(0)
    units = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)
    slot, first, end = _tile_of(
        unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
    )
    codes = slot + CODES + unit % BLOCKS * (ROWS * (INNER // 2))
    scales = slot + SCALES + unit % BLOCKS * (ROWS * (INNER // 32))
    if gl.program_id(0) < D // 16:
        row_scales_at = shared_scales + gl.program_id(0) // 8 * (INNER // 128)
        issue_row_scales(row_scales, row_scales_at, row_scales_at, INNER)
        issue_first_rows(slots, shared_codes + (gl.program_id(0) * 16).to(gl.int64) * INNER, 0, INNER)
    elif unit < units:
        issue_first(slots, BEGIN, codes, scales, 0, INNER)
    if PDL:
        gdc_wait()
    _shared_down(
        slots, inputs, input_scales, row_scales, shared_hidden, pair_order, shared_codes, shared_scales, out,
        num_tokens, codes, scales, unit < units, D, INNER, CHOICES,
    )  # fmt: skip
    filled = -1
    while unit < units:
        more = first + TOKENS < end
        next_unit = gl.where(more, unit, unit + 1)
        slot, next_first, next_end = _tile_of(
            next_unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
        )
        next_first = gl.where(more, first + TOKENS, next_first)
        next_codes = slot + CODES + next_unit % BLOCKS * (ROWS * (INNER // 2))
        next_scales = slot + SCALES + next_unit % BLOCKS * (ROWS * (INNER // 32))
        if first != filled:
            fill_inputs(inputs, input_scales, hidden, pair_order, first, gl.minimum(end - first, TOKENS), 1, INNER)
            fence_async_shared()
            filled = first
        total = tile_product(
            slots, BEGIN, inputs, input_scales, codes, scales, next_codes, next_scales, next_unit < units, 0, INNER
        )
        at = first + gl.arange(0, TOKENS, layout=SUM_TOKENS)
        pair = gl.load(pair_order + gl.minimum(at, end - 1))
        row = unit % BLOCKS * ROWS + gl.arange(0, ROWS, layout=SUM_ROWS)
        target = out + (pair + pair // CHOICES).to(gl.int64)[None, :] * D + row[:, None]
        gl.store(target, total.to(gl.bfloat16), mask=(at < end)[None, :])
        unit, first, end, codes, scales = next_unit, next_first, next_end, next_codes, next_scales
    if PDL:
        # Late: the successor is small, and its programs would stand where this launch's work is.
        gdc_launch_dependents()


# -- launchers ----------------------------------------------------------------------------------------------------


def serves(device: torch.device, wide: int, inner: int) -> bool:
    """Whether experts of `inner` columns on `wide` inputs are multiplied here: sm_90 and sizes of whole turns."""
    sizes = wide % UNIT == 0 and inner % UNIT == 0 and min(wide, inner) >= 2 * UNIT
    return sizes and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def num_programs(columns: int, device: torch.device) -> int:
    """Programs that the GPU holds at a time, of a product over `columns`."""
    slots = SLOTS.value * ROWS.value * (128 + 8)
    own = slots + TOKENS.value * (columns + 4 * columns // 128) + 3072
    return num_sms(device) * min(MOST_PROGRAMS, SHARED_BYTES // own)


def gate_up(
    x: Tensor, shared_w13: Any, weights: Tensor, groups: Any, slab: ExpertSlab, hidden: Tensor, limit: float,
    shared_hidden: Tensor, pdl: bool | None,
) -> None:  # fmt: skip
    """`experts_decode.expert_gate_up` of `x [T, D]` bf16, natural columns, not rounded."""
    tokens, choices, inner = hidden.shape
    gate_up_kernel[(num_programs(x.shape[1], x.device),)](
        x, weights, hidden, groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order,
        slab.table, slab.base, _or_base(slab.host, slab), _or_base(slab.peer, slab),
        shared_w13.codes.view(torch.uint8), shared_w13.scales, shared_hidden, tokens, float(limit),
        **_constants(x.shape[1], inner, choices, slab), **OPTIONS, **pdl_options(x, pdl),
    )  # fmt: skip


def down(
    hidden: Tensor, shared_hidden: Tensor, shared_w2: Any, groups: Any, slab: ExpertSlab, out: Tensor,
    pdl: bool | None,
) -> None:  # fmt: skip
    """`experts_decode.expert_down` of what `gate_up` leaves."""
    tokens, choices, inner = hidden.shape
    down_kernel[(num_programs(inner, hidden.device),)](
        hidden, shared_hidden, shared_w2.codes.view(torch.uint8), shared_w2.scales, out, groups.num_active,
        groups.active_experts, groups.active_begin, groups.pair_order, slab.table, slab.base,
        _or_base(slab.host, slab), _or_base(slab.peer, slab), tokens,
        **_constants(out.shape[2], inner, choices, slab), **OPTIONS, **pdl_options(hidden, pdl),
    )  # fmt: skip


def _constants(wide: int, inner: int, choices: int, slab: ExpertSlab) -> dict[str, Any]:
    return {
        "D": wide, "INNER": inner, "CHOICES": choices, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes,
        "HOST": slab.host is not None, "PEER": slab.peer is not None,
    }  # fmt: skip


def _or_base(tensor: Any, slab: ExpertSlab) -> Any:
    return slab.base if tensor is None else tensor


def compile_list() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations of V4-Flash for sm_90: name, function, signature, constants, options."""
    wide, inner = 4096, 2048
    pointers = dict.fromkeys(("num_active", "active_experts", "active_begin", "pair_order", "table"), "*i32")
    pointers |= dict.fromkeys(("base", "host", "peer", "shared_codes"), "*u8")
    pointers |= dict.fromkeys(("x", "hidden", "shared_hidden", "out"), "*bf16")
    types = pointers | {"routing": "*fp32", "shared_scales": "*fp32", "num_tokens": "i32", "limit": "fp32"}
    cases = []
    for kernel in (gate_up_kernel, down_kernel):
        for tiers in (False, True):
            constants = {
                "D": wide, "INNER": inner, "CHOICES": 6, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes,
                "HOST": tiers, "PEER": tiers, "PDL": True,
            }  # fmt: skip
            name = f"sm90_{kernel.fn.__name__}_{'tiers' if tiers else 'resident'}"
            signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
            cases.append((name, kernel, signature, constants, OPTIONS | {"launch_pdl": True}))
    return cases
