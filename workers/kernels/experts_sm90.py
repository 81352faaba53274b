"""The two launches of decode's experts on sm_90: persistent programs that never stop reading weights, Gluon.

Owns: which program multiplies which rows, when it may read what, and the launches. Does not own: the products
(`experts_tiles.py`), the form for other GPUs, which this one replaces where `serves` says so (`experts_decode.py`).

The tiles of a launch, expert by expert, are cut into as many runs as programs fit on the GPU. A program quantises its
inputs once per expert and has the next tile's copies on their way while it multiplies; so a launch begins and ends
once, however many experts there are. A tile's pairs beyond eight take further turns over its weights. The shared expert
comes first, 16 rows a program, because it needs nothing of the predecessor, in `down` neither: `gate_up` stores the
shared hidden state before its own wait. At one token `down` reads routed rows, too, while `gate_up` writes others
(`experts_hidden.py`). An expert that is not in the slab is read where it is, by boxes over its own memory, each byte
once per eight pairs. Between the launches `hidden` and `shared_hidden` are natural columns, not rounded: `down`
quantises what it reads.

How soon `gate_up` comes to its wait counts, because the router takes less time than the shared expert's first half.
What that needs is therefore asked for at the very beginning; one token's x comes rounded.
# measured (H200, 2026-11-22; 8 layers of V4-Flash at one token): 11 us less with x loaded at once than in four turns,
# when half of the programs came to their wait 3 us after the router had ended; rounded by who makes it, 21 us less.
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

from workers.experts.layout import ExpertSlab
from workers.kernels.arrivals import arrive, await_all
from workers.kernels.experts_boxes import box_types, boxes
from workers.kernels.experts_hidden import (
    FIRST,
    clear,
    count_of,
    fill_awaited,
    tag_of,
    words_of,
)
from workers.kernels.experts_rows import (
    WIDE_STEP,
    issue_first_rows,
    issue_row_scales,
    padded,
    rows_product,
)
from workers.kernels.experts_tiles import (
    FLAT1,
    ROWS,
    STEP,
    SUM_ROWS,
    SUM_TOKENS,
    SUMS,
    TOKENS,
    WARPS,
    fill_coded,
    fill_inputs,
    input_buffers,
    issue,
    issue_first,
    load_coded,
    slots_of_steps,
    tile_product,
)
from workers.kernels.launch import num_sms, pdl_options

gdc_wait = tl.extra.cuda.gdc_wait
gdc_launch_dependents = tl.extra.cuda.gdc_launch_dependents

OPTIONS = {"num_warps": 4, "maxnreg": 128}
"""Four programs can share a multiprocessor."""

SHARED_BYTES = 227 * 1024
"""Shared memory of a multiprocessor that programs can have, each 1 KB more than it asks for."""

MOST_PROGRAMS = 4
"""Of a multiprocessor: registers admit no more."""

LEAVES_ROOM = 4
"""Tokens from which on `down` has one program a multiprocessor less. Who does what changes no bit.
# measured (H200, 2026-11-21, V4-Flash): both launches 39.9, 102.6, 282 and 554 us at 1, 4, 16 and 64 tokens with four
# programs of `down`, 41.8, 99.3, 262 and 510 with three."""

UNIT = 1024
"""Columns of two turns of a tile: sizes must be multiples."""

ENTRIES = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS.value], [0]))


# -- kernels ------------------------------------------------------------------------------------------------------


@gluon.jit
def _member_of(unit, units, active_experts, active_begin, BLOCKS: gl.constexpr, E: gl.constexpr):
    """A tile's expert, and the first and last of its pairs; harmless beyond the last tile."""
    inside = unit < units
    member = unit // BLOCKS
    expert = gl.load(active_experts + member, mask=inside, other=0)
    begin = gl.load(active_begin + member, mask=inside, other=0)
    end = gl.load(active_begin + member + 1, mask=inside, other=0)
    return gl.minimum(gl.maximum(expert, 0), E - 1), begin, end


@gluon.jit
def _tile_of(unit, units, active_experts, active_begin, table, BLOCKS: gl.constexpr, E: gl.constexpr):
    """`_member_of`, the code of its place instead of the expert."""
    expert, begin, end = _member_of(unit, units, active_experts, active_begin, BLOCKS, E)
    return gl.load(table + expert), begin, end


