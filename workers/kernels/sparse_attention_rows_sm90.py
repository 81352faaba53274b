"""Device code of decode attention on sm_90: warps that bring keys from fp8 pages to shared memory, as bf16.

Owns: which rows a program's keys are, where they lie, and their way through shared memory and registers. Does not own:
what is done with them (`sparse_attention_decode_sm90.py`). Rows are of 512 dimensions, pairs of chunks of 64 keys.

These warps look up at the start where all rows of a program lie. A pair's bytes are on their way while the pair before
it is turned to bf16: half of them as copies to shared memory, half in registers; neither has room for all.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from workers.kernels.sparse_attention_sm90 import rows_of_chunk

HEAD_DIM = 512
CHUNK = 32
"""Keys of a chunk, as in the plain form."""

SLOTS = 2
"""Pairs of chunks in shared memory as bf16."""

BRINGERS = 4
"""Warps that bring rows."""

_HD = gl.constexpr(HEAD_DIM)
_KEYS = gl.constexpr(2 * CHUNK)
_SLOTS = gl.constexpr(SLOTS)
_ROW_BYTES = gl.constexpr(HEAD_DIM + 64)
_PIECES = gl.constexpr(4)
"""Blocks of 128 dimensions: seven groups of 64 in e4m3 with a scale each, the last group in bf16."""

_LINE = gl.constexpr(gl.BlockedLayout([1], [32], [BRINGERS], [0]))
COPIED = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 1, [1, 0]))
_STORED = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
_CODES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [BRINGERS, 1], [1, 0]))
_FOURS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [BRINGERS, 1], [1, 0]))
"""A piece of a chunk's rows by codes, and by words of four codes: in the same threads."""

_GROUPS = gl.constexpr(gl.BlockedLayout([1, 1, 4], [4, 2, 4], [BRINGERS, 1, 1], [2, 1, 0]))
"""The same words by groups of 64 dimensions."""

_HALF = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [BRINGERS, 1], [1, 0]))
_TWOS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [BRINGERS, 1], [1, 0]))
_HALF_TWOS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [BRINGERS, 1], [1, 0]))
"""Words of two bf16 numbers made of them; and of half a piece."""

_OPERAND_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, rank=2))
_OF_FOURS = gl.constexpr(gl.SliceLayout(1, gl.BlockedLayout([1, 4], [4, 8], [BRINGERS, 1], [1, 0])))


@gluon.jit
def _places(pair, position, num_entries, selected, tables, WINDOW: gl.constexpr, RATIO: gl.constexpr):
    """Page (-1: no row) and row in it of the keys of a pair of chunks. tables: window and full pages of the token."""
    row, live = rows_of_chunk(pair, position, num_entries, selected, WINDOW, RATIO, _LINE)
    pages, shift = tables[0], 8
    if RATIO > 0:
        is_entry = pair >= WINDOW // _KEYS
        pages = gl.where(is_entry, tables[1], tables[0])
        shift = gl.where(is_entry, 6 if RATIO == 4 else 1, 8)
    row = gl.where(live, row, 0)
    return gl.load(pages + (row >> shift), mask=live, other=-1), row & ((1 << shift) - 1)


@gluon.jit
def _bf16(words, scales):
    """Two words of two bf16 each of words of four e4m3 codes and e8m0 scales, whose byte 0 stands for zeros only."""
    factor = ((scales & 0xFF).to(gl.uint32) << 23).to(gl.float32, bitcast=True)
    return gl.inline_asm_elementwise(
        """{ .reg .b16 l, h, a, b, c, d; .reg .b32 x, y; .reg .f32 p, q, r, s;
        mov.b32 {l, h}, $2; cvt.rn.f16x2.e4m3x2 x, l; cvt.rn.f16x2.e4m3x2 y, h; mov.b32 {a, b}, x; mov.b32 {c, d}, y;
        cvt.f32.f16 p, a; cvt.f32.f16 q, b; cvt.f32.f16 r, c; cvt.f32.f16 s, d;
        mul.f32 p, p, $3; mul.f32 q, q, $3; mul.f32 r, r, $3; mul.f32 s, s, $3;
        cvt.rn.bf16x2.f32 $0, q, p; cvt.rn.bf16x2.f32 $1, s, r; }""",
        "=r,=r,r,f",
        [words, factor],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _put(words, scales, keys, PIECE: gl.constexpr):
    """Codes of a piece, int32 [KEYS, 32], to bf16 `keys`, int32 [KEYS, 64]. scales: eight of each row, int64 [KEYS]."""
    OF: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, _GROUPS))
    group = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(2, _GROUPS))) + PIECE * 2
    scales = gl.convert_layout(scales, OF)[:, None] >> (group * 8)[None, :]
    a, b = _bf16(gl.convert_layout(gl.reshape(words, (_KEYS, 2, 16)), _GROUPS), scales[:, :, None])
    keys.store(gl.convert_layout(gl.reshape(gl.join(a, b), (_KEYS, 64)), _TWOS))


