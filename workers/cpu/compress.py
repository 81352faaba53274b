"""Second stage of a layer: the compressed entries that this step finishes, and the state rings.

An entry's source rows come from the step's raw rows or, for tokens of earlier steps, from the sequence's ring. Entries
read rings that `store_rings` overwrites: all entries of a layer are pooled before any ring is written.
"""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.compile import jit
from workers.cpu.project import rope_row, row_place
from workers.cpu.rows import (
    F0,
    F1,
    ZERO,
    copy_row,
    hadamard,
    rms_factor,
    rotate,
    scale_row,
    store_entry,
    store_index_key,
)
from workers.cpu.simd import exp, f32_at, i64_at

LOWEST = np.float32(-3.0e38)
"""Start of a running maximum: finite, so that differences stay defined."""


@jit
def source_row(model, token, position, column, ring, ring_unit, ring_rows, row_bytes):
    """Address of the raw row (at `column`) of an earlier or equal position of the token's sequence."""
    sequence = i64_at(model[t.SEQUENCES])[token]
    start = i64_at(model[t.START])[sequence]
    if position >= start:
        row = i64_at(model[t.CU_STARTS])[sequence] + position - start
        return model[t.RAW] + row * model[t.RAW_STEP] + column * 4
    return ring + i64_at(model[t.SLOTS])[sequence] * ring_unit + (position % ring_rows) * row_bytes


@jit
def raise_peak(score, ape, peak, size):
    """Running maximum of biased scores per channel."""
    s, a, m = f32_at(score), f32_at(ape), f32_at(peak)
    for i in range(size):
        value = s[i] + a[i]
        m[i] = value if value > m[i] else m[i]


@jit
def add_weighted(kv, score, ape, peak, total, out, size):
    """Add one row's softmax terms: `total += e`, `out += e * kv` with e = exp(score + ape - peak)."""
    v, s, a, m = f32_at(kv), f32_at(score), f32_at(ape), f32_at(peak)
    z, o = f32_at(total), f32_at(out)
    for i in range(size):
        e = exp((s[i] + a[i]) - m[i])
        z[i] += e
        o[i] += e * v[i]


@jit
def pool_rows(model, layer, scratch, token, column, size, ape, ring, ring_unit):
    """Softmax-weighted sum of the entry that `token` finishes, [size] into scratch POOL_TOTAL."""
    ratio = layer[t.RATIO]
    parts = 2 if ratio == 4 else 1
    span, width = ratio * parts, size * parts
    peak, total, out = scratch[t.POOL_MAX], scratch[t.POOL_SUM], scratch[t.POOL_TOTAL]
    m, z, o = f32_at(peak), f32_at(total), f32_at(out)
    for i in range(size):
        m[i], z[i], o[i] = LOWEST, F0, F0
    last = i64_at(model[t.POSITIONS])[token]
    for passing in range(2):
        for i in range(span):
            position = last - span + 1 + i
            if position < 0:
                continue
            half = size * 4 if (parts == 2 and i >= ratio) else 0
            row = source_row(model, token, position, column, ring, ring_unit, span, 2 * width * 4)
            score, bias = row + width * 4 + half, ape + (position % ratio) * width * 4 + half
            if passing == 0:
                raise_peak(score, bias, peak, size)
            else:
                add_weighted(row + half, score, bias, peak, total, out, size)
    for i in range(size):
        o[i] = o[i] / z[i]


