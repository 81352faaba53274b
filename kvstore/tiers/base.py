"""What every tier is: a place for whole KV images, under a budget of bytes that is never exceeded.

Owns: the `Tier` protocol, its `TierStats`, keys, and the header of an image that does not exist yet. A tier never
raises for a full, failing or damaged store: no room is `None`, a failed save is `False`, a missing or damaged image is
`None`, and each is counted. A `ValueError` means the caller broke the protocol.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass
from typing import NewType, Protocol, TypeVar

import torch

from kvstore.image import DEFAULT_SEGMENT_BYTES, ImageHeader, KVImage, Segment
from kvstore.spec import KVSpec

_T = TypeVar("_T")

ImageKey = NewType("ImageKey", str)
"""Names one parked image, normally the request id: a request is parked at most once at a time."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """Counters since start, and what is held now.

    Attributes:
        used_bytes: held or promised now, rounding included; `peak_bytes` is its maximum, never above `budget_bytes`.
        puts, put_bytes, put_ms: images stored, their payload, and the time spent storing.
        put_failures: saves that failed after they were admitted; `out_of_space` of them because the device was full.
        refused: saves not admitted because the budget had no room.
        misses: loads of a key that is not here; `corrupt`, `foreign` and `read_errors` are loads of one that was.
        evictions: images dropped to make room for others.
        orphans: files that could not be removed; their bytes stay charged to the budget.
    """

    name: str
    budget_bytes: int
    used_bytes: int = 0
    peak_bytes: int = 0
    images: int = 0
    puts: int = 0
    put_bytes: int = 0
    put_ms: float = 0.0
    put_failures: int = 0
    out_of_space: int = 0
    refused: int = 0
    gets: int = 0
    get_bytes: int = 0
    get_ms: float = 0.0
    misses: int = 0
    corrupt: int = 0
    foreign: int = 0
    read_errors: int = 0
    evictions: int = 0
    orphans: int = 0


class Tier(Protocol):
    """A store of images by key. Calls return at once; slow work is behind futures, which all end in bounded time."""

    @property
    def name(self) -> str:
        """Short name for logs and metrics: "host", "disk", "peer"."""
        ...

    def put(self, key: ImageKey, image: KVImage) -> Future[bool] | None:
        """Store an image; `None` when the budget has no room for it now.

        The space is promised when this returns. The payload must not change or go away before the future is done.
        `True`: the image can be read from now on. `False`: nothing of it is left here.
        """
        ...

    def get(self, key: ImageKey, into: torch.Tensor | None = None) -> Future[KVImage | None]:
        """The image, its payload in `into` (uint8 [payload_bytes], host) when given; `None` when it is lost."""
        ...

    def discard(self, key: ImageKey) -> bool:
        """Forget an image, also one that is still being stored. Whether it was here."""
        ...

    def stats(self) -> TierStats:
        """A snapshot; any thread."""
        ...

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless what is held adds up to what is charged."""
        ...

    def close(self) -> None:
        """Wait for running work and stop. Images are kept or not as the tier's configuration says."""
        ...


def planned_header(
    spec: KVSpec,
    num_tokens: int,
    *,
    request_id: str,
    epoch: int = 0,
    model_hash: str = "",
    segment_bytes: int = DEFAULT_SEGMENT_BYTES,
) -> ImageHeader:
    """The header that an image of this request will have, checksums aside: all a tier needs to promise its space."""
    return ImageHeader(
        request_id=request_id,
        epoch=epoch,
        num_tokens=num_tokens,
        fingerprint=spec.fingerprint,
        model_hash=model_hash,
        payload_bytes=spec.image_bytes(num_tokens),
        segments=tuple(Segment(place) for place in spec.split_image(num_tokens, segment_bytes)),
    )


def finished(value: _T) -> Future[_T]:
    """A future that is done already."""
    future: Future[_T] = Future()
    future.set_result(value)
    return future