@gluon.jit
def _addresses(
    pair, places, at, sources, WINDOW: gl.constexpr, RATIO: gl.constexpr, STRIDES: gl.constexpr
):  # fmt: skip
    """Addresses of the codes and of the scales of a pair's rows, and which exist."""
    codes, shift, stride = sources[0], 8, STRIDES[0]
    if RATIO > 0:
        is_entry = pair >= WINDOW // _KEYS
        codes = gl.where(is_entry, sources[1], codes)
        shift = gl.where(is_entry, 6 if RATIO == 4 else 1, 8)
        stride = gl.where(is_entry, STRIDES[1], STRIDES[0])
    unit, offset = places[0].index(at).load(_OF_FOURS), places[1].index(at).load(_OF_FOURS)
    of_unit = codes + gl.maximum(unit, 0).to(gl.int64) * stride
    return of_unit + offset * _ROW_BYTES, of_unit + ((_ROW_BYTES << shift) + offset * 8), unit >= 0


@gluon.jit
def _copy(at, live, raw):
    """Start copying the first two pieces of rows."""
    column = gl.arange(0, 128, gl.SliceLayout(0, _CODES))[None, :]
    at = gl.convert_layout(at, gl.SliceLayout(1, _CODES))[:, None]
    live = gl.convert_layout(live, gl.SliceLayout(1, _CODES))[:, None]
    async_copy.async_copy_global_to_shared(raw[0], at + column, mask=live)
    async_copy.async_copy_global_to_shared(raw[1], at + (column + 128), mask=live)
    async_copy.commit_group()


@gluon.jit
def _rest(at, scales, live):
    """The other pieces: codes int32 [KEYS, 32] and [KEYS, 16], rope words [KEYS, 32], scales int64 [KEYS]."""
    words = at.to(gl.pointer_type(gl.int32), bitcast=True)
    column = gl.arange(0, 32, gl.SliceLayout(0, _FOURS))[None, :]
    third = gl.load(words[:, None] + (column + 64), mask=live[:, None], other=0)
    rope = gl.load(words[:, None] + (column + (_HD - 64) // 4), mask=live[:, None], other=0)
    last = gl.arange(0, 16, gl.SliceLayout(0, _HALF))[None, :] + 96
    some = gl.convert_layout(live, gl.SliceLayout(1, _HALF))[:, None]
    fourth = gl.load(gl.convert_layout(words, gl.SliceLayout(1, _HALF))[:, None] + last, mask=some, other=0)
    return third, fourth, rope, gl.load(scales.to(gl.pointer_type(gl.int64), bitcast=True), mask=live, other=0)


@gluon.jit
def bring(
    first, count, position, num_entries, selected, tables, sources, places, raw, keys, full, empty,
    WINDOW: gl.constexpr, RATIO: gl.constexpr, WINDOW_STRIDE: gl.constexpr, ENTRY_STRIDE: gl.constexpr,
    PAIRS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Bring `count` pairs of a program, which has at most PAIRS, from pair `first` of its token on.

    places: int32 [PAIRS, KEYS] twice, for pages and rows in them; raw: uint8 [KEYS, 128] twice; keys: a piece each,
    bf16 [SLOTS, KEYS, 128]. `full` and `empty` [SLOTS, 1]: barriers of slots that were filled, and used.
    """
    STRIDES: gl.constexpr = (WINDOW_STRIDE, ENTRY_STRIDE)
    if RATIO == 4 and PDL:
        tl.extra.cuda.gdc_wait()
    found = ()  # all lookups at once
    for i in gl.static_range(PAIRS):
        found += (_places(first + i, position, num_entries, selected, tables, WINDOW, RATIO),)
    for i in gl.static_range(PAIRS):
        places[0].index(i).store(gl.where(i < count, found[i][0], -1))
        places[1].index(i).store(found[i][1])
    at, scales, live = _addresses(first, places, 0, sources, WINDOW, RATIO, STRIDES)
    _copy(at, live, raw)
    third, fourth, rope, scale = _rest(at, scales, live)
    for i in tl.range(0, count, disable_licm=True):
        slot = i % _SLOTS
        words = ()
        for n in gl.static_range(_PIECES):
            words += (keys[n]._reinterpret(gl.int32, [_SLOTS, _KEYS, 64], _OPERAND_WORDS).index(slot),)
        async_copy.wait_group(0)
        mbarrier.wait(empty.index(slot), ((i // _SLOTS) & 1) ^ 1)
        for n in gl.static_range(2):
            _put(raw[n]._reinterpret(gl.int32, [_KEYS, 32], _STORED).load(_FOURS), scale, words[n], n)
        after = gl.minimum(i + 1, PAIRS - 1)
        at, scales, live = _addresses(first + after, places, after, sources, WINDOW, RATIO, STRIDES)
        live = live & (i + 1 < count)
        _copy(at, live, raw)
        _put(third, scale, words[2], 2)
        a, b = _bf16(fourth, gl.convert_layout(scale >> 48, gl.SliceLayout(1, _HALF))[:, None])
        words[3].slice(0, 32, dim=1).store(gl.convert_layout(gl.reshape(gl.join(a, b), (_KEYS, 32)), _HALF_TWOS))
        words[3].slice(32, 32, dim=1).store(rope)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(full.index(slot), count=1)
        third, fourth, rope, scale = _rest(at, scales, live)
    async_copy.wait_group(0)
    if RATIO != 4 and PDL:
        tl.extra.cuda.gdc_wait()
