"""Starting copies between pools and reserved host images, and the planned failure of one of them."""

from __future__ import annotations

from kvstore.image import KVImage
from kvstore.pools.aggregate import KVPools
from kvstore.sequence_kv import SequenceIndices
from workers.retract.ticket import Copy


class CopyFailed(Exception):
    """A copy out of the pools did not complete."""


class FailedCopy:
    """A copy that could not even start, or a planned failure: raises when it is asked."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def done(self) -> bool:
        raise self._error

    def wait(self) -> None:
        """No byte moves."""


def start_copy_out(pools: KVPools, indices: SequenceIndices, image: KVImage) -> Copy:
    """Begins to fill the reserved payload of `image` with the request's live rows."""
    return pools.start_cpu_copy(indices, image)


def start_copy_in(pools: KVPools, image: KVImage, indices: SequenceIndices) -> Copy:
    """Begins to load an image into the pages and slot of `indices`; checks its layout first."""
    return pools.start_load(image, indices)


def is_done(copy: Copy) -> bool:
    """Whether no byte moves any more, be it that the copy failed."""
    try:
        return copy.done()
    except Exception:
        return True
