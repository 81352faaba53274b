"""`open_bank`: the host bank of a node's workers, filled once by whoever comes first and mapped by the others.

Owns: who fills, who waits, what a bank must hold to be taken. Does not own: pages (`bank.py`), where bytes come from.
Whoever has the lock file's lock fills; the kernel drops the lock of a process that dies, and the next one starts over.
A filled bank is offered by every worker that has it, so it outlives the one that filled it, and a restarted worker has
it at once as long as one other lives.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from workers.errors import BadConfig
from workers.experts.bank import HostBank, Progress
from workers.experts.share import Offer, Share

logger = logging.getLogger(__name__)

WAIT_S = 0.1
"""Time between two looks at a bank that another worker fills."""

Choose = Callable[[], Sequence[int]]
"""Pairs of a new bank; called under the lock."""

Fill = Callable[[HostBank, Progress], None]
"""Writes every expert of the bank, telling (bytes done, bytes in all)."""


def open_bank(
    share: Share | None,
    key: str,
    choose: Choose,
    num_pairs: int,
    expert_bytes: int,
    fill: Fill,
    on_progress: Progress | None = None,
) -> HostBank:
    """A bank of the model `key`, filled; whoever makes it chooses which pairs it holds. Raises what `choose` and `fill`
    raise, and `BadConfig` when another worker's bank is of another model.

    What `on_progress` raises ends the wait or the filling. Without a `share` the bank is this process's alone. The
    bytes of one model are the same whoever fills, so the key names the weights, not the worker.
    """
    tell = on_progress or _nowhere
    if share is None:
        return _filled(HostBank(choose(), num_pairs, expert_bytes), fill, tell)
    what = f"bank-{key}"
    lock = os.open(share.folder / f"{what}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        _wait_for(lock, tell)
        offer = share.find(what)
        bank = _made(lock, choose(), num_pairs, expert_bytes, fill, tell) if offer is None else _taken(offer)
        if bank.expert_bytes != expert_bytes or bank.num_pairs != num_pairs:
            found = f"{bank.num_pairs} experts of {bank.expert_bytes} bytes in this host's bank"
            bank.close()
            raise BadConfig("experts", found, f"{num_pairs} of {expert_bytes} bytes", "worker config")
        facts = {"places": bank.place.tolist(), "expert_bytes": bank.expert_bytes}
        share.offer(what, bank.fd, facts)
        return bank
    finally:
        os.close(lock)


def _nowhere(done: int, total: int) -> None:
    del done, total


def _wait_for(lock: int, tell: Progress) -> None:
    """Until the lock is ours, telling how far its holder has come."""
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            # Two int64, written by the holder; nothing as long as it has not begun.
            if len(state := os.pread(lock, 16, 0)) == 16:
                tell(*(int(number) for number in np.frombuffer(state, np.int64)))
            time.sleep(WAIT_S)


def _made(lock: int, pairs: Sequence[int], num_pairs: int, expert_bytes: int, fill: Fill, tell: Progress) -> HostBank:
    """A new bank, filled under the lock."""

    def note(done: int, total: int) -> None:
        os.pwrite(lock, np.array([done, total], np.int64).tobytes(), 0)
        tell(done, total)

    os.truncate(lock, 0)
    return _filled(HostBank(pairs, num_pairs, expert_bytes), fill, note)


def _filled(bank: HostBank, fill: Fill, tell: Progress) -> HostBank:
    """The bank, which is closed when it cannot be filled."""
    began = time.monotonic()
    try:
        fill(bank, tell)
    except BaseException:
        bank.close()
        raise
    seconds = max(time.monotonic() - began, 1e-9)
    rate = bank.nbytes / 1e9 / seconds
    logger.info("experts: bank of %d experts filled in %.1f s, %.2f GB/s", bank.capacity, seconds, rate)
    return bank


def _taken(offer: Offer) -> HostBank:
    """The bank that another worker has filled."""
    try:
        places = np.array(offer.facts["places"], np.int64)
        bank = HostBank.attach(offer.fd, places, int(offer.facts["expert_bytes"]))
        offer.fd = -1
    finally:
        offer.close()
    logger.info("experts: bank of %d experts shared with %s", bank.capacity, offer.owner)
    return bank
