"""Device code of decode attention for sm_90 and several tokens, with layouts and copies given explicitly.

Owns: the form of `attend_decode` (`sparse_attention_decode.py`, which defines the arithmetic, serves one token and all
other sizes and GPUs, and adds up parts) for heads of 512 dimensions. Sums have the same order and tensor cores give the
same bits for both forms' instructions, so a token may take either: which one follows the number of tokens.

A program of 8 warps has one token, 64 heads and PAIRS times two chunks of keys: rows are turned from fp8 to bf16 once
for all 64 heads, where the plain form does so for every 16. The first warp group computes the scores of the first
chunk of a pair, the second those of the second; then each has half of the dimensions of both chunks' values. Where all
rows lie is looked up at the start, and bytes are copied one pair ahead. Before it waits a program makes its queries
where there is a selection, whose launches wait before they signal and come behind the queries; elsewhere it brings its
first keys, which are older than the queries, as the plain form says of the window.
# measured (H200, 2026-11-21): C4 with 64 tokens 36.5 us, 110 in the plain form; C128 at 64K of context the same;
# windows alone 21 and 40. Of the 36 us of C4's launch 24 % went by before the first pair, 63 % in pairs (4.5 us each).

    shared memory: queries 64 x 1,024 bytes, keys 64 x 1,024, their stored bytes 64 x 648, weights 64 x 128
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from workers.kernels.attention_parts import LOG2E, divisor, finite, power_of_two, visible_entries

HEADS_OF_PROGRAM = 64
"""Heads of a program: rows of one tensor-core instruction."""

HEAD_DIM = 512
NUM_WARPS = 8
CHUNK = 32
"""Keys of a chunk, as in the plain form."""

_LOG2E = gl.constexpr(LOG2E.value)
_BH = gl.constexpr(HEADS_OF_PROGRAM)
_HD = gl.constexpr(HEAD_DIM)
_KEYS = gl.constexpr(2 * CHUNK)
_ROW_BYTES = gl.constexpr(HEAD_DIM + 64)
_PIECES = gl.constexpr(4)
"""Blocks of 128 dimensions: seven groups of 64 in e4m3 with a scale each, the last group in bf16."""

_CODES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [NUM_WARPS, 1], [1, 0]))
_GROUPS = gl.constexpr(gl.BlockedLayout([1, 1, 16], [4, 2, 4], [NUM_WARPS, 1, 1], [2, 1, 0]))
"""The same bytes by groups of 64."""

_ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [NUM_WARPS, 1], [1, 0]))
_SCALES = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [NUM_WARPS, 1], [1, 0]))
_QUERIES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [NUM_WARPS, 1], [1, 0]))
_SQUARES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 2], [1, 0]))
"""Order of the sum of squares: that of the layout which Triton gives the plain form."""

_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [NUM_WARPS], [0]))
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, CHUNK, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16]))
_ROWS = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 64, 16])))
_OPERAND = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_BYTES = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 1, [1, 0]))
_WORDS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_TWO = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _places(pair, position, num_entries, selected, tables, WINDOW: gl.constexpr, RATIO: gl.constexpr):
    """Page (-1: no row) and row in it of the keys of a pair of chunks. tables: window and full pages of the token."""
    lane = gl.arange(0, _KEYS, _LINE)
    row = position - (WINDOW - 1) + pair * _KEYS + lane
    live = (row >= 0) & (row <= position)
    pages, shift = tables[0], 8
    if RATIO > 0:
        is_entry = pair >= WINDOW // _KEYS
        entry = (pair - WINDOW // _KEYS) * _KEYS + lane
        live_entry = is_entry & (entry < num_entries)
        if RATIO == 4:
            entry = gl.load(selected + entry, mask=live_entry, other=-1)
            live_entry = (entry >= 0) & (entry < (position + 1) // 4)
        row = gl.where(is_entry, entry, row)
        live = gl.where(is_entry, live_entry, live)
        pages = gl.where(is_entry, tables[1], tables[0])
        shift = gl.where(is_entry, 6 if RATIO == 4 else 1, 8)
    row = gl.where(live, row, 0)
    return gl.load(pages + (row >> shift), mask=live, other=-1), row & ((1 << shift) - 1)


@gluon.jit
def _copy_rows(
    pair, units, offsets, raw, sources, WINDOW: gl.constexpr, RATIO: gl.constexpr, STRIDES: gl.constexpr
):  # fmt: skip
    """The stored bytes of a pair to shared memory; rows that do not exist become 0.

    units, offsets: the pair's places; raw: four times codes [KEYS, 128], rope [KEYS, 64], scales [KEYS, 8].
    """
    codes, words, shift, stride = sources[0], sources[1], 8, STRIDES[0]
    if RATIO > 0:
        is_entry = pair >= WINDOW // _KEYS
        codes = gl.where(is_entry, sources[2], codes)
        words = gl.where(is_entry, sources[3], words)
        shift = gl.where(is_entry, 6 if RATIO == 4 else 1, 8)
        stride = gl.where(is_entry, STRIDES[1], STRIDES[0])
    unit, offset = units.load(gl.SliceLayout(1, _CODES)), offsets.load(gl.SliceLayout(1, _CODES))
    at = codes + (gl.maximum(unit, 0).to(gl.int64) * stride + offset * _ROW_BYTES)
    column = gl.arange(0, 128, gl.SliceLayout(0, _CODES))
    for i in gl.static_range(_PIECES):
        inside = (unit >= 0)[:, None] & (column < (128 if i < _PIECES - 1 else 64))[None, :]
        async_copy.async_copy_global_to_shared(raw[0][i], at[:, None] + (column + i * 128)[None, :], mask=inside)
    unit, offset = units.load(gl.SliceLayout(1, _ROPE)), offsets.load(gl.SliceLayout(1, _ROPE))
    word = gl.maximum(unit, 0).to(gl.int64) * (stride // 2) + (offset * (_ROW_BYTES // 2) + (_HD - 64) // 2)
    column = gl.arange(0, 64, gl.SliceLayout(0, _ROPE))
    async_copy.async_copy_global_to_shared(raw[1], (words + word)[:, None] + column[None, :], mask=(unit >= 0)[:, None])
    unit, offset = units.load(gl.SliceLayout(1, _SCALES)), offsets.load(gl.SliceLayout(1, _SCALES))
    at = codes + (gl.maximum(unit, 0).to(gl.int64) * stride + ((_ROW_BYTES << shift) + offset * 8))
    column = gl.arange(0, 8, gl.SliceLayout(0, _SCALES))
    async_copy.async_copy_global_to_shared(raw[2], at[:, None] + column[None, :], mask=(unit >= 0)[:, None])


@gluon.jit
def _expand(raw, keys):
    """Stored bytes to bf16 `keys`, four times [KEYS, 128], exact."""
    codes, bytes_ = (), ()
    for i in gl.static_range(_PIECES):  # all loads before the first store, which they would not be moved across
        codes += (raw[0][i].load(_CODES),)
        bytes_ += (raw[2].slice(i * 2, 2, dim=1).load(gl.SliceLayout(2, _GROUPS)),)
    rope = gl.expand_dims(raw[1].load(gl.SliceLayout(1, _GROUPS)), 1)
    for i in gl.static_range(_PIECES):
        code = gl.convert_layout(gl.reshape(codes[i], (_KEYS, 2, 64)), _GROUPS)
        factor = (bytes_[i].to(gl.uint32) << 23).to(gl.float32, bitcast=True)  # byte 0 stands for zeros only
        value = code.to(gl.float8e4nv, bitcast=True).to(gl.float16).to(gl.float32) * factor[:, :, None]
        value = value.to(gl.bfloat16)
        if i == _PIECES - 1:
            first = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, _GROUPS))) == 0
            value = gl.where(gl.expand_dims(gl.expand_dims(first, 0), 2), value, rope)
        keys[i].store(gl.convert_layout(gl.reshape(value, (_KEYS, 128)), _CODES))


@gluon.jit
def _rotated(x, angle, SIGN: gl.constexpr):
    """fp32 `x [BH, 128]`, the last piece of heads: the interleaved pairs of its last 64 columns are rotated."""
    even, odd = gl.split(gl.reshape(x, (_BH, 64, 2)))
    pair = gl.arange(0, 64, gl.SliceLayout(0, even.type.layout)) - 32
    cos = gl.load(angle + gl.maximum(pair, 0), mask=pair >= 0, other=1.0)[None, :] + gl.zeros_like(even)
    sin = gl.load(angle + 32 + gl.maximum(pair, 0), mask=pair >= 0, other=0.0)[None, :] * SIGN
    pairs = gl.join(gl.fma(even, cos, -(odd * sin)), gl.fma(odd, cos, even * sin))
    return gl.convert_layout(gl.reshape(pairs, (_BH, 128)), x.type.layout)


@gluon.jit
def _queries(q, angle, eps, query):
    """Raw queries, rotated, to `query`, four times [BH, 128]; fp32 [BH] factors of the scores. q: of the first head."""
    head, column = gl.arange(0, _BH, gl.SliceLayout(1, _SQUARES)), gl.arange(0, _HD, gl.SliceLayout(0, _SQUARES))
    x = gl.load(q + (head * _HD)[:, None] + column[None, :]).to(gl.float32)
    even, odd = gl.split(gl.reshape(x, (_BH, _HD // 2, 2)))
    norm = gl.rsqrt(gl.sum(gl.fma(even, even, odd * odd), 1) / _HD + eps)
    head, column = gl.arange(0, _BH, gl.SliceLayout(1, _QUERIES)), gl.arange(0, 128, gl.SliceLayout(0, _QUERIES))
    for i in gl.static_range(_PIECES):
        piece = gl.load(q + (head * _HD)[:, None] + (column + i * 128)[None, :])
        if i == _PIECES - 1:
            piece = _rotated(piece.to(gl.float32), angle, 1.0).to(gl.bfloat16)
        query[i].store(piece)
    return norm * (_HD**-0.5 * _LOG2E)


@gluon.jit
def _values(weights, rows):
    """Products of both chunks' weights with 128 dimensions of their `rows`, on their way: fp32 [BH, 128] each."""
    nothing = gl.zeros([_BH, 128], gl.float32, _OUTPUT)
    CHUNK: gl.constexpr = _KEYS // 2
    one, two = weights.slice(0, CHUNK, dim=1), weights.slice(CHUNK, CHUNK, dim=1)
    a = warpgroup_mma(one, rows.slice(0, CHUNK, dim=0), nothing, use_acc=False, is_async=True)
    return a, warpgroup_mma(two, rows.slice(CHUNK, CHUNK, dim=0), nothing, use_acc=False, is_async=True)


