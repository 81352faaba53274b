"""The two launches of decode's experts on sm_90: persistent programs that never stop reading weights, Gluon.

Owns: which program multiplies which rows, when it may read what, and the launches. Does not own: the products
(`experts_tiles.py`), the form for other GPUs, which this one replaces where `serves` says so (`experts_decode.py`).

The tiles of a launch, expert by expert, are cut into as many runs as programs fit on the GPU. A program quantises its
inputs once per expert and has the next tile's copies on their way while it multiplies; so a launch begins and ends
once, however many experts there are. A tile's pairs beyond eight take further turns over its weights. In `down` the
shared expert comes first, 16 rows a program; its and the first routed rows are on their way before the launch's wait.
An expert that is not in the slab is read where it is: copies of whole lines, many on their way, each byte once per
eight pairs.
Between the launches `hidden` and `shared_hidden` are natural columns, not rounded: `down` quantises what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from workers.experts.layout import TIER_SHIFT, ExpertShape, ExpertSlab, Tier
from workers.kernels.experts_tiles import (
    ROWS,
    SLOTS,
    SUM_ROWS,
    SUM_TOKENS,
    TOKENS,
    UNSCALE,
    WARPS,
    WIDE_STEP,
    WIDE_SUMS,
    code_pointers,
    code_slot,
    fill_inputs,
    input_buffers,
    issue,
    issue_rows,
    rows_step,
    scale_pointers,
    scale_slot,
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
def gate_up_kernel(
    x, routing, hidden, num_active, active_experts, active_begin, pair_order, table, base, host, peer,
    limit,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr,
    PEER: gl.constexpr, ONE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Any number of programs. A tile is 32 rows of w1 and the same 32 of w3."""
    BLOCKS: gl.constexpr = INNER // (ROWS // 2)
    SCALES: gl.constexpr = 3 * (D * INNER // 2)
    code_slots = (code_slot(), code_slot(), code_slot(), code_slot())
    scale_slots = (scale_slot(), scale_slot(), scale_slot(), scale_slot())
    inputs, input_scales = input_buffers(D)
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
    codes = code_pointers(slot, unit % BLOCKS, INNER, D)
    scales = scale_pointers(slot + SCALES, unit % BLOCKS, INNER, D)
    if unit < units:
        for step in gl.static_range(SLOTS - 1):
            issue(code_slots, scale_slots, step, codes, scales, step)
            async_copy.commit_group()
    if ONE:
        fill_inputs(inputs, input_scales, x, pair_order, 0, 1, 0, D, ONE)
    filled = -1
    while unit < units:
        more = first + TOKENS < end
        next_unit = gl.where(more, unit, unit + 1)
        slot, next_first, next_end = _tile_of(
            next_unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
        )
        next_first = gl.where(more, first + TOKENS, next_first)
        next_codes = code_pointers(slot, next_unit % BLOCKS, INNER, D)
        next_scales = scale_pointers(slot + SCALES, next_unit % BLOCKS, INNER, D)
        if first != filled:
            if not ONE:
                fill_inputs(
                    inputs, input_scales, x, pair_order, first, gl.minimum(end - first, TOKENS), CHOICES, D, ONE
                )
            fence_async_shared()
            filled = first
        total = tile_product(
            code_slots, scale_slots, inputs, input_scales, codes, scales, next_codes, next_scales, next_unit < units, D
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
    code_slots, scale_slots, inputs, input_scales, hidden, pair_order, codes, scales, out, num_tokens,
    next_codes, next_scales, has_next, D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, ONE: gl.constexpr,
):  # fmt: skip
    """The shared expert's part of `out [T, CHOICES + 1, D]`, 16 rows a program and turn, the first steps of the first
    on their way already. Leaves the first steps of the program's tiles on their way, if it has any."""
    STEPS: gl.constexpr = INNER // WIDE_STEP
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    piece = pid
    while piece < D // 16:
        first = 0
        while first < num_tokens:
            if first + piece > pid:
                for step in gl.static_range(SLOTS - 1):
                    issue_rows(code_slots, step, codes, piece * 16, step, 0, INNER)
                    async_copy.commit_group()
            go_on = (first + TOKENS >= num_tokens) & (piece + programs >= D // 16) & has_next
            count = gl.minimum(num_tokens - first, TOKENS)
            fill_inputs(inputs, input_scales, hidden, pair_order, first, count, 0, INNER, ONE)
            row_scales = scales + piece // 8 * (INNER // 128)
            total = gl.full([WARPS, 16, TOKENS], 0.0, gl.float32, WIDE_SUMS)
            for step in gl.static_range(STEPS):
                async_copy.wait_group(SLOTS - 2)
                if step + SLOTS - 1 < STEPS:
                    issue_rows(code_slots, step + SLOTS - 1, codes, piece * 16, step + SLOTS - 1, 0, INNER)
                elif go_on:
                    issue(code_slots, scale_slots, step + SLOTS - 1, next_codes, next_scales, step + SLOTS - 1 - STEPS)
                async_copy.commit_group()
                slot = code_slots[step % SLOTS]
                total = rows_step(total, slot, inputs, input_scales, row_scales, row_scales, step, INNER)
            value = gl.sum(total, 0) / UNSCALE
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
    PEER: gl.constexpr, ONE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Any number of programs. A tile is 64 rows of w2."""
    BLOCKS: gl.constexpr = D // ROWS
    CODES: gl.constexpr = D * INNER
    SCALES: gl.constexpr = 3 * (D * INNER // 2) + 2 * (D * INNER // 32)
    # The slot in which the routed experts' steps begin: behind the shared expert's.
    BEGIN: gl.constexpr = INNER // WIDE_STEP % SLOTS
    slots = (code_slot(), code_slot(), code_slot(), code_slot())
    code_slots = (slots[BEGIN], slots[(BEGIN + 1) % SLOTS], slots[(BEGIN + 2) % SLOTS], slots[(BEGIN + 3) % SLOTS])
    bytes_ = (scale_slot(), scale_slot(), scale_slot(), scale_slot())
    scale_slots = (bytes_[BEGIN], bytes_[(BEGIN + 1) % SLOTS], bytes_[(BEGIN + 2) % SLOTS], bytes_[(BEGIN + 3) % SLOTS])
    inputs, input_scales = input_buffers(INNER)
    # Weights and groups are older than the predecessor, `gate_up_kernel`, which lets this kernel start only after its
    # own wait.
    tiles = gl.load(num_active) * BLOCKS
    unit = gl.program_id(0) * tiles // gl.num_programs(0)
    units = (gl.program_id(0) + 1) * tiles // gl.num_programs(0)
    slot, first, end = _tile_of(
        unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
    )
    codes = code_pointers(slot + CODES, unit % BLOCKS, 0, INNER)
    scales = scale_pointers(slot + SCALES, unit % BLOCKS, 0, INNER)
    if gl.program_id(0) < D // 16:
        for step in gl.static_range(SLOTS - 1):
            issue_rows(slots, step, shared_codes, gl.program_id(0) * 16, step, 0, INNER)
            async_copy.commit_group()
    elif unit < units:
        for step in gl.static_range(SLOTS - 1):
            issue(code_slots, scale_slots, step, codes, scales, step)
            async_copy.commit_group()
    if PDL:
        gdc_wait()
    _shared_down(
        slots, bytes_, inputs, input_scales, shared_hidden, pair_order, shared_codes, shared_scales, out, num_tokens,
        codes, scales, unit < units, D, INNER, CHOICES, ONE,
    )  # fmt: skip
    filled = -1
    while unit < units:
        more = first + TOKENS < end
        next_unit = gl.where(more, unit, unit + 1)
        slot, next_first, next_end = _tile_of(
            next_unit, units, active_experts, active_begin, table, base, host, peer, BLOCKS, EXPERT_BYTES, HOST, PEER
        )
        next_first = gl.where(more, first + TOKENS, next_first)
        next_codes = code_pointers(slot + CODES, next_unit % BLOCKS, 0, INNER)
        next_scales = scale_pointers(slot + SCALES, next_unit % BLOCKS, 0, INNER)
        if first != filled:
            count = gl.minimum(end - first, TOKENS)
            fill_inputs(inputs, input_scales, hidden, pair_order, first, count, 1, INNER, ONE)
            fence_async_shared()
            filled = first
        total = tile_product(
            code_slots, scale_slots, inputs, input_scales, codes, scales, next_codes, next_scales, next_unit < units,
            INNER,
        )  # fmt: skip
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
    own = slots + TOKENS.value * columns + TOKENS.value * 4 * columns // 128 + 2048
    return num_sms(device) * min(MOST_PROGRAMS, SHARED_BYTES // own)


def gate_up(
    x: Tensor, weights: Tensor, groups: Any, slab: ExpertSlab, hidden: Tensor, limit: float, pdl: bool | None
) -> None:  # fmt: skip
    """`experts_decode.expert_gate_up` of `x [T, D]` bf16, natural columns, not rounded."""
    tokens, choices, inner = hidden.shape
    gate_up_kernel[(num_programs(x.shape[1], x.device),)](
        x, weights, hidden, groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order,
        slab.table, slab.base, _or_base(slab.host, slab), _or_base(slab.peer, slab), float(limit),
        **_constants(x.shape[1], inner, choices, slab, tokens), **OPTIONS, **pdl_options(x, pdl),
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
        **_constants(out.shape[2], inner, choices, slab, tokens), **OPTIONS, **pdl_options(hidden, pdl),
    )  # fmt: skip


def _constants(wide: int, inner: int, choices: int, slab: ExpertSlab, tokens: int) -> dict[str, Any]:
    return {
        "D": wide, "INNER": inner, "CHOICES": choices, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes,
        "HOST": slab.host is not None, "PEER": slab.peer is not None, "ONE": tokens == 1,
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
        for one in (True, False):
            for tiers in (False, True):
                constants = {
                    "D": wide, "INNER": inner, "CHOICES": 6, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes,
                    "HOST": tiers, "PEER": tiers, "ONE": one, "PDL": True,
                }  # fmt: skip
                name = f"sm90_{kernel.fn.__name__}_{'one' if one else 'many'}_{'tiers' if tiers else 'resident'}"
                signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
                cases.append((name, kernel, signature, constants, OPTIONS | {"launch_pdl": True}))
    return cases
