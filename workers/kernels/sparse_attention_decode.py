"""Device code of decode attention over fp8 pages: chunks of keys, and how their results are put together.

Owns: the arithmetic of decode. Every chunk has a maximum of its own, rounded up to a whole power of two: bringing two
results to a common maximum is then exact, and only additions round. They are done in one order, whoever computes what:
the chunks of a run of RUN chunks first to last, then the runs first to last. So a program may compute one chunk, a run,
or all of a token, and `combine` does the additions that are left: the bits of the output are the same, and the split
can follow the number of tokens.

Sums whose order would follow a block's layout are made so that they have none, or are laid out alike in both forms of
the kernel (`sparse_attention_decode_sm90.py`): of a chunk's weights as whole numbers, of queries' squares explicitly.

A program has few heads. Products are bf16 with fp32 accumulation, probabilities are rounded to bf16 for the values and
their sum is not (official kernel). The rows of a chunk lie in shared memory once, as keys and as values.
# measured: groups of 64 dimensions as a batch of products, one a warp, spent 7,000 of 18,000 cycles in bank conflicts
# (sum of the scores over warps, and values read across; H200, 2026-11-21).

A chunk of the window is older than the launches that make the queries and the selection, and is loaded before waiting
for them: every launch between the one that stores it and this one waits before it signals, or its predecessor does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.attention_parts import (
    LOG2E,
    chunk_rows,
    divisor,
    dot_bf16,
    finite,
    power_of_two,
    visible_entries,
)
from workers.kernels.formats import e4m3_to_f16
from workers.kernels.kv_rows import as_bf16, unit_and_offset

AT_ONCE = tl.constexpr(32)
"""Parts that `combine` loads at once; where a token can have more, it walks their runs."""

RUN_KEYS = 320
"""Keys of a run. A change moves the last bits of every result with more keys than this."""


@triton.jit
def _computed_once(x, WIDEN: tl.constexpr):
    """bf16 `x`. Without this the compiler moves what computes a block behind the exchange between threads, where every
    warp computes all of it, and a block that is wanted as keys and as values twice."""
    if not WIDEN:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def _angles(angle, HD: tl.constexpr):
    """cos and sin fp32 [1, HD / 2] of every pair: 1 and 0 but for the last 32. angle: pointer to cos | sin."""
    pair = tl.arange(0, HD // 2) - (HD // 2 - 32)
    cos = tl.load(angle + pair, mask=pair >= 0, other=1.0)
    return cos[None, :], tl.load(angle + 32 + pair, mask=pair >= 0, other=0.0)[None, :]


@triton.jit
def _queries(q, live, angles, eps, HD: tl.constexpr, WIDEN: tl.constexpr):
    """bf16 [BH, HD] raw queries, rotated; fp32 [BH] factors of their norm, which are applied to the scores.

    q: pointers [BH] to raw rows; angles: cos and sin.
    """
    BH: tl.constexpr = q.shape[0]
    pair = tl.arange(0, HD // 2)[None, :]
    word = tl.load(q.to(tl.pointer_type(tl.uint32))[:, None] + pair, mask=live[:, None], other=0)  # two numbers each
    even = (word << 16).to(tl.float32, bitcast=True)
    odd = (word & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    norm = tl.rsqrt(tl.sum(tl.fma(even, even, odd * odd), 1) / HD + eps)
    cos, sin = angles
    turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin))
    x = _computed_once(as_bf16(tl.reshape(turned, (BH, HD)), WIDEN), WIDEN)
    return x, norm * (HD**-0.5 * LOG2E)


@triton.jit
def _chunk(
    chunk,
    position,
    num_entries,
    selected,
    sources,  # (window codes, words; entry codes, words)
    tables,  # (window pages, full pages) of the token's sequence
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    STRIDES: tl.constexpr,  # bytes of a window page and of an entry page
    KEYS: tl.constexpr,
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Rows of a chunk as bf16 [KEYS, W * 64], exact, dead rows 0; and which rows exist, bool [KEYS]."""
    ROW: tl.constexpr = W * 64 + 64
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
    unit = unit.to(tl.int64)
    group = tl.arange(0, W)
    column = tl.arange(0, 64)[None, None, :]
    scales = (codes + (unit * stride + ((ROW << shift) + offset * 8))).to(tl.pointer_type(tl.int64))
    codes += unit * stride + offset * ROW
    words += unit * (stride // 2) + (offset * (ROW // 2) + (W - 1) * 32)
    is_nope = (group < W - 1)[None, :, None]
    at = codes[:, None, None] + (group[None, :, None] * 64 + column)
    code = tl.load(at, mask=live[:, None, None] & is_nope, other=0)  # [KEYS, W, 64]
    scale = tl.load(scales, mask=live, other=0)  # eight e8m0 bytes
    rope = tl.load(words[:, None, None] + column, mask=live[:, None, None], other=0.0)  # [KEYS, 1, 64]
    exponent = ((scale[:, None] >> (group * 8)[None, :]) & 0xFF).to(tl.uint32)  # byte 0 stands for zeros only
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    value = (e4m3_to_f16(code, HW).to(tl.float32) * scale[:, :, None]).to(tl.bfloat16)
    value = tl.where(is_nope, value, rope)
    return tl.reshape(_computed_once(value, WIDEN), (KEYS, W * 64)), live


@triton.jit
def _weights(q, k, live, scale, WIDEN: tl.constexpr):
    """Of one chunk: bf16 probabilities [BH, KEYS], their maximum as a whole power of two and their sum, fp32 [BH]."""
    s = dot_bf16(q, tl.trans(k), None, WIDEN) * scale[:, None]
    s = tl.where(live[None, :], s, -float("inf"))
    top = tl.ceil(tl.max(s, 1))
    p = tl.exp2(s - finite(top)[:, None])
    counts = tl.sum((p + 1.0).to(tl.int32, bitcast=True) - 0x3F800000, 1)  # of 2 ** -23, rounded
    return as_bf16(p, WIDEN), top, counts.to(tl.float32) * (2.0**-23)


@triton.jit(do_not_specialize=["num_pages", "num_parts"])
def attend_decode(
    q,  # bf16 [T, Q_STRIDE]: the first HEADS * W * 64 columns are raw queries
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
    out,  # bf16 [T, HEADS * W * 64]
    work,  # fp32: values [T, HEADS, num_parts, W * 64], then (maximum, sum) [T, HEADS, num_parts, 2]
    num_parts,
    eps,
    HEADS: tl.constexpr,
    W: tl.constexpr,  # groups of 64 dimensions, and warps
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,  # 0: window only
    SELECTED: tl.constexpr,
    Q_STRIDE: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,  # bytes of a window page and of an entry page
    ENTRY_STRIDE: tl.constexpr,
    BH: tl.constexpr,
    KEYS: tl.constexpr,
    RUN: tl.constexpr,  # chunks of a run
    SPLIT: tl.constexpr,  # a program computes 1: a chunk, 2: a run, 0: all, and writes `out`
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (ceil(HEADS / BH), T, parts). EARLY: the launch after the next streams weights. With many parts (C4) that
    is not worth what the next one's programs take up.
    """
    HD: tl.constexpr = W * 64
    STRIDES: tl.constexpr = (WINDOW_STRIDE, ENTRY_STRIDE)
    token = tl.program_id(1)
    part = tl.program_id(2)
    position = tl.load(positions + token)
    tables_at = tl.load(sequence_of_token + token).to(tl.int64) * num_pages
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    live_head = head < HEADS
    num_entries = visible_entries(position, SELECTED, RATIO)
    num_chunks = (WINDOW + KEYS - 1) // KEYS + (num_entries + KEYS - 1) // KEYS
    first = part * (1 if SPLIT == 1 else RUN)
    if SPLIT > 0:  # noqa: SIM102 - decided by the compiler
        if (first >= num_chunks) | (position < 0):
            if PDL:
                tl.extra.cuda.gdc_wait()
            return
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64
    angles = _angles(angle, HD)  # ahead of all waits. measured (H200, 2026-11-22): 8 layers 1.0004 -> 0.9978 ms
    if PDL and RATIO == 4 and SPLIT == 1:  # noqa: SIM102 - decided by the compiler
        if first * KEYS >= WINDOW:  # the selection is the launch before
            tl.extra.cuda.gdc_wait()
    tables = (window_pages + tables_at, full_pages + tables_at)
    sources = (window_codes, window_words, entry_codes, entry_words)
    selected += token * SELECTED
    q += token.to(tl.int64) * Q_STRIDE + head * HD
    place = (selected, sources, tables)
    if SPLIT == 1:
        k, live = _chunk(first, position, num_entries, *place, W, WINDOW, RATIO, STRIDES, KEYS, HW, WIDEN)
        if PDL:
            tl.extra.cuda.gdc_wait()
            if EARLY and RATIO != 4:
                tl.extra.cuda.gdc_launch_dependents()
        x, scale = _queries(q, live_head, angles, eps, HD, WIDEN)
        p, maximum, total = _weights(x, k, live, scale, WIDEN)
        values = dot_bf16(p, k, None, WIDEN)
    else:  # queries go through shared memory for every chunk: as operands of all warps they would fill the registers
        if PDL:
            tl.extra.cuda.gdc_wait()
        x, scale = _queries(q, live_head, angles, eps, HD, WIDEN)
        maximum = tl.full((BH,), -float("inf"), tl.float32)
        total = tl.zeros((BH,), tl.float32)
        values = tl.zeros((BH, HD), tl.float32)
        end = tl.minimum(first + RUN, num_chunks) if SPLIT == 2 else tl.where(position < 0, 0, num_chunks)
        if SPLIT == 2:
            for chunk in tl.range(first, end):
                k, live = _chunk(chunk, position, num_entries, *place, W, WINDOW, RATIO, STRIDES, KEYS, HW, WIDEN)
                p, top, chunk_total = _weights(_computed_once(x, WIDEN), k, live, scale, WIDEN)
                new_maximum = tl.maximum(maximum, top)
                kept = power_of_two(maximum - finite(new_maximum))
                added = power_of_two(top - finite(new_maximum))
                maximum = new_maximum
                total = total * kept + chunk_total * added
                values = values * kept[:, None] + dot_bf16(p, k, None, WIDEN) * added[:, None]
        else:
            for run in tl.range(first, end, RUN):
                run_total = tl.zeros((BH,), tl.float32)
                run_values = tl.zeros((BH, HD), tl.float32)
                for chunk in tl.range(run, tl.minimum(run + RUN, end)):
                    k, live = _chunk(chunk, position, num_entries, *place, W, WINDOW, RATIO, STRIDES, KEYS, HW, WIDEN)
                    p, top, chunk_total = _weights(_computed_once(x, WIDEN), k, live, scale, WIDEN)
                    new_maximum = tl.maximum(maximum, top)
                    kept = power_of_two(maximum - finite(new_maximum))
                    added = power_of_two(top - finite(new_maximum))
                    maximum = new_maximum
                    run_total = run_total * kept + chunk_total * added
                    run_values = run_values * kept[:, None] + dot_bf16(p, k, None, WIDEN) * added[:, None]
                    total *= kept
                    values *= kept[:, None]
                total += run_total
                values += run_values
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, HD)[None, :]
    if SPLIT == 0:
        values *= divisor(maximum, total, tl.load(sink + head, mask=live_head, other=0.0))[:, None]
        even, odd = tl.split(tl.reshape(values, (BH, HD // 2, 2)))
        cos, sin = _angles(angle, HD)
        turned = tl.join(tl.fma(even, cos, odd * sin), tl.fma(odd, cos, -(even * sin)))
        out += token.to(tl.int64) * (HEADS * HD)
        result = as_bf16(tl.reshape(turned, (BH, HD)), WIDEN)
        tl.store(out + (head[:, None] * HD + column), result, mask=live_head[:, None])
    else:
        first_part = token.to(tl.int64) * HEADS * num_parts + part
        statistics = work + (tl.num_programs(1).to(tl.int64) * HEADS * num_parts) * HD + first_part * 2
        head *= num_parts
        tl.store(work + first_part * HD + (head[:, None] * HD + column), values, mask=live_head[:, None])
        tl.store(statistics + head * 2, maximum, mask=live_head)
        tl.store(statistics + (head * 2 + 1), total, mask=live_head)


@triton.jit
def _run(work, statistics, first, live_parts, shift, PARTS: tl.constexpr, HD: tl.constexpr):
    """Sum and values [HD / 2, 2] of PARTS parts from `first` on, added first to last, at the maximum `shift`."""
    total = 0.0
    values = tl.zeros((HD // 2, 2), tl.float32)
    for i in tl.static_range(PARTS):
        live = first + i < live_parts
        top = tl.load(statistics + (first + i) * 2, mask=live, other=-float("inf"))
        added = power_of_two(top - shift)
        total += tl.load(statistics + (first + i) * 2 + 1, mask=live, other=0.0) * added
        values += tl.load(work + (first + i) * HD, mask=live, other=0.0) * added
    return total, values


@triton.jit(do_not_specialize=["num_parts"])
def combine(
    work,
    num_parts,
    positions,
    sink,
    rope_table,
    out,
    HEADS: tl.constexpr,
    W: tl.constexpr,
    WINDOW: tl.constexpr,
    RATIO: tl.constexpr,
    SELECTED: tl.constexpr,
    KEYS: tl.constexpr,
    RUN: tl.constexpr,
    SPLIT: tl.constexpr,  # parts are 1: chunks, 2: runs
    MOST: tl.constexpr,  # num_parts rounded up to a power of two
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the parts of one head of one token, divide, undo the rotation. Grid (HEADS, T).

    EARLY: the launch behind streams weights, and may start at once.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    HD: tl.constexpr = W * 64
    PARTS_OF_RUN: tl.constexpr = RUN if SPLIT == 1 else 1
    token = tl.program_id(1)
    head = tl.program_id(0)
    position = tl.load(positions + token)
    sink = tl.load(sink + head)
    pair = tl.arange(0, HD // 2)
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64 + (pair - (HD // 2 - 32))
    rotary = pair >= HD // 2 - 32
    cos = tl.load(angle, mask=rotary, other=1.0)
    sin = tl.load(angle + 32, mask=rotary, other=0.0)
    num_chunks = (WINDOW + KEYS - 1) // KEYS + (visible_entries(position, SELECTED, RATIO) + KEYS - 1) // KEYS
    live_parts = tl.where(position < 0, 0, num_chunks if SPLIT == 1 else (num_chunks + RUN - 1) // RUN)
    at = (token.to(tl.int64) * HEADS + head) * num_parts
    statistics = work + (tl.num_programs(1).to(tl.int64) * HEADS * num_parts) * HD + at * 2
    every = tl.arange(0, MOST)
    dim = tl.arange(0, HD // 2)[:, None] * 2 + tl.arange(0, 2)[None, :]
    work += at * HD + dim
    if PDL:
        tl.extra.cuda.gdc_wait()
    shift = tl.load(statistics + every * 2, mask=every < live_parts, other=-float("inf"))
    maximum = tl.max(shift, 0)
    total = 0.0
    values = tl.zeros((HD // 2, 2), tl.float32)
    if MOST <= AT_ONCE:  # all loads at once, not run by run
        for run in tl.static_range(0, MOST, PARTS_OF_RUN):
            added = _run(work, statistics, run, live_parts, finite(maximum), PARTS_OF_RUN, HD)
            total += added[0]
            values += added[1]
    else:
        for run in range(0, live_parts, PARTS_OF_RUN):
            added = _run(work, statistics, run, live_parts, finite(maximum), PARTS_OF_RUN, HD)
            total += added[0]
            values += added[1]
    values *= divisor(maximum, total, sink)
    even, odd = tl.split(values)
    values = tl.join(tl.fma(even, cos, odd * sin), tl.fma(odd, cos, -(even * sin)))
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(out + (token.to(tl.int64) * HEADS + head) * HD + dim, as_bf16(values, WIDEN))
