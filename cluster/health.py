"""Watches the workers, brings restarted ones back, and tells the router.

Owns: the loop's state per worker and the events it reports. Does not own: restarting the process (Ray does), the first
start (`cluster/launch.py`). A restarted worker has lost its KV and its port: it starts under a new incarnation and is
registered again; the router's requests on the old one have failed and were retried elsewhere.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.backends import WorkerAddress

logger = logging.getLogger(__name__)


class WorkerDown(Exception):
    """The process is gone for now; Ray restarts it."""


class WorkerLost(Exception):
    """The process is gone for good."""


class Supervised(Protocol):
    """One worker actor, as the watch sees it. Every call has a deadline of its own."""

    def address(self) -> WorkerAddress | None:
        """Where it listens; None when the process is new and its worker not started. Raises the two errors above."""
        ...

    def start(self) -> WorkerAddress | None:
        """Starts the worker in a new process, or looks how far that has come: None while it loads. Raises `WorkerDown`
        when it did not start; `address` then tells whether there will be another process."""
        ...


class Registry(Protocol):
    """The router's side."""

    def bind(self, address: WorkerAddress) -> None: ...

    def unbind(self, name: str) -> None: ...


class Health(enum.Enum):
    """What the watch last saw."""

    UP = "up"
    DOWN = "down"
    LOST = "lost"


@dataclass(slots=True)
class _Watched:
    worker: Supervised
    health: Health
    incarnation: str


class HealthWatch:
    """One `check` looks at every worker once. Single-threaded; the caller decides how often."""

    def __init__(
        self,
        workers: Mapping[str, Supervised],
        addresses: Mapping[str, WorkerAddress],
        registry: Registry,
        report: Callable[[str], None],
    ) -> None:
        self._watched = {
            name: _Watched(worker, Health.UP, addresses[name].incarnation) for name, worker in workers.items()
        }
        self._registry = registry
        self._report = report

    @property
    def health(self) -> dict[str, Health]:
        return {name: watched.health for name, watched in self._watched.items()}

    @property
    def lost(self) -> list[str]:
        """Workers that will not come back."""
        return [name for name, watched in self._watched.items() if watched.health is Health.LOST]

    def check(self) -> None:
        """Looks at every worker once and acts on what changed."""
        for name, watched in self._watched.items():
            if watched.health is not Health.LOST:
                self._check_one(name, watched)

    def _check_one(self, name: str, watched: _Watched) -> None:
        try:
            address = watched.worker.address()
            if address is None:
                self._mark_down(name, watched, "its process was replaced")
                if (address := watched.worker.start()) is None:
                    return
        except WorkerDown as exc:
            self._mark_down(name, watched, str(exc))
            return
        except WorkerLost as exc:
            self._mark_down(name, watched, str(exc))
            watched.health = Health.LOST
            self._report(f"{name} is lost: {exc}")
            return
        if address.incarnation != watched.incarnation or watched.health is Health.DOWN:
            self._registry.bind(address)
            self._report(f"{name} is back at {address.address} after {address.start_s:.1f} s")
            logger.info("worker_back name=%s incarnation=%s address=%s", name, address.incarnation, address.address)
        watched.health, watched.incarnation = Health.UP, address.incarnation

    def _mark_down(self, name: str, watched: _Watched, reason: str) -> None:
        if watched.health is Health.UP:
            watched.health = Health.DOWN
            self._registry.unbind(name)
            self._report(f"{name} is down: {reason}")
            logger.warning("worker_down name=%s reason=%s", name, reason)
