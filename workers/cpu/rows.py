"""Row arithmetic of the CPU path: matrix products over packed panels, norms, rotation, and number formats.

Every function works on raw addresses (int64, bytes) of contiguous fp32 rows unless it says otherwise, allocates nothing
and keeps no state. Rounding rules are those of `workers/reference/quant.py`, bit for bit.
"""

from __future__ import annotations

import math

import numpy as np

from workers.cpu.block_product import FP4, MAX_VECTORS, PANEL, block_product, has_block
from workers.cpu.compile import jit, jit_sums
from workers.cpu.simd import (
    LANES,
    bf16_decode,
    bf16_encode,
    e4m3_decode,
    e4m3_encode,
    exp,
    f32_at,
    scale_byte,
    scale_value,
    u8_at,
    u16_at,
)

F0, F1, F2 = np.float32(0), np.float32(1), np.float32(2)
AMAX_FLOOR, E4M3_MAX = np.float32(1e-4), np.float32(448)
ACT_GROUP, KV_GROUP = 128, 64
ZERO, ONE, FLOAT = np.int64(0), np.int64(1), np.int64(4)
"""Arguments as int64: a plain literal would compile its own copy of the callee."""

WIDEST_OF_8 = max(v for v in range(1, MAX_VECTORS + 1) if has_block(8, v))