@gluon.jit
def _share(count):
    """First of the program's share of `count` things, and first of the next program's. Earlier programs have more."""
    pid, programs = gl.program_id(0), gl.num_programs(0)
    each, rest = count // programs, count % programs
    return pid * each + gl.minimum(pid, rest), (pid + 1) * each + gl.minimum(pid + 1, rest)


@gluon.jit
def _shares(pieces, tiles):
    """The program's share of some pieces and then some tiles, each two pieces' work: first and last + 1 of both."""
    work = pieces + 2 * tiles
    begin = gl.program_id(0) * work // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * work // gl.num_programs(0)
    item, items = gl.minimum(begin, pieces), gl.minimum(end, pieces)
    return item, items, (gl.maximum(begin - pieces, 0) + 1) // 2, (gl.maximum(end - pieces, 0) + 1) // 2


@gluon.jit
def _swiglu(gate, up, limit):
    gate = gl.minimum(gate, limit)
    up = gl.minimum(gl.maximum(up, -limit), limit)
    return gate / (1.0 + gl.exp(-gate)) * up


@gluon.jit
def _gate_and_up(total):
    """fp32 `[WARPS, 8, TOKENS]` each, of a tile of both matrices."""
    return gl.split(gl.permute(gl.reshape(total, [WARPS, 2, 8, TOKENS]), [0, 2, 3, 1]))


@gluon.jit
def _shared_gate_up(
    slots, inputs, input_scales, row_scales, x, coded, pair_order, codes, scales, out, words, tag, num_tokens, limit,
    D: gl.constexpr, INNER: gl.constexpr,
):  # fmt: skip
    """The shared expert's hidden rows `out [T, INNER]`, that of one token also to `words`: eight columns of eight
    tokens at a time, tokens outermost."""
    PIECES: gl.constexpr = INNER // 8
    items = (num_tokens + TOKENS - 1) // TOKENS * PIECES
    # The last programs come late, where the predecessor's stand: 129 of the router's, 12 on a multiprocessor.
    early = gl.num_programs(0) * 10 // 11
    item = gl.minimum(gl.program_id(0), early) * items // early
    items = gl.minimum(gl.program_id(0) + 1, early) * items // early
    begin = 0
    filled = -1
    loaded = item % PIECES // 16
    only = load_coded(coded, num_tokens == 1, D)
    if item < items:
        row = scales + loaded * (D // 128)
        issue_row_scales(row_scales, row, row + INNER // 128 * (D // 128), D)
        issue_first_rows(slots, begin, codes + (item % PIECES * 8).to(gl.int64) * D, INNER, D)
    if num_tokens == 1:
        fill_coded(inputs, input_scales, only, D)
        filled = 0
    while item < items:
        piece = item % PIECES
        first = item // PIECES * TOKENS
        rows = codes + (piece * 8).to(gl.int64) * D
        next_rows = codes + ((item + 1) % PIECES * 8).to(gl.int64) * D
        if piece // 16 != loaded:
            row = scales + piece // 16 * (D // 128)
            issue_row_scales(row_scales, row, row + INNER // 128 * (D // 128), D)
            async_copy.commit_group()
            async_copy.wait_group(0)
            loaded = piece // 16
        if first != filled:
            fill_inputs(inputs, input_scales, x, pair_order, first, gl.minimum(num_tokens - first, TOKENS), 0, D)
            filled = first
        both = rows_product(
            slots, begin, inputs, input_scales, row_scales, rows, next_rows, item + 1 < items, (0, 0), 0, 0, False,
            INNER, D, False, False, False,
        )  # fmt: skip
        begin += D // WIDE_STEP // 2
        gate, up = gl.split(gl.permute(gl.reshape(both, [2, 8, TOKENS]), [1, 2, 0]))
        value = _swiglu(gate, up, limit)
        token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, value.type.layout))
        column = piece * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, value.type.layout))
        target = token.to(gl.int64)[None, :] * INNER + column[:, None]
        value = value.to(gl.bfloat16)
        if num_tokens == 1:
            gl.store(words + target, words_of(value, tag), mask=(token < num_tokens)[None, :])
        gl.store(out + target, value, mask=(token < num_tokens)[None, :])
        item += 1


