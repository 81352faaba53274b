"""Device code of prefill attention for sm_90, with layouts and copies given explicitly.

Owns: the form of `attend_prefill` (`sparse_attention_prefill.py`, which fills the workspace and says how it lies) for
heads of 512 dimensions, 64 at a time. The arithmetic is the same, chunk by chunk; other GPUs, other sizes and the
interpreter, which does not know this language, run that one.

A program of 8 warps has one token. Scores of 64 keys are split over the two warp groups by keys, outputs by dimensions;
weights pass from one to the other through shared memory. Triton gives all products of a chain one split, and computed
every score twice. While scores are computed the rows of the next chunk are copied to the other of two buffers. These
are two allocations, and a chunk's code is there twice: of one buffer with a half that is worked out the compiler does
not know which half is read, and puts a barrier between the scores and the copies.

    shared memory: keys 2 x 64 rows of 1,024 bytes, queries 64 x 1,024, weights 64 x 128
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from workers.kernels.attention_parts import LOG2E, divisor, finite
from workers.kernels.sparse_attention_prefill import MARGIN, tokens_of_sequence

HEADS_OF_PROGRAM = 64
"""Heads of a program: rows of one tensor-core instruction."""

HEAD_DIM = 512
NUM_WARPS = 8

_MARGIN = gl.constexpr(MARGIN)
_LOG2E = gl.constexpr(LOG2E.value)
_BH = gl.constexpr(HEADS_OF_PROGRAM)
_HD = gl.constexpr(HEAD_DIM)
_KEYS = gl.constexpr(64)
_ROPE = gl.constexpr(64)

_LOAD = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [NUM_WARPS, 1], [1, 0]))
"""Rows in global memory: a warp has half a row at a time."""

_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
_OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))
_SHARED = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))


@gluon.jit
def rows_of_chunk(
    chunk, position, num_entries, selected, WINDOW: gl.constexpr, RATIO: gl.constexpr, LAYOUT: gl.constexpr
):
    """As `attention_parts.chunk_rows`, of 64 keys, in a layout."""
    lane = gl.arange(0, _KEYS, LAYOUT)
    row = position - (WINDOW - 1) + chunk * _KEYS + lane
    live = (row >= 0) & (row <= position)
    if RATIO > 0:
        entry = (chunk - WINDOW // _KEYS) * _KEYS + lane
        is_entry = chunk >= WINDOW // _KEYS
        live_entry = is_entry & (entry < num_entries)
        if RATIO == 4:
            entry = gl.load(selected + entry, mask=live_entry, other=-1)
            live_entry = (entry >= 0) & (entry < (position + 1) // 4)
        row = gl.where(is_entry, entry, row)
        live = gl.where(is_entry, live_entry, live)
    return row, live


@gluon.jit
def _rotated(x, rope_table, position, SIGN: gl.constexpr):
    """bf16 of fp32 `x [H, HD]`, the interleaved pairs of its rope part rotated by the position's angles."""
    even, odd = gl.split(gl.reshape(x, (_BH, _HD // 2, 2)))
    pair = gl.arange(0, _HD // 2, gl.SliceLayout(0, even.type.layout)) - (_HD - _ROPE) // 2
    angle = rope_table + gl.maximum(position, 0).to(gl.int64) * _ROPE + gl.maximum(pair, 0)
    cos = gl.load(angle, mask=pair >= 0, other=1.0)[None, :] + gl.zeros_like(even)
    sin = gl.load(angle + _ROPE // 2, mask=pair >= 0, other=0.0)[None, :] * SIGN
    pairs = gl.join(gl.fma(even, cos, -(odd * sin)), gl.fma(odd, cos, even * sin))
    return gl.convert_layout(gl.reshape(pairs, (_BH, _HD)).to(gl.bfloat16), x.type.layout)


@gluon.jit
def _chunk(
    now,  # keys of this chunk, and where those of the next one go
    then,
    query,
    weights,
    o,
    maximum,
    total,
    row,  # workspace rows of the next chunk
    live,
    scale,
    rows,
    chunk,
    num_chunks,
    position,
    num_entries,
    selected,
    window_at,
    entries_at,
    WINDOW: gl.constexpr,
    RATIO: gl.constexpr,
):
    """One chunk's scores, weights and outputs: `o`, `maximum`, `total`, and the rows of the chunk after the next."""
    async_copy.wait_group(0)
    fence_async_shared()
    nothing = gl.zeros([_BH, _KEYS], gl.float32, _SCORES)
    s = warpgroup_mma(query, now.permute((1, 0)), nothing, use_acc=False, is_async=True)
    key = (rows + row.to(gl.int64) * _HD)[:, None] + gl.arange(0, _HD, gl.SliceLayout(0, _LOAD))[None, :]
    async_copy.async_copy_global_to_shared(then, key, mask=live[:, None])
    async_copy.commit_group()
    unused, seen = rows_of_chunk(chunk, position, num_entries, selected, WINDOW, RATIO, gl.SliceLayout(0, _SCORES))
    after = chunk + 2
    row, live = rows_of_chunk(after, position, num_entries, selected, WINDOW, RATIO, gl.SliceLayout(1, _LOAD))
    row += gl.where(after < WINDOW // _KEYS, window_at, entries_at)
    live &= after < num_chunks
    s = warpgroup_mma_wait(0, deps=[s])
    s = gl.where(seen[None, :], s * scale, -float("inf"))
    new_maximum = gl.maximum(maximum, gl.max(s, 1))
    kept = gl.exp2(maximum - finite(new_maximum))
    p = gl.exp2(s - finite(new_maximum)[:, None])
    weights.store(p.to(gl.bfloat16))
    o = o * gl.convert_layout(kept, gl.SliceLayout(1, _OUTPUT))[:, None]
    fence_async_shared()
    o = warpgroup_mma(weights, now, o, is_async=True)
    total = total * kept[:, None] + p
    o = warpgroup_mma_wait(0, deps=[o])
    return o, new_maximum, total, row, live


@gluon.jit
def attend_prefill_sm90(
    q,  # the arguments of `attend_prefill`
    positions,
    sequence_of_token,
    cu_starts,
    start,
    rows,
    bases,
    num_sequences,
    selected,
    sink,
    rope_table,
    out,
    eps,
    HEADS: gl.constexpr,
    WINDOW: gl.constexpr,
    RATIO: gl.constexpr,
    SELECTED: gl.constexpr,
    Q_STRIDE: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (HEADS / 64, T)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    token, num_tokens = gl.program_id(1), gl.num_programs(1)
    position = gl.load(positions + token)
    b = gl.load(sequence_of_token + token)
    num_entries = position * 0
    if RATIO == 4:
        num_entries = gl.minimum((position + 1) // 4, SELECTED)
    elif RATIO == 128:
        num_entries = (position + 1) // 128
    num_chunks = gl.where(position < 0, 0, WINDOW // _KEYS + (num_entries + _KEYS - 1) // _KEYS)
    index, begin, end = tokens_of_sequence(b, positions, sequence_of_token, cu_starts, start, num_tokens)
    window_at = index - begin + _MARGIN * (b + 1)  # row of position 0
    entries_at = num_tokens + _MARGIN * num_sequences
    if RATIO > 0:
        entries_at += gl.load(bases + b)
    selected += token * SELECTED

    ROW_LOAD: gl.constexpr = gl.SliceLayout(1, _LOAD)
    keys = gl.allocate_shared_memory(gl.bfloat16, [_KEYS, _HD], _SHARED)
    other_keys = gl.allocate_shared_memory(gl.bfloat16, [_KEYS, _HD], _SHARED)
    column = gl.arange(0, _HD, gl.SliceLayout(0, _LOAD))[None, :]
    row, live = rows_of_chunk(0, position, num_entries, selected, WINDOW, RATIO, ROW_LOAD)
    key = (rows + (row + window_at).to(gl.int64) * _HD)[:, None] + column
    async_copy.async_copy_global_to_shared(keys, key, mask=live[:, None])
    async_copy.commit_group()
    row, live = rows_of_chunk(1, position, num_entries, selected, WINDOW, RATIO, ROW_LOAD)
    row += window_at

    # Queries are normed by a factor of the scores.
    place = ((gl.program_id(0) * _BH + gl.arange(0, _BH, ROW_LOAD)) * _HD)[:, None] + column
    x = gl.load(q + token.to(gl.int64) * Q_STRIDE + place).to(gl.float32)
    scale = gl.rsqrt(gl.sum(x * x, 1) / _HD + eps) * (_HD**-0.5 * _LOG2E)
    scale = gl.convert_layout(scale, gl.SliceLayout(1, _SCORES))[:, None]
    query = gl.allocate_shared_memory(gl.bfloat16, [_BH, _HD], _SHARED)
    query.store(_rotated(x, rope_table, position, 1.0))
    weights = gl.allocate_shared_memory(gl.bfloat16, [_BH, _KEYS], _SHARED)
    o = gl.zeros([_BH, _HD], gl.float32, _OUTPUT)
    maximum = gl.full([_BH], -float("inf"), gl.float32, gl.SliceLayout(1, _SCORES))
    total = gl.zeros([_BH, _KEYS], gl.float32, _SCORES)
    for pair in range((num_chunks + 1) // 2):
        o, maximum, total, row, live = _chunk(
            keys, other_keys, query, weights, o, maximum, total, row, live, scale, rows, 2 * pair, num_chunks,
            position, num_entries, selected, window_at, entries_at, WINDOW, RATIO,
        )  # fmt: skip
        if 2 * pair + 1 < num_chunks:
            o, maximum, total, row, live = _chunk(
                other_keys, keys, query, weights, o, maximum, total, row, live, scale, rows, 2 * pair + 1, num_chunks,
                position, num_entries, selected, window_at, entries_at, WINDOW, RATIO,
            )  # fmt: skip
    async_copy.wait_group(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    sinks = gl.load(sink + gl.program_id(0) * _BH + gl.arange(0, _BH, gl.SliceLayout(1, _SCORES)))
    factor = divisor(maximum, gl.sum(total, 1), sinks)
    o = o * gl.convert_layout(factor, gl.SliceLayout(1, _OUTPUT))[:, None]
    keys.store(_rotated(o, rope_table, position, -1.0))
    gl.store(out + token.to(gl.int64) * (HEADS * _HD) + place, keys.load(_LOAD))


def serves(heads: int, head_dim: int, window: int) -> bool:
    """Whether there is a kernel for these sizes."""
    return heads % HEADS_OF_PROGRAM == 0 and head_dim == HEAD_DIM and window % 64 == 0 and window >= 128


def attend(arguments: tuple[Any, ...], num_tokens: int, **options: Any) -> None:
    """Launch. `arguments`: those of `attend_prefill`; `options`: the constants of the kernel, and of the launch."""
    attend_prefill_sm90[(options["HEADS"] // HEADS_OF_PROGRAM, num_tokens)](*arguments, num_warps=NUM_WARPS, **options)
