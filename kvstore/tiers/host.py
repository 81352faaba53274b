"""`HostTier`: parked images in one slab of host memory, pinned where there is a GPU.

Owns: the slab, which image holds which extent, pins. Space is reserved before a victim is chosen, the copy engine
writes straight into the reserved payload, and `commit` makes the image readable; nothing is copied twice. Not
thread-safe: the engine thread is the only caller. Other threads only touch payload bytes of entries that are pinned.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from kvstore.arena import Extent, HostArena
from kvstore.errors import IntegrityError
from kvstore.image import ImageHeader, KVImage
from kvstore.tiers.base import ImageKey, TierStats, finished


class HostState(enum.Enum):
    """Life of an entry. DOOMED: discarded while pinned, freed with its last pin."""

    RESERVED = "reserved"
    READY = "ready"
    DOOMED = "doomed"


@dataclass(slots=True, eq=False)
class _Entry:
    header: ImageHeader
    extent: Extent
    state: HostState = HostState.RESERVED
    pins: int = 0


class HostTier:
    """Images in a slab of `budget_bytes`; nothing is ever allocated beyond it."""

    name = "host"

    def __init__(
        self, budget_bytes: int, *, pinned: bool | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Reserve the slab; `pinned` defaults to whether there is a CUDA device."""
        pinned = torch.cuda.is_available() if pinned is None else pinned
        self._arena = HostArena(budget_bytes, pinned=pinned and budget_bytes > 0)
        self._entries: dict[ImageKey, _Entry] = {}
        self._doomed: list[_Entry] = []
        self._clock = clock
        self._counts = TierStats("host", budget_bytes)

    @property
    def budget_bytes(self) -> int:
        """Size of the slab."""
        return self._arena.budget_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of the slab that are held, rounding to host pages included."""
        return self._arena.used_bytes

    @property
    def largest_free_bytes(self) -> int:
        """Longest range that `reserve` could give now."""
        return self._arena.largest_free_bytes

    def __contains__(self, key: ImageKey) -> bool:
        return key in self._entries

    def reserve(self, key: ImageKey, header: ImageHeader) -> KVImage | None:
        """A payload to fill for `key`; `None` when no free range of the slab is long enough.

        The image is valid until `discard`. Follow with `commit` once every byte is there, or `discard`.

        Raises:
            ValueError: the key is here already.
        """
        if key in self._entries:
            raise ValueError(f"image {key} is in the host tier already")
        extent = self._arena.allocate(header.payload_bytes)
        if extent is None:
            self._counts = replace(self._counts, refused=self._counts.refused + 1)
            return None
        self._entries[key] = _Entry(header, extent)
        self._counts = replace(self._counts, peak_bytes=max(self._counts.peak_bytes, self._arena.used_bytes))
        return KVImage(header, self._arena.tensor(extent))

    def commit(self, key: ImageKey, header: ImageHeader | None = None) -> None:
        """The reserved payload is complete. `header` replaces the planned one when the bytes came with checksums."""
        entry = self._entries[key]
        if entry.state is not HostState.RESERVED:
            raise ValueError(f"image {key} is {entry.state.value}, not reserved")
        if header is not None:
            if header.payload_bytes != entry.header.payload_bytes:
                raise ValueError(
                    f"image {key}: {header.payload_bytes} bytes in a place for {entry.header.payload_bytes}"
                )
            entry.header = header
        entry.state = HostState.READY
        counts = self._counts
        self._counts = replace(counts, puts=counts.puts + 1, put_bytes=counts.put_bytes + entry.header.payload_bytes)

    def put(self, key: ImageKey, image: KVImage) -> Future[bool] | None:
        """Copy an image in; done when this returns. Prefer `reserve`, which needs no copy."""
        place = self.reserve(key, image.header)
        if place is None:
            return None
        start = self._clock()
        place.payload.copy_(image.payload)
        self.commit(key)
        self._counts = replace(self._counts, put_ms=self._counts.put_ms + (self._clock() - start) * 1e3)
        return finished(True)

    def image(self, key: ImageKey) -> KVImage | None:
        """The image where it lies, without a copy; `None` when it is not here or not complete.

        Valid until `discard`; `pin` it for another thread.
        """
        entry = self._entries.get(key)
        if entry is None or entry.state is not HostState.READY:
            return None
        return KVImage(entry.header, self._arena.tensor(entry.extent))

    def get(self, key: ImageKey, into: torch.Tensor | None = None) -> Future[KVImage | None]:
        """The image in `into`, or where it lies."""
        image, counts = self.image(key), self._counts
        if image is None:
            self._counts = replace(counts, misses=counts.misses + 1)
            return finished(None)
        start = self._clock()
        if into is not None:
            into.copy_(image.payload)
            image = KVImage(image.header, into)
        self._counts = replace(
            counts,
            gets=counts.gets + 1,
            get_bytes=counts.get_bytes + image.header.payload_bytes,
            get_ms=counts.get_ms + (self._clock() - start) * 1e3,
        )
        return finished(image)

    def pin(self, key: ImageKey) -> Callable[[], None]:
        """Keep the entry's bytes in place until the returned function is called, on this thread, exactly once."""
        entry = self._entries[key]
        entry.pins += 1
        return lambda: self._unpin(entry)

    def _unpin(self, entry: _Entry) -> None:
        if entry.pins < 1:
            raise IntegrityError("a pin was released twice")
        entry.pins -= 1
        if entry.state is HostState.DOOMED and not entry.pins:
            self._doomed.remove(entry)
            self._arena.free(entry.extent)

    def discard(self, key: ImageKey) -> bool:
        """Forget the image. Its bytes stay charged while pinned; nobody may be filling a reserved payload any more."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        entry.state = HostState.DOOMED
        if entry.pins:
            self._doomed.append(entry)
        else:
            self._arena.free(entry.extent)
        return True

    def keys(self) -> Iterator[ImageKey]:
        """Complete images, oldest first."""
        return (key for key, entry in self._entries.items() if entry.state is HostState.READY)

    def held_keys(self) -> tuple[ImageKey, ...]:
        """Every key that has space here, reserved ones included."""
        return tuple(self._entries)

    def stats(self) -> TierStats:
        """A snapshot. Bytes are copied by the GPU, so `put_ms` and `get_ms` only count copies made here."""
        return replace(self._counts, used_bytes=self._arena.used_bytes, images=len(self._entries))

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless entries and the slab agree."""
        self._arena.check_integrity()
        held = [*self._entries.values(), *self._doomed]
        if sum(e.extent.reserved for e in held) != self._arena.used_bytes or len(held) != self._arena.num_held:
            raise IntegrityError(f"host tier: {len(held)} entries, slab holds {self._arena.num_held} extents")
        for entry in held:
            if entry.extent.length != entry.header.payload_bytes or entry.pins < 0:
                raise IntegrityError(f"host tier: {entry.extent} for {entry.header.payload_bytes} bytes")
        if any(e.state is not HostState.DOOMED or not e.pins for e in self._doomed):
            raise IntegrityError("host tier: a discarded image is held by nobody")

    def close(self) -> None:
        """Nothing runs here."""
