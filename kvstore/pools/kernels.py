"""The Triton kernel that moves rows of one request between every pool and one contiguous block, in one launch.

Owns: the device code and the static shape of a pool that it is compiled for. Does not own: which rows move (the table
of `pieces.py`), memory and streams (`copies.py`). Imported only when a device, or Triton's interpreter, is asked for.

One program moves a tile of rows of one layer. Everything about a pool but its base address is a constant of the kernel,
so that addresses are known to be multiples of 16 bytes and loads are as wide: an address read from a table hides its
alignment from the compiler and is loaded byte by byte (3-4x slower, measured 2026-11). Rows in the block are packed:
584-byte rows start at multiples of 8 bytes and 132-byte rows at multiples of 4, which is the width on that side.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kvstore.pools.pieces import FIELDS, PoolShape


@triton.jit
def _move_part(
    pool,  # int32 or int64 pointer to the first row's unit data, see below
    block,  # the same type, at the first row of the piece
    unit_words,  # int64 [R, 1]: words from `pool` to the unit
    offset,  # int64 [R, 1]: row inside the unit
    row,  # int64 [R, 1]: row inside the piece
    live,  # bool [R, 1]
    PLANE_AT: tl.constexpr,  # words from the unit to the plane
    PLANE_WORDS: tl.constexpr,  # words of a row in the plane
    COLUMN: tl.constexpr,  # first word of the part in the plane's row
    WIDTH: tl.constexpr,  # words of the part, a power of two
    BLOCK_AT: tl.constexpr,  # first word of the part in a packed row
    ROW_WORDS: tl.constexpr,  # words of a packed row
    TO_POOL: tl.constexpr,
):
    column = tl.arange(0, WIDTH)[None, :]
    at_pool = pool + (unit_words + PLANE_AT + offset * PLANE_WORDS + COLUMN) + column
    at_block = block + (row * ROW_WORDS + BLOCK_AT) + column
    if TO_POOL:
        tl.store(at_pool, tl.load(at_block, mask=live), mask=live)
    else:
        tl.store(at_block, tl.load(at_pool, mask=live), mask=live)


@triton.jit
def _reset_part(
    pool,
    unit_words,
    offset,
    dead,
    COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    LOW: tl.constexpr,  # word in the first half of a row (kv)
    HIGH: tl.constexpr,  # word in the second half (score)
):
    column = COLUMN + tl.arange(0, WIDTH)[None, :]
    low = tl.full((1, WIDTH), LOW, pool.dtype.element_ty)
    high = tl.full((1, WIDTH), HIGH, pool.dtype.element_ty)
    value = tl.where(column < ROW_WORDS // 2, low, high)
    at_pool = pool + (unit_words + offset * ROW_WORDS) + column
    tl.store(at_pool, tl.broadcast_to(value, at_pool.shape), mask=dead)


@triton.jit
def _move_parts(
    pool,
    block,
    unit_words,
    offset,
    row,
    live,
    ROW_WORDS: tl.constexpr,
    TO_POOL: tl.constexpr,
    SHAPES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    for i in tl.static_range(NUM_PARTS):
        _move_part(
            pool,
            block,
            unit_words,
            offset,
            row,
            live,
            SHAPES[PARTS + i * 5],
            SHAPES[PARTS + i * 5 + 1],
            SHAPES[PARTS + i * 5 + 2],
            SHAPES[PARTS + i * 5 + 3],
            SHAPES[PARTS + i * 5 + 4],
            ROW_WORDS,
            TO_POOL,
        )


@triton.jit
def _reset_parts(
    pool,
    unit_words,
    offset,
    dead,
    ROW_WORDS: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    SHAPES: tl.constexpr,
    PARTS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
):
    for i in tl.static_range(NUM_PARTS):
        _reset_part(
            pool, unit_words, offset, dead, SHAPES[PARTS + i * 5 + 2], SHAPES[PARTS + i * 5 + 3], ROW_WORDS, LOW, HIGH
        )


@triton.jit
def _move_tile(pool, staging, table, entry, tile, TO_POOL: tl.constexpr, SHAPES: tl.constexpr, AT: tl.constexpr):
    # SHAPES[AT:] is one pool's, see `_static_shape`
    WORD: tl.constexpr = SHAPES[AT]
    ALIGN: tl.constexpr = SHAPES[AT + 1]
    LAYER_WORDS: tl.constexpr = SHAPES[AT + 2]
    UNIT_WORDS: tl.constexpr = SHAPES[AT + 3]
    ROW_WORDS: tl.constexpr = SHAPES[AT + 4]
    PER_UNIT: tl.constexpr = SHAPES[AT + 5]
    IS_SLOT: tl.constexpr = SHAPES[AT + 6]
    ROWS: tl.constexpr = SHAPES[AT + 7]
    LOW: tl.constexpr = SHAPES[AT + 8]
    HIGH: tl.constexpr = SHAPES[AT + 9]
    NUM_PARTS: tl.constexpr = SHAPES[AT + 10]
    PARTS: tl.constexpr = AT + 11
    first_layer = tl.load(entry + 1)
    num_layers = tl.load(entry + 2)
    row_start = tl.load(entry + 3)
    num_rows = tl.load(entry + 4)
    place = tl.load(entry + 5)  # in units of ALIGN bytes
    pad = tl.load(entry + 6)  # bytes to clear after the piece; negative: reset instead of move
    index = tl.load(entry + 7)
    tiles = (tl.where(pad < 0, PER_UNIT, num_rows) + ROWS - 1) // ROWS
    layer = tile // tiles
    if layer < num_layers:
        words = tl.int64 if WORD == 8 else tl.int32
        word_pool = pool.to(tl.pointer_type(words))
        row = ((tile % tiles) * ROWS + tl.arange(0, ROWS).to(tl.int64))[:, None]
        layer_pool = word_pool + (first_layer + layer) * LAYER_WORDS
        if pad < 0:
            if IS_SLOT and TO_POOL:
                unit_words = tl.load(table + index) * UNIT_WORDS + row * 0
                dead = (row < PER_UNIT) & (((row - row_start) % PER_UNIT + PER_UNIT) % PER_UNIT >= num_rows)
                _reset_parts(layer_pool, unit_words, row, dead, ROW_WORDS, LOW, HIGH, SHAPES, PARTS, NUM_PARTS)
        else:
            live = row < num_rows
            absolute = row_start + row
            if IS_SLOT:
                unit_words = tl.load(table + index) * UNIT_WORDS + row * 0
            else:
                unit_words = tl.load(table + (index + absolute // PER_UNIT), mask=live, other=0) * UNIT_WORDS
            block = staging.to(tl.pointer_type(words)) + place * (ALIGN // WORD)
            block = block + layer * num_rows * ROW_WORDS
            offset = absolute % PER_UNIT
            _move_parts(layer_pool, block, unit_words, offset, row, live, ROW_WORDS, TO_POOL, SHAPES, PARTS, NUM_PARTS)
            if not TO_POOL:  # noqa: SIM102 - the outer one is decided by the compiler
                if (tile == 0) & (pad > 0):
                    after = staging.to(tl.pointer_type(tl.int32)) + place * (ALIGN // 4)
                    after = after + num_layers * num_rows * (ROW_WORDS * (WORD // 4))
                    word = tl.arange(0, 16)
                    tl.store(after + word, tl.full((16,), 0, tl.int32), mask=word * 4 < pad)


@triton.jit
def move_rows(
    pools,
    staging,
    table,
    TO_POOL: tl.constexpr,
    SHAPES: tl.constexpr,
    SHAPE_WORDS: tl.constexpr,
    NUM_POOLS: tl.constexpr,
):
    """Every piece of a table. pools: tuple of int64 pointers; staging: int64 pointer; table: int64 [pieces, FIELDS],
    then the index lists. Grid: (most tiles of a piece, pieces)."""
    tile = tl.program_id(0).to(tl.int64)
    entry = table + tl.program_id(1).to(tl.int64) * 8
    pool = tl.load(entry)
    for i in tl.static_range(NUM_POOLS):
        if pool == i:
            _move_tile(pools[i], staging, table, entry, tile, TO_POOL, SHAPES, i * SHAPE_WORDS)


@functools.cache
def static_shapes(shapes: tuple[PoolShape, ...]) -> tuple[tuple[int, ...], int]:
    """The shapes as one flat tuple of integers, which Triton takes as constants, and the integers of each shape."""
    assert FIELDS == 8, "move_rows reads 8 fields"
    rows = [_static_shape(shape) for shape in shapes]
    words = max(len(row) for row in rows)
    return tuple(word for row in rows for word in (*row, *[0] * (words - len(row)))), words


def _static_shape(shape: PoolShape) -> tuple[int, ...]:
    word = shape.word_bytes
    parts = [(p.plane_at, p.plane_words, p.column, p.width, p.block_at) for p in shape.parts]
    return (
        word,
        shape.align_bytes,
        shape.layer_bytes // word,
        shape.unit_bytes // word,
        shape.row_bytes // word,
        shape.rows_per_unit,
        int(shape.is_slot),
        shape.tile_rows,
        shape.reset_low,
        shape.reset_high,
        len(parts),
        *(word for part in parts for word in part),
    )


def launch(
    pools: tuple[torch.Tensor, ...],
    staging: torch.Tensor,
    table: torch.Tensor,
    shapes: tuple[PoolShape, ...],
    *,
    pieces: int,
    tiles: int,
    to_pool: bool,
) -> None:
    """Run `move_rows` on the current stream.

    pools: int64 views of the pools' memory; staging: int64 view of the block; table: int64 on the same device.
    """
    constants, words = static_shapes(shapes)
    move_rows[(tiles, pieces)](
        pools,
        staging,
        table,
        TO_POOL=to_pool,
        SHAPES=constants,
        SHAPE_WORDS=words,
        NUM_POOLS=len(shapes),
        num_warps=4,
    )
