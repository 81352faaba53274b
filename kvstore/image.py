"""`KVImage`: the one serial form of a request's KV state, for hand-off, retract, disk and migration.

Owns: the header (versioned, with its own checksum), the segment table and its completeness check, checksums. Does not
own: where rows sit in the payload (`KVSpec.place`), how they get in and out of pools (`pools/aggregate.py`).

Serial form of the header, little endian:

    | 8 B magic | u32 version | u32 body length | body: UTF-8 JSON | u64 xxh3 of all bytes before |

The payload follows separately: it is written in place by transfers and straight to disk by tiers.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvstore.checksum import CHECKSUM_NAME, checksum
from kvstore.errors import CorruptImage, SpecMismatch
from kvstore.spec import KVSpec, PoolName, RowRange

IMAGE_VERSION = 1
_MAGIC = b"DSV4KVIM"
_PREFIX = struct.Struct("<8sII")
_TRAILER = struct.Struct("<Q")

DEFAULT_SEGMENT_BYTES = 2 << 20
"""Target of `KVSpec.split`: segments of larger pools are then 1 to 2 MiB, which a transfer moves fastest."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One row range of the payload; `checksum` covers its bytes, `None` before `KVImage.sealed`."""

    place: RowRange
    checksum: int | None = None


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Everything about an image but its bytes.

    Attributes:
        num_tokens: committed tokens n; with the spec it decides which rows the payload holds.
        fingerprint: `KVSpec.fingerprint` of the writer.
        model_hash: identity of the weights that computed the rows ("" when not tracked).
        payload_bytes: length of the payload.
    """

    request_id: str
    epoch: int
    num_tokens: int
    fingerprint: str
    model_hash: str
    payload_bytes: int
    segments: tuple[Segment, ...]
    checksum_name: str = CHECKSUM_NAME
    version: int = IMAGE_VERSION

    def to_bytes(self) -> bytes:
        """Serial form, see the module docstring."""
        body = dataclasses.asdict(self)
        body["segments"] = [
            (s.place.pool.value, s.place.row_start, s.place.row_end, s.place.offset, s.place.length, s.checksum)
            for s in self.segments
        ]
        text = json.dumps(body, separators=(",", ":")).encode()
        raw = _PREFIX.pack(_MAGIC, self.version, len(text)) + text
        return raw + _TRAILER.pack(checksum(raw))

    @classmethod
    def from_bytes(cls, raw: bytes | memoryview) -> tuple[ImageHeader, int]:
        """Parse a header at the start of `raw`; returns it and its length in bytes.

        Raises:
            CorruptImage: not an image, another version, truncated, or damaged.
        """
        view = memoryview(raw)
        if len(view) < _PREFIX.size:
            raise CorruptImage(f"header truncated at {len(view)} bytes")
        magic, version, length = _PREFIX.unpack_from(view)
        if magic != _MAGIC or version != IMAGE_VERSION:
            raise CorruptImage(f"not a KV image of version {IMAGE_VERSION}: magic {magic!r}, version {version}")
        end = _PREFIX.size + length
        if len(view) < end + _TRAILER.size:
            raise CorruptImage(f"header truncated: {len(view)} of {end + _TRAILER.size} bytes")
        (expected,) = _TRAILER.unpack_from(view, end)
        if checksum(view[:end]) != expected:
            raise CorruptImage("header checksum does not match")
        body: dict[str, Any] = json.loads(bytes(view[_PREFIX.size : end]))
        body["segments"] = tuple(
            Segment(RowRange(PoolName(pool), start, stop, offset, size), check)
            for pool, start, stop, offset, size, check in body["segments"]
        )
        return cls(**body), end + _TRAILER.size


@dataclass(frozen=True, slots=True)
class KVImage:
    """A header and its payload, uint8 [payload_bytes] in host memory (pinned or not). The image owns the payload."""

    header: ImageHeader
    payload: torch.Tensor

    def segment_bytes(self, segment: Segment) -> memoryview:
        """The segment's bytes in the payload, without a copy."""
        return payload_view(self.payload, segment.place.offset, segment.place.length)

    def segment_rows(self, segment: Segment, spec: KVSpec) -> torch.Tensor:
        """The segment as uint8 [layers, rows, row_bytes], a view of the payload."""
        pool, place = spec.pool(segment.place.pool), segment.place
        flat = self.payload[place.offset : place.offset + place.length]
        return flat.view(len(pool.layers), place.num_rows, pool.row_bytes)

    def sealed(self) -> KVImage:
        """The same image with every missing checksum filled in. Shares the payload."""
        segments = tuple(
            s if s.checksum is not None else dataclasses.replace(s, checksum=checksum(self.segment_bytes(s)))
            for s in self.header.segments
        )
        return dataclasses.replace(self, header=dataclasses.replace(self.header, segments=segments))

    def verify(self) -> None:
        """Raise `CorruptImage` unless every segment has a checksum that matches its bytes."""
        if self.header.checksum_name != CHECKSUM_NAME:
            raise SpecMismatch("checksum name", CHECKSUM_NAME, self.header.checksum_name)
        for segment in self.header.segments:
            found = checksum(self.segment_bytes(segment))
            if found != segment.checksum:
                raise CorruptImage(f"segment {segment.place}: checksum {found:#x}, header says {segment.checksum}")


