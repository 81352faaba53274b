"""Which rows one launch moves, as a table of integers: the plan of a gather or a scatter. Torch-free.

Owns: the static shape of a pool as the kernel sees it, the cut of an image into blocks that fit the staging buffer, and
the table of one block. Does not own: the place of rows in an image (`KVSpec.place`).

Table, int64: `FIELDS` words a piece, then the index lists (full pages, window pages, slot):

    pool | first layer | layers | first row | rows | place in the block / align | bytes to clear after, or -1 | index

"first row" is absolute, "index" is the word of the table at which the unit of logical page 0 stands (a slot pool: the
slot). A piece with -1 resets those rows of the slot's ring that the image does not hold, so that no launch and no
ordering is needed between reset and load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import IntegrityError
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import REGION_ALIGN_BYTES, IndexSpace, KVSpec, PoolSpec, ResetValue, RowRange

FIELDS = 8
_TILE_BYTES = 8 << 10
_WIDEST_PART = 512
_MINUS_INF = 0xFF800000  # fp32 bits


@dataclass(frozen=True, slots=True)
class Part:
    """A power of two of words in each row: `column` in its plane, `block_at` in the packed row. All in words."""

    plane_at: int
    plane_words: int
    column: int
    width: int
    block_at: int


@dataclass(frozen=True, slots=True)
class PoolShape:
    """A pool's layout in memory, all that the kernel is compiled for.

    Attributes:
        word_bytes: 8 where rows and planes allow, else 4.
        align_bytes: what every row of a packed block is a multiple of, at most 16.
        reset_low, reset_high: signed words of a reset row's first and second half.
        tile_rows: rows of one program, a power of two.
    """

    word_bytes: int
    align_bytes: int
    layer_bytes: int
    unit_bytes: int
    row_bytes: int
    rows_per_unit: int
    is_slot: bool
    tile_rows: int
    parts: tuple[Part, ...]
    reset_low: int
    reset_high: int

    @classmethod
    def of(cls, pool: PoolSpec, num_units: int) -> PoolShape:
        """Shape of one pool.

        Raises:
            ValueError: rows that cannot be moved in words of 4 bytes.
        """
        aligned = math.gcd(pool.row_bytes, pool.unit_stride_bytes, 16, *(p.row_bytes for p in pool.planes))
        align = math.gcd(pool.row_bytes, 16)
        word = min(8, aligned)
        if word < 4:
            raise ValueError(f"pool {pool.name}: rows of {pool.row_bytes} bytes are not whole words")
        minus_inf = _MINUS_INF << 32 | _MINUS_INF if word == 8 else _MINUS_INF
        high = minus_inf - (1 << 8 * word) if pool.reset is ResetValue.KV_ZERO_SCORE_MINUS_INF else 0
        rows = max(1, min(128, 1 << round(math.log2(_TILE_BYTES / pool.row_bytes))))
        return cls(
            word_bytes=word,
            align_bytes=align,
            layer_bytes=num_units * pool.unit_stride_bytes,
            unit_bytes=pool.unit_stride_bytes,
            row_bytes=pool.row_bytes,
            rows_per_unit=pool.rows_per_unit,
            is_slot=pool.space is IndexSpace.SLOT,
            tile_rows=rows,
            parts=tuple(_parts(pool, word)),
            reset_low=0,
            reset_high=high,
        )


def _parts(pool: PoolSpec, word: int) -> Iterable[Part]:
    packed = 0
    for i, plane in enumerate(pool.planes):
        words, column = plane.row_bytes // word, 0
        while column < words:
            width = min(_WIDEST_PART, 1 << ((words - column).bit_length() - 1))
            yield Part(pool.plane_offset(i) // word, words, column, width, packed + column)
            column += width
        packed += words


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of `layers` of one range, at bytes [start, end) of an image; `pad` bytes up to the next region follow."""

    place: RowRange
    first_layer: int
    layers: int
    start: int
    end: int
    pad: int


@dataclass(frozen=True, slots=True)
class Block:
    """Pieces that lie next to each other in an image: bytes [start, end), moved by one launch and one copy."""

    pieces: tuple[Piece, ...]
    start: int
    end: int

    @property
    def base(self) -> int:
        """Byte of the image that the start of the staging block stands for: keeps the alignment of every piece."""
        return self.start // REGION_ALIGN_BYTES * REGION_ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class Table:
    """The table of one block, int64 [words], and the grid of its launch."""

    words: npt.NDArray[np.int64]
    pieces: int
    tiles: int


