"""Device code of prefill attention: the rows of a step's sequences become bf16 once, then one program walks the keys of
one token, for 64 heads.

Owns: the layout of the workspace and the arithmetic of prefill. A row is read by up to 128 tokens as window row and by
any number as selected entry, so `expand_rows` undoes the fp8 of each row once, into memory that stays in L2, and
`attend_prefill` brings rows from there to shared memory by asynchronous copies, without passing registers. sm_90 has a
faster form of it (`sparse_attention_sm90.py`).

The tokens of a call may be a block of a longer step: what follows counts the call's own tokens, `first[b]` being the
position of sequence b's first one and `cu[b]` its index. Workspace: bf16 rows [R, head size], then int32 [B].
    rows of sequence b's window: from cu[b] + 128 * b on, positions first[b] - 128 to the last of the call's
    rows of its entries:         from T + 128 * B + base[b] on, those visible to the last token
    the integers:                base[b], the entries of the sequences before b
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.attention_parts import LOG2E, chunk_rows, divisor, dot_bf16, finite, visible_entries
from workers.kernels.kv_rows import as_bf16, load_nope, load_rope, rotate, unit_and_offset

MARGIN = 128
"""Window rows kept for the tokens before a sequence's first new one."""

ROWS_OF_PROGRAM = 64

_MARGIN = tl.constexpr(MARGIN)


def workspace_rows(num_tokens: int, num_sequences: int, num_entries: int) -> int:
    """Rows of the workspace. num_entries: at least the visible entries of all sequences together."""
    return num_tokens + MARGIN * num_sequences + num_entries


@triton.jit
def tokens_of_sequence(b, positions, sequence_of_token, cu_starts, start, num_tokens):
    """Of sequence b's tokens in this call: index of the first, its position, and the position after the last."""
    first_sequence = tl.load(sequence_of_token)
    first_position = tl.load(positions)
    skipped = tl.load(cu_starts + first_sequence) + first_position - tl.load(start + first_sequence)
    begin = tl.load(cu_starts + b) - skipped
    end = tl.minimum(tl.load(cu_starts + b + 1) - skipped, num_tokens)
    end = tl.where(first_position < 0, 0, end)  # padding comes last: such a call has no other tokens
    index = tl.maximum(begin, 0)
    position = tl.load(start + b) + index - begin
    return index, position, position + tl.maximum(end - index, 0)


