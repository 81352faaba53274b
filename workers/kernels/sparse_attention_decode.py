"""Device code of sparse attention over fp8 pages: chunks of 64 keys, and how their results are put together.

Owns: the arithmetic. Keys of a token are a list: the 128 window rows, then the compressed entries, cut into chunks of
KEYS at fixed places of that list. A chunk's result (running maximum, sum, weighted values) never depends on anything
but the chunk; groups of GROUP chunks are merged first to last, then the groups first to last, always by the same
formula (`_merged`). So a program may compute one chunk or a whole group: the bits of the output are the same, and the
split can follow the batch size. The last step (`_divisor`, inverse rope) is shared too.

Products are bf16 with fp32 accumulation, transposed (keys or value dimensions as the large MMA axis, heads as the small
one), so that few heads do not waste the tensor cores. Probabilities are rounded to bf16 for the values, their sum is
not (official kernel). The sink enters the denominator only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.kv_rows import as_bf16, load_nope, load_rope, rotate, unit_and_offset

GROUP = 16
"""Chunks merged into one group. A change moves the last bits of contexts with more than GROUP chunks."""

_GROUP = tl.constexpr(GROUP)
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    """`a @ b + total` of bf16 operands. WIDEN: for the interpreter, whose `tl.dot` takes bf16 for integers."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total) if WIDEN else tl.dot(a, b, total)


@triton.jit
def _merged(old, old_weight, new, new_weight):
    # An explicit fma, so that every caller rounds alike.
    return tl.fma(old, old_weight, new * new_weight)


@triton.jit
def _finite(maximum):
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def _divisor(maximum, total, sink):
    """Factor of the weighted values: 1 / (sum + sink), brought to a common maximum. All in powers of two."""
    sink = sink * _LOG2E
    top = _finite(tl.maximum(maximum, sink))
    kept = tl.exp2(maximum - top)
    denominator = tl.fma(total, kept, tl.exp2(sink - top))
    return tl.where(denominator > 0, kept / denominator, 0.0)


