"""Sparse attention of each token over its dequantised rows, and the grouped output projection.

Per token: its window rows and compressed entries become one fp32 block in cache, scores and weighted sums are small
products, heads are vector lanes of the softmax. Tokens of a chunk share their window rows in groups. Rows are in
position order and each logit is one sum, so a token's result is the same in any group or batch.
"""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.block_product import PANEL
from workers.cpu.compile import jit
from workers.cpu.compress import entry_place
from workers.cpu.project import rope_row, window_place
from workers.cpu.rows import F0, F1, FLOAT, ZERO, linear, load_entry, product, rotate, round_activations
from workers.cpu.select import pack_columns, select_tile
from workers.cpu.simd import LANES, exp, exp_and_sum, f32_at, i64_at, scale_and_peak

PANEL_BYTES = np.int64(PANEL * 4)
"""Step between column panels of plain fp32 rows."""

MINUS_1 = np.float32(-1)


@jit
def load_window(model, layer, out, step, sequence, first, last):
    """Window rows of positions [first, last] of a sequence to `out`."""
    size, rope, fp8 = model[t.HEAD_DIM], model[t.ROPE_DIM], model[t.KV_FP8] != 0
    for position in range(first, last + 1):
        data, scales = window_place(model, layer, sequence, position)
        load_entry(data, scales, out + (position - first) * step, size, rope, fp8)


@jit
def load_compressed(model, layer, scratch, out, step, token, lo):
    """Compressed entries of a token to `out`: chosen ones in C4, all visible ones in C128. Returns their number."""
    size, rope, fp8 = model[t.HEAD_DIM], model[t.ROPE_DIM], model[t.KV_FP8] != 0
    sequence, ratio = i64_at(model[t.SEQUENCES])[token], layer[t.RATIO]
    if ratio == 0:
        return ZERO
    chosen = i64_at(scratch[t.CHOSEN_ROWS] + (token - lo) * model[t.TOPK] * 8)
    count = (i64_at(model[t.POSITIONS])[token] + 1) // 128
    if ratio == 4:
        count = i64_at(scratch[t.CHOSEN_COUNTS])[token - lo]
    for i in range(count):
        data, scales = entry_place(model, layer, sequence, chosen[i] if ratio == 4 else i)
        load_entry(data, scales, out + i * step, size, rope, fp8)
    return count


@jit
def find_peaks(source, source_wide, target, peak, num_rows, wide, scale):
    """`target [num_rows, wide] = source * scale` (rows of `source_wide`); raises `peak [wide]` to the maxima."""
    for first in range(0, wide * 4, LANES * 4):
        scale_and_peak(source + first, source_wide * 4, target + first, wide * 4, peak + first, num_rows, scale)


@jit
def exponentiate(logits, peak, total, sink, num_rows, heads, wide):
    """Logits to exp(logit - peak) in place; `total [wide]` gets the sums with the sink's share."""
    m, z, s = f32_at(peak), f32_at(total), f32_at(sink)
    for h in range(wide):
        z[h] = exp((s[h] if h < heads else F0) - m[h])
    for first in range(0, wide * 4, LANES * 4):
        exp_and_sum(logits + first, wide * 4, peak + first, total + first, num_rows)


