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
from kvstore.pools.copies import DEFAULT_STAGING_BYTES, Mover, PendingCopy, PendingLoad
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
        self,
        spec: KVSpec,
        sizes: PoolSizes,
        device: torch.device | str = "cpu",
        *,
        model_hash: str = "",
        one_launch: bool | None = None,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        """Allocate and reset everything.

        Args:
            model_hash: goes into every image made here.
            one_launch: move whole requests with the Triton kernel. Default: on a CUDA device. On the CPU it needs
                Triton's interpreter and is slow: for tests.
            staging_bytes: device bytes of the kernel's staging ring, allocated at the first copy.
        """
        self.spec = spec
        self.sizes = sizes
        self.device = torch.device(device)
        self.model_hash = model_hash
        self._pools = {pool.name: Pool(pool, sizes.units(pool.space), device) for pool in spec.pools}
        self._one_launch = self.device.type == "cuda" if one_launch is None else one_launch
        self._staging_bytes = staging_bytes
        self._lazy_mover: Mover | None = None

    def mover(self) -> Mover:
        """The one-launch copies of these pools; takes its staging memory at the first call."""
        if self._lazy_mover is None:
            self._lazy_mover = Mover(self.spec, self.pools, self.device, staging_bytes=self._staging_bytes)
        return self._lazy_mover

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
        pending = self.start_cpu_copy(indices, request_id=request_id, epoch=epoch, segment_bytes=segment_bytes)
        return pending.image()

    def start_cpu_copy(
        self,
        indices: SequenceIndices,
        into: torch.Tensor | KVImage | None = None,
        *,
        request_id: str = "",
        epoch: int = 0,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
    ) -> PendingCopy:
        """Start `get_cpu_copy`. On the CPU it is done at once; on a device it runs beside the current stream.

        Until `done()` the pages and the slot belong to the copy ("draining"): do not free or write them.

        Args:
            into: where the payload goes, uint8 [image_bytes(n)] in host memory, pinned to be fast; or an image whose
                payload is to be filled, as a tier reserves it. Its segments then decide the payload's layout, and
                `request_id`, `epoch` and `segment_bytes` are not used. Default: new memory, pinned on a device.

        Raises:
            IntegrityError: `indices` does not map a live row.
            ValueError: `into` has another size.
        """
        n = indices.num_tokens
        if isinstance(into, KVImage):
            if into.header.num_tokens != n:
                raise ValueError(f"image of {into.header.num_tokens} tokens for a copy of {n}")
            check_header(into.header, self.spec, model_hash=self.model_hash)
            image = into
        else:
            segments = tuple(Segment(place) for place in self.spec.split_image(n, segment_bytes))
            size = self.spec.image_bytes(n)
            pinned = self.device.type == "cuda"
            payload = torch.empty(size, dtype=torch.uint8, pin_memory=pinned) if into is None else into
            header = ImageHeader(
                request_id=request_id,
                epoch=epoch,
                num_tokens=n,
                fingerprint=self.spec.fingerprint,
                model_hash=self.model_hash,
                payload_bytes=size,
                segments=segments,
            )
            image = KVImage(header, payload)
        if image.payload.dtype != torch.uint8 or image.payload.shape != (image.header.payload_bytes,):
            raise ValueError(f"payload {image.payload.dtype} {tuple(image.payload.shape)} for {image.header}")
        if self._one_launch:
            places = [segment.place for segment in image.header.segments]
            return PendingCopy(image, self.mover().copy_out(image.payload, places, indices))
        self._export(image, indices)
        return PendingCopy(image)

    def _export(self, image: KVImage, indices: SequenceIndices) -> None:
        """Fill an image, pool by pool."""
        end, payload = 0, image.payload
        for segment in sorted(image.header.segments, key=lambda s: s.place.offset):
            payload[end : segment.place.offset] = 0  # padding: equal requests give equal files
            end = segment.place.offset + segment.place.length
            image.segment_rows(segment, self.spec).copy_(self.export_rows(segment.place, indices))
        payload[end:] = 0

    def load_cpu_copy(self, image: KVImage, indices: SequenceIndices) -> None:
        """Put an image into the pages and slot of `indices`; the slot is reset first. Returns when it is there.

        Checks layout and completeness, not checksums: whoever received the bytes has verified them.

        Raises:
            SpecMismatch, CorruptImage: see `check_header`; nothing was written.
            IntegrityError: `indices` does not map a live row; nothing was written.
        """
        self.start_load(image, indices).wait()

    def start_load(self, image: KVImage, indices: SequenceIndices) -> PendingLoad:
        """Start `load_cpu_copy`; raises the same. On the CPU it is done at once.

        Until `done()` the places of `indices` and the image's payload belong to the load.
        """
        header = image.header
        check_header(header, self.spec, model_hash=self.model_hash)
        if header.num_tokens != indices.num_tokens:
            raise IntegrityError(f"image of {header.num_tokens} tokens into a place for {indices.num_tokens}")
        if self._one_launch:
            return self.mover().copy_in(image.payload, [segment.place for segment in header.segments], indices)
        located = [(s, self._locate(s.place, indices)) for s in header.segments]
        self.reset_slot(indices.slot)
        for segment, locations in located:
            rows = image.segment_rows(segment, self.spec)
            self._pools[segment.place.pool].scatter(locations, rows.to(self.device))
        return PendingLoad()

    def _locate(self, place: RowRange, indices: SequenceIndices) -> torch.Tensor:
        return self._pools[place.pool].locations(range(place.row_start, place.row_end), indices)

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless the pools are exactly those of the manifest."""
        if tuple(self._pools) != tuple(pool.name for pool in self.spec.pools):
            raise IntegrityError(f"pools {list(self._pools)} are not the manifest's")
        for pool in self.pools:
            pool.check_integrity()