@triton.jit
def _query_part(q, live, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    return tl.load(q[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _square(x):
    wide = x.to(tl.float32)
    return wide * wide


@triton.jit
def _queries(q, live, cos, sin, eps, NOPE: tl.constexpr, WIDEN: tl.constexpr):
    """Query parts, bf16 [BH, 128 | 128 | 128 | 64 | 64] (of 64 nope dims only the last two count), the last one
    rotated, and the factors fp32 [BH] of their norm: those are applied to scores, so that raw parts go to the tensor
    cores as they are in memory. q: pointers [BH] to raw rows."""
    part3 = _query_part(q, live, NOPE - 64, 64)
    rope = _query_part(q, live, NOPE, 64)
    total = tl.sum(_square(part3) + _square(rope), 1)
    part0, part1, part2 = part3, part3, part3
    if NOPE == 448:
        part0 = _query_part(q, live, 0, 128)
        part1 = _query_part(q, live, 128, 128)
        part2 = _query_part(q, live, 256, 128)
        total += tl.sum(_square(part0) + _square(part1) + _square(part2), 1)
    rope = as_bf16(rotate(rope.to(tl.float32), cos, sin), WIDEN)
    return part0, part1, part2, part3, rope, tl.rsqrt(total / (NOPE + 64) + eps)


@triton.jit
def visible_entries(position, num_selected, RATIO: tl.constexpr):
    """Compressed entries in the list of the token at `position`; of C4, `selected` holds them first to last."""
    count = 0
    if RATIO == 4:
        count = tl.minimum((position + 1) // 4, num_selected)
    elif RATIO == 128:
        count = (position + 1) // 128
    return count


@triton.jit
def _chunk_rows(chunk, position, num_entries, selected, WINDOW: tl.constexpr, RATIO: tl.constexpr, KEYS: tl.constexpr):
    """Row numbers [KEYS] of a chunk in its pool, and which of them exist."""
    lane = tl.arange(0, KEYS)
    window_chunks: tl.constexpr = (WINDOW + KEYS - 1) // KEYS
    row = position - (WINDOW - 1) + chunk * KEYS + lane
    live = (row >= 0) & (row <= position)
    if RATIO > 0:
        entry = (chunk - window_chunks) * KEYS + lane
        is_entry = chunk >= window_chunks
        live_entry = is_entry & (entry < num_entries)
        if RATIO == 4:
            entry = tl.load(selected + entry, mask=live_entry, other=-1)
            live_entry = entry >= 0
        row = tl.where(is_entry, entry, row)
        live = tl.where(is_entry, live_entry, live)
    return row, live


@triton.jit
def _chunk_pointers(
    chunk,
    position,
    num_entries,
    selected,
    sources,  # (window codes, window words, entry codes, entry words)
    tables,  # (window pages, full pages) of the token's sequence
    NOPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    STRIDES: tl.constexpr,  # bytes of a window page and of an entry page
    KEYS: tl.constexpr,
):
    """Pointers [KEYS] to the codes, scales and rope words of a chunk's rows, and which rows exist."""
    ROW: tl.constexpr = NOPE + 128
    SHIFT: tl.constexpr = 6 if RATIO == 4 else 1  # an entry page has 64 or 2 rows
    row, live = _chunk_rows(chunk, position, num_entries, selected, WINDOW, RATIO, KEYS)
    codes, words, pages, shift, stride = sources[0], sources[1], tables[0], 8, STRIDES[0]
    if RATIO > 0:
        is_entry = chunk >= (WINDOW + KEYS - 1) // KEYS
        codes = tl.where(is_entry, sources[2], codes)
        words = tl.where(is_entry, sources[3], words)
        pages = tl.where(is_entry, tables[1], pages)
        shift = tl.where(is_entry, SHIFT, 8)
        stride = tl.where(is_entry, STRIDES[1], STRIDES[0])
    unit, offset, live = unit_and_offset(pages, row, live, shift)
    codes += unit.to(tl.int64) * stride
    words += unit.to(tl.int64) * (stride // 2) + (offset * (ROW // 2) + NOPE // 2)
    return codes + offset * ROW, codes + ((ROW << shift) + offset * 8), words, live


@triton.jit
def _keys(codes, scales, words, live, NOPE: tl.constexpr, HW: tl.constexpr):
    """Rows as bf16 parts [KEYS, 128 | 128 | 128 | 64 | 64] (of 64 nope dims only the last two count)."""
    part3 = load_nope(codes, scales, live, NOPE - 64, 1, HW)
    part0, part1, part2 = part3, part3, part3
    if NOPE == 448:
        part0 = load_nope(codes, scales, live, 0, 2, HW)
        part1 = load_nope(codes, scales, live, 128, 2, HW)
        part2 = load_nope(codes, scales, live, 256, 2, HW)
    return part0, part1, part2, part3, load_rope(words, live)


@triton.jit
def _scores(q, k, live, scale, NOPE: tl.constexpr, WIDEN: tl.constexpr):
    """fp32 [BH, KEYS] in powers of two; -inf for keys that do not exist. q, k: the five parts."""
    if NOPE == 448:
        s = _dot(q[0], tl.trans(k[0]), None, WIDEN)
        s = _dot(q[1], tl.trans(k[1]), s, WIDEN)
        s = _dot(q[2], tl.trans(k[2]), s, WIDEN)
        s = _dot(q[3], tl.trans(k[3]), s, WIDEN)
    else:
        s = _dot(q[3], tl.trans(k[3]), None, WIDEN)
    s = _dot(q[4], tl.trans(k[4]), s, WIDEN) * scale
    return tl.where(live[None, :], s, -float("inf"))


@triton.jit
def _added(o, kept, p, values, added, LOOP: tl.constexpr, WIDEN: tl.constexpr):
    """Weighted values so far and those of one more chunk."""
    if LOOP == 2:
        return _dot(p, values, o * kept, WIDEN)
    return _merged(o, kept, _dot(p, values, None, WIDEN), added)


@triton.jit
def _store(to, o, factor, live, FIRST: tl.constexpr, DIRECT: tl.constexpr, WIDEN: tl.constexpr):
    column = FIRST + tl.arange(0, o.shape[1])
    value = as_bf16(o * factor, WIDEN) if DIRECT else o
    tl.store(to[:, None] + column[None, :], value, mask=live[:, None])


@triton.jit
def _attend(
    q,
    position,
    num_entries,
    first,
    last,
    selected,
    sources,
    tables,
    sink,
    angle,
    out,
    statistics,
    eps,
    live_head,
    NOPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    STRIDES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,  # value columns: 0: below 256, 1: the others, 2: all (64 nope dims)
    LOOP: tl.constexpr,
    DIRECT: tl.constexpr,
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Chunks [first, last) of one token for BH heads; q, out, statistics: pointers [BH] to each head's place."""
    BH: tl.constexpr = live_head.shape[0]
    cos = tl.load(angle + tl.arange(0, 32)[None, :])
    sin = tl.load(angle + 32 + tl.arange(0, 32)[None, :])
    if LOOP == 0:
        rows = _chunk_pointers(
            first, position, num_entries, selected, sources, tables, NOPE, WINDOW, RATIO, STRIDES, KEYS
        )
        q0, q1, q2, q3, q4, norm = _queries(q, live_head, cos, sin, eps, NOPE, WIDEN)
        scale = (norm * ((NOPE + 64) ** -0.5 * _LOG2E))[:, None]
        k0, k1, k2, k3, k4 = _keys(rows[0], rows[1], rows[2], rows[3], NOPE, HW)
        s = _scores((q0, q1, q2, q3, q4), (k0, k1, k2, k3, k4), rows[3], scale, NOPE, WIDEN)
        maximum = tl.max(s, 1)
        p = tl.exp2(s - _finite(maximum)[:, None])
        total = tl.sum(p, 1)
        p = as_bf16(p, WIDEN)
        if HALF == 0:
            o0 = _dot(p, k0, None, WIDEN)
            o1 = _dot(p, k1, None, WIDEN)
        else:
            if HALF == 1:
                o2 = _dot(p, k2, None, WIDEN)
            o3 = _dot(p, k3, None, WIDEN)
            o4 = _dot(p, k4, None, WIDEN)
    else:
        q0, q1, q2, q3, q4, norm = _queries(q, live_head, cos, sin, eps, NOPE, WIDEN)
        scale = (norm * ((NOPE + 64) ** -0.5 * _LOG2E))[:, None]
        maximum = tl.full((BH,), -float("inf"), tl.float32)
        total = tl.zeros((BH,), tl.float32)
        if HALF == 0:
            o0 = tl.zeros((BH, 128), tl.float32)
            o1 = tl.zeros((BH, 128), tl.float32)
        else:
            o2 = tl.zeros((BH, 128), tl.float32)
            o3 = tl.zeros((BH, 64), tl.float32)
            o4 = tl.zeros((BH, 64), tl.float32)
        # NOTE: hoisted, the addresses of all tiles in shared memory would not fit the registers.
        for chunk in tl.range(first, last, disable_licm=True):
            rows = _chunk_pointers(
                chunk, position, num_entries, selected, sources, tables, NOPE, WINDOW, RATIO, STRIDES, KEYS
            )
            k0, k1, k2, k3, k4 = _keys(rows[0], rows[1], rows[2], rows[3], NOPE, HW)
            s = _scores((q0, q1, q2, q3, q4), (k0, k1, k2, k3, k4), rows[3], scale, NOPE, WIDEN)
            top = tl.max(s, 1)
            new_maximum = tl.maximum(maximum, top)
            kept = tl.exp2(maximum - _finite(new_maximum))
            if LOOP == 2:
                top = new_maximum
            added = tl.exp2(top - _finite(new_maximum))
            p = tl.exp2(s - _finite(top)[:, None])
            total = _merged(total, kept, tl.sum(p, 1), added)
            maximum = new_maximum
            p = as_bf16(p, WIDEN)
            kept = kept[:, None]
            added = added[:, None]
            if HALF == 0:
                o0 = _added(o0, kept, p, k0, added, LOOP, WIDEN)
                o1 = _added(o1, kept, p, k1, added, LOOP, WIDEN)
            else:
                if HALF == 1:
                    o2 = _added(o2, kept, p, k2, added, LOOP, WIDEN)
                o3 = _added(o3, kept, p, k3, added, LOOP, WIDEN)
                o4 = _added(o4, kept, p, k4, added, LOOP, WIDEN)

    factor = 1.0
    if DIRECT:
        factor = _divisor(maximum, total, tl.load(sink, mask=live_head, other=0.0))[:, None]
    elif HALF > 0:
        tl.store(statistics, maximum, mask=live_head)
        tl.store(statistics + 1, total, mask=live_head)
    if HALF == 0:
        _store(out, o0, factor, live_head, 0, DIRECT, WIDEN)
        _store(out, o1, factor, live_head, 128, DIRECT, WIDEN)
    else:
        if HALF == 1:
            _store(out, o2, factor, live_head, 256, DIRECT, WIDEN)
        _store(out, o3, factor, live_head, NOPE - 64, DIRECT, WIDEN)
        if DIRECT:
            o4 = rotate(o4 * factor, cos, -sin)
        _store(out, o4, 1.0, live_head, NOPE, DIRECT, WIDEN)


@triton.jit(do_not_specialize=["num_pages", "num_parts", "span"])
def attend(
    q,  # bf16 [T, Q_STRIDE]: the first HEADS * (NOPE + 64) columns are raw queries
    positions,  # int32 [T], -1 = padding
    sequence_of_token,  # int32 [T]
    window_pages,  # int32 [B, num_pages]
    full_pages,  # int32 [B, num_pages]
    num_pages,
    window_codes,  # uint8, and the same memory as bf16: one layer of the window pool
    window_words,
    entry_codes,  # the same of the C4 or C128 pool
    entry_words,
    selected,  # int32 [T, SELECTED]
    sink,  # fp32 [HEADS]
    rope_table,  # fp32 [P, 64]: cos | sin
    out,  # bf16 [T, HEADS * (NOPE + 64)]
    work,  # fp32: values [T, HEADS, num_parts, NOPE + 64], then (maximum, sum) [T, HEADS, num_parts, 2]
    num_parts,
    span,  # chunks of a program
    eps,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,  # 0: window only
    SELECTED: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,  # bytes of a window page and of an entry page
    ENTRY_STRIDE: tl.constexpr,
    BH: tl.constexpr,
    KEYS: tl.constexpr,
    LOOP: tl.constexpr,  # 0: one chunk a program, 1: merged like parts, 2: one running maximum (faster, other bits)
    DIRECT: tl.constexpr,  # write `out`; else a part of `work`
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (ceil(HEADS / BH) * halves of the value columns, T, parts); one half where NOPE is 64, else two."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HD: tl.constexpr = NOPE + 64
    HALVES: tl.constexpr = 1 if NOPE == 64 else 2
    STRIDES: tl.constexpr = (WINDOW_STRIDE, ENTRY_STRIDE)
    token = tl.program_id(1)
    part = tl.program_id(2)
    position = tl.load(positions + token)
    sequence = tl.load(sequence_of_token + token)
    head = tl.program_id(0) // HALVES * BH + tl.arange(0, BH)
    live_head = head < HEADS
    num_entries = visible_entries(position, SELECTED, RATIO)
    num_chunks = (WINDOW + KEYS - 1) // KEYS + (num_entries + KEYS - 1) // KEYS
    first = part * span
    if not DIRECT:  # noqa: SIM102 - decided by the compiler
        if (first >= num_chunks) | (position < 0):
            return
    last = tl.where(position < 0, first, tl.minimum(first + span, num_chunks))
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64
    tables_at = sequence.to(tl.int64) * num_pages
    tables = (window_pages + tables_at, full_pages + tables_at)
    sources = (window_codes, window_words, entry_codes, entry_words)
    row_of_head = token.to(tl.int64) * HEADS + head
    q += token.to(tl.int64) * Q_STRIDE + head * HD
    selected += token * SELECTED
    if DIRECT:
        to = out + row_of_head * HD
        statistics = work + row_of_head
    else:
        at = row_of_head * num_parts + part
        to = work + at * HD
        statistics = work + (tl.num_programs(1).to(tl.int64) * HEADS * num_parts) * HD + at * 2
    if HALVES == 1:
        _attend(q, position, num_entries, first, last, selected, sources, tables, sink + head, angle, to, statistics,
                eps, live_head, NOPE, WINDOW, RATIO, STRIDES, KEYS, 2, LOOP, DIRECT, HW, WIDEN)  # fmt: skip
    elif tl.program_id(0) % 2 == 0:
        _attend(q, position, num_entries, first, last, selected, sources, tables, sink + head, angle, to, statistics,
                eps, live_head, NOPE, WINDOW, RATIO, STRIDES, KEYS, 0, LOOP, DIRECT, HW, WIDEN)  # fmt: skip
    else:
        _attend(q, position, num_entries, first, last, selected, sources, tables, sink + head, angle, to, statistics,
                eps, live_head, NOPE, WINDOW, RATIO, STRIDES, KEYS, 1, LOOP, DIRECT, HW, WIDEN)  # fmt: skip


@triton.jit(do_not_specialize=["num_parts"])
def combine(
    work,
    num_parts,
    positions,
    sink,
    rope_table,
    out,
    HEADS: tl.constexpr,
    NOPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    SELECTED: tl.constexpr,
    KEYS: tl.constexpr,
    PER_GROUP: tl.constexpr,  # parts of a group: GROUP when a part is one chunk, 1 when it is a group
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Merge the parts of one head of one token, divide, undo the rotation. Grid (HEADS, T)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HD: tl.constexpr = NOPE + 64
    CHUNKS_OF_PART: tl.constexpr = 1 if PER_GROUP > 1 else _GROUP
    token = tl.program_id(1)
    head = tl.program_id(0)
    position = tl.load(positions + token)
    num_chunks = (WINDOW + KEYS - 1) // KEYS + (visible_entries(position, SELECTED, RATIO) + KEYS - 1) // KEYS
    live_parts = tl.where(position < 0, 0, (num_chunks + CHUNKS_OF_PART - 1) // CHUNKS_OF_PART)
    at = (token.to(tl.int64) * HEADS + head) * num_parts
    statistics = work + (tl.num_programs(1).to(tl.int64) * HEADS * num_parts) * HD + at * 2
    pair = tl.arange(0, HD // 2)
    dim = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    maximum = -float("inf")
    total = 0.0
    values = tl.zeros((HD // 2, 2), tl.float32)
    for begin in range(0, live_parts, PER_GROUP):
        group_maximum = -float("inf")
        group_total = 0.0
        group_values = tl.zeros((HD // 2, 2), tl.float32)
        for i in tl.static_range(PER_GROUP):
            live = begin + i < live_parts
            part_at = statistics + (begin + i) * 2
            top = tl.load(part_at, mask=live, other=-float("inf"))
            part_total = tl.load(part_at + 1, mask=live, other=0.0)
            part = tl.load(work + (at + begin + i) * HD + dim, mask=live, other=0.0)
            new_maximum = tl.maximum(group_maximum, top)
            kept = tl.exp2(group_maximum - _finite(new_maximum))
            added = tl.exp2(top - _finite(new_maximum))
            group_total = _merged(group_total, kept, part_total, added)
            group_values = _merged(group_values, kept, part, added)
            group_maximum = new_maximum
        new_maximum = tl.maximum(maximum, group_maximum)
        kept = tl.exp2(maximum - _finite(new_maximum))
        added = tl.exp2(group_maximum - _finite(new_maximum))
        total = _merged(total, kept, group_total, added)
        values = _merged(values, kept, group_values, added)
        maximum = new_maximum
    values = values * _divisor(maximum, total, tl.load(sink + head))
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64 + (pair - NOPE // 2)
    rotary = pair >= NOPE // 2
    cos = tl.load(angle, mask=rotary, other=1.0)
    sin = tl.load(angle + 32, mask=rotary, other=0.0)
    even, odd = tl.split(values)
    values = tl.join(tl.fma(even, cos, odd * sin), tl.fma(odd, cos, -(even * sin)))
    tl.store(out + (token.to(tl.int64) * HEADS + head) * HD + dim, as_bf16(values, WIDEN))