@gluon.jit
def _taken(values, a, b, factors, to, second, PART: gl.constexpr, APART: gl.constexpr):
    """Both chunks' products added to `values` at their common maximum, or stored as they are, PART floats apart."""
    a, b = warpgroup_mma_wait(0, deps=[a, b])
    if APART:
        gl.store(to, a)
        gl.store(to + PART, b, mask=second)
    else:
        values = values * factors[0] + a * factors[1] + b * factors[2]
    return values


@gluon.jit
def _finish(values, maximum, total, sink, angle, buffers, out):
    """Values of all keys to the program's heads of `out`: divided, rotated back, through shared memory."""
    factor = divisor(maximum, total, gl.load(sink + gl.arange(0, _BH, _ROWS)))[:, None]
    buffers[0].store((values[0] * factor).to(gl.bfloat16))
    buffers[1].store((values[1] * factor).to(gl.bfloat16))
    buffers[2].store((values[2] * factor).to(gl.bfloat16))
    buffers[3].store(_rotated(values[3] * factor, angle, -1.0).to(gl.bfloat16))
    row = gl.program_id(0) * _BH + gl.arange(0, _BH, gl.SliceLayout(1, _QUERIES))
    place = (row * _HD)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, _QUERIES))[None, :]
    for i in gl.static_range(_PIECES):
        gl.store(out + (place + i * 128), buffers[i].load(_QUERIES))


