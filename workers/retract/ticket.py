"""`Ticket`: one request that is out of the batch, from the snapshot to the step in which it runs again.

A request's life outside the batch, by `SeqState`:

    DRAINING   it holds its old pages; the copy out of them is under way, or waits for room in the host tier
    PARKED     it holds nothing; its image is in the cascade, or still where it landed, or lost (to be recomputed)
    RESTORING  it holds new pages; a load into them, or a prefill for them, is under way
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from kvstore.image import KVImage
from kvstore.sequence_kv import SequenceIndices, SequenceKV
from kvstore.tiers.base import ImageKey
from workers.sequence import Sequence


class Copy(Protocol):
    """A copy between pools and host memory that was started; on a CPU it is done at once."""

    def done(self) -> bool:
        """Whether every byte is there. Raises when the copy failed."""

    def wait(self) -> None:
        """Returns when no byte moves any more."""


@dataclass(frozen=True, slots=True)
class HeldImage:
    """A verified image in memory that is not the cascade's; the holder calls `release` exactly once."""

    image: KVImage
    release: Callable[[], None]


class Recomputer(Protocol):
    """Prefills tokens again somewhere else. Methods return at once and may be called from the engine thread."""

    @property
    def available(self) -> bool:
        """Whether any prefill worker is known."""

    def start(self, name: str, token_ids: tuple[int, ...], timeout_s: float) -> Future[HeldImage]:
        """An image of all `token_ids`, as it arrives; fails with a `RequestError`. `name` is new for each try."""

    def cancel(self, name: str) -> None:
        """Nobody waits any more. An image that arrives all the same is released by whoever gets it."""


class ImageState(enum.Enum):
    """Where the KV of a ticket is."""

    IN_PAGES = "in_pages"
    IN_CASCADE = "in_cascade"
    HELD = "held"
    """Where it landed, because no tier has room."""
    LOST = "lost"


@dataclass(slots=True, eq=False)
class Ticket:
    """One request out of the batch. Owned by `RetractController`."""

    sequence: Sequence
    key: ImageKey
    num_tokens: int
    """Committed tokens n: the image holds exactly these, and the request goes on with token n."""
    cause: str
    since_s: float
    indices: SequenceIndices | None
    """Where it was; None for an image that never was in the pools."""
    image: ImageState = ImageState.IN_PAGES
    tier: str = "pinned"
    """Lowest tier that the image has been in."""
    forced_tier: str = "auto"
    must_sink: bool = False
    """A forced tier that the image has not reached yet; it does not come back before."""
    reserved: KVImage | None = None
    """Its place in the host tier, being filled by `copy`."""
    copy: Copy | None = None
    copy_began_s: float = 0.0
    num_copies: int = 0
    parked_s: float = 0.0
    wanted_s: float | None = None
    load: Copy | None = None
    load_began_s: float = 0.0
    held: HeldImage | None = None
    awaits_room: bool = False
    """The tiers are making room for the held image."""
    recompute: Future[HeldImage] | None = None
    recompute_name: str = ""
    num_recomputes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Unsettled:
    """A copy of a request that has ended meanwhile: pages and image go when it is done."""

    copy: Copy
    free: Callable[[], None]


def shares_memory(kv: SequenceKV, indices: SequenceIndices | None) -> bool:
    """Whether any page, or the slot, is one that a request had before."""
    if indices is None:
        return False
    windows = {page for page in indices.window_pages if page is not None}
    same_page = windows.intersection(kv.window_pages) or set(indices.full_pages).intersection(kv.full_pages)
    return kv.slot == indices.slot or bool(same_page)
