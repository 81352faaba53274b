"""What the attention kernels of decode and prefill share: the list of keys of a token, the sink, number formats.

Keys of a token are a list: its WINDOW window rows, oldest first, then its compressed entries, cut into chunks of KEYS
at fixed places of that list. Scores are in powers of two (times log2 e). What is made of given blocks alone serves the
forms with explicit layouts, too.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot_bf16(a, b, total, WIDEN: tl.constexpr):
    """`a @ b + total` of bf16 operands. WIDEN: for the interpreter, whose `tl.dot` takes bf16 for integers."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), total) if WIDEN else tl.dot(a, b, total)


@triton.jit
def finite(maximum):
    """A maximum that may be subtracted: 0 in place of -inf."""
    return tl.where(maximum == -float("inf"), 0.0, maximum)


@triton.jit
def power_of_two(exponent):
    """`2 ** exponent` of whole fp32 numbers <= 0, exact; 0 below -126."""
    return ((tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def divisor(maximum, total, sink):
    """Factor of the weighted values: 1 / (sum + sink) at the values' own maximum. All in powers of two."""
    sink = sink * LOG2E
    top = finite(tl.maximum(maximum, sink))
    kept = tl.exp2(maximum - top)
    denominator = tl.fma(total, kept, tl.exp2(sink - top))
    return tl.where(denominator > 0, kept / denominator, 0.0)


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
def chunk_rows(chunk, position, num_entries, selected, WINDOW: tl.constexpr, RATIO: tl.constexpr, KEYS: tl.constexpr):
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
            live_entry = (entry >= 0) & (entry < (position + 1) // 4)
        row = tl.where(is_entry, entry, row)
        live = tl.where(is_entry, live_entry, live)
    return row, live
