"""`KVSpec`: the manifest of every KV pool, and all byte arithmetic that follows from it. Torch-free.

Owns: what a row is (planes), where it lives (index space, rows per unit, stride), which rows are alive after n tokens,
what an unused row holds, and where each row sits in the serial form of one request. Does not own: memory (`pools/`),
page tables (`sequence_kv.py`), model configs (`workers/model/kv_layout.py` calls `build_kv_spec`).

Rows are addressed by position everywhere: row r of a pool covers tokens [r * tokens_per_row, (r + 1) * tokens_per_row).
Sizes follow reference/dsv4_spec.md 4.2 (entries), 4.4 (states) and 4.5 (totals), read from SGLang's V4 layout.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PAGE_TOKENS = 256
"""Tokens of one logical page. 4 and 128 divide it, so one page table serves C4, indexer and C128 rows."""

REGION_ALIGN_BYTES = 64
"""Start of each pool's bytes in an image; below 8, rows could not be read as 8-byte words."""

SPEC_VERSION = 1
"""Part of the fingerprint: raise it when the meaning of stored bytes changes without any size changing."""

SCALE_BLOCK = 64
"""Dimensions of a stored KV entry that share one e8m0 scale (dsv4_spec.md 4.2)."""

_KNOWN_OFFSETS = 64
"""Token counts whose region offsets a manifest remembers."""

KVFormat = Literal["fp8", "fp32"]


class PoolName(enum.StrEnum):
    """Every pool of the store. The value is the name on the wire and in the fingerprint."""

    WINDOW = "window"
    C4 = "c4"
    C4_INDEXER = "c4_indexer"
    C128 = "c128"
    C4_STATE = "c4_state"
    C4_INDEXER_STATE = "c4_indexer_state"
    C128_STATE = "c128_state"


class IndexSpace(enum.Enum):
    """What a pool's unit index is: a page of the full table, a page of the window table, or the request's slot."""

    FULL_PAGE = "full_page"
    WINDOW_PAGE = "window_page"
    SLOT = "slot"


class LiveRule(enum.Enum):
    """Which rows will be read again after n committed tokens.

    LAST_SPAN: [max(0, n - span), n).  EVERY: [0, n // tokens_per_pooling).
    UNPOOLED: [max(0, ratio * (n // ratio) - span), n): rows of the open compression window and `span` rows before it.
    """

    LAST_SPAN = "last_span"
    EVERY = "every"
    UNPOOLED = "unpooled"


class ResetValue(enum.Enum):
    """What a reset row holds: zero bytes, or fp32 zeros in the first half (kv) and -inf in the second (scores)."""

    ZERO = "zero"
    KV_ZERO_SCORE_MINUS_INF = "kv_zero_score_minus_inf"