@jit
def product(a, row_step, k_step, b, element, panel_step, row_bytes, c, c_step, num_rows, size, columns):
    """`c[num_rows, columns] = a @ b` where b lies in column panels of `PANEL` (the last one narrower).

    Steps in bytes. `panel_step` is the distance of full panels, `row_bytes` that of a panel's rows (0: its own width).
    Columns are rounded up to whole vectors: `c` must have room for them.
    """
    for first in range(0, columns, PANEL):
        width = min(MAX_VECTORS, (columns - first + LANES - 1) // LANES)
        step = row_bytes if row_bytes > 0 else width * LANES * element
        panel, out = b + (first // PANEL) * panel_step, c + first * 4
        vectors = MAX_VECTORS
        while width > 0:
            while vectors > width:
                vectors //= 2
            product_block(a, row_step, k_step, panel, element, step, out, c_step, num_rows, size, vectors)
            width -= vectors
            panel, out = panel + vectors * LANES * element, out + vectors * LANES * 4


@jit
def product_block(a, row_step, k_step, b, element, b_step, c, c_step, num_rows, size, vectors):
    """`product` for `vectors` whole vectors of columns: all rows, in blocks of 8, 4, 2 and 1."""
    code = vectors * 8 + element
    rows, m = 8 if vectors <= WIDEST_OF_8 else 4, 0
    while m < num_rows:
        while m + rows > num_rows:
            rows //= 2
        block_product(rows * 64 + code, a + m * row_step, row_step, k_step, b, b_step, c + m * c_step, c_step, size)
        m += rows


@jit
def linear(a, row_step, weight, element, c, c_step, num_rows, size, columns):
    """`product` with packed weight panels (`workers/cpu/panels.py`) and rows of contiguous floats."""
    step = (size // 2 + size // 32) * PANEL if element == FP4 else size * PANEL * element
    product(a, row_step, FLOAT, weight, element, step, ZERO, c, c_step, num_rows, size, columns)


@jit_sums
def square_sum(x, size):
    """Sum of squares of a row."""
    p = f32_at(x)
    total = F0
    for i in range(size):
        total += p[i] * p[i]
    return total


@jit
def rms_factor(x, size, eps):
    """1 / rms of a row."""
    return F1 / np.sqrt(square_sum(x, size) / np.float32(size) + eps)


@jit
def scale_row(x, factor, weight, out, size):
    """`out = x * factor * weight`; weight 0 means none. `out` may be `x`."""
    source, target = f32_at(x), f32_at(out)
    if weight == 0:
        for i in range(size):
            target[i] = source[i] * factor
        return
    w = f32_at(weight)
    for i in range(size):
        target[i] = source[i] * factor * w[i]


@jit
def rotate(x, cos, sin, half, sign):
    """Rotate `half` interleaved pairs in place; sign -1 undoes it."""
    p, c, s = f32_at(x), f32_at(cos), f32_at(sin)
    for i in range(half):
        even, odd = p[2 * i], p[2 * i + 1]
        turn = s[i] * sign
        p[2 * i] = even * c[i] - odd * turn
        p[2 * i + 1] = odd * c[i] + even * turn


@jit
def hadamard(x, size):
    """Orthonormal Walsh-Hadamard transform in place; size is a power of two."""
    p = f32_at(x)
    half = 1
    while half < size:
        for first in range(0, size, 2 * half):
            for i in range(first, first + half):
                low, high = p[i], p[i + half]
                p[i], p[i + half] = low + high, low - high
        half *= 2
    factor = np.float32(np.float64(size) ** -0.5)
    for i in range(size):
        p[i] *= factor


@jit_sums
def largest(x, size):
    """Largest magnitude of a row."""
    p = f32_at(x)
    top = F0
    for i in range(size):
        value = abs(p[i])
        top = value if value > top else top
    return top


@jit
def group_scale(x, size):
    """e8m0 byte of one group: power of two at or above max(amax, 1e-4) / 448."""
    return scale_byte(max(largest(x, size), AMAX_FLOOR) / E4M3_MAX)


@jit
def round_activations(x, out, size):
    """A linear's input as e4m3 with a power-of-two scale per 128, dequantised. `out` may be `x`."""
    source, target = f32_at(x), f32_at(out)
    for first in range(0, size, ACT_GROUP):
        count = min(ACT_GROUP, size - first)
        byte = group_scale(x + 4 * first, count)
        scale, inverse = scale_value(byte), scale_value(np.uint8(254 - byte))
        for i in range(first, first + count):
            target[i] = e4m3_decode(e4m3_encode(source[i] * inverse)) * scale


@jit
def copy_row(x, out, size):
    """`size` floats."""
    source, target = f32_at(x), f32_at(out)
    for i in range(size):
        target[i] = source[i]


@jit
def store_entry(x, data, scales, size, rope, fp8):
    """Write one KV entry of `size` floats as a pool row: data plane at `data`, scale plane at `scales`."""
    if not fp8:
        copy_row(x, data, size)
        return
    nope = size - rope
    source, codes, scale_bytes = f32_at(x), u8_at(data), u8_at(scales)
    groups = nope // KV_GROUP
    for group in range(groups):
        byte = group_scale(x + 4 * KV_GROUP * group, KV_GROUP)
        scale_bytes[group] = byte
        inverse = scale_value(np.uint8(254 - byte))
        for i in range(group * KV_GROUP, (group + 1) * KV_GROUP):
            codes[i] = e4m3_encode(source[i] * inverse)
    for group in range(groups, (groups + 7) // 8 * 8):
        scale_bytes[group] = np.uint8(0)
    halves = u16_at(data + nope)
    for i in range(rope):
        halves[i] = bf16_encode(source[nope + i])


@jit
def load_entry(data, scales, out, size, rope, fp8):
    """Inverse of `store_entry`."""
    if not fp8:
        copy_row(data, out, size)
        return
    nope = size - rope
    target, codes, scale_bytes = f32_at(out), u8_at(data), u8_at(scales)
    for group in range(nope // KV_GROUP):
        scale = scale_value(scale_bytes[group])
        for i in range(group * KV_GROUP, (group + 1) * KV_GROUP):
            target[i] = e4m3_decode(codes[i]) * scale
    halves = u16_at(data + nope)
    for i in range(rope):
        target[nope + i] = bf16_decode(halves[i])


@jit
def store_index_key(x, data, scales, size, fp8):
    """Write one indexer key (after Hadamard): e4m3 codes and one fp32 scale amax / 448, or fp32."""
    if not fp8:
        copy_row(x, data, size)
        return
    scale = max(largest(x, size), AMAX_FLOOR) / E4M3_MAX
    source, codes = f32_at(x), u8_at(data)
    for i in range(size):
        codes[i] = e4m3_encode(source[i] / scale)
    f32_at(scales)[0] = scale


@jit
def load_index_key(data, scales, out, size, fp8):
    """Inverse of `store_index_key`."""
    if not fp8:
        copy_row(data, out, size)
        return
    scale = f32_at(scales)[0]
    target, codes = f32_at(out), u8_at(data)
    for i in range(size):
        target[i] = e4m3_decode(codes[i]) * scale


@jit
def round_index_query(x, size, fp8):
    """An indexer query (after Hadamard) through its number format, in place."""
    if not fp8:
        return
    scale = max(largest(x, size), AMAX_FLOOR) / E4M3_MAX
    p = f32_at(x)
    for i in range(size):
        p[i] = e4m3_decode(e4m3_encode(p[i] / scale)) * scale


@jit
def sigmoid(x):
    """Logistic function."""
    return F1 / (F1 + exp(-x))


@jit
def swiglu(gate, up, out, size, limit, weight):
    """`out = silu(min(gate, limit)) * clamp(up, -limit, limit) * weight`."""
    g, u, target = f32_at(gate), f32_at(up), f32_at(out)
    for i in range(size):
        a = limit if g[i] > limit else g[i]
        b = limit if u[i] > limit else (-limit if u[i] < -limit else u[i])
        target[i] = a * (F1 / (F1 + exp(-a))) * b * weight


@jit
def sqrt_softplus(x):
    """Router score of one logit; linear above 20 as in torch."""
    if x > np.float32(20):
        return np.sqrt(x)
    return np.float32(math.sqrt(math.log1p(math.exp(x))))
