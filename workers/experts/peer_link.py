"""`PeerLink`: keeps one worker's table pointing into the other's slab for exactly as long as that is there. Torch-free.

Owns: a thread that waits for the other worker's offer, checks that it is of the same model, and waits for its end. Does
not own: the table (`holder`), addresses (`window`), which experts the other promises (its offer says). All changes are
made on the engine thread between steps, so that no kernel ever meets a window in the middle of one.

An owner that dies leaves its pages mapped here until the window is shut: steps under way still read the right bytes,
then every pair goes back to the host bank, and only then is the memory let go, for the owner's successor to use.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import IntegrityError
from workers.errors import WorkerError, WorkerStopping
from workers.experts.share import Offer, Share

logger = logging.getLogger(__name__)

APART = "peer-off"
"""While a file of this name is in the share's folder no worker reads the other's experts: for measurements."""

SLAB = "slab"
"""What a worker's offer of its slab is called."""

RETRY_S = 0.5
"""Time between two looks for a worker that is not there: it is starting, or being started again."""

LOOK_S = 1.0
"""Longest wait for an owner's end in one go; `close` is noticed no later."""

EngineCall = Callable[[Callable[[], None]], "Future[None]"]
"""Runs something on the engine thread between two steps."""


class Slab(Protocol):
    """`workers.gpu.peer_slab.SharedSlab`."""

    @property
    def block_bytes(self) -> int: ...

    def export(self) -> int: ...


class Window(Protocol):
    """`workers.gpu.peer_slab.PeerWindow`."""

    def open(self, fd: int, block_bytes: int) -> None: ...

    def shut(self) -> None: ...


class Holder(Protocol):
    """Who owns the table of this worker's experts. Engine thread."""

    def peer_came(self, pairs: npt.NDArray[np.int64]) -> None:
        """Place i of the window holds `pairs[i]` from now on."""

    def peer_left(self) -> None:
        """No table points into the window any more, and nothing launched before is under way. Raises `IntegrityError`,
        with every table as before, when a pair then has no home."""


def offer_slab(share: Share, slab: Slab, pairs: Sequence[int], *, key: str, expert_bytes: int) -> None:
    """Offers a slab whose place i holds `pairs[i]` of the model `key`, for ever."""
    fd = slab.export()
    try:
        facts = {"key": key, "expert_bytes": expert_bytes, "block_bytes": slab.block_bytes}
        share.offer(SLAB, fd, facts | {"pairs": [int(pair) for pair in pairs]})
    finally:
        os.close(fd)


class PeerLink:
    """One worker's view of the other. `is_met` may be read from anywhere."""

    def __init__(
        self,
        share: Share,
        peer: str,
        window: Window,
        holder: Holder,
        call: EngineCall,
        *,
        key: str,
        expert_bytes: int,
    ) -> None:
        self._share, self._peer, self._window, self._holder, self._call = share, peer, window, holder, call
        self._key, self._expert_bytes = key, expert_bytes
        self._closing = threading.Event()
        self.is_met = threading.Event()
        """Set while the window is open."""
        self.num_meetings = 0
        self.num_partings = 0
        self._thread = threading.Thread(target=self._run, name=f"peer-{peer}", daemon=True)

    def start(self) -> None:
        """Begins to look for the other worker."""
        self._thread.start()

    def close(self) -> None:
        """Parts and stops looking; an engine that has stopped keeps its table. Safe to call again."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0 + LOOK_S)

    def _run(self) -> None:
        refused = ""
        while not self._closing.is_set():
            offer = None if self._is_apart() else self._share.take(self._peer, SLAB)
            if offer is None:
                self._closing.wait(RETRY_S)
                continue
            try:
                if problem := self._problem(offer):
                    raise WorkerError(problem)
                self._call(functools.partial(self._meet, offer)).result()
                self._stay(offer)
            except (WorkerStopping, CancelledError):
                return
            except Exception as exc:
                # Whatever it is, the bank has every expert: the worker serves on without this peer.
                if str(exc) != refused:
                    logger.error("peer=%s is not used: %s", self._peer, exc, exc_info=exc)
                refused = str(exc)
                self._closing.wait(RETRY_S)
            finally:
                offer.close()

    def _problem(self, offer: Offer) -> str:
        """Why the offer must not be used, or nothing: another model's bytes would be wrong tokens."""
        found = (offer.facts.get("key"), offer.facts.get("expert_bytes"))
        if found == (self._key, self._expert_bytes):
            return ""
        return f"it holds experts of {found[0]}, {found[1]} bytes each, not of {self._key}, {self._expert_bytes}"

    def _meet(self, offer: Offer) -> None:
        self._window.open(offer.fd, int(offer.facts["block_bytes"]))
        try:
            self._holder.peer_came(np.array(offer.facts["pairs"], np.int64))
        except BaseException:
            self._window.shut()
            raise
        self.num_meetings += 1
        self.is_met.set()
        logger.info("peer=%s holds %d experts for us", self._peer, len(offer.facts["pairs"]))

    def _is_apart(self) -> bool:
        return (self._share.folder / APART).exists()

    def _stay(self, offer: Offer) -> None:
        """Until the owner's end, or our own: then nothing points into the window any more."""
        while not (is_gone := offer.is_gone(LOOK_S)) and not self._closing.is_set() and not self._is_apart():
            pass
        if is_gone:
            logger.warning("peer=%s is gone: back to the host bank", self._peer)
        self._call(self._part).result()

    def _part(self) -> None:
        self.is_met.clear()
        self.num_partings += 1
        try:
            self._holder.peer_left()
        except IntegrityError as exc:
            # Our own fault, but no reason to stop: the dead owner's pages stay readable as long as they are mapped.
            logger.critical("peer=%s is gone, and its memory is kept: %s", self._peer, exc)
            self._closing.set()
            return
        self._window.shut()