@gluon.jit(do_not_specialize=["num_tokens"])
def gate_up_kernel(
    x, coded, routing, hidden, num_active, active_experts, active_begin, pair_order, table,
    slab_codes, slab_scales, host_codes, host_scales, peer_codes, peer_scales,
    shared_codes, shared_scales, shared_hidden, counter, num_tokens, limit,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, HOST: gl.constexpr,
    PEER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Any number of programs. A tile is 32 rows of w1 and the same 32 of w3."""
    BLOCKS: gl.constexpr = INNER // (ROWS // 2)
    HIDDEN: gl.constexpr = _gate_and_up(gl.full([ROWS, TOKENS], 0.0, gl.float32, SUMS))[0].type.layout
    HIDDEN_TOKENS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, HIDDEN))
    slots = slots_of_steps()
    inputs, input_scales = input_buffers(D)
    count = count_of(counter)
    # The table changes between steps only.
    entry = gl.arange(0, padded(E), layout=ENTRIES)
    entries = gl.load(table + entry, mask=entry < E, other=0)
    # `x` and its coded row are older than the predecessor, the router, which lets this kernel start only when one of
    # its programs has waited.
    _shared_gate_up(
        slots, inputs, input_scales, slots[2].index(0), x, coded, pair_order, shared_codes, shared_scales,
        shared_hidden, counter + FIRST + CHOICES * INNER, tag_of(count, gl.num_programs(0)), num_tokens, limit,
        D, INNER,
    )  # fmt: skip
    if num_tokens == 1:
        arrive(counter, gl.num_programs(0), False)
    else:
        arrive(counter, gl.num_programs(0), True)
    places = slots[0].index(0)._reinterpret(gl.int32, [padded(E), 1], FLAT1)
    places._reinterpret(gl.int32, [padded(E)], FLAT1).store(entries)
    if PDL:
        gdc_wait()
        # All programs are here: the successor may take the room of those that end first. It reads the groups before its
        # own wait.
        gdc_launch_dependents()
    # A token's experts are CHOICES, if not all alike: the first are looked up beside their number.
    active = gl.load(num_active)
    unit, units = _share(CHOICES * BLOCKS)
    expert, first, end = _member_of(unit, units, active_experts, active_begin, BLOCKS, E)
    if active != CHOICES:
        unit, units = _share(active * BLOCKS)
        expert, first, end = _member_of(unit, units, active_experts, active_begin, BLOCKS, E)
    code = gl.max(places.index(expert).load(ENTRIES), 0)
    experts = (slab_codes, slab_scales, host_codes, host_scales, peer_codes, peer_scales)
    tile_row = unit % BLOCKS * (ROWS // 2)
    if unit < units:
        issue_first(slots, 0, experts, code, tile_row, True, HOST, PEER)
    if (num_tokens > 1) | (active == 0):
        clear(counter, gl.where(num_tokens == 1, CHOICES, CHOICES + 1), INNER)
    turns = 0
    filled = -1
    while unit < units:
        more = first + TOKENS < end
        next_unit = gl.where(more, unit, unit + 1)
        next_code, next_first, next_end = _tile_of(next_unit, units, active_experts, active_begin, table, BLOCKS, E)
        next_first = gl.where(more, first + TOKENS, next_first)
        next_row = next_unit % BLOCKS * (ROWS // 2)
        if first != filled:
            if (num_tokens > 1) | (active != CHOICES):
                # Also of one token that has an expert twice: its row in several places.
                fill_inputs(inputs, input_scales, x, pair_order, first, gl.minimum(end - first, TOKENS), CHOICES, D)
            fence_async_shared()
            filled = first
        at = first + gl.arange(0, TOKENS, layout=HIDDEN_TOKENS)
        pair = gl.load(pair_order + gl.minimum(at, end - 1))
        weight = gl.load(routing + pair)[None, None, :]
        total = tile_product(
            slots, 0, turns, inputs, input_scales, experts, code, tile_row, next_code, next_row, next_unit < units,
            True, HOST, PEER, D,
        )  # fmt: skip
        turns += D // STEP // 2
        gate, up = _gate_and_up(total)
        value = _swiglu(gate, up, limit) * weight
        warp = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, HIDDEN)))[:, None, None]
        row = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, HIDDEN)))[None, :, None]
        column = unit % BLOCKS * (ROWS // 2) + warp * 8 + row
        value = value.to(gl.bfloat16)
        target = pair.to(gl.int64)[None, None, :] * INNER + column
        if num_tokens == 1:
            words = words_of(value, tag_of(count, gl.num_programs(0)))
            gl.store(counter + FIRST + target, words, mask=(at < end)[None, None, :])
        gl.store(hidden + target, value, mask=(at < end)[None, None, :])
        unit, first, end, code, tile_row = next_unit, next_first, next_end, next_code, next_row


@gluon.jit
def _shared_down(
    slots, inputs, input_scales, row_scales, hidden, pair_order, item, items, codes, scales, out, num_tokens, counter,
    tag, experts, code, tile_row, has_tile, D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr,
    HOST: gl.constexpr, PEER: gl.constexpr,
):  # fmt: skip
    """The shared expert's part of `out [T, CHOICES + 1, D]`: items `item` .. `items - 1`, 16 rows of eight tokens each,
    tokens outermost; the first one's copies and its scales' have begun. Leaves the first steps of the program's tiles
    on their way, if it has any. Gives the slot pair in which they begin."""
    PIECES: gl.constexpr = D // 16
    begin = 0
    filled = -1
    loaded = item % PIECES // 8
    while item < items:
        piece = item % PIECES
        first = item // PIECES * TOKENS
        if piece // 8 != loaded:
            row = scales + piece // 8 * (INNER // 128)
            issue_row_scales(row_scales, row, row, INNER)
            async_copy.commit_group()
            async_copy.wait_group(0)
            loaded = piece // 8
        if first != filled:
            if num_tokens == 1:
                fill_awaited(inputs, input_scales, counter, CHOICES, tag, INNER)
            else:
                # Stored before the predecessor's wait, hence before this kernel began.
                count = gl.minimum(num_tokens - first, TOKENS)
                fill_inputs(inputs, input_scales, hidden, pair_order, first, count, 0, INNER)
            filled = first
        value = rows_product(
            slots, begin, inputs, input_scales, row_scales, codes + (piece * 16).to(gl.int64) * INNER,
            codes + ((item + 1) % PIECES * 16).to(gl.int64) * INNER, item + 1 < items, experts, code, tile_row,
            has_tile, 0, INNER, True, HOST, PEER,
        )  # fmt: skip
        begin += INNER // WIDE_STEP // 2
        token = first + gl.arange(0, TOKENS, layout=gl.SliceLayout(0, value.type.layout))
        row = piece * 16 + gl.arange(0, 16, layout=gl.SliceLayout(1, value.type.layout))
        target = out + (token.to(gl.int64) * (CHOICES + 1) + CHOICES)[None, :] * D + row[:, None]
        gl.store(target, value.to(gl.bfloat16), mask=(token < num_tokens)[None, :])
        item += 1
    return begin


@gluon.jit(do_not_specialize=["num_tokens", "counted"])
def down_kernel(
    hidden, shared_hidden, shared_codes, shared_scales, out, num_active, active_experts, active_begin, pair_order,
    table, slab_codes, slab_scales, host_codes, host_scales, peer_codes, peer_scales, counter, counted, num_tokens,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, E: gl.constexpr, HOST: gl.constexpr,
    PEER: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Any number of programs. A tile is 64 rows of w2."""
    BLOCKS: gl.constexpr = D // ROWS
    PIECES: gl.constexpr = D // 16
    slots = slots_of_steps()
    inputs, input_scales = input_buffers(INNER)
    # Weights and groups are older than the predecessor, `gate_up_kernel`, which lets this kernel start only after its
    # own wait. A piece is half a tile's work.
    shared = (num_tokens + TOKENS - 1) // TOKENS * PIECES
    count = count_of(counter)
    active = gl.load(num_active)
    item, items, unit, units = _shares(shared, CHOICES * BLOCKS)
    expert, first, end = _member_of(unit, units, active_experts, active_begin, BLOCKS, E)
    source = gl.load(pair_order + unit // BLOCKS, mask=unit < units, other=0)
    if active != CHOICES:
        item, items, unit, units = _shares(shared, active * BLOCKS)
        expert, first, end = _member_of(unit, units, active_experts, active_begin, BLOCKS, E)
    code = gl.load(table + expert)
    # All programs of the predecessor have arrived, of which some may not show yet.
    tag = tag_of(count - 1, counted)
    row_scales = slots[2].index(((items - item) * (INNER // WIDE_STEP // 2) + 1) % 2)
    experts = (slab_codes, slab_scales, host_codes, host_scales, peer_codes, peer_scales)
    tile_row = unit % BLOCKS * ROWS
    if item < items:
        row = shared_scales + item % PIECES // 8 * (INNER // 128)
        issue_row_scales(row_scales, row, row, INNER)
        issue_first_rows(slots, 0, shared_codes + (item % PIECES * 16).to(gl.int64) * INNER, 0, INNER)
    elif unit < units:
        # One turn: memory is the predecessor's until it has ended.
        issue(slots, 0, experts, code, tile_row, 0, False, HOST, PEER)
    only_tiles = (item >= items) & (unit < units)
    turns = 0
    begin = 0
    if item < items:
        # Nobody reads `out` any more.
        if num_tokens > 1:
            await_all(counter, counted)
        begin = _shared_down(
            slots, inputs, input_scales, row_scales, shared_hidden, pair_order, item, items, shared_codes,
            shared_scales, out, num_tokens, counter, tag, experts, code, tile_row, unit < units, D, INNER, CHOICES,
            HOST, PEER,
        )  # fmt: skip
    filled = -1
    if (num_tokens == 1) & (active == CHOICES):
        # Each pair has an expert to itself.
        if unit < units:
            fill_awaited(inputs, input_scales, counter, source, tag, INNER)
            fence_async_shared()
            filled = first
        if PDL:
            # All programs are here. Before its wait the successor reads streams and gates: older than the predecessor.
            gdc_launch_dependents()
    elif PDL:
        gdc_wait()
    if only_tiles:
        issue(slots, 1, experts, code, tile_row, 1, False, HOST, PEER)
    while unit < units:
        more = first + TOKENS < end
        next_unit = gl.where(more, unit, unit + 1)
        next_code, next_first, next_end = _tile_of(next_unit, units, active_experts, active_begin, table, BLOCKS, E)
        next_first = gl.where(more, first + TOKENS, next_first)
        next_row = next_unit % BLOCKS * ROWS
        if first != filled:
            if PDL:
                gdc_wait()
            fill_inputs(inputs, input_scales, hidden, pair_order, first, gl.minimum(end - first, TOKENS), 1, INNER)
            fence_async_shared()
            filled = first
        at = first + gl.arange(0, TOKENS, layout=SUM_TOKENS)
        pair = gl.load(pair_order + gl.minimum(at, end - 1))
        total = tile_product(
            slots, begin % 2, turns, inputs, input_scales, experts, code, tile_row, next_code, next_row,
            next_unit < units, False, HOST, PEER, INNER,
        )  # fmt: skip
        turns += INNER // STEP // 2
        row = unit % BLOCKS * ROWS + gl.arange(0, ROWS, layout=SUM_ROWS)
        target = out + (pair + pair // CHOICES).to(gl.int64)[None, :] * D + row[:, None]
        gl.store(target, total.to(gl.bfloat16), mask=(at < end)[None, :])
        unit, first, end, code, tile_row = next_unit, next_first, next_end, next_code, next_row
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


# -- launchers ----------------------------------------------------------------------------------------------------


def serves(device: torch.device, wide: int, inner: int) -> bool:
    """Whether experts of `inner` columns on `wide` inputs are multiplied here: sm_90 and sizes of whole turns."""
    sizes = wide % UNIT == 0 and inner % UNIT == 0 and min(wide, inner) >= 2 * UNIT
    return sizes and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def num_programs(columns: int, device: torch.device, most: int = MOST_PROGRAMS) -> int:
    """Programs that the GPU holds at a time, of a product over `columns`; at most `most` a multiprocessor."""
    slots = 4 * ROWS.value * (128 + 8)
    own = slots + TOKENS.value * (columns + 4 * columns // 128) + 3072
    return num_sms(device) * min(most, SHARED_BYTES // own)


def gate_up(
    x: Tensor, coded: Tensor, shared_w13: Any, weights: Tensor, groups: Any, slab: ExpertSlab, hidden: Tensor,
    limit: float, shared_hidden: Tensor, counters: Tensor, pdl: bool | None,
) -> None:  # fmt: skip
    """`experts_decode.expert_gate_up` of `x [T, D]` bf16, natural columns, not rounded. `coded`: of one token, its
    coded row; else anything on the device.

    `counters`: int32 zeros, `experts_hidden.room`, for this and the `down` that follows; for launches of these sizes
    only.
    """
    tokens, choices, inner = hidden.shape
    gate_up_kernel[(num_programs(x.shape[1], x.device),)](
        x, coded.view(torch.uint8), weights, hidden, groups.num_active, groups.active_experts, groups.active_begin,
        groups.pair_order, slab.table, *boxes(slab, x.shape[1], inner, gates=True),
        shared_w13.codes.view(torch.uint8), shared_w13.scales, shared_hidden, counters, tokens, float(limit),
        E=slab.table.numel(), **_constants(x.shape[1], inner, choices, slab), **OPTIONS, **pdl_options(x, pdl),
    )  # fmt: skip


def down(
    hidden: Tensor, shared_hidden: Tensor, shared_w2: Any, groups: Any, slab: ExpertSlab, out: Tensor,
    counters: Tensor, pdl: bool | None,
) -> None:  # fmt: skip
    """`experts_decode.expert_down` of what `gate_up` leaves."""
    tokens, choices, inner = hidden.shape
    most = MOST_PROGRAMS if tokens < LEAVES_ROOM else MOST_PROGRAMS - 1
    down_kernel[(num_programs(inner, hidden.device, most),)](
        hidden, shared_hidden, shared_w2.codes.view(torch.uint8), shared_w2.scales, out, groups.num_active,
        groups.active_experts, groups.active_begin, groups.pair_order, slab.table,
        *boxes(slab, out.shape[2], inner, gates=False), counters, num_programs(out.shape[2], out.device), tokens,
        E=slab.table.numel(), **_constants(out.shape[2], inner, choices, slab), **OPTIONS, **pdl_options(hidden, pdl),
    )  # fmt: skip


def _constants(wide: int, inner: int, choices: int, slab: ExpertSlab) -> dict[str, Any]:
    return {
        "D": wide, "INNER": inner, "CHOICES": choices, "HOST": slab.host is not None, "PEER": slab.peer is not None,
    }  # fmt: skip


def compile_list() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations of V4-Flash for sm_90: name, function, signature, constants, options."""
    wide, inner = 4096, 2048
    pointers = dict.fromkeys(("num_active", "active_experts", "active_begin", "pair_order", "table"), "*i32")
    pointers |= {"coded": "*u8", "shared_codes": "*u8", "counter": "*i32"}
    pointers |= dict.fromkeys(("x", "hidden", "shared_hidden", "out"), "*bf16")
    types = pointers | {"routing": "*fp32", "shared_scales": "*fp32", "limit": "fp32"}
    types |= {"num_tokens": "i32", "counted": "i32"}
    cases = []
    for kernel in (gate_up_kernel, down_kernel):
        for tiers in (False, True):
            constants = {
                "D": wide, "INNER": inner, "CHOICES": 6, "HOST": tiers, "PEER": tiers, "PDL": True,
            }  # fmt: skip
            name = f"sm90_{kernel.fn.__name__}_{'tiers' if tiers else 'resident'}"
            constants |= {"E": 256}
            types |= box_types(gates=kernel is gate_up_kernel)
            signature = {argument: types[argument] for argument in kernel.arg_names if argument in types}
            cases.append((name, kernel, signature, constants, OPTIONS | {"launch_pdl": True}))
    return cases
