"""`Pool`: the memory of one manifest row, read and written by row location.

Owns: one uint8 tensor [layers, units, unit_stride_bytes] and the block-split addressing inside a unit. Knows planes,
not what they mean: entries, indexer keys and states are all rows of bytes. A *location* is unit * rows_per_unit +
offset (int64), the same for every layer of the pool. Locations must be valid; a caller with padding clamps and masks.
"""

from __future__ import annotations

import torch

from kvstore.errors import IntegrityError
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import IndexSpace, PoolSpec, ResetValue

_WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16))


def _word(spec: PoolSpec) -> tuple[int, torch.dtype]:
    """Widest integer that divides every plane row and the stride: fewer, wider moves per row."""
    for size, dtype in _WORDS:
        if spec.unit_stride_bytes % size == 0 and all(plane.row_bytes % size == 0 for plane in spec.planes):
            return size, dtype
    return 1, torch.uint8


class Pool:
    """All layers of one pool on one device. Methods run on the caller's thread and current stream."""

    def __init__(self, spec: PoolSpec, num_units: int, device: torch.device | str = "cpu") -> None:
        """Allocate and reset `num_units` units."""
        self.spec = spec
        self.num_units = num_units
        self.data = torch.zeros(len(spec.layers), num_units, spec.unit_stride_bytes, dtype=torch.uint8, device=device)
        self._layer_index = {layer: i for i, layer in enumerate(spec.layers)}
        self._word_bytes, self._word_dtype = _word(spec)
        self._planes = tuple(self._plane_words(i) for i in range(len(spec.planes)))  # each [L, units, rows, words]
        if spec.reset is not ResetValue.ZERO:
            self.reset(torch.arange(num_units, device=device))

    @property
    def nbytes(self) -> int:
        """Bytes of the pool's memory."""
        return self.data.numel()

    def layer_index(self, layer: int) -> int:
        """Index of a model layer id in `data`; raises `KeyError` when the layer has no such pool."""
        return self._layer_index[layer]

    def plane(self, index: int) -> torch.Tensor:
        """A view of one plane, uint8 [layers, units, rows_per_unit, plane row bytes]; shares memory with `data`."""
        spec = self.spec
        width, stride = spec.planes[index].row_bytes, spec.unit_stride_bytes
        shape = (len(spec.layers), self.num_units, spec.rows_per_unit, width)
        return self.data.as_strided(shape, (self.num_units * stride, stride, width, 1), spec.plane_offset(index))

    def _plane_words(self, index: int) -> torch.Tensor:
        spec, size = self.spec, self._word_bytes
        width, stride = spec.planes[index].row_bytes // size, spec.unit_stride_bytes // size
        shape = (len(spec.layers), self.num_units, spec.rows_per_unit, width)
        words = self.data.view(self._word_dtype)
        return words.as_strided(shape, (self.num_units * stride, stride, width, 1), spec.plane_offset(index) // size)

    def _address(self, locations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.spec.rows_per_unit
        return torch.div(locations, rows, rounding_mode="floor"), torch.remainder(locations, rows)

    def read_rows(self, layer: int, locations: torch.Tensor) -> torch.Tensor:
        """Rows of one layer. locations: int64 [...]; returns a new uint8 [..., row_bytes]."""
        index = self._layer_index[layer]
        unit, offset = self._address(locations)
        parts = [plane[index][unit, offset] for plane in self._planes]  # each [..., words]
        words = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return words.view(torch.uint8)

    def write_rows(self, layer: int, locations: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows of one layer. locations: int64 [n], each at most once; rows: uint8 [n, row_bytes]."""
        index = self._layer_index[layer]
        unit, offset = self._address(locations)
        words = self._as_words(rows)  # [n, words of a row]
        start = 0
        for plane in self._planes:
            end = start + plane.shape[-1]
            plane[index].index_put_((unit, offset), words[:, start:end])
            start = end

    def _as_words(self, rows: torch.Tensor) -> torch.Tensor:
        if rows.dtype != torch.uint8 or rows.shape[-1] != self.spec.row_bytes:
            raise ValueError(f"pool {self.spec.name}: rows must be uint8 [..., {self.spec.row_bytes}]: {rows.shape}")
        rows = rows.contiguous()
        if rows.storage_offset() % self._word_bytes:
            rows = rows.clone()
        return rows.view(self._word_dtype)

    def gather(self, locations: torch.Tensor) -> torch.Tensor:
        """Rows of all layers. locations: int64 [n]; returns a new uint8 [L, n, row_bytes], contiguous."""
        unit, offset = self._address(locations)
        parts = [plane[:, unit, offset] for plane in self._planes]  # each [L, n, words]
        words = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return words.contiguous().view(torch.uint8)

    def scatter(self, locations: torch.Tensor, rows: torch.Tensor) -> None:
        """Store rows of all layers. locations: int64 [n], each at most once; rows: uint8 [L, n, row_bytes]."""
        unit, offset = self._address(locations)
        words = self._as_words(rows)  # [L, n, words of a row]
        start = 0
        for plane in self._planes:
            end = start + plane.shape[-1]
            plane[:, unit, offset] = words[..., start:end]
            start = end

    def reset(self, units: torch.Tensor) -> None:
        """Give every row of these units (int64 [n]) its reset value, in all layers."""
        if self.spec.reset is ResetValue.ZERO:
            self.data[:, units] = 0
            return
        width, half = self.spec.row_bytes // 4, self.spec.row_bytes // 8
        rings = self.data.view(torch.float32).view(*self.data.shape[:2], self.spec.rows_per_unit, width)
        rings[:, units, :, :half] = 0.0
        rings[:, units, :, half:] = -torch.inf

    def poison(self, units: torch.Tensor) -> None:
        """Fill these units with 0xFF bytes: NaN as fp32, bf16, e4m3 and e8m0, so that a stale read cannot go unseen."""
        self.data[:, units] = 0xFF

    def locations(self, rows: range, indices: SequenceIndices) -> torch.Tensor:
        """Locations of absolute rows of one request: int64 [len(rows)].

        Raises:
            IntegrityError: a row's page is not mapped (reclaimed, or never allocated).
        """
        row = torch.arange(rows.start, rows.stop, dtype=torch.int64)
        per_unit = self.spec.rows_per_unit
        if self.spec.space is IndexSpace.SLOT:
            return (indices.slot * per_unit + row % per_unit).to(self.data.device)
        table = indices.full_pages if self.spec.space is IndexSpace.FULL_PAGE else indices.window_pages
        pages = range(rows.start // per_unit, -(-rows.stop // per_unit))
        mapped = table[pages.start : pages.stop]
        if len(mapped) != len(pages) or any(page is None for page in mapped):
            raise IntegrityError(f"pool {self.spec.name}: rows {rows} need unmapped pages {pages}: {mapped}")
        units = torch.tensor(mapped, dtype=torch.int64)
        location = units[row // per_unit - pages.start] * per_unit + row % per_unit
        return location.to(self.data.device)

    def get_cpu_copy(self, indices: SequenceIndices) -> torch.Tensor:
        """The request's live rows of this pool in host memory: uint8 [L, live rows, row_bytes]."""
        return self.gather(self.locations(self.spec.live_rows(indices.num_tokens), indices)).cpu()

    def load_cpu_copy(self, copy: torch.Tensor, indices: SequenceIndices) -> None:
        """Mirror of `get_cpu_copy`, into the pages and slot of `indices` (which may be others than at the copy).

        A slot pool's ring is reset first: rows that are not alive must not leak from the slot's previous owner.
        """
        if self.spec.space is IndexSpace.SLOT:
            self.reset(torch.tensor([indices.slot], device=self.data.device))
        rows = self.spec.live_rows(indices.num_tokens)
        if tuple(copy.shape) != (len(self.spec.layers), len(rows), self.spec.row_bytes):
            raise ValueError(f"pool {self.spec.name}: copy {tuple(copy.shape)} does not hold rows {rows}")
        self.scatter(self.locations(rows, indices), copy.to(self.data.device))

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the memory has the shape the manifest gives it."""
        expected = (len(self.spec.layers), self.num_units, self.spec.unit_stride_bytes)
        if tuple(self.data.shape) != expected or self.data.dtype != torch.uint8 or not self.data.is_contiguous():
            raise IntegrityError(f"pool {self.spec.name}: {self.data.dtype} {tuple(self.data.shape)}, not {expected}")
