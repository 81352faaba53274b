"""Device code of mHC up to the partial sums: embedding, write-back to the streams, products with `fn`.

`workers/kernels/mhc.py` says what it computes and launches it for decode, `mhc_prefill.py` for prefill.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def embed_streams_kernel(token_ids, embed, streams, vocab, D: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, D / BLOCK)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < D
    token_id = tl.load(token_ids + token)
    known = tl.minimum(tl.maximum(token_id, 0), vocab - 1).to(tl.int64)
    row = tl.load(embed + known * D + channel, mask=inside & (token_id >= 0), other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    for stream in tl.static_range(4):
        tl.store(streams + (token * 4 + stream) * D + channel, row, mask=inside)


@triton.jit
def _cut(x):
    """fp32 `x` without the bits that bf16 has no place for."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _as_they_are(x):
    """bf16 of fp32 numbers that bf16 can hold."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _fn_parts(fn, first, C: tl.constexpr, D: tl.constexpr, NUM_FN: tl.constexpr, WIDEN: tl.constexpr):
    """Rows of `fn` at channels first..first + C of the four streams, `[4C, 32]`, as three bf16 blocks whose exact sum
    they are.

    WIDEN: the fp32 block itself, for the interpreter, whose `tl.dot` takes bf16 for integers.
    """
    row = tl.arange(0, 32)[None, :]
    flat = tl.arange(0, 4 * C)
    column = (flat // C) * D + first + flat % C
    weight = tl.load(fn + row * (4 * D) + column[:, None], mask=row < NUM_FN, other=0.0)
    if WIDEN:
        return (weight,)
    else:
        # Eight bits of the significand each, cut off: a conversion that rounds costs an instruction of a slow unit.
        high = _cut(weight)
        rest = weight - high
        middle = _cut(rest)
        low = rest - middle
        return _as_they_are(low), _as_they_are(middle), _as_they_are(high)


@triton.jit
def _products(x0, x1, x2, x3, parts, WIDEN: tl.constexpr):
    """The streams `[TM, C]` side by side, times `parts [4C, 32]`: every product is exact, sums are fp32."""
    TM: tl.constexpr = x0.shape[0]
    C: tl.constexpr = x0.shape[1]
    # [TM, C, stream % 2, stream // 2] to [TM, stream, C].
    pairs = tl.join(tl.join(x0, x1), tl.join(x2, x3))
    x = tl.reshape(tl.permute(pairs, (0, 3, 2, 1)), (TM, 4 * C))
    if WIDEN:
        return tl.dot(x.to(tl.float32), parts[0], input_precision="ieee")
    else:
        # Three chains that advance side by side; Triton would otherwise put them one after the other.
        low, middle = _kept_apart(tl.dot(x, parts[0])), _kept_apart(tl.dot(x, parts[1]))
        return _kept_apart(tl.dot(x, parts[2])) + (middle + low)


@triton.jit
def _kept_apart(x):
    """fp32 `x`, which Triton will not take for the start value of another product."""
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _gate(gates, token, inside, index: tl.constexpr, width: tl.constexpr):
    """One gate of every token, `[TM, 1]`."""
    return tl.load(gates + token * width + index, mask=inside, other=0.0)[:, None]


@triton.jit
def _loaded_gates(post, comb, token, inside):
    """For each new stream: the gate of the output and those of the four old streams (a column of comb)."""
    p0, p1 = _gate(post, token, inside, 0, 4), _gate(post, token, inside, 1, 4)
    p2, p3 = _gate(post, token, inside, 2, 4), _gate(post, token, inside, 3, 4)
    c00, c01 = _gate(comb, token, inside, 0, 16), _gate(comb, token, inside, 1, 16)
    c02, c03 = _gate(comb, token, inside, 2, 16), _gate(comb, token, inside, 3, 16)
    c10, c11 = _gate(comb, token, inside, 4, 16), _gate(comb, token, inside, 5, 16)
    c12, c13 = _gate(comb, token, inside, 6, 16), _gate(comb, token, inside, 7, 16)
    c20, c21 = _gate(comb, token, inside, 8, 16), _gate(comb, token, inside, 9, 16)
    c22, c23 = _gate(comb, token, inside, 10, 16), _gate(comb, token, inside, 11, 16)
    c30, c31 = _gate(comb, token, inside, 12, 16), _gate(comb, token, inside, 13, 16)
    c32, c33 = _gate(comb, token, inside, 14, 16), _gate(comb, token, inside, 15, 16)
    first, second = (p0, c00, c10, c20, c30), (p1, c01, c11, c21, c31)
    return first, second, (p2, c02, c12, c22, c32), (p3, c03, c13, c23, c33)


@triton.jit
def _computed_once(x, WIDEN: tl.constexpr):
    """bf16 `x`. Keeps Triton from mixing the streams a second time in the layout of the product's operand, which takes
    every warp through all channels: it moves nothing across assembly with side effects."""
    if not WIDEN:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)
    return x


@triton.jit
def _mixed(gates, out, r0, r1, r2, r3, WIDEN: tl.constexpr):
    """One new stream `[TM, C]` in bf16: `post * out + sum_j comb[j] * R[j]`."""
    new = gates[0] * out
    new += gates[1] * r0
    new += gates[2] * r1
    new += gates[3] * r2
    new += gates[4] * r3
    return _computed_once(new.to(tl.bfloat16), WIDEN)


@triton.jit
def _old_streams(source, mask, D: tl.constexpr):
    """The four streams `[TM, C]` at the pointers `source`."""
    x0 = tl.load(source, mask=mask, other=0.0)
    x1 = tl.load(source + D, mask=mask, other=0.0)
    x2 = tl.load(source + 2 * D, mask=mask, other=0.0)
    x3 = tl.load(source + 3 * D, mask=mask, other=0.0)
    return x0, x1, x2, x3


@triton.jit
def _written_back(
    sub_out, old, source, token, channel, mask, gates, D: tl.constexpr, R: tl.constexpr, WIDEN: tl.constexpr
):
    """The four new streams at some channels, which also go to memory. R = 0: the streams as they are."""
    x0, x1, x2, x3 = old
    if R > 0:
        part = sub_out + token[:, None] * (R * D) + channel[None, :]
        out = tl.load(part, mask=mask, other=0.0).to(tl.float32)
        for i in tl.static_range(1, R):
            out += tl.load(part + i * D, mask=mask, other=0.0).to(tl.float32)
        r0, r1, r2, r3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
        x0 = _mixed(gates[0], out, r0, r1, r2, r3, WIDEN)
        x1 = _mixed(gates[1], out, r0, r1, r2, r3, WIDEN)
        x2 = _mixed(gates[2], out, r0, r1, r2, r3, WIDEN)
        x3 = _mixed(gates[3], out, r0, r1, r2, r3, WIDEN)
        tl.store(source, x0, mask=mask)
        tl.store(source + D, x1, mask=mask)
        tl.store(source + 2 * D, x2, mask=mask)
        tl.store(source + 3 * D, x3, mask=mask)
    return x0, x1, x2, x3


@triton.jit
def _inner_products(x0, x1, x2, x3):
    """`[TM]` each: (0,0), (1,1), (2,2), (3,3), (0,1), (1,2), (2,3), (3,0), (0,2), (1,3)."""
    y0, y1, y2, y3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    squares = tl.sum(y0 * y0, 1), tl.sum(y1 * y1, 1), tl.sum(y2 * y2, 1), tl.sum(y3 * y3, 1)
    beside = tl.sum(y0 * y1, 1), tl.sum(y1 * y2, 1), tl.sum(y2 * y3, 1), tl.sum(y3 * y0, 1)
    return squares + beside + (tl.sum(y0 * y2, 1), tl.sum(y1 * y3, 1))


@triton.jit
def _rows(rows, num_rows, TM: tl.constexpr, HAS_ROWS: tl.constexpr):
    """Index of this program's tokens in `work`, their rows in the streams, and which exist."""
    index = tl.program_id(1) * TM + tl.arange(0, TM)
    inside = index < num_rows
    token = index.to(tl.int64)
    if HAS_ROWS:
        token = tl.maximum(tl.load(rows + index, mask=inside, other=0), 0).to(tl.int64)
    return index.to(tl.int64), token, inside


