"""`KVPools`: every pool of one worker, and images of whole requests in and out of them.

Owns all KV memory of the worker: each tensor here belongs to a row of the manifest (a test walks the object and fails
otherwise). Not thread-safe: the engine thread that runs the model is the only caller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kvstore.errors import IntegrityError
from kvstore.ids import PageId, SlotId
from kvstore.image import DEFAULT_SEGMENT_BYTES, ImageHeader, KVImage, Segment, check_header
from kvstore.pools.pool import Pool
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import IndexSpace, KVSpec, PoolName, RowRange


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """Units of each index space."""

    full_pages: int
    window_pages: int
    slots: int

    def units(self, space: IndexSpace) -> int:
        """Number of units of one space."""
        return {
            IndexSpace.FULL_PAGE: self.full_pages,
            IndexSpace.WINDOW_PAGE: self.window_pages,
            IndexSpace.SLOT: self.slots,
        }[space]


class KVPools:
    """All pools of a manifest on one device."""

    def __init__(
        self, spec: KVSpec, sizes: PoolSizes, device: torch.device | str = "cpu", *, model_hash: str = ""
    ) -> None:
        """Allocate and reset everything. `model_hash` goes into every image made here."""
        self.spec = spec
        self.sizes = sizes
        self.device = torch.device(device)
        self.model_hash = model_hash
        self._pools = {pool.name: Pool(pool, sizes.units(pool.space), device) for pool in spec.pools}

    def pool(self, name: PoolName) -> Pool:
        """The pool of one manifest row."""
        return self._pools[name]

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All pools, in manifest order."""
        return tuple(self._pools.values())

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held."""
        return sum(pool.nbytes for pool in self.pools)

    def reset_slot(self, slot: SlotId) -> None:
        """Give every ring of a slot its reset value. Run on each slot before its first token."""
        self._for_units((), (), slot, Pool.reset)

    def poison(self, indices: SequenceIndices) -> None:
        """Fill a request's pages and slot with NaN bytes, for tests that look for reads of freed memory."""
        held = [page for page in indices.window_pages if page is not None]
        self._for_units(indices.full_pages, held, indices.slot, Pool.poison)

    def _for_units(
        self,
        full: Sequence[PageId],
        window: Sequence[PageId],
        slot: SlotId,
        action: Callable[[Pool, torch.Tensor], None],
    ) -> None:
        units: dict[IndexSpace, Sequence[int]] = {
            IndexSpace.FULL_PAGE: full,
            IndexSpace.WINDOW_PAGE: window,
            IndexSpace.SLOT: (slot,),
        }
        for pool in self.pools:
            if len(units[pool.spec.space]):
                action(pool, torch.tensor(units[pool.spec.space], dtype=torch.int64, device=self.device))

    def export_rows(self, place: RowRange, indices: SequenceIndices) -> torch.Tensor:
        """Rows of one range in host memory: uint8 [layers, rows, row_bytes], new and contiguous."""
        pool = self._pools[place.pool]
        return pool.gather(pool.locations(range(place.row_start, place.row_end), indices)).cpu()

    def get_cpu_copy(
        self,
        indices: SequenceIndices,
        *,
        request_id: str = "",
        epoch: int = 0,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    ) -> KVImage:
        """An image of the request after `indices.num_tokens` committed tokens. Only live rows move.

        The image is not sealed: call `KVImage.sealed` before it leaves the process.
        """
        n = indices.num_tokens
        payload = torch.empty(self.spec.image_bytes(n), dtype=torch.uint8)
        segments = tuple(Segment(place) for place in self.spec.split_image(n, segment_bytes))
        header = ImageHeader(
            request_id=request_id,
            epoch=epoch,
            num_tokens=n,
            fingerprint=self.spec.fingerprint,
            model_hash=self.model_hash,
            payload_bytes=payload.numel(),
            segments=segments,
        )
        image = KVImage(header, payload)
        end = 0
        for segment in segments:
            payload[end : segment.place.offset] = 0  # padding: equal requests give equal files
            end = segment.place.offset + segment.place.length
            image.segment_rows(segment, self.spec).copy_(self.export_rows(segment.place, indices))
        payload[end:] = 0
        return image

    def load_cpu_copy(self, image: KVImage, indices: SequenceIndices) -> None:
        """Put an image into the pages and slot of `indices`; the slot is reset first.

        Checks layout and completeness, not checksums: whoever received the bytes has verified them.

        Raises:
            SpecMismatch, CorruptImage: see `check_header`; nothing was written.
            IntegrityError: `indices` does not map a live row; nothing was written.
        """
        header = image.header
        check_header(header, self.spec, model_hash=self.model_hash)
        if header.num_tokens != indices.num_tokens:
            raise IntegrityError(f"image of {header.num_tokens} tokens into a place for {indices.num_tokens}")
        located = [(s, self._locate(s.place, indices)) for s in header.segments]
        self.reset_slot(indices.slot)
        for segment, locations in located:
            rows = image.segment_rows(segment, self.spec)
            self._pools[segment.place.pool].scatter(locations, rows.to(self.device))

    def _locate(self, place: RowRange, indices: SequenceIndices) -> torch.Tensor:
        return self._pools[place.pool].locations(range(place.row_start, place.row_end), indices)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the pools are exactly those of the manifest."""
        if tuple(self._pools) != tuple(pool.name for pool in self.spec.pools):
            raise IntegrityError(f"pools {list(self._pools)} are not the manifest's")
        for pool in self.pools:
            pool.check_integrity()
