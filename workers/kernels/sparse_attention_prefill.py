"""Device code of prefill attention over fp8 pages: one program walks all keys of a token, for 64 heads at a time.

Owns: the arithmetic of prefill. Products are bf16 with fp32 accumulation, probabilities are rounded to bf16 for the
values and their sum is not (official kernel). At head size 512 two programs share a token, each with half of the value
columns, because the accumulators of all would not fit the registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.attention_parts import LOG2E, chunk_rows, divisor, dot_bf16, finite, visible_entries
from workers.kernels.kv_rows import as_bf16, load_nope, load_rope, rotate, unit_and_offset


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
    row, live = chunk_rows(chunk, position, num_entries, selected, WINDOW, RATIO, KEYS)
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
        s = dot_bf16(q[0], tl.trans(k[0]), None, WIDEN)
        s = dot_bf16(q[1], tl.trans(k[1]), s, WIDEN)
        s = dot_bf16(q[2], tl.trans(k[2]), s, WIDEN)
        s = dot_bf16(q[3], tl.trans(k[3]), s, WIDEN)
    else:
        s = dot_bf16(q[3], tl.trans(k[3]), None, WIDEN)
    s = dot_bf16(q[4], tl.trans(k[4]), s, WIDEN) * scale
    return tl.where(live[None, :], s, -float("inf"))


@triton.jit
def _store(to, o, live, FIRST: tl.constexpr, WIDEN: tl.constexpr):
    column = FIRST + tl.arange(0, o.shape[1])
    tl.store(to[:, None] + column[None, :], as_bf16(o, WIDEN), mask=live[:, None])


@triton.jit
def _attend(
    q,
    position,
    num_entries,
    num_chunks,
    selected,
    sources,
    tables,
    sink,
    angle,
    out,
    eps,
    live_head,
    NOPE: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    STRIDES: tl.constexpr,
    KEYS: tl.constexpr,
    HALF: tl.constexpr,  # value columns: 0: below 256, 1: the others, 2: all (64 nope dims)
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One token for BH heads; q, out: pointers [BH] to each head's place."""
    BH: tl.constexpr = live_head.shape[0]
    cos = tl.load(angle + tl.arange(0, 32)[None, :])
    sin = tl.load(angle + 32 + tl.arange(0, 32)[None, :])
    q0, q1, q2, q3, q4, norm = _queries(q, live_head, cos, sin, eps, NOPE, WIDEN)
    scale = (norm * ((NOPE + 64) ** -0.5 * LOG2E))[:, None]
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
    for chunk in tl.range(0, num_chunks, disable_licm=True):
        codes, scales, words, live = _chunk_pointers(
            chunk, position, num_entries, selected, sources, tables, NOPE, WINDOW, RATIO, STRIDES, KEYS
        )
        k0, k1, k2, k3, k4 = _keys(codes, scales, words, live, NOPE, HW)
        if NOPE == 448:
            s = dot_bf16(q0, tl.trans(k0), None, WIDEN)
            s = dot_bf16(q1, tl.trans(k1), s, WIDEN)
            s = dot_bf16(q2, tl.trans(k2), s, WIDEN)
            s = dot_bf16(q3, tl.trans(k3), s, WIDEN)
        else:
            s = dot_bf16(q3, tl.trans(k3), None, WIDEN)
        s = dot_bf16(q4, tl.trans(k4), s, WIDEN) * scale
        s = tl.where(live[None, :], s, -float("inf"))  # [BH, KEYS]
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        kept = tl.exp2(maximum - finite(new_maximum))
        maximum = new_maximum
        p = tl.exp2(s - finite(maximum)[:, None])
        total = total * kept + tl.sum(p, 1)
        p = as_bf16(p, WIDEN)
        kept = kept[:, None]
        if HALF == 0:
            o0 = dot_bf16(p, k0, o0 * kept, WIDEN)
            o1 = dot_bf16(p, k1, o1 * kept, WIDEN)
        else:
            if HALF == 1:
                o2 = dot_bf16(p, k2, o2 * kept, WIDEN)
            o3 = dot_bf16(p, k3, o3 * kept, WIDEN)
            o4 = dot_bf16(p, k4, o4 * kept, WIDEN)

    factor = divisor(maximum, total, tl.load(sink, mask=live_head, other=0.0))[:, None]
    if HALF == 0:
        _store(out, o0 * factor, live_head, 0, WIDEN)
        _store(out, o1 * factor, live_head, 128, WIDEN)
    else:
        if HALF == 1:
            _store(out, o2 * factor, live_head, 256, WIDEN)
        _store(out, o3 * factor, live_head, NOPE - 64, WIDEN)
        _store(out, rotate(o4 * factor, cos, -sin), live_head, NOPE, WIDEN)


@triton.jit(do_not_specialize=["num_pages"])
def attend_prefill(
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
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (ceil(HEADS / BH) * halves of the value columns, T); one half where NOPE is 64, else two."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HD: tl.constexpr = NOPE + 64
    HALVES: tl.constexpr = 1 if NOPE == 64 else 2
    STRIDES: tl.constexpr = (WINDOW_STRIDE, ENTRY_STRIDE)
    token = tl.program_id(1)
    position = tl.load(positions + token)
    head = tl.program_id(0) // HALVES * BH + tl.arange(0, BH)
    live_head = head < HEADS
    num_entries = visible_entries(position, SELECTED, RATIO)
    num_chunks = (WINDOW + KEYS - 1) // KEYS + (num_entries + KEYS - 1) // KEYS
    num_chunks = tl.where(position < 0, 0, num_chunks)
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64
    tables_at = tl.load(sequence_of_token + token).to(tl.int64) * num_pages
    tables = (window_pages + tables_at, full_pages + tables_at)
    sources = (window_codes, window_words, entry_codes, entry_words)
    q += token.to(tl.int64) * Q_STRIDE + head * HD
    out += (token.to(tl.int64) * HEADS + head) * HD
    selected += token * SELECTED
    sink += head
    if HALVES == 1:
        _attend(q, position, num_entries, num_chunks, selected, sources, tables, sink, angle, out, eps, live_head,
                NOPE, WINDOW, RATIO, STRIDES, KEYS, 2, HW, WIDEN)  # fmt: skip
    elif tl.program_id(0) % 2 == 0:
        _attend(q, position, num_entries, num_chunks, selected, sources, tables, sink, angle, out, eps, live_head,
                NOPE, WINDOW, RATIO, STRIDES, KEYS, 0, HW, WIDEN)  # fmt: skip
    else:
        _attend(q, position, num_entries, num_chunks, selected, sources, tables, sink, angle, out, eps, live_head,
                NOPE, WINDOW, RATIO, STRIDES, KEYS, 1, HW, WIDEN)  # fmt: skip
