"""Kernels of the compressor for prefill chunks: entries of many tokens a sequence, then the rings.

Owns: which tokens of a chunk finish entries and which rows the rings keep. Does not own: the arithmetic of one entry
(`compressor_entry.py`) or the launches (`compressor.py`). The pooling kernels only read the rings, for rows before the
chunk; `write_rings` must come after them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.compressor_entry import finish_token, write_ring_row


@triton.jit
def _pool_tile(
    rows, tensors, rope_table, step, num_tokens, eps,
    TOKENS: tl.constexpr, RATIO: tl.constexpr, ROW: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Pool, one after the other, the entries that tokens [TOKENS * program 0, + TOKENS) finish. Writes no ring.

    tensors, SHAPE: as in `compressor_entry.finish_pooled`; step: the step's metadata, page_columns last.
    """
    positions, sequence_of_token, slots, start, full_pages, page_columns = step
    first = tl.program_id(0) * TOKENS
    at = tl.arange(0, TOKENS)
    position = tl.load(positions + first + at, mask=first + at < num_tokens, other=-1)
    finishes = (position >= 0) & ((position + 1) % RATIO == 0)
    next_at = tl.min(tl.where(finishes, at, TOKENS), 0)
    while next_at < TOKENS:
        token = first + next_at
        sequence = tl.load(sequence_of_token + token)
        pages, slot = full_pages + sequence * page_columns, tl.load(slots + sequence)
        last, begun = tl.load(positions + token), tl.load(start + sequence)
        finish_token(rows, tensors, rope_table, pages, slot, token, last, begun, eps, RATIO, ROW, SHAPE, False)
        next_at = tl.min(tl.where(finishes & (at > next_at), at, TOKENS), 0)


@triton.jit
def compress_c4_pool(
    rows,
    positions,
    sequence_of_token,
    slots,
    start,
    full_pages,
    page_columns,
    num_tokens,
    state,
    entries,
    ape,
    norm,
    index_state,
    index_entries,
    index_ape,
    index_norm,
    rope_table,
    eps,
    TOKENS: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    HD: tl.constexpr,
    DI: tl.constexpr,
    RD: tl.constexpr,
    HW: tl.constexpr,
):
    """Prefill, grid (ceil(T / TOKENS), 2): entries of the main compressor and keys of the indexer's."""
    step = (positions, sequence_of_token, slots, start, full_pages, page_columns)
    if tl.program_id(1) == 0:
        ENTRY: tl.constexpr = (STRIDE, HD, RD, False, HW)
        _pool_tile(rows, (state, entries, ape, norm), rope_table, step, num_tokens, eps, TOKENS, 4, ROW, ENTRY)
    else:
        KEY: tl.constexpr = (INDEX_STRIDE, DI, RD, True, HW)
        index = (index_state, index_entries, index_ape, index_norm)
        _pool_tile(rows + 4 * HD, index, rope_table, step, num_tokens, eps, TOKENS, 4, ROW, KEY)


@triton.jit
def compress_c128_pool(
    rows,
    positions,
    sequence_of_token,
    slots,
    start,
    full_pages,
    page_columns,
    num_tokens,
    state,
    entries,
    ape,
    norm,
    rope_table,
    eps,
    TOKENS: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    HD: tl.constexpr,
    RD: tl.constexpr,
    HW: tl.constexpr,
):
    """Prefill, grid (ceil(T / TOKENS),)."""
    ENTRY: tl.constexpr = (STRIDE, HD, RD, False, HW)
    step = (positions, sequence_of_token, slots, start, full_pages, page_columns)
    _pool_tile(rows, (state, entries, ape, norm), rope_table, step, num_tokens, eps, TOKENS, 128, ROW, ENTRY)


@triton.jit
def write_rings(
    rows,
    positions,
    slots,
    cu_starts,
    state,
    index_state,
    ROW: tl.constexpr,
    RING: tl.constexpr,
    WIDTH: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,  # 0: no indexer
):
    """Prefill, grid (B, RING): the last RING tokens of each sequence of the chunk."""
    sequence = tl.program_id(0)
    token = tl.load(cu_starts + sequence + 1) - 1 - tl.program_id(1)
    if token >= tl.load(cu_starts + sequence):
        position = tl.load(positions + token)
        slot = tl.load(slots + sequence)
        write_ring_row(rows, state, slot, token, position, ROW, RING, WIDTH)
        if INDEX_WIDTH > 0:
            write_ring_row(rows + WIDTH, index_state, slot, token, position, ROW, RING, INDEX_WIDTH)
