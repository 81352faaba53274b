"""Typed access to the KV pools: fp32 vectors in and out, addressed by (sequence, row number) through page tables.

Owns: the mapping row -> location (`unit * rows_per_unit + offset`, int64) for pages and rings, and which stored format
or fake quantisation applies. Does not own: bytes (`workers/reference/kv_format.py`) or memory (`kvstore/pools`).
"""

from __future__ import annotations

from torch import Tensor

from kvstore.pools.aggregate import KVPools
from kvstore.spec import IndexSpace, PoolName
from workers.batch import ForwardBatch
from workers.model import layers as parts
from workers.model.config import ModelConfig
from workers.model.precision import Precision
from workers.reference import kv_format
from workers.reference.indexer import hadamard


class PagedKV:
    """Reads and writes rows of one `KVPools` for one batch at a time.

    Raises ValueError at construction when the pools' stored format is narrower than the precision asks for.
    """

    def __init__(self, config: ModelConfig, precision: Precision, pools: KVPools) -> None:
        self.config, self.precision, self.pools = config, precision, pools
        self.fp8 = pools.spec.fmt == "fp8"
        if self.fp8 and not (precision.kv_fp8 and precision.indexer == "fp8"):
            raise ValueError(f"pools store fp8 rows, but {precision} needs fmt='fp32' pools")

    def locations(self, name: PoolName, batch: ForwardBatch, sequences: Tensor, rows: Tensor) -> Tensor:
        """Location of `rows` of `sequences` (same shape, int64). Rows must be valid: clamp before, mask after."""
        spec = self.pools.spec.pool(name)
        per_unit = spec.rows_per_unit
        if spec.space is IndexSpace.SLOT:
            return batch.slots[sequences] * per_unit + rows % per_unit
        table = batch.window_pages if spec.space is IndexSpace.WINDOW_PAGE else batch.full_pages
        return table[sequences, rows // per_unit] * per_unit + rows % per_unit

    def write_entries(self, name: PoolName, layer: int, locations: Tensor, entries: Tensor) -> None:
        """Store KV entries [n, D] fp32 at `locations` [n]; fake-quantised entries are stored unchanged."""
        if self.fp8:
            rows = kv_format.pack_kv_fp8(entries, self.config.qk_rope_head_dim)
        else:
            rows = kv_format.pack_fp32(parts.store_entry(entries, self.config, self.precision))
        self.pools.pool(name).write_rows(layer, locations, rows)

    def read_entries(self, name: PoolName, layer: int, locations: Tensor, valid: Tensor) -> Tensor:
        """KV entries [..., D] fp32; where not `valid` the location is ignored and zeros come back."""
        rows = self._read(name, layer, locations, valid)
        if self.fp8:
            return kv_format.unpack_kv_fp8(rows, self.config.head_dim, self.config.qk_rope_head_dim)
        return kv_format.unpack_fp32(rows)

    def write_index_keys(self, layer: int, locations: Tensor, keys: Tensor) -> None:
        """Store indexer keys [n, Di] fp32, as they are after rope (Hadamard and number format happen here)."""
        if self.fp8:
            rows = kv_format.pack_indexer_fp8(hadamard(keys))
        else:
            rows = kv_format.pack_fp32(parts.store_index_vector(keys, self.precision))
        self.pools.pool(PoolName.C4_INDEXER).write_rows(layer, locations, rows)

    def read_index_keys(self, layer: int, locations: Tensor, valid: Tensor) -> Tensor:
        """Indexer keys [..., Di] fp32, zeros where not `valid`."""
        rows = self._read(PoolName.C4_INDEXER, layer, locations, valid)
        if self.fp8:
            return kv_format.unpack_indexer_fp8(rows, self.config.index_head_dim)
        return kv_format.unpack_fp32(rows)

    def write_state(self, name: PoolName, layer: int, locations: Tensor, rows: Tensor) -> None:
        """Store raw compressor rows [n, W] fp32."""
        self.pools.pool(name).write_rows(layer, locations, kv_format.pack_fp32(rows))

    def read_state(self, name: PoolName, layer: int, locations: Tensor, valid: Tensor) -> Tensor:
        """Raw compressor rows [..., W] fp32, zeros where not `valid`."""
        return kv_format.unpack_fp32(self._read(name, layer, locations, valid))

    def _read(self, name: PoolName, layer: int, locations: Tensor, valid: Tensor) -> Tensor:
        rows = self.pools.pool(name).read_rows(layer, locations.masked_fill(~valid, 0))
        return rows.masked_fill(~valid.unsqueeze(-1), 0)
