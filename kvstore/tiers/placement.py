"""Vocabulary and choices of the cascade: places, causes, and whom to move down. Pure values and functions."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

from kvstore.arena import EXTENT_ALIGN_BYTES
from kvstore.image import ImageHeader, KVImage
from kvstore.tiers.base import ImageKey, Tier, TierStats


class Place(enum.Enum):
    """Where a parked image is. RESERVED: being filled by the caller. LENT: being read by the caller."""

    RESERVED = "reserved"
    HOST = "host"
    DEMOTING = "demoting"
    LOWER = "lower"
    PROMOTING = "promoting"
    LENT = "lent"


NEXT_PLACES = {
    Place.RESERVED: {Place.HOST},
    Place.HOST: {Place.DEMOTING, Place.LENT},
    Place.DEMOTING: {Place.HOST, Place.LOWER},
    Place.LOWER: {Place.PROMOTING},
    Place.PROMOTING: {Place.HOST},
    Place.LENT: {Place.HOST},
}


class Cause(enum.StrEnum):
    """Why an image is not where the first choice would have put it."""

    HOST_TOO_SMALL = "host_too_small"
    """The image is larger than the whole host budget."""
    NO_ROOM = "no_room"
    """No tier has room for it, nor for what would have to make way."""
    MAKING_ROOM = "making_room"
    """Demotions under way will make room: ask again after a `poll`."""
    TIER_PASSED = "tier_passed"
    """A lower tier was full or had failed, and the next one took the image."""
    SAVE_FAILED = "save_failed"
    """A demotion failed; the image stayed in the host tier."""
    LOST = "lost"
    """A lower tier no longer has the image, or it was damaged: recompute."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """No reservation. `retry`: room is being made."""

    cause: Cause

    @property
    def retry(self) -> bool:
        """Whether the same call may succeed after a later `poll`."""
        return self.cause is Cause.MAKING_ROOM


@dataclass(frozen=True, slots=True)
class Lost:
    """A parked image that cannot be had back. The cascade has forgotten it."""

    key: ImageKey
    tier: str


@dataclass(frozen=True, slots=True)
class CascadeStats:
    """Counters since start, and what is parked now.

    Attributes:
        parked: (place, images, payload bytes), every place that holds any.
        fallbacks: (cause, count), every cause that occurred.
        demoted_to: (tier, images, payload bytes) moved down; `promoted_from` the same upwards.
    """

    parked_images: int
    parked_bytes: int
    parked: tuple[tuple[Place, int, int], ...]
    demoted_to: tuple[tuple[str, int, int], ...]
    promoted_from: tuple[tuple[str, int, int], ...]
    fallbacks: tuple[tuple[Cause, int], ...]
    tiers: tuple[TierStats, ...]


@dataclass(slots=True, eq=False)
class Move:
    """A transfer between the host and a lower tier; it holds the host bytes in place until it is done."""

    future: Future[bool] | Future[KVImage | None]
    unpin: Callable[[], None]


@dataclass(slots=True, eq=False)
class Parked:
    """One parked image; `order` grows with the time of parking. Others read only."""

    key: ImageKey
    header: ImageHeader
    order: int
    place: Place = Place.RESERVED
    wanted: bool = False
    tier: Tier | None = None
    move: Move | None = None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the image itself."""
        return self.header.payload_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes that it takes of the host budget."""
        return host_bytes(self.header)


def host_bytes(header: ImageHeader) -> int:
    """Bytes that an image takes of the host budget: whole pages of host memory."""
    return max(1, -(-header.payload_bytes // EXTENT_ALIGN_BYTES)) * EXTENT_ALIGN_BYTES


def choose_demotions(candidates: Iterable[Parked], needed_bytes: int) -> list[Parked]:
    """Whom to move down so that `needed_bytes` of the host budget come free, or all when they are not enough.

    Latest parked first: resumes are served oldest first, so the latest is the one whose image is read last. Images that
    the caller already wants back stay.
    """
    chosen: list[Parked] = []
    for parked in sorted(candidates, key=lambda p: p.order, reverse=True):
        if needed_bytes <= 0:
            break
        if parked.place is Place.HOST and not parked.wanted:
            chosen.append(parked)
            needed_bytes -= parked.host_bytes
    return chosen
