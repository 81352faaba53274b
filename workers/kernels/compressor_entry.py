"""Device functions of the compressor: pool one entry, finish it, store its bytes. Arithmetic in fp32.

Owns: pooling and finishing (`workers/reference/compressor.py`) and the stored bytes of entries and indexer keys
(`workers/reference/kv_format.py`) for one entry in one program. Does not own: which tokens finish entries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.formats import f32_to_e4m3, pow2_reciprocal, pow2_scale_ceil

STEP = tl.constexpr(8)
"""Rows of a C128 entry that prefill pools at a time."""


@triton.jit
def _pooled_c4(rows, state, slot, token, position, start, ape, ROW: tl.constexpr, HD: tl.constexpr, PDL: tl.constexpr):
    """fp32 [HD]: the entry whose last token is `position` = 4w + 3, from A parts of 4w-4 .. 4w-1 and B of 4w .. 4w+3.

    Row layout kvA | kvB | scA | scB. Rows before `start` come from the ring, rows before the sequence count nothing.
    A row is a vector of its own, so that a thread holds its channels of every row and nothing crosses threads. PDL, for
    decode: only the last row comes from the launch before, and is waited for.
    """
    channel = tl.arange(0, HD)
    kvs = ()
    scores = ()
    top = tl.full((HD,), float("-inf"), tl.float32)
    for r in tl.static_range(8):
        column = (r // 4) * HD + channel  # A for the first four rows, B for the last four
        source = position - 7 + r
        in_chunk = rows + (token - 7 + r).to(tl.int64) * ROW
        in_ring = state + slot.to(tl.int64) * (32 * HD) + (source & 7) * (4 * HD)
        at = tl.where(source >= start, in_chunk, in_ring) + column
        present = (source >= 0) & (channel >= 0)
        if PDL and r == 7:
            tl.extra.cuda.gdc_wait()
        score = tl.load(at + 2 * HD, mask=present, other=float("-inf"))
        score += tl.load(ape + (r % 4) * (2 * HD) + column)
        kvs = kvs + (tl.load(at, mask=present, other=0.0),)  # noqa: RUF005
        scores = scores + (score,)  # noqa: RUF005
        top = tl.maximum(top, score)
    total = tl.zeros((HD,), tl.float32)
    pooled = tl.zeros((HD,), tl.float32)
    for r in tl.static_range(8):
        weight = tl.exp(scores[r] - top)
        total += weight
        pooled += weight * kvs[r]
    return pooled / total


@triton.jit
def _pooled_c128(rows, state, slot, token, position, start, ape, ROW: tl.constexpr, HD: tl.constexpr):
    """fp32 [HD]: the entry of tokens position-127 .. position, by an online softmax over STEP rows at a time."""
    column = tl.arange(0, HD)[None, :]
    top = tl.full((HD,), float("-inf"), tl.float32)
    total = tl.zeros((HD,), tl.float32)
    pooled = tl.zeros((HD,), tl.float32)
    for first in range(0, 128, STEP):
        r = first + tl.arange(0, STEP)[:, None]
        source = position - 127 + r
        in_chunk = rows + (token - 127 + r).to(tl.int64) * ROW + column
        in_ring = state + slot.to(tl.int64) * (256 * HD) + ((source & 127) * (2 * HD) + column)
        at = tl.where(source >= start, in_chunk, in_ring)
        kv = tl.load(at)
        score = tl.load(at + HD) + tl.load(ape + r * HD + column)
        new_top = tl.maximum(top, tl.max(score, 0))
        keep = tl.exp(top - new_top)
        weight = tl.exp(score - new_top[None, :])
        total = total * keep + tl.sum(weight, 0)
        pooled = pooled * keep + tl.sum(weight * kv, 0)
        top = new_top
    return pooled / total


@triton.jit
def _pooled_c128_part(
    rows,
    state,
    slot,
    token,
    position,
    ape,
    part,
    ROW: tl.constexpr,
    HD: tl.constexpr,
    WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Decode, fp32 [WIDTH]: channels from part * WIDTH on, all rows at once; only the last is not in the ring."""
    r = tl.arange(0, 128)[:, None]
    column = part * WIDTH + tl.arange(0, WIDTH)[None, :]
    at = state + slot.to(tl.int64) * (256 * HD) + r * (2 * HD) + column  # position % 128 == 127: row r is its own
    kv = tl.load(at, mask=r < 127, other=0.0)
    score = tl.load(at + HD, mask=r < 127, other=0.0)
    offset = tl.load(ape + r * HD + column)
    if PDL:
        tl.extra.cuda.gdc_wait()
    own = rows + token.to(tl.int64) * ROW + column
    kv = tl.where(r == 127, tl.load(own), kv)
    score = tl.where(r == 127, tl.load(own + HD), score) + offset
    weight = tl.exp(score - tl.max(score, 0)[None, :])
    return tl.sum(weight * kv, 0) / tl.sum(weight, 0)