@triton.jit
def _store_sums(work, index, inside, part, acc, inner, NUM_FN: tl.constexpr, PARTS: tl.constexpr):
    """Partial sums of part `part` of the channels into `work [T, 40, PARTS]`."""
    target = work + index * (40 * PARTS) + part
    row = tl.arange(0, 32)[None, :]
    tl.store(target[:, None] + row * PARTS, acc, mask=inside[:, None] & (row < NUM_FN))
    # One block and one store: ten of them would change layouts, through shared memory, one after the other.
    products = tl.broadcast_to(inner[0][:, None], acc.shape)
    for i in tl.static_range(1, 10):
        products = tl.where(row == i, inner[i][:, None], products)
    tl.store(target[:, None] + (24 + row) * PARTS, products, mask=inside[:, None] & (row < 10))


@triton.jit(do_not_specialize=["num_rows"])
def mix_decode_kernel(
    sub_out,
    streams,
    post,
    comb,
    fn,
    rows,
    work,
    num_rows,
    D: tl.constexpr,
    R: tl.constexpr,
    NUM_FN: tl.constexpr,
    TM: tl.constexpr,
    C: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (D / C, T / TM): one part per program, `fn` on its way before the predecessor has ended, and with it (R > 0)
    streams and gates: those are older than the launch that makes `sub_out`, which waits before it signals. EARLY: the
    launch behind streams weights, and may start at once."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    part = tl.program_id(0)
    channel = part * C + tl.arange(0, C)
    parts = _fn_parts(fn, part * C, C, D, NUM_FN, WIDEN)
    if PDL and R == 0:
        tl.extra.cuda.gdc_wait()
    index, token, inside = _rows(rows, num_rows, TM, HAS_ROWS)
    gates = _loaded_gates(post, comb, token, inside) if R > 0 else ()
    source = streams + token[:, None] * (4 * D) + channel[None, :]
    old = _old_streams(source, inside[:, None], D)
    if PDL and R > 0:
        tl.extra.cuda.gdc_wait()
    x0, x1, x2, x3 = _written_back(sub_out, old, source, token, channel, inside[:, None], gates, D, R, WIDEN)
    acc = _products(x0, x1, x2, x3, parts, WIDEN)
    if PDL and not EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    _store_sums(work, index, inside, part, acc, _inner_products(x0, x1, x2, x3), NUM_FN, D // C)


@triton.jit(do_not_specialize=["num_rows"])
def mix_prefill_kernel(
    sub_out,
    streams,
    post,
    comb,
    fn,
    rows,
    work,
    num_rows,
    D: tl.constexpr,
    R: tl.constexpr,
    NUM_FN: tl.constexpr,
    TM: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (PARTS, T / TM): a program walks through the channels of its part."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    part = tl.program_id(0)
    index, token, inside = _rows(rows, num_rows, TM, HAS_ROWS)
    gates = _loaded_gates(post, comb, token, inside) if R > 0 else ()
    acc = tl.zeros((TM, 32), tl.float32)
    zero = tl.zeros((TM,), tl.float32)
    g0, g1, g2, g3, g4, g5, g6, g7, g8, g9 = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    for start in range(0, D // PARTS, C):
        channel = part * (D // PARTS) + start + tl.arange(0, C)
        source = streams + token[:, None] * (4 * D) + channel[None, :]
        old = _old_streams(source, inside[:, None], D)
        x0, x1, x2, x3 = _written_back(sub_out, old, source, token, channel, inside[:, None], gates, D, R, WIDEN)
        acc += _products(x0, x1, x2, x3, _fn_parts(fn, part * (D // PARTS) + start, C, D, NUM_FN, WIDEN), WIDEN)
        inner = _inner_products(x0, x1, x2, x3)
        g0, g1, g2, g3, g4 = g0 + inner[0], g1 + inner[1], g2 + inner[2], g3 + inner[3], g4 + inner[4]
        g5, g6, g7, g8, g9 = g5 + inner[5], g6 + inner[6], g7 + inner[7], g8 + inner[8], g9 + inner[9]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    _store_sums(work, index, inside, part, acc, (g0, g1, g2, g3, g4, g5, g6, g7, g8, g9), NUM_FN, PARTS)
