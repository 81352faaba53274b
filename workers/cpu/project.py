"""First stage of a layer, token by token: attention input, queries, window rows, and raw compressor rows.

Reads the streams; writes the tokens' gates, queries (heads, then indexer heads), raw rows (main `kv | score`, indexer
`kv | score`, indexer head weights) and their window rows in the pool. Tokens are independent of each other here.
"""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.compile import jit
from workers.cpu.rows import (
    F1,
    copy_row,
    hadamard,
    linear,
    rms_factor,
    rotate,
    round_activations,
    round_index_query,
    scale_row,
    store_entry,
)
from workers.cpu.simd import LANES, f32_at, i64_at
from workers.cpu.streams import mix_streams


@jit
def rope_row(model, layer, position):
    """Addresses of the cos and sin rows of a position in the layer's table."""
    offset = position * (model[t.ROPE_DIM] // 2) * 4
    if layer[t.RATIO] == 0:
        return model[t.COS] + offset, model[t.SIN] + offset
    return model[t.COS_COMPRESSED] + offset, model[t.SIN_COMPRESSED] + offset


@jit
def row_place(pool, unit_bytes, rows_per_unit, data_bytes, scale_offset, scale_bytes, page, row):
    """Addresses of a row's data and scale plane in a paged pool."""
    unit = pool + page * unit_bytes
    offset = row % rows_per_unit
    return unit + offset * data_bytes, unit + scale_offset + offset * scale_bytes


@jit
def window_place(model, layer, sequence, position):
    """Addresses of the window row of a position."""
    pages = i64_at(model[t.WINDOW_PAGES] + sequence * model[t.NUM_PAGES] * 8)
    rows = model[t.WINDOW_ROWS]
    return row_place(
        layer[t.WINDOW_POOL],
        model[t.WINDOW_UNIT],
        rows,
        model[t.ENTRY_DATA],
        model[t.WINDOW_SCALES],
        model[t.ENTRY_SCALE],
        pages[position // rows],
        position,
    )


@jit
def finish_queries(model, real, layer, token):
    """Norm and rotation of a token's heads; rotation, Hadamard and number format of its indexer heads; in place."""
    position = i64_at(model[t.POSITIONS])[token]
    cos, sin = rope_row(model, layer, position)
    size, rope = model[t.HEAD_DIM], model[t.ROPE_DIM]
    query = model[t.QUERY] + token * model[t.QUERY_STEP]
    for head in range(model[t.HEADS]):
        q = query + head * size * 4
        scale_row(q, rms_factor(q, size, real[t.NORM_EPS]), 0, q, size)
        rotate(q + (size - rope) * 4, cos, sin, rope // 2, F1)
    if layer[t.RATIO] != 4:
        return
    index_query, index_size = query + model[t.HEADS] * size * 4, model[t.INDEX_DIM]
    for head in range(model[t.INDEX_HEADS]):
        q = index_query + head * index_size * 4
        rotate(q + (index_size - rope) * 4, cos, sin, rope // 2, F1)
        hadamard(q, index_size)
        round_index_query(q, index_size, model[t.KV_FP8] != 0)


@jit
def store_window(model, real, layer, token, kv):
    """Norm, rotate and store the window row of one token; `kv` is overwritten."""
    position = i64_at(model[t.POSITIONS])[token]
    size, rope = model[t.HEAD_DIM], model[t.ROPE_DIM]
    cos, sin = rope_row(model, layer, position)
    scale_row(kv, rms_factor(kv, size, real[t.NORM_EPS]), layer[t.KV_NORM], kv, size)
    rotate(kv + (size - rope) * 4, cos, sin, rope // 2, F1)
    data, scales = window_place(model, layer, i64_at(model[t.SEQUENCES])[token], position)
    store_entry(kv, data, scales, size, rope, model[t.KV_FP8] != 0)


@jit
def project_tile(model, real, layer, scratch, lo, hi):
    """Stage for tokens [lo, hi), at most TILE of them."""
    hidden, rank, size = model[t.HIDDEN], model[t.Q_LORA], model[t.HEAD_DIM]
    fn, element = layer[t.HC_ATTN], layer[t.HC_ATTN_ELEMENT]
    base, scale = layer[t.HC_ATTN_BASE], layer[t.HC_ATTN_SCALE]
    mix_streams(model, real, scratch, fn, element, base, scale, layer[t.ATTN_NORM], lo, hi)
    count, x, xq = hi - lo, scratch[t.X], scratch[t.XQ]
    quantise = model[t.ACT_FP8] != 0
    for r in range(count):
        if quantise:
            round_activations(x + r * hidden * 4, xq + r * hidden * 4, hidden)
        else:
            copy_row(x + r * hidden * 4, xq + r * hidden * 4, hidden)
    down, step = scratch[t.DOWN_OUT], (rank + size + LANES - 1) // LANES * LANES * 4
    linear(xq, hidden * 4, layer[t.DOWN], layer[t.DOWN_ELEMENT], down, step, count, hidden, rank + size)
    latent = scratch[t.LATENT]
    for r in range(count):
        row = down + r * step
        target = latent + r * rank * 4
        scale_row(row, rms_factor(row, rank, real[t.NORM_EPS]), layer[t.Q_NORM], target, rank)
        if quantise:
            round_activations(target, target, rank)
        store_window(model, real, layer, lo + r, row + rank * 4)
    query = model[t.QUERY] + lo * model[t.QUERY_STEP]
    columns = layer[t.UP_COLUMNS]
    linear(latent, rank * 4, layer[t.UP], layer[t.UP_ELEMENT], query, model[t.QUERY_STEP], count, rank, columns)
    for token in range(lo, hi):
        finish_queries(model, real, layer, token)
    if layer[t.EXTRA_COLUMNS] > 0:
        raw = model[t.RAW] + lo * model[t.RAW_STEP]
        columns = layer[t.EXTRA_COLUMNS]
        linear(x, hidden * 4, layer[t.EXTRA], layer[t.EXTRA_ELEMENT], raw, model[t.RAW_STEP], count, hidden, columns)
    scale_head_weights(model, real, layer, lo, hi)


@jit
def scale_head_weights(model, real, layer, lo, hi):
    """Fold both scales into the indexer's head weights, the last columns of the raw row."""
    if layer[t.RATIO] != 4:
        return
    heads = model[t.INDEX_HEADS]
    for token in range(lo, hi):
        row = model[t.RAW] + token * model[t.RAW_STEP]
        weights = f32_at(row + (layer[t.EXTRA_COLUMNS] - heads) * 4)
        for head in range(heads):
            weights[head] = np.float32(weights[head] * real[t.INDEX_SCALE_FACTOR])