def cut_blocks(spec: KVSpec, num_tokens: int, places: Sequence[RowRange], most_bytes: int) -> list[Block]:
    """Cut an image into runs of at most `most_bytes`, at segments where possible, else at layers.

    Raises:
        ValueError: one layer of a segment is larger than `most_bytes`.
    """
    blocks: list[Block] = []
    open_pieces: list[Piece] = []
    for piece in _pieces(spec, num_tokens, places, most_bytes):
        if open_pieces and piece.end + piece.pad - open_pieces[0].start > most_bytes:
            blocks.append(_block(open_pieces))
            open_pieces = []
        open_pieces.append(piece)
    if open_pieces:
        blocks.append(_block(open_pieces))
    return blocks


def _block(pieces: list[Piece]) -> Block:
    return Block(tuple(pieces), pieces[0].start, pieces[-1].end + pieces[-1].pad)


def _pieces(spec: KVSpec, num_tokens: int, places: Sequence[RowRange], most_bytes: int) -> Iterable[Piece]:
    for place in sorted(places, key=lambda p: p.offset):
        pool = spec.pool(place.pool)
        layer_bytes = place.length // len(pool.layers)
        at_a_time = len(pool.layers)
        if place.length + REGION_ALIGN_BYTES > most_bytes:
            at_a_time = (most_bytes - REGION_ALIGN_BYTES) // layer_bytes
        if at_a_time < 1:
            raise ValueError(f"pool {place.pool}: {layer_bytes} bytes of one layer exceed staging of {most_bytes}")
        ends_region = place.row_end == pool.live_rows(num_tokens).stop
        for layer in range(0, len(pool.layers), at_a_time):
            layers = min(at_a_time, len(pool.layers) - layer)
            start = place.offset + layer * layer_bytes
            end = start + layers * layer_bytes
            pad = -end % REGION_ALIGN_BYTES if ends_region and layer + layers == len(pool.layers) else 0
            yield Piece(place, layer, layers, start, end, pad)


class Planner:
    """Tables for one manifest and its pool sizes."""

    def __init__(self, spec: KVSpec, num_units: Sequence[int]) -> None:
        """`num_units`: units of each pool, in manifest order."""
        self.spec = spec
        self.names = tuple(pool.name for pool in spec.pools if pool.layers)
        units = dict(zip((pool.name for pool in spec.pools), num_units, strict=True))
        self._number = {name: i for i, name in enumerate(self.names)}
        self.shapes = tuple(PoolShape.of(spec.pool(name), units[name]) for name in self.names)

    def check_mapped(self, indices: SequenceIndices) -> None:
        """Raise `IntegrityError` unless every live row has a unit."""
        for name in self.names:
            pool = self.spec.pool(name)
            rows = pool.live_rows(indices.num_tokens)
            if pool.space is IndexSpace.SLOT or not rows:
                continue
            table = indices.full_pages if pool.space is IndexSpace.FULL_PAGE else indices.window_pages
            first, last = rows.start // pool.rows_per_unit, (rows.stop - 1) // pool.rows_per_unit
            if last >= len(table) or any(page is None for page in table[first : last + 1]):
                raise IntegrityError(f"pool {name}: rows {rows} need unmapped pages [{first}, {last}]: {table}")

    def table(self, block: Block, indices: SequenceIndices, *, reset: bool) -> Table:
        """The table of one block; with `reset`, also of the slot's reset."""
        extra = [name for name in self.names if self.spec.pool(name).space is IndexSpace.SLOT] if reset else []
        count = len(block.pieces) + len(extra)
        lists = count * FIELDS
        index = {
            IndexSpace.FULL_PAGE: lists,
            IndexSpace.WINDOW_PAGE: lists + len(indices.full_pages),
            IndexSpace.SLOT: lists + len(indices.full_pages) + len(indices.window_pages),
        }
        rows: list[tuple[int, ...]] = []
        most = 1
        for piece in block.pieces:
            number = self._number[piece.place.pool]
            shape, spec = self.shapes[number], self.spec.pool(piece.place.pool)
            at, rest = divmod(piece.start - block.base, shape.align_bytes)
            assert not rest, piece
            place = piece.place
            most = max(most, piece.layers * -(-place.num_rows // shape.tile_rows))
            rows.append(
                (number, piece.first_layer, piece.layers, place.row_start, place.num_rows, at, piece.pad)
                + (index[spec.space],)
            )
        for name in extra:
            number, spec = self._number[name], self.spec.pool(name)
            live = spec.live_rows(indices.num_tokens)
            most = max(most, len(spec.layers) * -(-spec.rows_per_unit // self.shapes[number].tile_rows))
            rows.append((number, 0, len(spec.layers), live.start, len(live), 0, -1, index[spec.space]))
        flat = [word for row in rows for word in row]
        flat.extend(indices.full_pages)
        flat.extend(-1 if page is None else page for page in indices.window_pages)
        flat.append(indices.slot)
        return Table(np.array(flat, dtype=np.int64), count, most)