@jit
def finish_entry(model, real, layer, scratch, token, size, norm):
    """Norm and rotation of the pooled entry in scratch POOL_TOTAL, in place."""
    out, rope = scratch[t.POOL_TOTAL], model[t.ROPE_DIM]
    first = i64_at(model[t.POSITIONS])[token] + 1 - layer[t.RATIO]
    cos, sin = rope_row(model, layer, first)
    scale_row(out, rms_factor(out, size, real[t.NORM_EPS]), norm, out, size)
    rotate(out + (size - rope) * 4, cos, sin, rope // 2, F1)


@jit
def entry_place(model, layer, sequence, entry):
    """Addresses of a compressed entry in the layer's C4 or C128 pool."""
    pages = i64_at(model[t.FULL_PAGES] + sequence * model[t.NUM_PAGES] * 8)
    four = layer[t.RATIO] == 4
    rows = model[t.C4_ROWS] if four else model[t.C128_ROWS]
    unit = model[t.C4_UNIT] if four else model[t.C128_UNIT]
    scales = model[t.C4_SCALES] if four else model[t.C128_SCALES]
    pool, page = layer[t.ENTRY_POOL], pages[entry // rows]
    return row_place(pool, unit, rows, model[t.ENTRY_DATA], scales, model[t.ENTRY_SCALE], page, entry)


@jit
def index_place(model, layer, sequence, entry):
    """Addresses of an indexer key."""
    pages = i64_at(model[t.FULL_PAGES] + sequence * model[t.NUM_PAGES] * 8)
    rows = model[t.INDEX_ROWS]
    return row_place(
        layer[t.INDEX_POOL],
        model[t.INDEX_UNIT],
        rows,
        model[t.INDEX_DATA],
        model[t.INDEX_SCALES],
        model[t.INDEX_SCALE],
        pages[entry // rows],
        entry,
    )


@jit
def compress_tokens(model, real, layer, scratch, lo, hi):
    """Entries number [lo, hi) of those that this step finishes in the layer's ratio."""
    four = layer[t.RATIO] == 4
    size, fp8 = model[t.HEAD_DIM], model[t.KV_FP8] != 0
    finished = i64_at(model[t.FINISHED_4] if four else model[t.FINISHED_128])
    ring_unit = model[t.C4_RING_UNIT] if four else model[t.C128_RING_UNIT]
    out = scratch[t.POOL_TOTAL]
    for number in range(lo, hi):
        token = finished[number]
        sequence = i64_at(model[t.SEQUENCES])[token]
        entry = i64_at(model[t.POSITIONS])[token] // layer[t.RATIO]
        pool_rows(model, layer, scratch, token, ZERO, size, layer[t.APE], layer[t.RING_POOL], ring_unit)
        finish_entry(model, real, layer, scratch, token, size, layer[t.ENTRY_NORM])
        data, scales = entry_place(model, layer, sequence, entry)
        store_entry(out, data, scales, size, model[t.ROPE_DIM], fp8)
        if not four:
            continue
        index_size, ring = model[t.INDEX_DIM], layer[t.INDEX_RING_POOL]
        column = 4 * size
        unit = model[t.INDEX_RING_UNIT]
        pool_rows(model, layer, scratch, token, column, index_size, layer[t.INDEX_APE], ring, unit)
        finish_entry(model, real, layer, scratch, token, index_size, layer[t.INDEX_NORM])
        hadamard(out, index_size)
        data, scales = index_place(model, layer, sequence, entry)
        store_index_key(out, data, scales, index_size, fp8)


@jit
def store_rings(model, layer):
    """Raw rows of each sequence's last tokens into its rings."""
    ratio = layer[t.RATIO]
    if ratio == 0:
        return
    four = ratio == 4
    span = 8 if four else 128
    width = (4 if four else 2) * model[t.HEAD_DIM]
    unit = model[t.C4_RING_UNIT] if four else model[t.C128_RING_UNIT]
    index_width = 4 * model[t.INDEX_DIM]
    positions, sequences = i64_at(model[t.POSITIONS]), i64_at(model[t.SEQUENCES])
    ends, slots = i64_at(model[t.ENDS]), i64_at(model[t.SLOTS])
    for token in range(model[t.NUM_TOKENS]):
        position, sequence = positions[token], sequences[token]
        if position < ends[sequence] - span:
            continue
        raw, slot, offset = model[t.RAW] + token * model[t.RAW_STEP], slots[sequence], position % span
        copy_row(raw, layer[t.RING_POOL] + slot * unit + offset * width * 4, width)
        if four:
            place = layer[t.INDEX_RING_POOL] + slot * model[t.INDEX_RING_UNIT] + offset * index_width * 4
            copy_row(raw + width * 4, place, index_width)
