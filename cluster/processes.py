"""Process trees by pid and start time: what a command started, and making sure that it is gone.

Owns: listing, ending and verifying processes. Does not own: why they run. A pid alone may be reused by the system, so a
process is always named by pid and creation time.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

_PR_SET_CHILD_SUBREAPER = 36
"""`prctl` option of Linux (linux/prctl.h)."""

MAX_ROUNDS = 5
"""Looks for processes that appeared while others were being ended."""


@dataclass(frozen=True, slots=True)
class ProcessRef:
    """One process that cannot be mistaken for a later one with the same pid."""

    pid: int
    created: float
    """Seconds since the epoch, as the system reports it."""
    name: str = ""

    @classmethod
    def of(cls, pid: int) -> ProcessRef | None:
        """The process with this pid now; None when there is none."""
        try:
            process = psutil.Process(pid)
            return cls(pid, process.create_time(), process.name())
        except psutil.Error:
            return None

    @property
    def is_alive(self) -> bool:
        """True while it runs; a zombie has ended."""
        return self._process() is not None

    def _process(self) -> psutil.Process | None:
        try:
            process = psutil.Process(self.pid)
            if abs(process.create_time() - self.created) > 0.01 or process.status() == psutil.STATUS_ZOMBIE:
                return None
            return process
        except psutil.Error:
            return None

    def terminate(self) -> None:
        """Asks it to end (SIGTERM)."""
        if process := self._process():
            _ignore_gone(process.terminate)

    def kill(self) -> None:
        """Ends it (SIGKILL)."""
        if process := self._process():
            _ignore_gone(process.kill)


def _ignore_gone(action: object) -> None:
    try:
        action()  # type: ignore[operator]
    except psutil.NoSuchProcess:
        return


def descendants(pid: int) -> tuple[ProcessRef, ...]:
    """Every living child, grandchild and so on of `pid`, without itself."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return ()
    refs = (ProcessRef.of(child.pid) for child in children)
    return tuple(ref for ref in refs if ref is not None)


def wait_gone(processes: Iterable[ProcessRef], timeout_s: float) -> tuple[ProcessRef, ...]:
    """Waits until all have ended; returns the ones that still run when the time is up."""
    deadline = time.monotonic() + timeout_s
    alive = tuple(process for process in processes if process.is_alive)
    while alive and time.monotonic() < deadline:
        time.sleep(0.05)
        alive = tuple(process for process in alive if process.is_alive)
    return alive


def end_all(processes: Iterable[ProcessRef], grace_s: float) -> tuple[ProcessRef, ...]:
    """Waits `grace_s` for them to end by themselves, then terminates, then kills; returns survivors (normally none)."""
    alive = wait_gone(processes, grace_s)
    for process in alive:
        process.terminate()
    alive = wait_gone(alive, 2.0)
    for process in alive:
        process.kill()
    return wait_gone(alive, 2.0)


def adopt_orphans() -> None:
    """From now on a descendant whose parent ends becomes a child of this process: `descendants` lists it.

    Without it the children of a Ray daemon that is ended while it starts would belong to init, out of reach. Linux
    only; elsewhere nothing happens.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(known: Iterable[ProcessRef], grace_s: float) -> tuple[ProcessRef, ...]:
    """`end_all` of `known` and of every descendant, also of those that only appear meanwhile; returns survivors."""
    survivors: tuple[ProcessRef, ...] = ()
    for _ in range(MAX_ROUNDS):
        left = tuple({ref.pid: ref for ref in (*known, *descendants(os.getpid()))}.values())
        left = tuple(ref for ref in left if ref.is_alive)
        if not left:
            return ()
        survivors = end_all(left, grace_s)
        grace_s = 0.0
    return survivors