@gluon.jit(do_not_specialize=["num_pages", "num_parts"])
def attend_decode_sm90(
    q,  # the arguments of `attend_decode`
    positions,
    sequence_of_token,
    window_pages,
    full_pages,
    num_pages,
    window_codes,
    window_words,
    entry_codes,
    entry_words,
    selected,
    sink,
    rope_table,
    out,
    work,
    num_parts,
    eps,
    HEADS: gl.constexpr,
    WINDOW: gl.constexpr,
    RATIO: gl.constexpr,
    SELECTED: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    WINDOW_STRIDE: gl.constexpr,
    ENTRY_STRIDE: gl.constexpr,
    PAIRS: gl.constexpr,  # pairs of chunks of a program; 1: each chunk is a part
    FINAL: gl.constexpr,  # a program has all keys of its token, and writes `out`
    PDL: gl.constexpr,
):
    """Grid (HEADS / 64, T, programs of a token)."""
    STRIDES: gl.constexpr = (WINDOW_STRIDE, ENTRY_STRIDE)
    token, program = gl.program_id(1), gl.program_id(2)
    position = gl.load(positions + token)
    tables_at = gl.load(sequence_of_token + token).to(gl.int64) * num_pages
    num_entries = visible_entries(position, SELECTED, RATIO)
    num_pairs = gl.where(position < 0, 0, WINDOW // _KEYS + (num_entries + _KEYS - 1) // _KEYS)
    first = program * PAIRS
    if not FINAL:  # noqa: SIM102 - decided by the compiler
        if first >= num_pairs:
            if PDL:
                tl.extra.cuda.gdc_wait()
            return
    end = gl.minimum(first + PAIRS, num_pairs)
    tables = (window_pages + tables_at, full_pages + tables_at)
    sources = (window_codes, window_words, entry_codes, entry_words)
    selected += token * SELECTED
    angle = rope_table + gl.maximum(position, 0).to(gl.int64) * 64
    query, keys, codes = (), (), ()  # each piece by itself: between uses of one buffer the compiler puts barriers
    for _ in gl.static_range(_PIECES):
        query += (gl.allocate_shared_memory(gl.bfloat16, [_BH, 128], _OPERAND),)
        keys += (gl.allocate_shared_memory(gl.bfloat16, [_KEYS, 128], _OPERAND),)
        codes += (gl.allocate_shared_memory(gl.uint8, [_KEYS, 128], _BYTES),)
    weights = gl.allocate_shared_memory(gl.bfloat16, [_BH, _KEYS], _OPERAND)
    rope = gl.allocate_shared_memory(gl.bfloat16, [_KEYS, 64], _BYTES)
    scales = gl.allocate_shared_memory(gl.uint8, [_KEYS, 8], _BYTES)
    raw = (codes, rope, scales)
    units = gl.allocate_shared_memory(gl.int32, [PAIRS, _KEYS], _WORDS)
    offsets = gl.allocate_shared_memory(gl.int32, [PAIRS, _KEYS], _WORDS)
    tops = gl.allocate_shared_memory(gl.float32, [2, _BH], _WORDS)
    sums = gl.allocate_shared_memory(gl.float32, [2, _BH], _WORDS)
    q += token.to(gl.int64) * Q_STRIDE + gl.program_id(0) * (_BH * _HD)
    if RATIO == 4:
        norm = _queries(q, angle, eps, query)
        if PDL:
            tl.extra.cuda.gdc_wait()
    places = ()  # all lookups at once
    for i in gl.static_range(PAIRS):
        places += (_places(first + i, position, num_entries, selected, tables, WINDOW, RATIO),)
    for i in gl.static_range(PAIRS):
        units.index(i).store(gl.where(first + i < end, places[i][0], -1))
        offsets.index(i).store(places[i][1])
    _copy_rows(first, units.index(0), offsets.index(0), raw, sources, WINDOW, RATIO, STRIDES)
    async_copy.commit_group()
    if RATIO != 4:
        if PDL:
            tl.extra.cuda.gdc_wait()
        norm = _queries(q, angle, eps, query)
    scale = gl.convert_layout(norm, gl.SliceLayout(1, _SCORES))
    head = gl.program_id(0) * _BH + gl.arange(0, _BH, _ROWS)
    column = gl.arange(0, 128, gl.SliceLayout(0, _OUTPUT))
    first_part = token.to(gl.int64) * HEADS * num_parts + program * (2 if PAIRS == 1 else 1)
    statistics = work + (gl.num_programs(1).to(gl.int64) * HEADS * num_parts) * _HD + first_part * 2
    statistics += head * (num_parts * 2)
    to = work + first_part * _HD + (head * (num_parts * _HD))[:, None] + column[None, :]
    second = program * 2 + 1 < num_parts
    maximum = gl.full([_BH], -float("inf"), gl.float32, _ROWS)
    total = gl.zeros([_BH], gl.float32, _ROWS)
    v0 = gl.zeros([_BH, 128], gl.float32, _OUTPUT)
    v1, v2, v3 = v0, v0, v0
    # NOTE: hoisted, addresses in shared memory would take registers that the values need.
    for pair in tl.range(first, end, disable_licm=True):
        async_copy.wait_group(0)
        _expand(raw, keys)
        seen = units.index(pair - first).load(gl.SliceLayout(0, _SCORES)) >= 0
        fence_async_shared()
        nothing = gl.zeros([_BH, _KEYS], gl.float32, _SCORES)
        s = warpgroup_mma(query[0], keys[0].permute((1, 0)), nothing, use_acc=False, is_async=True)
        for i in gl.static_range(1, _PIECES):
            s = warpgroup_mma(query[i], keys[i].permute((1, 0)), s, is_async=True)
        after = gl.minimum(pair + 1 - first, PAIRS - 1)
        if pair + 1 < end:
            _copy_rows(pair + 1, units.index(after), offsets.index(after), raw, sources, WINDOW, RATIO, STRIDES)
        async_copy.commit_group()
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where(seen[None, :], s * scale[:, None], -float("inf"))
        s = gl.reshape(s, (_BH, 2, _KEYS // 2))  # a chunk a warp group
        top = gl.ceil(gl.max(s, 2))
        p = gl.exp2(s - gl.expand_dims(finite(top), 2))
        counts = gl.sum((p + 1.0).to(gl.int32, bitcast=True) - 0x3F800000, 2)
        weights.store(gl.convert_layout(gl.reshape(p, (_BH, _KEYS)).to(gl.bfloat16), _SCORES))
        tops._reinterpret(gl.float32, [2, _BH], _TWO).store(gl.permute(top, (1, 0)))
        sums._reinterpret(gl.float32, [2, _BH], _TWO).store(gl.permute(counts.to(gl.float32) * (2.0**-23), (1, 0)))
        fence_async_shared()
        a, b = _values(weights, keys[0])
        top_a, top_b = tops.index(0).load(_ROWS), tops.index(1).load(_ROWS)
        sum_a, sum_b = sums.index(0).load(_ROWS), sums.index(1).load(_ROWS)
        new_maximum = gl.maximum(maximum, gl.maximum(top_a, top_b))
        kept = power_of_two(maximum - finite(new_maximum))
        added_a = power_of_two(top_a - finite(new_maximum))
        added_b = power_of_two(top_b - finite(new_maximum))
        maximum = new_maximum
        total = total * kept + sum_a * added_a + sum_b * added_b
        if PAIRS == 1:
            gl.store(statistics, top_a)
            gl.store(statistics + 1, sum_a)
            gl.store(statistics + 2, top_b, mask=second)
            gl.store(statistics + 3, sum_b, mask=second)
        factors = (kept[:, None], added_a[:, None], added_b[:, None])
        v0 = _taken(v0, a, b, factors, to, second, _HD, PAIRS == 1)
        a, b = _values(weights, keys[1])
        v1 = _taken(v1, a, b, factors, to + 128, second, _HD, PAIRS == 1)
        a, b = _values(weights, keys[2])
        v2 = _taken(v2, a, b, factors, to + 256, second, _HD, PAIRS == 1)
        a, b = _values(weights, keys[3])
        v3 = _taken(v3, a, b, factors, to + 384, second, _HD, PAIRS == 1)
    async_copy.wait_group(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if FINAL:
        out += token.to(gl.int64) * (HEADS * _HD)
        _finish((v0, v1, v2, v3), maximum, total, sink + gl.program_id(0) * _BH, angle, keys, out)
    elif PAIRS > 1:
        gl.store(to, v0)
        gl.store(to + 128, v1)
        gl.store(to + 256, v2)
        gl.store(to + 384, v3)
        gl.store(statistics, maximum)
        gl.store(statistics + 1, total)


def serves(heads: int, head_dim: int, window: int) -> bool:
    """Whether there is a kernel for these sizes."""
    return heads % HEADS_OF_PROGRAM == 0 and head_dim == HEAD_DIM and window % (2 * CHUNK) == 0


def attend(arguments: tuple[Any, ...], num_tokens: int, programs: int, **options: Any) -> None:
    """Launch. `arguments`: those of `attend_decode`; `options`: the constants of the kernel, and of the launch."""
    grid = (options["HEADS"] // HEADS_OF_PROGRAM, num_tokens, programs)
    attend_decode_sm90[grid](*arguments, num_warps=NUM_WARPS, **options)