@jit
def finish_heads(model, layer, scratch, rows, step, token, lo):
    """Divide the heads by their totals, rotate them back and put them into the token's row of HEADS_OUT."""
    heads, size, rope = model[t.HEADS], model[t.HEAD_DIM], model[t.ROPE_DIM]
    cos, sin = rope_row(model, layer, i64_at(model[t.POSITIONS])[token])
    z = f32_at(scratch[t.TOTAL])
    for head in range(heads):
        out = scratch[t.HEADS_OUT] + ((token - lo) * heads + head) * size * 4
        source, target = f32_at(rows + head * step), f32_at(out)
        inverse = F1 / z[head]
        for i in range(size):
            target[i] = source[i] * inverse
        rotate(out + (size - rope) * 4, cos, sin, rope // 2, MINUS_1)


@jit
def attend_group(model, real, layer, scratch, token, count, lo):
    """Heads of `count` consecutive tokens of one sequence to HEADS_OUT.

    Their window rows overlap: they are loaded and multiplied once, every token's heads side by side. Tokens then take
    turns from the last to the first, each putting its compressed entries right behind its own window rows, where only
    later tokens still had a row.
    """
    heads, size, scale = model[t.HEADS], model[t.HEAD_DIM], real[t.ATTENTION_SCALE]
    wide, step = (heads + LANES - 1) // LANES * LANES, (size + LANES - 1) // LANES * LANES * 4
    columns = count * heads
    together = (columns + LANES - 1) // LANES * LANES
    positions, sequence = i64_at(model[t.POSITIONS]), i64_at(model[t.SEQUENCES])[token]
    base, last = max(0, positions[token] + 1 - model[t.WINDOW]), positions[token + count - 1]
    panels, rows, window, logits = (
        scratch[t.QUERY_PANELS],
        scratch[t.ENTRIES],
        scratch[t.WINDOW_LOGITS],
        scratch[t.LOGITS],
    )
    for i in range(count):
        query = model[t.QUERY] + (token + i) * model[t.QUERY_STEP]
        pack_columns(query, size * 4, heads, size, panels, i * heads, columns)
    load_window(model, layer, rows, step, sequence, base, last)
    product(
        rows, step, FLOAT, panels, FLOAT, size * PANEL * 4, ZERO, window, together * 4, last + 1 - base, size, columns
    )
    peak, sink, out = f32_at(scratch[t.PEAK]), f32_at(layer[t.SINK]), scratch[t.HEAD_ROWS]
    for i in range(count - 1, -1, -1):
        position = positions[token + i]
        first, end = max(0, position + 1 - model[t.WINDOW]) - base, position + 1 - base
        behind = rows + end * step
        num_entries = load_compressed(model, layer, scratch, behind, step, token + i, lo)
        own, row_bytes = (panels, ZERO) if count == 1 else (panels + i * heads * 4, together * 4)
        entry_logits = logits + (end - first) * wide * 4
        if num_entries > 0:
            panel_step = size * PANEL * 4
            product(
                behind, step, FLOAT, own, FLOAT, panel_step, row_bytes, entry_logits, wide * 4, num_entries, size, heads
            )
        for h in range(wide):
            peak[h] = sink[h] if h < heads else F0
        columns_at = window + (first * together + i * heads) * 4
        find_peaks(columns_at, together, logits, scratch[t.PEAK], end - first, wide, scale)
        find_peaks(entry_logits, wide, entry_logits, scratch[t.PEAK], num_entries, wide, scale)
        num_rows = end - first + num_entries
        exponentiate(logits, scratch[t.PEAK], scratch[t.TOTAL], layer[t.SINK], num_rows, heads, wide)
        product(
            logits, FLOAT, wide * 4, rows + first * step, FLOAT, PANEL_BYTES, step, out, step, heads, num_rows, size
        )
        finish_heads(model, layer, scratch, out, step, token + i, lo)


@jit
def attend_tile(model, real, layer, scratch, lo, hi):
    """Attention sublayer output of tokens [lo, hi) to scratch OUT."""
    if layer[t.RATIO] == 4:
        select_tile(model, layer, scratch, lo, hi)
    sequences, most = i64_at(model[t.SEQUENCES]), max(1, PANEL // model[t.HEADS])
    token = lo
    while token < hi:
        end = token + 1
        while end < hi and end - token < most and sequences[end] == sequences[token]:
            end += 1
        attend_group(model, real, layer, scratch, token, end - token, lo)
        token = end
    groups, rank, count = model[t.O_GROUPS], model[t.O_LORA], hi - lo
    width = model[t.HEADS] * model[t.HEAD_DIM]
    size, step, low = width // groups, scratch[t.LOW_RANK_STEP], scratch[t.LOW_RANK]
    element = layer[t.WO_A_ELEMENT]
    for group in range(groups):
        a, weight = scratch[t.HEADS_OUT] + group * size * 4, layer[t.WO_A] + group * layer[t.WO_A_STEP]
        linear(a, width * 4, weight, element, low + group * rank * 4, step, count, size, rank)
    if model[t.ACT_FP8] != 0:
        for r in range(count):
            round_activations(low + r * step, low + r * step, groups * rank)
    columns = model[t.HIDDEN]
    weight, element = layer[t.WO_B], layer[t.WO_B_ELEMENT]
    linear(low, step, weight, element, scratch[t.OUT], scratch[t.OUT_STEP], count, groups * rank, columns)