@dataclass(frozen=True, slots=True)
class Plane:
    """One part of a row. A unit holds all rows of plane 0, then all rows of plane 1 (block-split)."""

    name: str
    row_bytes: int


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """One row of the manifest.

    Attributes:
        layers: model layer ids that have this pool, ascending; the pool's tensor has one entry each.
        rows_per_unit: rows of one page, or length of one slot's ring.
        tokens_per_row: 1 for window and states, 4 or 128 for compressed entries.
        ratio: compression ratio that decides liveness (1 for the window).
        span: extra rows of the live rule, see `LiveRule`.
    """

    name: PoolName
    space: IndexSpace
    layers: tuple[int, ...]
    rows_per_unit: int
    planes: tuple[Plane, ...]
    tokens_per_row: int
    live: LiveRule
    ratio: int
    span: int
    reset: ResetValue

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one layer, without page padding."""
        return sum(plane.row_bytes for plane in self.planes)

    @property
    def unit_stride_bytes(self) -> int:
        """Bytes of one unit of one layer: its rows, rounded up to a multiple of the data plane's row."""
        data = self.planes[0].row_bytes
        return math.ceil(self.rows_per_unit * self.row_bytes / data) * data

    @property
    def row_all_layers_bytes(self) -> int:
        """Bytes of one row over all layers: the step of a row in an image."""
        return self.row_bytes * len(self.layers)

    def plane_offset(self, plane: int) -> int:
        """Byte offset of a plane's first row inside a unit."""
        return self.rows_per_unit * sum(p.row_bytes for p in self.planes[:plane])

    def live_rows(self, num_tokens: int) -> range:
        """Absolute row numbers that must survive a copy taken after `num_tokens` committed tokens."""
        n = num_tokens
        if self.live is LiveRule.EVERY:
            return range(n // self.ratio)
        if self.live is LiveRule.LAST_SPAN:
            return range(max(0, n - self.span), n)
        return range(max(0, self.ratio * (n // self.ratio) - self.span), n)

    def finished_rows(self, start_token: int, end_token: int) -> range:
        """Rows of an EVERY pool that become final while tokens [start, end) are committed."""
        if self.live is not LiveRule.EVERY:
            raise ValueError(f"pool {self.name} keeps changing: only its tail can be copied")
        return range(start_token // self.ratio, end_token // self.ratio)


@dataclass(frozen=True, slots=True)
class RowRange:
    """Rows [row_start, row_end) of one pool, all layers, and their place in the image of one request."""

    pool: PoolName
    row_start: int
    row_end: int
    offset: int
    length: int

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.row_end - self.row_start


@dataclass(frozen=True)
class KVSpec:
    """All pools of one model, in manifest order.

    An image of n tokens is one byte string: for each pool, at a 64-byte boundary, its live rows in order. The place of
    a row range depends on (pool, row_start, n) alone, never on how the image is cut into segments; inside a segment the
    bytes are [layers, rows, row_bytes].
    """

    pools: tuple[PoolSpec, ...]
    fmt: KVFormat
    page_tokens: int = PAGE_TOKENS

    def pool(self, name: PoolName) -> PoolSpec:
        """The pool's manifest row; raises `KeyError` for a name the model does not have."""
        return self._by_name[name]

    @functools.cached_property
    def _by_name(self) -> dict[PoolName, PoolSpec]:
        return {pool.name: pool for pool in self.pools}

    @functools.cached_property
    def _index_by_name(self) -> dict[PoolName, int]:
        return {pool.name: i for i, pool in enumerate(self.pools)}

    @functools.cached_property
    def fingerprint(self) -> str:
        """128-bit hex digest of all that gives stored bytes a meaning; equal fingerprints can exchange images."""
        rows = [
            {
                "name": pool.name.value,
                "space": pool.space.value,
                "layers": pool.layers,
                "rows_per_unit": pool.rows_per_unit,
                "planes": [(plane.name, plane.row_bytes) for plane in pool.planes],
                "tokens_per_row": pool.tokens_per_row,
                "live": (pool.live.value, pool.ratio, pool.span),
                "reset": pool.reset.value,
            }
            for pool in self.pools
        ]
        form = {"version": SPEC_VERSION, "fmt": self.fmt, "page_tokens": self.page_tokens, "pools": rows}
        return hashlib.sha256(json.dumps(form, sort_keys=True).encode()).hexdigest()[:32]

    @functools.cached_property
    def growing_pools(self) -> tuple[PoolSpec, ...]:
        """Pools whose rows never change once written: they can be sent while later chunks compute."""
        return tuple(pool for pool in self.pools if pool.live is LiveRule.EVERY and pool.layers)

    @functools.cached_property
    def tail_pools(self) -> tuple[PoolSpec, ...]:
        """Pools whose live rows depend on the final n: they go with the last chunk."""
        return tuple(pool for pool in self.pools if pool.live is not LiveRule.EVERY and pool.layers)

    @property
    def window_tokens(self) -> int:
        """Tokens of the sliding window."""
        return self.pool(PoolName.WINDOW).span

    def num_pages(self, num_tokens: int) -> int:
        """Logical pages of `num_tokens` tokens."""
        return -(-num_tokens // self.page_tokens)

    def live_bytes(self, num_tokens: int) -> int:
        """Bytes that must move for one request of n tokens, without padding."""
        return sum(len(p.live_rows(num_tokens)) * p.row_all_layers_bytes for p in self.pools)

    def image_bytes(self, num_tokens: int) -> int:
        """Bytes of the payload of one request's image (live bytes plus at most 63 bytes of padding a pool)."""
        return self._region_offsets(num_tokens)[len(self.pools)]

    @functools.cached_property
    def _known_offsets(self) -> dict[int, tuple[int, ...]]:
        return {}

    def _region_offsets(self, num_tokens: int) -> tuple[int, ...]:
        """Start of every region, then the end of the last. Kept for a few n: an image asks once per segment."""
        found = self._known_offsets.get(num_tokens)
        if found is None:
            offsets = [0]
            for pool in self.pools:
                length = len(pool.live_rows(num_tokens)) * pool.row_all_layers_bytes
                offsets.append(offsets[-1] + -(-length // REGION_ALIGN_BYTES) * REGION_ALIGN_BYTES)
            found = tuple(offsets)
            if len(self._known_offsets) >= _KNOWN_OFFSETS:
                self._known_offsets.clear()
            self._known_offsets[num_tokens] = found
        return found

    def region_offset(self, name: PoolName, num_tokens: int) -> int:
        """Byte offset in an image of n tokens at which the pool's live rows begin."""
        return self._region_offsets(num_tokens)[self._index_by_name[name]]

    def place(self, name: PoolName, row_start: int, row_end: int, num_tokens: int) -> RowRange:
        """Place of rows [row_start, row_end) in an image of n tokens.

        Raises:
            ValueError: the range is empty or not alive after n tokens.
        """
        pool = self.pool(name)
        live = pool.live_rows(num_tokens)
        if not live.start <= row_start < row_end <= live.stop:
            raise ValueError(f"pool {name}: rows [{row_start}, {row_end}) are not alive at n={num_tokens}: {live}")
        step = pool.row_all_layers_bytes
        offset = self.region_offset(name, num_tokens) + (row_start - live.start) * step
        return RowRange(name, row_start, row_end, offset, (row_end - row_start) * step)

    def split(self, name: PoolName, rows: range, num_tokens: int, target_bytes: int) -> list[RowRange]:
        """Cut rows into nearly equal ranges of at most `target_bytes` each (one row is never cut).

        With `target_bytes` of 2 MiB or more every range of a larger set is at least 1 MiB.
        """
        pool = self.pool(name)
        if not rows or not pool.layers:
            return []
        most = max(1, target_bytes // pool.row_all_layers_bytes)
        pieces = -(-len(rows) // most)
        cuts = [rows.start + len(rows) * i // pieces for i in range(pieces + 1)]
        return [self.place(name, a, b, num_tokens) for a, b in zip(cuts, cuts[1:], strict=False)]

    def split_image(self, num_tokens: int, target_bytes: int) -> list[RowRange]:
        """Every live row of every pool after n tokens, in manifest order."""
        return [r for p in self.pools for r in self.split(p.name, p.live_rows(num_tokens), num_tokens, target_bytes)]

    def chunk_ranges(self, start_token: int, end_token: int, num_tokens: int, target_bytes: int) -> list[RowRange]:
        """Rows that become final while tokens [start, end) of a prompt of n are prefilled: sent after the chunk."""
        return [
            r
            for p in self.growing_pools
            for r in self.split(p.name, p.finished_rows(start_token, end_token), num_tokens, target_bytes)
        ]

    def tail_ranges(self, num_tokens: int, target_bytes: int) -> list[RowRange]:
        """Window and state rows after n tokens: send them with the last chunk."""
        return [
            r for p in self.tail_pools for r in self.split(p.name, p.live_rows(num_tokens), num_tokens, target_bytes)
        ]


def _entry_planes(head_dim: int, rope_dim: int, fmt: KVFormat) -> tuple[Plane, ...]:
    """A stored KV entry: e4m3 nope and bf16 rope, then e8m0 scales padded to 8 bytes; or plain fp32."""
    if fmt == "fp32":
        return (Plane("data", 4 * head_dim),)
    nope = head_dim - rope_dim
    scales = -(-(nope // SCALE_BLOCK) // 8) * 8
    return (Plane("data", nope + 2 * rope_dim), Plane("scale", scales))


def _indexer_planes(index_head_dim: int, fmt: KVFormat) -> tuple[Plane, ...]:
    """A stored indexer key: e4m3 then one fp32 scale; or plain fp32."""
    if fmt == "fp32":
        return (Plane("data", 4 * index_head_dim),)
    return (Plane("data", index_head_dim), Plane("scale", 4))


def _paged(name: PoolName, layers: tuple[int, ...], planes: tuple[Plane, ...], ratio: int) -> PoolSpec:
    """A pool of compressed entries: one row per `ratio` tokens, on full pages."""
    return PoolSpec(
        name=name,
        space=IndexSpace.FULL_PAGE,
        layers=layers,
        rows_per_unit=PAGE_TOKENS // ratio,
        planes=planes,
        tokens_per_row=ratio,
        live=LiveRule.EVERY,
        ratio=ratio,
        span=0,
        reset=ResetValue.ZERO,
    )


def _ring(name: PoolName, layers: tuple[int, ...], row_bytes: int, *, ring: int, ratio: int, span: int) -> PoolSpec:
    """A pool of raw compressor rows: a ring of `ring` rows in the request's slot."""
    return PoolSpec(
        name=name,
        space=IndexSpace.SLOT,
        layers=layers,
        rows_per_unit=ring,
        planes=(Plane("data", row_bytes),),
        tokens_per_row=1,
        live=LiveRule.UNPOOLED,
        ratio=ratio,
        span=span,
        reset=ResetValue.KV_ZERO_SCORE_MINUS_INF,
    )


def build_kv_spec(
    layer_kinds: Sequence[int],
    *,
    head_dim: int,
    rope_dim: int,
    index_head_dim: int,
    window: int,
    fmt: KVFormat,
) -> KVSpec:
    """The manifest of one model.

    Args:
        layer_kinds: compression ratio of each layer, 0 (sliding only), 4 or 128; the index is the layer id.
        window: tokens of the sliding window, at most one page.
        fmt: "fp8" for the stored formats of the official release, "fp32" for exactness tests.

    Raises:
        ValueError: a ratio, size or format this store has no layout for.
    """
    unknown = sorted(set(layer_kinds) - {0, 4, 128})
    if unknown or fmt not in ("fp8", "fp32"):
        raise ValueError(f"no KV layout for compression ratios {unknown}, fmt {fmt!r}")
    if (head_dim - rope_dim) % SCALE_BLOCK or head_dim <= rope_dim or not 0 < window <= PAGE_TOKENS:
        raise ValueError(f"no KV layout for head_dim {head_dim}, rope_dim {rope_dim}, window {window}")
    everywhere = tuple(range(len(layer_kinds)))
    c4 = tuple(i for i, ratio in enumerate(layer_kinds) if ratio == 4)
    c128 = tuple(i for i, ratio in enumerate(layer_kinds) if ratio == 128)
    entry = _entry_planes(head_dim, rope_dim, fmt)
    window_pool = PoolSpec(
        name=PoolName.WINDOW,
        space=IndexSpace.WINDOW_PAGE,
        layers=everywhere,
        rows_per_unit=PAGE_TOKENS,
        planes=entry,
        tokens_per_row=1,
        live=LiveRule.LAST_SPAN,
        ratio=1,
        span=window,
        reset=ResetValue.ZERO,
    )
    pools = (
        window_pool,
        _paged(PoolName.C4, c4, entry, 4),
        _paged(PoolName.C4_INDEXER, c4, _indexer_planes(index_head_dim, fmt), 4),
        _paged(PoolName.C128, c128, entry, 128),
        _ring(PoolName.C4_STATE, c4, 4 * 4 * head_dim, ring=8, ratio=4, span=4),
        _ring(PoolName.C4_INDEXER_STATE, c4, 4 * 4 * index_head_dim, ring=8, ratio=4, span=4),
        _ring(PoolName.C128_STATE, c128, 4 * 2 * head_dim, ring=128, ratio=128, span=0),
    )
    return KVSpec(pools=pools, fmt=fmt)
