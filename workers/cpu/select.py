"""The indexer: which C4 entries each query attends to.

Queries of one sequence are scored together, up to one vector of them, so that dequantised keys are used several times.
Scores of a query depend on nothing but its own columns: sums over dimensions and heads run in a fixed order, and the
other queries' columns only meet exact zeros. The choice is exact: the k largest, ties to the lower entry.
"""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.block_product import PANEL
from workers.cpu.compile import jit, jit_sums
from workers.cpu.compress import index_place
from workers.cpu.rows import F0, FLOAT, ZERO, load_index_key, product
from workers.cpu.simd import LANES, f32_at, float_order, i32_at, i64_at

ALL_LANES = np.int64(LANES)
"""Queries scored together; an int64 so that callees compile once."""


@jit
def pack_columns(source, step, num_rows, size, panels, first, columns):
    """Rows [num_rows, size] as columns [first, first + num_rows) of product panels with `columns` columns in all.

    The last rows also clear the columns that fill up the last vector.
    """
    wide = (columns + LANES - 1) // LANES * LANES
    for j in range(num_rows):
        column = first + j
        begin = column // PANEL * PANEL
        width = min(PANEL, wide - begin)
        row, target = f32_at(source + j * step), f32_at(panels + (begin * size + column - begin) * 4)
        for i in range(size):
            target[i * width] = row[i]
    if first + num_rows == columns:
        for column in range(columns, wide):
            begin = column // PANEL * PANEL
            width = min(PANEL, wide - begin)
            target = f32_at(panels + (begin * size + column - begin) * 4)
            for i in range(size):
                target[i * width] = F0


@jit
def relu_row(x, size):
    """Negative values to zero, in place."""
    p = f32_at(x)
    for i in range(size):
        p[i] = p[i] if p[i] > F0 else F0


@jit
def pack_head_weights(model, layer, scratch, lo, count):
    """Block-diagonal [count * heads, LANES]: column q holds query q's head weights in its own rows, zero elsewhere."""
    heads = model[t.INDEX_HEADS]
    target = f32_at(scratch[t.WEIGHT_PANELS])
    for i in range(count * heads * LANES):
        target[i] = F0
    for q in range(count):
        row = model[t.RAW] + (lo + q) * model[t.RAW_STEP]
        weights = f32_at(row + (layer[t.EXTRA_COLUMNS] - heads) * 4)
        for head in range(heads):
            target[(q * heads + head) * LANES + q] = weights[head]


@jit
def score_queries(model, layer, scratch, lo, count, num_entries):
    """Scores [num_entries, LANES] (scratch SCORES) of queries lo .. lo+count-1 of one sequence, one lane each."""
    heads, size, fp8 = model[t.INDEX_HEADS], model[t.INDEX_DIM], model[t.KV_FP8] != 0
    columns = count * heads
    wide = (columns + LANES - 1) // LANES * LANES
    query = model[t.QUERY] + lo * model[t.QUERY_STEP] + model[t.HEADS] * model[t.HEAD_DIM] * 4
    for q in range(count):
        pack_columns(
            query + q * model[t.QUERY_STEP], size * 4, heads, size, scratch[t.INDEX_PANELS], q * heads, columns
        )
    pack_head_weights(model, layer, scratch, lo, count)
    sequence = i64_at(model[t.SEQUENCES])[lo]
    keys, dots = scratch[t.KEYS], scratch[t.DOTS]
    panels, weights = scratch[t.INDEX_PANELS], scratch[t.WEIGHT_PANELS]
    for first in range(0, num_entries, t.KEY_BLOCK):
        block = min(t.KEY_BLOCK, num_entries - first)
        for i in range(block):
            data, scale = index_place(model, layer, sequence, first + i)
            load_index_key(data, scale, keys + i * size * 4, size, fp8)
        product(keys, size * 4, FLOAT, panels, FLOAT, size * PANEL * 4, ZERO, dots, wide * 4, block, size, columns)
        relu_row(dots, block * wide)
        row = ALL_LANES * 4
        out = scratch[t.SCORES] + first * row
        product(dots, wide * 4, FLOAT, weights, FLOAT, ZERO, ZERO, out, row, block, columns, ALL_LANES)


@jit_sums
def count_at_least(order, size, bound):
    """How many of the int32 keys are >= bound."""
    p = i32_at(order)
    total = 0
    for i in range(size):
        total += 1 if p[i] >= bound else 0
    return total


@jit
def edge_of_best(order, size, k):
    """The k-th largest int32 key by bisection, or the value below a bound that exactly k keys reach."""
    low, high = np.int64(-(2**31)), np.int64(2**31 - 1)
    while low < high:
        middle = low + (high - low + 1) // 2
        count = count_at_least(order, size, np.int32(middle))
        if count == k:
            return middle - 1
        if count > k:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def choose_best(scratch, lane, size, k, chosen):
    """The k best of `size` scores of one lane, ascending entry numbers, to `chosen` (int64)."""
    scores, order, out = f32_at(scratch[t.SCORES]), i32_at(scratch[t.ORDER]), i64_at(chosen)
    for i in range(size):
        order[i] = float_order(scores[i * LANES + lane])
    bound = edge_of_best(scratch[t.ORDER], size, k)
    above = 0 if bound == 2**31 - 1 else count_at_least(scratch[t.ORDER], size, np.int32(bound + 1))
    ties, n = k - above, 0
    for i in range(size):
        if order[i] > bound:
            out[n] = i
            n += 1
        elif order[i] == bound and ties > 0:
            out[n] = i
            n += 1
            ties -= 1


@jit
def select_tile(model, layer, scratch, lo, hi):
    """Chosen entries of tokens [lo, hi): scratch CHOSEN_ROWS [TILE, TOPK] and CHOSEN_COUNTS."""
    k, heads = model[t.TOPK], model[t.INDEX_HEADS]
    positions, sequences = i64_at(model[t.POSITIONS]), i64_at(model[t.SEQUENCES])
    counts = i64_at(scratch[t.CHOSEN_COUNTS])
    together = max(1, min(LANES, PANEL // heads))
    token = lo
    while token < hi:
        end = token + 1
        while end < hi and end - token < together and sequences[end] == sequences[token]:
            end += 1
        most = (positions[end - 1] + 1) // 4
        if most > k:
            score_queries(model, layer, scratch, token, end - token, most)
        for q in range(token, end):
            visible = (positions[q] + 1) // 4
            chosen = scratch[t.CHOSEN_ROWS] + (q - lo) * k * 8
            counts[q - lo] = min(visible, k)
            if visible > k:
                choose_best(scratch, q - token, visible, k, chosen)
            else:
                rows = i64_at(chosen)
                for i in range(visible):
                    rows[i] = i
        token = end
