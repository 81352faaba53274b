"""Device code of decode attention for sm_90 and several tokens, with layouts, copies and warps' work given explicitly.

Owns: the form of `attend_decode` (`sparse_attention_decode.py`, which defines the arithmetic, serves one token and all
other sizes and GPUs, and adds up parts) for heads of 512 dimensions. Sums have the same order and tensor cores give the
same bits for both forms' instructions, so a token may take either: which one follows the number of tokens.

A program has one token, 64 heads and PAIRS times two chunks of keys: rows are turned from fp8 to bf16 once for all 64
heads, where the plain form does so for every 16. Four warps bring rows (`sparse_attention_rows_sm90.py`), a pair of
chunks ahead of eight warps that multiply. Of these the first warp group computes the scores of the first chunk of a
pair, the second those of the second; then each has half of the dimensions of both chunks' values. Before it waits a
program makes its queries where there is a selection, whose launches wait before they signal and come behind the
queries; elsewhere it brings its first keys, which are older than the queries, as the plain form says of the window.

Where two programs have all keys of a token, and all of a launch run at the same time, they exchange halves of their
values and write the output (HALVES), in place of a second launch that adds up parts.
# measured (H200, 2026-11-22), 64 tokens at 64K in a model: C4 36.0 us, C128 35.4, windows alone 16.0 (21, 21 and 19 %
# of their floors); 42.8, 42.5 and 24.2 when every warp brought rows and a second launch added up parts.

    shared memory: queries 64 x 1,024 bytes, keys 2 x 64 x 1,024, their stored bytes 64 x 256, weights 64 x 128
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from workers.kernels.arrivals import arrive, await_first_half
from workers.kernels.attention_parts import LOG2E, divisor, finite, power_of_two, visible_entries
from workers.kernels.sparse_attention_rows_sm90 import BRINGERS, CHUNK, COPIED, HEAD_DIM, SLOTS, bring

HEADS_OF_PROGRAM = 64
"""Heads of a program: rows of one tensor-core instruction."""

NUM_WARPS = 8
"""Warps that multiply."""

BRINGER_REGISTERS = 104
"""Of their threads; the others have what is left, 200."""

WIDTH = 64
"""Columns of values that are computed at once: of 128, whose products take twice the registers, a part would spill."""

_LOG2E = gl.constexpr(LOG2E.value)
_BH = gl.constexpr(HEADS_OF_PROGRAM)
_HD = gl.constexpr(HEAD_DIM)
_KEYS = gl.constexpr(2 * CHUNK)
_SLOTS = gl.constexpr(SLOTS)
_WIDTH = gl.constexpr(WIDTH)
_BRINGERS = gl.constexpr(BRINGERS)
_BRINGER_REGISTERS = gl.constexpr(BRINGER_REGISTERS)
_PIECES = gl.constexpr(4)
"""Blocks of 128 dimensions: seven groups of 64 in e4m3 with a scale each, the last group in bf16."""

_SENT = gl.constexpr(HEADS_OF_PROGRAM * (HEAD_DIM // 2 + 2))
"""fp32 numbers that a program sends: half of its values, maxima and sums."""

_QUERIES = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [NUM_WARPS, 1], [1, 0]))
_SQUARES = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 2], [1, 0]))
"""Order of the sum of squares: that of the layout which Triton gives the plain form."""

_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, CHUNK, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, WIDTH // 2, 16]))
_ROWS = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 2], [16, WIDTH // 2, 16])))
_OPERAND = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))
_WORDS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_TWO = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _rotated(x, angle, FIRST: gl.constexpr, SIGN: gl.constexpr):
    """fp32 `x [BH, N]`, columns of heads from FIRST on: interleaved pairs of the last 64 of a head are rotated."""
    N: gl.constexpr = x.shape[1]
    even, odd = gl.split(gl.reshape(x, (_BH, N // 2, 2)))
    pair = gl.arange(0, N // 2, gl.SliceLayout(0, even.type.layout)) + (FIRST // 2 - (_HD // 2 - 32))
    cos = gl.load(angle + gl.maximum(pair, 0), mask=pair >= 0, other=1.0)[None, :] + gl.zeros_like(even)
    sin = gl.load(angle + 32 + gl.maximum(pair, 0), mask=pair >= 0, other=0.0)[None, :] * SIGN
    pairs = gl.join(gl.fma(even, cos, -(odd * sin)), gl.fma(odd, cos, even * sin))
    return gl.convert_layout(gl.reshape(pairs, (_BH, N)), x.type.layout)


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
            piece = _rotated(piece.to(gl.float32), angle, _HD - 128, 1.0).to(gl.bfloat16)
        query.index(i).store(piece)
    return norm * (_HD**-0.5 * _LOG2E)


@gluon.jit
def _product(weights, keys, slot, STEP: gl.constexpr):
    """A chunk's weights times WIDTH columns of its keys, on their way: the first's and the second's in turn."""
    C: gl.constexpr = _KEYS // 2
    which: gl.constexpr = STEP % 2
    column: gl.constexpr = STEP // 2 * _WIDTH
    rows = keys[column // 128].index(slot).slice(which * C, C, dim=0).slice(column % 128, _WIDTH, dim=1)
    nothing = gl.zeros([_BH, _WIDTH], gl.float32, _OUTPUT)
    return warpgroup_mma(weights.slice(which * C, C, dim=1), rows, nothing, use_acc=False, is_async=True)


@gluon.jit
def _added(value, kept, product, factor, FIRST: gl.constexpr):
    """`value * kept + product * factor`, at this place: the compiler would move sums to the end of the loop's body and
    keep every product until then. Without FIRST `kept` is 1."""
    if FIRST:
        return gl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.rn.f32 t, $1, $2; fma.rn.f32 $0, $3, $4, t; }",
            "=f,f,f,f,f", [value, kept, product, factor], dtype=gl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    return gl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;",
        "=f,f,f,f", [product, factor, value], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _exchange(values, WHO: gl.constexpr, maximum, total, head, sink, angle, keys, out, work, arrived):
    """Both programs of a token have the values of half of its keys; each adds half of the columns of both."""
    N: gl.constexpr = _HD // _WIDTH // 2
    local = gl.arange(0, _BH, _ROWS)
    at = (local * (_HD // 2))[:, None] + gl.arange(0, _WIDTH, gl.SliceLayout(0, _OUTPUT))[None, :]
    to, of = work + WHO * _SENT, work + (1 - WHO) * _SENT
    for n in gl.static_range(N):
        gl.store(to + (at + n * _WIDTH), values[(1 - WHO) * N + n])
    statistics = _BH * (_HD // 2) + local
    gl.store(to + statistics, maximum)
    gl.store(to + (statistics + _BH), total)
    arrive(arrived, 2, True)
    sinks = gl.load(sink + head)
    await_first_half(arrived, 2)
    other, other_total = (
        gl.load(of + statistics, cache_modifier=".cg"),
        gl.load(of + (statistics + _BH), cache_modifier=".cg"),
    )
    most = gl.maximum(maximum, other)
    kept, added = power_of_two(maximum - finite(most)), power_of_two(other - finite(most))
    factor = divisor(most, total * kept + other_total * added, sinks)[:, None]
    kept, added = kept[:, None], added[:, None]
    for n in gl.static_range(N):
        value = values[WHO * N + n] * kept + gl.load(of + (at + n * _WIDTH), cache_modifier=".cg") * added
        value = value * factor
        if WHO == 1 and n + 1 == N:
            value = _rotated(value, angle, _HD - _WIDTH, -1.0)
        piece = keys[(WHO * N + n) * _WIDTH // 128].index(0)
        piece.slice(n * _WIDTH % 128, _WIDTH, dim=1).store(value.to(gl.bfloat16))
    row = gl.program_id(0) * _BH + gl.arange(0, _BH, gl.SliceLayout(1, _QUERIES))
    place = (row * _HD)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, _QUERIES))[None, :]
    for n in gl.static_range(2):
        gl.store(out + (place + (WHO * 2 + n) * 128), keys[WHO * 2 + n].index(0).load(_QUERIES))
    arrive(arrived, 2, True)


@gluon.jit
def _attend(
    q, angle, eps, count, query, keys, weights, units, tops, sums, full, empty, sink, out, work, statistics, num_parts,
    arrived, RATIO: gl.constexpr, APART: gl.constexpr, FINAL: gl.constexpr, HALVES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Scores, weights and values of the pairs that are brought; what becomes of them. Arguments: see the kernel.

    query: bf16 [4, BH, 128]; keys: a piece each, bf16 [SLOTS, KEYS, 128]; weights: bf16 [BH, KEYS]; units: int32
    [PAIRS, KEYS], -1 where there is no row; tops, sums: fp32 [2, BH], of both chunks; work, statistics: of the part.
    """
    STEPS: gl.constexpr = 2 * _HD // _WIDTH
    if RATIO != 4 and PDL:
        tl.extra.cuda.gdc_wait()
    scale = gl.convert_layout(_queries(q, angle, eps, query), gl.SliceLayout(1, _SCORES))
    if RATIO == 4 and PDL:
        tl.extra.cuda.gdc_wait()
    fence_async_shared()
    gl.thread_barrier()
    head = gl.program_id(0) * _BH + gl.arange(0, _BH, _ROWS)
    maximum = gl.full([_BH], -float("inf"), gl.float32, _ROWS)
    total = gl.zeros([_BH], gl.float32, _ROWS)
    values = ()
    for _ in gl.static_range(STEPS // 2):
        values += (gl.zeros([_BH, _WIDTH], gl.float32, _OUTPUT),)
    for i in tl.range(0, count, disable_licm=True):
        slot = i % _SLOTS
        mbarrier.wait(full.index(slot), (i // _SLOTS) & 1)
        seen = units.index(i).load(gl.SliceLayout(0, _SCORES)) >= 0
        s = gl.zeros([_BH, _KEYS], gl.float32, _SCORES)
        for n in gl.static_range(_PIECES):
            rows = keys[n].index(slot).permute((1, 0))
            s = warpgroup_mma(query.index(n), rows, s, use_acc=n > 0, is_async=True)
        s = warpgroup_mma_wait(0, deps=[s])
        s = gl.where(seen[None, :], s * scale[:, None], -float("inf"))
        s = gl.reshape(s, (_BH, 2, _KEYS // 2))  # a chunk a warp group
        top = gl.ceil(gl.max(s, 2))
        p = gl.exp2(s - gl.expand_dims(finite(top), 2))
        counts = gl.sum((p + 1.0).to(gl.int32, bitcast=True) - 0x3F800000, 2)  # of 2 ** -23, rounded
        weights.store(gl.convert_layout(gl.reshape(p, (_BH, _KEYS)).to(gl.bfloat16), _SCORES))
        tops._reinterpret(gl.float32, [2, _BH], _TWO).store(gl.permute(top, (1, 0)))
        sums._reinterpret(gl.float32, [2, _BH], _TWO).store(gl.permute(counts.to(gl.float32) * (2.0**-23), (1, 0)))
        fence_async_shared()
        gl.thread_barrier()
        a, b = _product(weights, keys, slot, 0), _product(weights, keys, slot, 1)
        top_a, top_b = tops.index(0).load(_ROWS), tops.index(1).load(_ROWS)
        new_maximum = gl.maximum(maximum, gl.maximum(top_a, top_b))
        kept = power_of_two(maximum - finite(new_maximum))
        factor_a = power_of_two(top_a - finite(new_maximum))
        factor_b = power_of_two(top_b - finite(new_maximum))
        maximum = new_maximum
        total = total * kept + sums.index(0).load(_ROWS) * factor_a + sums.index(1).load(_ROWS) * factor_b
        if APART:
            second = gl.program_id(2) * 2 + 1 < num_parts
            of_heads = statistics + head * (num_parts * 2)
            gl.store(of_heads, top_a)
            gl.store(of_heads + 1, sums.index(0).load(_ROWS))
            gl.store(of_heads + 2, top_b, mask=second)
            gl.store(of_heads + 3, sums.index(1).load(_ROWS), mask=second)
            to = work + (head * (num_parts * _HD))[:, None] + gl.arange(0, _WIDTH, gl.SliceLayout(0, _OUTPUT))[None, :]
        next_values = ()
        for n in gl.static_range(STEPS // 2):
            a, b = warpgroup_mma_wait(1, deps=[a, b])
            if APART:
                gl.store(to + n * _WIDTH, a)
            else:
                value = _added(values[n], kept[:, None], a, factor_a[:, None], True)
            if n + 1 < STEPS // 2:
                a = _product(weights, keys, slot, 2 * n + 2)
                b, a = warpgroup_mma_wait(1, deps=[b, a])
            else:
                b = warpgroup_mma_wait(0, deps=[b])
            if APART:
                gl.store(to + (n * _WIDTH + _HD), b, mask=second)
            else:
                next_values += (_added(value, kept[:, None], b, factor_b[:, None], False),)
            if n + 1 < STEPS // 2:
                b = _product(weights, keys, slot, 2 * n + 3)
        if not APART:
            values = next_values
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if FINAL:
        factor = divisor(maximum, total, gl.load(sink + head))[:, None]
        for n in gl.static_range(STEPS // 2):
            value = values[n] * factor
            if (n + 1) * _WIDTH == _HD:
                value = _rotated(value, angle, _HD - _WIDTH, -1.0)
            keys[n * _WIDTH // 128].index(0).slice(n * _WIDTH % 128, _WIDTH, dim=1).store(value.to(gl.bfloat16))
        row = gl.program_id(0) * _BH + gl.arange(0, _BH, gl.SliceLayout(1, _QUERIES))
        place = (row * _HD)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, _QUERIES))[None, :]
        for n in gl.static_range(_PIECES):
            gl.store(out + (place + n * 128), keys[n].index(0).load(_QUERIES))
    elif HALVES:
        if gl.program_id(2) == 0:
            _exchange(values, 0, maximum, total, head, sink, angle, keys, out, work, arrived)
        else:
            _exchange(values, 1, maximum, total, head, sink, angle, keys, out, work, arrived)
    elif not APART:  # noqa: SIM102 - decided by the compiler
        if count > 0:
            column = gl.arange(0, _WIDTH, gl.SliceLayout(0, _OUTPUT))
            to = work + (head * (num_parts * _HD))[:, None] + column[None, :]
            for n in gl.static_range(STEPS // 2):
                gl.store(to + n * _WIDTH, values[n])
            gl.store(statistics + head * (num_parts * 2), maximum)
            gl.store(statistics + (head * (num_parts * 2) + 1), total)


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
    arrived,  # int32 [T * HEADS / 64], zeros: where programs wait for each other
    HEADS: gl.constexpr,
    WINDOW: gl.constexpr,
    RATIO: gl.constexpr,
    SELECTED: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    WINDOW_STRIDE: gl.constexpr,
    ENTRY_STRIDE: gl.constexpr,
    PAIRS: gl.constexpr,  # pairs of chunks of a program
    FINAL: gl.constexpr,  # a program has all keys of its token, and writes `out`
    HALVES: gl.constexpr,  # two programs have them
    PDL: gl.constexpr,
):
    """Grid (HEADS / 64, T, programs of a token)."""
    token, program = gl.program_id(1), gl.program_id(2)
    position = gl.load(positions + token)
    tables_at = gl.load(sequence_of_token + token).to(gl.int64) * num_pages
    num_entries = visible_entries(position, SELECTED, RATIO)
    num_pairs = gl.where(position < 0, 0, WINDOW // _KEYS + (num_entries + _KEYS - 1) // _KEYS)
    first = program * PAIRS
    count = gl.maximum(gl.minimum(first + PAIRS, num_pairs) - first, 0)
    tables = (window_pages + tables_at, full_pages + tables_at)
    sources = (window_codes, entry_codes)
    angle = rope_table + gl.maximum(position, 0).to(gl.int64) * 64
    query = gl.allocate_shared_memory(gl.bfloat16, [_PIECES, _BH, 128], _OPERAND)
    keys = ()
    for _ in gl.static_range(_PIECES):
        keys += (gl.allocate_shared_memory(gl.bfloat16, [_SLOTS, _KEYS, 128], _OPERAND),)
    weights = gl.allocate_shared_memory(gl.bfloat16, [_BH, _KEYS], _OPERAND)
    raw = (
        gl.allocate_shared_memory(gl.uint8, [_KEYS, 128], COPIED),
        gl.allocate_shared_memory(gl.uint8, [_KEYS, 128], COPIED),
    )
    units = gl.allocate_shared_memory(gl.int32, [PAIRS, _KEYS], _WORDS)
    offsets = gl.allocate_shared_memory(gl.int32, [PAIRS, _KEYS], _WORDS)
    tops = gl.allocate_shared_memory(gl.float32, [2, _BH], _WORDS)
    sums = gl.allocate_shared_memory(gl.float32, [2, _BH], _WORDS)
    full = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(_SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=1)
    q += token.to(gl.int64) * Q_STRIDE + gl.program_id(0) * (_BH * _HD)
    selected += token * SELECTED
    out += token.to(gl.int64) * (HEADS * _HD)
    part = token.to(gl.int64) * HEADS * num_parts + program * (2 if PAIRS == 1 else 1)
    statistics = work + (gl.num_programs(1).to(gl.int64) * HEADS * num_parts) * _HD + part * 2
    if HALVES:
        of_heads = token * gl.num_programs(0) + gl.program_id(0)
        arrived += of_heads
        work += of_heads.to(gl.int64) * (2 * _SENT)
    else:
        work += part * _HD
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    q,
                    angle,
                    eps,
                    count,
                    query,
                    keys,
                    weights,
                    units,
                    tops,
                    sums,
                    full,
                    empty,
                    sink,
                    out,
                    work,
                    statistics,
                    num_parts,
                    arrived,
                    RATIO,
                    PAIRS == 1,
                    FINAL,
                    HALVES,
                    PDL,
                ),
            ),
            (
                bring,
                (
                    first,
                    count,
                    position,
                    num_entries,
                    selected,
                    tables,
                    sources,
                    (units, offsets),
                    raw,
                    keys,
                    full,
                    empty,
                    WINDOW,
                    RATIO,
                    WINDOW_STRIDE,
                    ENTRY_STRIDE,
                    PAIRS,
                    PDL,
                ),
            ),
        ],
        [_BRINGERS],
        [_BRINGER_REGISTERS],
    )


def serves(heads: int, head_dim: int, window: int) -> bool:
    """Whether there is a kernel for these sizes."""
    return heads % HEADS_OF_PROGRAM == 0 and head_dim == HEAD_DIM and window % (2 * CHUNK) == 0


def attend(arguments: tuple[Any, ...], arrived: Tensor, num_tokens: int, programs: int, **options: Any) -> None:
    """Launch. `arguments`: those of `attend_decode`; `options`: the constants of the kernel, and of the launch."""
    grid = (options["HEADS"] // HEADS_OF_PROGRAM, num_tokens, programs)
    attend_decode_sm90[grid](*arguments, arrived, num_warps=NUM_WARPS, **options)
