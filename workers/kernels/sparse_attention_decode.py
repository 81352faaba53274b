"""Device code of decode attention over fp8 pages: chunks of keys, and how their results are put together.

Owns: the arithmetic of decode. Every chunk has a maximum of its own, rounded up to a whole power of two: bringing two
results to a common maximum is then exact, and only additions round. They are done in one order, whoever computes what:
the chunks of a run of RUN chunks first to last, then the runs first to last. So a program may compute one chunk, a run,
or all of a token, and `combine` does the additions that are left: the bits of the output are the same, and the split
can follow the number of tokens.

A program has few heads, and one warp for every 64 dimensions of the rows, as keys and as values: scores are summed over
the warps. Products are f16 with fp32 accumulation: e4m3 codes are exact there, their scales multiply the scores and the
probabilities. Probabilities are rounded for the values (f16; the official kernel has bf16) and their sum is not.

A chunk of the window is older than the launches that make the queries and the selection, and is loaded before waiting
for them: every launch between the one that stores it and this one waits before it signals, or its predecessor does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.attention_parts import LOG2E, chunk_rows, divisor, finite, visible_entries
from workers.kernels.formats import e4m3_to_f16, pow2_reciprocal
from workers.kernels.kv_rows import as_bf16, rotate, unit_and_offset

AT_ONCE = tl.constexpr(32)
"""Parts that `combine` loads at once; where a token can have more, it walks their runs."""

RUN_KEYS = 256
"""Keys of a run. A change moves the last bits of every result with more keys than this."""


@triton.jit
def _power_of_two(exponent):
    """`2 ** exponent` of whole fp32 numbers <= 0, exact; 0 below -126."""
    return ((tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _queries(q, live, angle, eps, W: tl.constexpr):
    """f16 [W, BH, 64] queries by groups of 64 dimensions: normed, the last group rotated, in units of powers of two.

    q: pointers [BH] to raw rows; angle: pointer to the position's cos | sin.
    """
    group = tl.arange(0, W)[:, None, None]
    pair = tl.arange(0, 32)[None, None, :]
    words = q.to(tl.pointer_type(tl.uint32))[None, :, None] + (group * 32 + pair)
    word = tl.load(words, mask=live[None, :, None], other=0)  # [W, BH, 32], two numbers each
    even = (word << 16).to(tl.float32, bitcast=True)
    odd = (word & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    cos = tl.load(angle + pair + 0 * group, mask=group == W - 1, other=1.0)
    sin = tl.load(angle + 32 + pair + 0 * group, mask=group == W - 1, other=0.0)
    norm = tl.rsqrt(tl.sum(tl.sum(even * even + odd * odd, 2), 0) / (W * 64) + eps) * ((W * 64) ** -0.5 * LOG2E)
    turned = tl.join(tl.fma(even, cos, -(odd * sin)), tl.fma(odd, cos, even * sin)) * norm[None, :, None, None]
    return tl.reshape(turned.to(tl.float16), (W, q.shape[0], 64))


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
    """Rows of a chunk: numbers f16 [W, KEYS, 64], dead rows 0, and their scales fp32 [W, KEYS], -1 of dead rows.

    Numbers are e4m3 codes, exact, and the rotary part, of which f16 keeps all bits between 2 ** -14 and 65504.
    """
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
    # One byte a program's thread: the compiler would load fewer again for every layout that the scales are wanted in.
    scales = codes + (unit * stride + ((ROW << shift) + offset * 8))
    byte = tl.load(scales[None, :] + group[:, None], mask=live[None, :], other=255)  # e8m0; the last of a row is 0
    codes += unit * stride + offset * ROW
    words += unit * (stride // 2) + (offset * (ROW // 2) + (W - 1) * 32)
    is_nope = (group < W - 1)[:, None, None]
    code = tl.load(
        codes[None, :, None] + group[:, None, None] * 64 + column, mask=live[None, :, None] & is_nope, other=0
    )
    rope = tl.load(words[None, :, None] + column, mask=live[None, :, None], other=0.0)  # [1, KEYS, 64]
    scale = (byte.to(tl.uint32) << 23).to(tl.float32, bitcast=True)  # byte 0 stands for zeros only
    scale = tl.where(byte == 255, -1.0, tl.where((group == W - 1)[:, None], 1.0, scale))
    value = tl.where(is_nope, e4m3_to_f16(code, HW), rope.to(tl.float32).to(tl.float16))
    if not WIDEN:
        # NOTE: without this the compiler moves the conversion behind the exchange between threads, and then converts
        # twice: for the tile as keys and for the tile as values.
        value = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [value], tl.float16, is_pure=False, pack=2)
    return value, scale


@triton.jit
def _weights(q, k, scale):
    """Of one chunk: probabilities fp32 [BH, KEYS], their maximum as a whole power of two and their sum, fp32 [BH]."""
    dead = tl.where(scale < 0, -float("inf"), 0.0)[:, None, :]
    s = tl.sum(tl.dot(q, tl.permute(k, (0, 2, 1))) * scale[:, None, :] + dead, 0)
    top = tl.ceil(tl.max(s, 1))
    p = tl.exp2(s - finite(top)[:, None])
    return p, top, tl.sum(p, 1)


@triton.jit
def _values(p, k, scale):
    """fp32 [W, BH, 64]: probabilities times values. Scales go to the probabilities, as f16 shares of their maximum."""
    most = tl.maximum(tl.max(scale, 1), 2.0**-60)  # [W], a power of two
    share = scale * pow2_reciprocal(most)[:, None]
    return tl.dot((p[None, :, :] * share[:, None, :]).to(tl.float16), k) * most[:, None, None]


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
    PDL: tl.constexpr,
):
    """Grid (ceil(HEADS / BH), T, parts)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
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
    if PDL and RATIO == 4 and SPLIT == 1:  # noqa: SIM102 - decided by the compiler
        if first * KEYS >= WINDOW:  # the selection is the launch before
            tl.extra.cuda.gdc_wait()
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64
    tables = (window_pages + tables_at, full_pages + tables_at)
    sources = (window_codes, window_words, entry_codes, entry_words)
    selected += token * SELECTED
    q += token.to(tl.int64) * Q_STRIDE + head * HD
    place = (selected, sources, tables)
    if SPLIT == 1:
        k, scale = _chunk(first, position, num_entries, *place, W, WINDOW, RATIO, STRIDES, KEYS, HW, WIDEN)
        if PDL:
            tl.extra.cuda.gdc_wait()
        x = _queries(q, live_head, angle, eps, W)
        p, maximum, total = _weights(x, k, scale)
        values = _values(p, k, scale)
    else:
        if PDL:
            tl.extra.cuda.gdc_wait()
        x = _queries(q, live_head, angle, eps, W)
        maximum = tl.full((BH,), -float("inf"), tl.float32)
        total = tl.zeros((BH,), tl.float32)
        values = tl.zeros((W, BH, 64), tl.float32)
        end = tl.minimum(first + RUN, num_chunks) if SPLIT == 2 else tl.where(position < 0, 0, num_chunks)
        for run in tl.range(first, end, RUN):
            run_total = tl.zeros((BH,), tl.float32)
            run_values = tl.zeros((W, BH, 64), tl.float32)
            for chunk in tl.range(run, tl.minimum(run + RUN, end)):
                k, scale = _chunk(chunk, position, num_entries, *place, W, WINDOW, RATIO, STRIDES, KEYS, HW, WIDEN)
                p, top, chunk_total = _weights(x, k, scale)
                new_maximum = tl.maximum(maximum, top)
                kept = _power_of_two(maximum - finite(new_maximum))
                added = _power_of_two(top - finite(new_maximum))
                maximum = new_maximum
                run_total = run_total * kept + chunk_total * added
                run_values = run_values * kept[None, :, None] + _values(p, k, scale) * added[None, :, None]
                total *= kept
                values *= kept[None, :, None]
            total += run_total
            values += run_values
    column = tl.arange(0, W)[:, None, None] * 64 + tl.arange(0, 64)[None, None, :]
    mask = live_head[None, :, None]
    if SPLIT == 0:
        values *= divisor(maximum, total, tl.load(sink + head, mask=live_head, other=0.0))[None, :, None]
        cos = tl.load(angle + tl.arange(0, 32)[None, :])
        sin = tl.load(angle + 32 + tl.arange(0, 32)[None, :])
        turned = tl.reshape(rotate(tl.reshape(values, (W * BH, 64)), cos, -sin), (W, BH, 64))
        values = tl.where(tl.arange(0, W)[:, None, None] == W - 1, turned, values)
        out += token.to(tl.int64) * (HEADS * HD)
        tl.store(out + (head[None, :, None] * HD + column), as_bf16(values, WIDEN), mask=mask)
    else:
        first_part = token.to(tl.int64) * HEADS * num_parts + part
        statistics = work + (tl.num_programs(1).to(tl.int64) * HEADS * num_parts) * HD + first_part * 2
        head *= num_parts
        work += first_part * HD
        tl.store(work + (head[None, :, None] * HD + column), values, mask=mask)
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
        added = _power_of_two(top - shift)
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
    PDL: tl.constexpr,
):
    """Add the parts of one head of one token, divide, undo the rotation. Grid (HEADS, T)."""
    if PDL:
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
    tl.store(out + (token.to(tl.int64) * HEADS + head) * HD + dim, as_bf16(values, WIDEN))