@triton.jit
def finish_operands(tensors, rope_table, pages, position, RATIO: tl.constexpr, HD: tl.constexpr, RD: tl.constexpr):
    """(page, norm weight [HD], cos, sin [HD / 2]) for the entry whose last token is `position`: loaded before pooling.

    The entry is rotated at its first own token. Arguments as in `finish_pooled`.
    """
    pair = tl.arange(0, HD // 2) - (HD - RD) // 2
    at = rope_table + (position + 1 - RATIO) * RD + pair
    cos = tl.load(at, mask=pair >= 0, other=1.0)
    sin = tl.load(at + RD // 2, mask=pair >= 0, other=0.0)
    return tl.load(pages + position // 256), tl.load(tensors[3] + tl.arange(0, HD)), cos, sin


@triton.jit
def _finished(pooled, gamma, cos, sin, eps, HD: tl.constexpr):
    """RMSNorm, then rope of the last dimensions; fp32 [HD]."""
    inverse = tl.rsqrt(tl.sum(pooled * pooled, 0) / HD + eps)
    even, odd = tl.split(tl.reshape(pooled * inverse * gamma, (HD // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), (HD,))


@triton.jit
def to_bf16(x, HW: tl.constexpr):
    """Nearest bf16 of finite fp32, ties to even. NOTE: the interpreter's own cast cuts the low bits off."""
    if HW:
        value = x.to(tl.bfloat16)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = bits.to(tl.uint32).to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value


@triton.jit
def _store_entry(
    entry,
    entries,
    page,
    row,
    PAGE_ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    HD: tl.constexpr,
    RD: tl.constexpr,
    HW: tl.constexpr,
):
    """Write one entry: e4m3 nope and bf16 rope into the page's data plane, scale bytes (padded by 0) into the other."""
    NOPE: tl.constexpr = HD - RD
    DATA: tl.constexpr = NOPE + 2 * RD
    GROUPS: tl.constexpr = HD // 64
    unit = page.to(tl.int64) * STRIDE
    g = tl.arange(0, GROUPS)
    d = g[:, None] * 64 + tl.arange(0, 64)[None, :]
    groups = tl.reshape(entry, (GROUPS, 64))
    scale, byte = pow2_scale_ceil(tl.max(tl.abs(groups), 1), 448.0, 1e-4)
    codes = f32_to_e4m3(groups * pow2_reciprocal(scale)[:, None], HW)
    tl.store(entries + unit + row * DATA + d, codes, mask=d < NOPE)
    halves = entries.to(tl.pointer_type(tl.bfloat16)) + unit // 2 + row * (DATA // 2)
    tl.store(halves + NOPE // 2 + (d - NOPE), to_bf16(groups, HW), mask=d >= NOPE)
    scales = entries + unit + PAGE_ROWS * DATA + row * 8
    tl.store(scales + g, tl.where(g < NOPE // 64, byte, 0).to(tl.uint8), mask=g < 8)
    if GROUPS < 8:
        pad = tl.arange(0, 8)
        tl.store(scales + pad, tl.zeros((8,), tl.uint8), mask=pad >= GROUPS)


@triton.jit
def sylvester_sign(i, j):
    """fp32 (-1) ** popcount(i & j): entries of the Walsh-Hadamard matrix, for indices below 256."""
    bits = i & j
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return (1 - 2 * (bits & 1)).to(tl.float32)


@triton.jit
def _hadamard(x, SIZE: tl.constexpr):
    """Orthonormal Walsh-Hadamard transform of fp32 [SIZE], SIZE = A * 16: H[A] X H[16] of X [A, 16]."""
    A: tl.constexpr = SIZE // 16
    a = tl.arange(0, A)
    b = tl.arange(0, 16)
    inner = sylvester_sign(b[:, None], b[None, :])[None, :, :]  # [1, 16, 16]
    outer = sylvester_sign(a[:, None], a[None, :])[:, :, None]  # [A, A, 1]
    x = tl.sum(tl.reshape(x, (A, 16))[:, :, None] * inner, 1)  # [A, 16]
    x = tl.sum(x[:, None, :] * outer, 0)  # [A, 16]
    return tl.reshape(x, (SIZE,)) * (SIZE**-0.5)


@triton.jit
def _store_index_key(
    key, keys, page, row, PAGE_ROWS: tl.constexpr, STRIDE: tl.constexpr, DI: tl.constexpr, HW: tl.constexpr
):
    """Hadamard transform, then e4m3 codes with one fp32 scale per key, not a power of two."""
    key = _hadamard(key, DI)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(key), 0), 1e-4), 448.0)
    unit = page.to(tl.int64) * STRIDE
    codes = f32_to_e4m3(tl.div_rn(key, tl.broadcast_to(scale, key.shape)), HW)
    tl.store(keys + unit + row * DI + tl.arange(0, DI), codes)
    tl.store(keys.to(tl.pointer_type(tl.float32)) + unit // 4 + PAGE_ROWS * (DI // 4) + row, scale)


@triton.jit
def finish_pooled(pooled, tensors, operands, position, eps, RATIO: tl.constexpr, SHAPE: tl.constexpr):
    """Finish and store the pooled entry whose last token is `position`, if its page is mapped.

    tensors: (ring as fp32, entries u8, ape, norm) of the compressor; operands: of `finish_operands`.
    SHAPE: (bytes of a page of entries, hd, rd, whether they are indexer keys, HW).
    """
    STRIDE: tl.constexpr = SHAPE[0]
    HD: tl.constexpr = SHAPE[1]
    RD: tl.constexpr = SHAPE[2]
    IS_KEY: tl.constexpr = SHAPE[3]
    HW: tl.constexpr = SHAPE[4]
    PAGE_ROWS: tl.constexpr = 256 // RATIO
    page, gamma, cos, sin = operands
    entry = _finished(pooled, gamma, cos, sin, eps, HD)
    row = (position // RATIO) % PAGE_ROWS
    if page >= 0:
        if IS_KEY:
            _store_index_key(entry, tensors[1], page, row, PAGE_ROWS, STRIDE, HD, HW)
        else:
            _store_entry(entry, tensors[1], page, row, PAGE_ROWS, STRIDE, HD, RD, HW)


@triton.jit
def finish_token(
    rows, tensors, rope_table, pages, slot, token, position, start, eps,
    RATIO: tl.constexpr, ROW: tl.constexpr, SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Pool, finish and store the entry whose last token is `position`; `tensors` and SHAPE as in `finish_pooled`."""
    HD: tl.constexpr = SHAPE[1]
    operands = finish_operands(tensors, rope_table, pages, position, RATIO, HD, SHAPE[2])
    if RATIO == 4:
        pooled = _pooled_c4(rows, tensors[0], slot, token, position, start, tensors[2], ROW, HD, PDL)
    else:
        pooled = _pooled_c128(rows, tensors[0], slot, token, position, start, tensors[2], ROW, HD)
    finish_pooled(pooled, tensors, operands, position, eps, RATIO, SHAPE)


@triton.jit
def finish_part(
    rows, tensors, rope_table, pages, slot, token, position, eps, work, part,
    ROW: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Decode, C128: pool WIDTH channels of the entry; the last of the HD / WIDTH programs to arrive finishes it.

    work: fp32 [T, HD] for the parts, and int32 [T] counters, zero before and after.
    """
    HD: tl.constexpr = SHAPE[1]
    parts, arrived = work
    operands = finish_operands(tensors, rope_table, pages, position, 128, HD, SHAPE[2])
    pooled = _pooled_c128_part(rows, tensors[0], slot, token, position, tensors[2], part, ROW, HD, WIDTH, PDL)
    tl.store(parts + token * HD + part * WIDTH + tl.arange(0, WIDTH), pooled)
    tl.debug_barrier()  # every thread's stores come before the counter's release
    if tl.atomic_add(arrived + token, 1, sem="acq_rel", scope="gpu") == HD // WIDTH - 1:
        tl.store(arrived + token, 0)
        whole = tl.load(parts + token * HD + tl.arange(0, HD), cache_modifier=".cg")
        finish_pooled(whole, tensors, operands, position, eps, 128, SHAPE)


@triton.jit
def write_ring_row(rows, state, slot, token, position, ROW: tl.constexpr, RING: tl.constexpr, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    at = state + (slot.to(tl.int64) * RING + position % RING) * WIDTH
    tl.store(at + column, tl.load(rows + token.to(tl.int64) * ROW + column))