def payload_view(payload: torch.Tensor, offset: int, length: int) -> memoryview:
    """Writable bytes [offset, offset + length) of a host tensor, without a copy."""
    return payload[offset : offset + length].numpy().data


def check_header(header: ImageHeader, spec: KVSpec, *, model_hash: str = "") -> None:
    """Check that an image was written for this layout and model and that its segments hold exactly the live rows.

    Raises:
        SpecMismatch: other layout, other weights, or other checksum.
        CorruptImage: rows are missing, doubled or misplaced.
    """
    if header.fingerprint != spec.fingerprint:
        raise SpecMismatch("layout fingerprint", spec.fingerprint, header.fingerprint)
    if model_hash and header.model_hash and header.model_hash != model_hash:
        raise SpecMismatch("model hash", model_hash, header.model_hash)
    if header.checksum_name != CHECKSUM_NAME:
        raise SpecMismatch("checksum name", CHECKSUM_NAME, header.checksum_name)
    needed = spec.image_bytes(header.num_tokens)
    if header.payload_bytes != needed:
        raise CorruptImage(f"payload of {header.payload_bytes} bytes, n={header.num_tokens} needs {needed}")
    for segment in header.segments:
        place = segment.place
        try:
            expected = spec.place(place.pool, place.row_start, place.row_end, header.num_tokens)
        except (KeyError, ValueError) as exc:
            raise CorruptImage(str(exc)) from exc
        if place != expected:
            raise CorruptImage(f"segment {place} should be {expected}")
    gap = first_gap([segment.place for segment in header.segments], spec, header.num_tokens)
    if gap is not None:
        raise CorruptImage(gap)


def first_gap(places: Sequence[RowRange], spec: KVSpec, num_tokens: int) -> str | None:
    """Name the first live row that no range, or more than one range, covers; `None` when all is exact."""
    for pool in spec.pools:
        live = pool.live_rows(num_tokens)
        if not pool.layers or not live:
            continue
        reached = live.start
        for place in sorted((p for p in places if p.pool is pool.name), key=lambda p: p.row_start):
            if place.row_start != reached:
                kind = "missing" if place.row_start > reached else "doubled"
                ends = sorted((reached, place.row_start))
                return f"pool {pool.name}: rows [{ends[0]}, {ends[1]}) {kind} at n={num_tokens}"
            reached = place.row_end
        if reached != live.stop:
            return f"pool {pool.name}: rows [{reached}, {live.stop}) missing at n={num_tokens}"
    return None
