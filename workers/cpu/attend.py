"""Sparse attention of each token over its dequantised rows, and the grouped output projection.

Per token: its window rows and compressed entries become one fp32 block in cache, scores and weighted sums are two
small products, heads are vector lanes of the softmax. Rows are in position order: sums are the same in any batch.
"""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.compile import jit
from workers.cpu.compress import entry_place
from workers.cpu.project import rope_row, window_place
from workers.cpu.rows import F0, FLOAT, ZERO, linear, load_entry, product, rotate, round_activations
from workers.cpu.select import pack_columns, select_tile
from workers.cpu.simd import LANES, PANEL, exp, f32_at, i64_at

PANEL_BYTES = np.int64(PANEL * 4)
"""Step between column panels of plain fp32 rows."""


@jit
def load_rows(model, layer, scratch, token, lo):
    """Fill scratch ENTRIES with the token's rows: window first, then compressed. Returns their number."""
    sequence, position = i64_at(model[t.SEQUENCES])[token], i64_at(model[t.POSITIONS])[token]
    size, rope, fp8 = model[t.HEAD_DIM], model[t.ROPE_DIM], model[t.KV_FP8] != 0
    step = (size + LANES - 1) // LANES * LANES * 4
    out = scratch[t.ENTRIES]
    for past in range(max(0, position + 1 - model[t.WINDOW]), position + 1):
        data, scales = window_place(model, layer, sequence, past)
        load_entry(data, scales, out, size, rope, fp8)
        out += step
    ratio = layer[t.RATIO]
    if ratio == 4:
        chosen = i64_at(scratch[t.CHOSEN_ROWS] + (token - lo) * model[t.TOPK] * 8)
        for i in range(i64_at(scratch[t.CHOSEN_COUNTS])[token - lo]):
            data, scales = entry_place(model, layer, sequence, chosen[i])
            load_entry(data, scales, out, size, rope, fp8)
            out += step
    elif ratio == 128:
        for entry in range((position + 1) // 128):
            data, scales = entry_place(model, layer, sequence, entry)
            load_entry(data, scales, out, size, rope, fp8)
            out += step
    return (out - scratch[t.ENTRIES]) // step


@jit
def find_peaks(logits, peak, sink, num_rows, heads, wide, scale):
    """Scale logits [num_rows, wide] in place; `peak [wide]` gets each head's maximum, the sink included."""
    p, m, s = f32_at(logits), f32_at(peak), f32_at(sink)
    for h in range(wide):
        m[h] = s[h] if h < heads else F0
    for first in range(0, wide, LANES):
        for r in range(num_rows):
            row = r * wide + first
            for lane in range(LANES):
                value = p[row + lane] * scale
                p[row + lane] = value
                m[first + lane] = value if value > m[first + lane] else m[first + lane]


@jit
def exponentiate(logits, peak, total, sink, num_rows, heads, wide):
    """Logits to exp(logit - peak) in place; `total [wide]` gets the sums with the sink's share."""
    p, m, z, s = f32_at(logits), f32_at(peak), f32_at(total), f32_at(sink)
    for h in range(wide):
        z[h] = exp((s[h] if h < heads else F0) - m[h])
    for first in range(0, wide, LANES):
        for r in range(num_rows):
            row = r * wide + first
            for lane in range(LANES):
                value = exp(p[row + lane] - m[first + lane])
                p[row + lane] = value
                z[first + lane] += value


@jit
def attend_token(model, real, layer, scratch, token, lo):
    """One token's heads, rotated back, to its row of scratch HEADS_OUT."""
    heads, size, rope = model[t.HEADS], model[t.HEAD_DIM], model[t.ROPE_DIM]
    wide, step = (heads + LANES - 1) // LANES * LANES, (size + LANES - 1) // LANES * LANES * 4
    num_rows = load_rows(model, layer, scratch, token, lo)
    query = model[t.QUERY] + token * model[t.QUERY_STEP]
    panels, logits, entries = scratch[t.QUERY_PANELS], scratch[t.LOGITS], scratch[t.ENTRIES]
    pack_columns(query, size * 4, heads, size, panels)
    product(entries, step, FLOAT, panels, FLOAT, size * PANEL * 4, ZERO, logits, wide * 4, num_rows, size, heads)
    peak, total, sink = scratch[t.PEAK], scratch[t.TOTAL], layer[t.SINK]
    find_peaks(logits, peak, sink, num_rows, heads, wide, real[t.ATTENTION_SCALE])
    exponentiate(logits, peak, total, sink, num_rows, heads, wide)
    rows = scratch[t.HEAD_ROWS]
    product(logits, FLOAT, wide * 4, entries, FLOAT, PANEL_BYTES, step, rows, step, heads, num_rows, size)
    cos, sin = rope_row(model, layer, i64_at(model[t.POSITIONS])[token])
    z = f32_at(total)
    for head in range(heads):
        out = scratch[t.HEADS_OUT] + ((token - lo) * heads + head) * size * 4
        source, target = f32_at(rows + head * step), f32_at(out)
        inverse = np.float32(1) / z[head]
        for i in range(size):
            target[i] = source[i] * inverse
        rotate(out + (size - rope) * 4, cos, sin, rope // 2, np.float32(-1))


@jit
def attend_tile(model, real, layer, scratch, lo, hi):
    """Attention sublayer output of tokens [lo, hi) to scratch OUT."""
    if layer[t.RATIO] == 4:
        select_tile(model, layer, scratch, lo, hi)
    for token in range(lo, hi):
        attend_token(model, real, layer, scratch, token, lo)
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