@triton.jit
def expand_rows(
    rows,  # bf16 [R, NOPE + 64]
    bases,  # int32 [B]
    positions,  # int32 [T], contiguous for each sequence
    sequence_of_token,  # int32 [T]
    cu_starts,  # int32 [B + 1]
    start,  # int32 [B]
    num_tokens,
    window_pages,  # int32 [B, num_pages]
    full_pages,
    num_pages,
    window_codes,  # uint8, and the same memory as bf16: one layer of the window pool
    window_words,
    entry_codes,  # the same of the C4 or C128 pool
    entry_words,
    window_programs,  # programs of a sequence for its window; the others are for its entries
    NOPE: tl.constexpr,
    RATIO: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    ENTRY_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    HW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (window programs + ceil(most entries of a sequence / ROWS), B)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    ROW: tl.constexpr = NOPE + 128
    SHIFT: tl.constexpr = 6 if RATIO == 4 else 1  # an entry page has 64 or 2 rows
    b = tl.program_id(1)
    index, begin, end = tokens_of_sequence(b, positions, sequence_of_token, cu_starts, start, num_tokens)
    program = tl.program_id(0)
    is_window = program < window_programs
    place = tl.where(is_window, program, program - window_programs) * ROWS + tl.arange(0, ROWS)
    row = tl.where(is_window, begin - _MARGIN + place, place)
    live = (row >= 0) & (row < end) & (end > begin)
    place += index + _MARGIN * b
    codes, words, pages, shift, stride = window_codes, window_words, window_pages, 8, WINDOW_STRIDE
    if RATIO > 0:
        live &= is_window | (row < end // RATIO)
        base = 0
        for other in range(b):
            _, first, after = tokens_of_sequence(other, positions, sequence_of_token, cu_starts, start, num_tokens)
            base += tl.where(after > first, after // RATIO, 0)
        if program == 0:
            tl.store(bases + b, base)
        place = tl.where(is_window, place, row + num_tokens + _MARGIN * tl.num_programs(1) + base)
        codes = tl.where(is_window, codes, entry_codes)
        words = tl.where(is_window, words, entry_words)
        pages = tl.where(is_window, pages, full_pages)
        shift = tl.where(is_window, 8, SHIFT)
        stride = tl.where(is_window, WINDOW_STRIDE, ENTRY_STRIDE)
    unit, offset, live = unit_and_offset(pages + b.to(tl.int64) * num_pages, row, live, shift)
    codes += unit.to(tl.int64) * stride
    words += unit.to(tl.int64) * (stride // 2) + (offset * (ROW // 2) + NOPE // 2)
    scales = codes + ((ROW << shift) + offset * 8)
    codes += offset * ROW
    to = rows + place.to(tl.int64)[:, None] * (NOPE + 64)
    mask = live[:, None]
    column = tl.arange(0, 64)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(to + (NOPE - 64 + column), load_nope(codes, scales, live, NOPE - 64, 1, HW), mask=mask)
    tl.store(to + (NOPE + column), load_rope(words, live), mask=mask)
    if NOPE == 448:
        tl.store(to + tl.arange(0, 256)[None, :], load_nope(codes, scales, live, 0, 4, HW), mask=mask)
        tl.store(to + (256 + tl.arange(0, 128)[None, :]), load_nope(codes, scales, live, 256, 2, HW), mask=mask)


@triton.jit
def _part(row, live, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Columns FIRST to FIRST + WIDTH - 1 of rows: pointers [N] and which of them exist."""
    return tl.load(row[:, None] + (FIRST + tl.arange(0, WIDTH))[None, :], mask=live[:, None], other=0.0)


@triton.jit
def _square(x):
    wide = x.to(tl.float32)
    return tl.sum(wide * wide, 1)


@triton.jit
def _store(to, o, live, FIRST: tl.constexpr, WIDEN: tl.constexpr):
    column = FIRST + tl.arange(0, o.shape[1])
    tl.store(to[:, None] + column[None, :], as_bf16(o, WIDEN), mask=live[:, None])


@triton.jit
def attend_prefill(
    q,  # bf16 [T, Q_STRIDE]: the first HEADS * (NOPE + 64) columns are raw queries
    positions,  # int32 [T], -1 = padding
    sequence_of_token,  # int32 [T]
    cu_starts,  # int32 [B + 1]
    start,  # int32 [B]
    rows,  # bf16 [R, NOPE + 64], see the module
    bases,  # int32 [B]
    num_sequences,
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
    BH: tl.constexpr,
    KEYS: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (ceil(HEADS / BH), T)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    HD: tl.constexpr = NOPE + 64
    token = tl.program_id(1)
    position = tl.load(positions + token)
    b = tl.load(sequence_of_token + token)
    head = tl.program_id(0) * BH + tl.arange(0, BH)
    live_head = head < HEADS
    num_entries = visible_entries(position, SELECTED, RATIO)
    window_chunks: tl.constexpr = (WINDOW + KEYS - 1) // KEYS
    num_chunks = tl.where(position < 0, 0, window_chunks + (num_entries + KEYS - 1) // KEYS)
    num_tokens = tl.num_programs(1)
    index, begin, _ = tokens_of_sequence(b, positions, sequence_of_token, cu_starts, start, num_tokens)
    window_at = index - begin + _MARGIN * (b + 1)  # row of position 0
    entries_at = 0
    if RATIO > 0:
        entries_at = num_tokens + _MARGIN * num_sequences + tl.load(bases + b)
    angle = rope_table + tl.maximum(position, 0).to(tl.int64) * 64 + tl.arange(0, 32)[None, :]
    cos = tl.load(angle)
    sin = tl.load(angle + 32)
    # Raw parts of the queries go to the tensor cores as they are in memory; their norm is a factor of the scores.
    q += token.to(tl.int64) * Q_STRIDE + head * HD
    q2 = _part(q, live_head, NOPE - 64, 64)
    q3 = _part(q, live_head, NOPE, 64)
    square = _square(q2) + _square(q3)
    q3 = as_bf16(rotate(q3.to(tl.float32), cos, sin), WIDEN)
    o2 = tl.zeros((BH, 64), tl.float32)
    o3 = tl.zeros((BH, 64), tl.float32)
    if NOPE == 448:
        q0 = _part(q, live_head, 0, 256)
        q1 = _part(q, live_head, 256, 128)
        square += _square(q0) + _square(q1)
        o0 = tl.zeros((BH, 256), tl.float32)
        o1 = tl.zeros((BH, 128), tl.float32)
    scale = (tl.rsqrt(square / HD + eps) * (HD**-0.5 * LOG2E))[:, None]
    maximum = tl.full((BH,), -float("inf"), tl.float32)
    total = tl.zeros((BH,), tl.float32)
    # NOTE: hoisted, the addresses of all tiles in shared memory would not fit the registers.
    for chunk in tl.range(0, num_chunks, disable_licm=True):
        row, live = chunk_rows(chunk, position, num_entries, selected + token * SELECTED, WINDOW, RATIO, KEYS)
        key = rows + (row + tl.where(chunk < window_chunks, window_at, entries_at)).to(tl.int64) * HD
        k2 = _part(key, live, NOPE - 64, 64)
        k3 = _part(key, live, NOPE, 64)
        if NOPE == 448:
            k0 = _part(key, live, 0, 256)
            k1 = _part(key, live, 256, 128)
            s = dot_bf16(q0, tl.trans(k0), None, WIDEN)
            s = dot_bf16(q1, tl.trans(k1), s, WIDEN)
            s = dot_bf16(q2, tl.trans(k2), s, WIDEN)
        else:
            s = dot_bf16(q2, tl.trans(k2), None, WIDEN)
        s = dot_bf16(q3, tl.trans(k3), s, WIDEN) * scale
        s = tl.where(live[None, :], s, -float("inf"))  # [BH, KEYS]
        new_maximum = tl.maximum(maximum, tl.max(s, 1))
        kept = tl.exp2(maximum - finite(new_maximum))
        maximum = new_maximum
        p = tl.exp2(s - finite(maximum)[:, None])
        total = total * kept + tl.sum(p, 1)
        p = as_bf16(p, WIDEN)
        kept = kept[:, None]
        if NOPE == 448:
            o0 = dot_bf16(p, k0, o0 * kept, WIDEN)
            o1 = dot_bf16(p, k1, o1 * kept, WIDEN)
        o2 = dot_bf16(p, k2, o2 * kept, WIDEN)
        o3 = dot_bf16(p, k3, o3 * kept, WIDEN)
    factor = divisor(maximum, total, tl.load(sink + head, mask=live_head, other=0.0))[:, None]
    out += (token.to(tl.int64) * HEADS + head) * HD
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    _store(out, o2 * factor, live_head, NOPE - 64, WIDEN)
    _store(out, rotate(o3 * factor, cos, -sin), live_head, NOPE, WIDEN)
    if NOPE == 448:
        _store(out, o0 * factor, live_head, 0, WIDEN)
        _store(out, o1 * factor, live_head, 256, WIDEN)
