"""`RayWorker`: one worker actor as the launch and the health watch see it, whatever process is behind it now.

Owns: calls to one actor handle with their deadlines, a start that is under way, which GPUs the actor was heard to have.
Does not own: when to start (`launch.py`, `health.py`), restarting the process (Ray does).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.backends import WorkerAddress
from cluster.health import WorkerDown, WorkerLost

logger = logging.getLogger(__name__)

PROBE_S = 5.0
"""Wait for one answer of an actor that should be idle on its control path."""

LOOK_S = 0.2
"""Longest look at a start that is under way: the other workers are watched meanwhile."""


@dataclass(frozen=True, slots=True)
class _Start:
    """A call of `start` that has not been read."""

    ref: Any
    until_s: float


class RayWorker:
    """`health.Supervised` over one actor handle."""

    def __init__(
        self, handle: Any, name: str, start_deadline_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.handle, self.name = handle, name
        self.peer: RayWorker | None = None
        """The worker whose memory it maps; set before the first start."""
        self.gpus: tuple[str, ...] = ()
        """Its GPUs, as last heard; only of workers that have a peer."""
        self._start_deadline_s, self._clock = start_deadline_s, clock
        self._start: _Start | None = None
        self._failure = ""
        """Why the last start failed."""

    @property
    def beside(self) -> tuple[str, ...]:
        """GPUs of its peer, as last heard."""
        return () if self.peer is None else self.peer.gpus

    def note_gpus(self, timeout_s: float) -> None:
        """Asks a worker that has a peer which GPUs are its own: the peer must see them too. Raises as Ray does."""
        import ray

        if self.peer is not None:
            self.gpus = ray.get(self.handle.gpus.remote(), timeout=timeout_s)

    def address(self) -> WorkerAddress | None:
        """See `health.Supervised`."""
        try:
            found = self._answer(self.handle.address.remote(), PROBE_S)
        except WorkerLost as exc:
            raise WorkerLost(
                f"{str(exc).rstrip('.')}; its last start: {self._failure}" if self._failure else str(exc)
            ) from exc
        if found is not None:
            self._start, self._failure = None, ""
        return found

    def start(self) -> WorkerAddress | None:
        """Begins a start, or looks at the one under way: None while it loads. Raises `WorkerDown`.

        A start that fails or takes too long ends the process: the next one may find what was missing (memory of a GPU
        that its predecessor still held), and Ray's limit of restarts makes an end of it.
        """
        import ray

        if self._start is None:
            self._note_all_gpus()
            self._start = _Start(self.handle.start.remote(self.beside), self._clock() + self._start_deadline_s)
        start = self._start
        done, _ = ray.wait([start.ref], timeout=LOOK_S)
        if not done and self._clock() < start.until_s:
            return None
        self._start, reason = None, f"not ready after {self._start_deadline_s:g} s"
        if done:
            try:
                # A process that died over it is gone already: ending it again would end its successor.
                return self._answer(start.ref, PROBE_S, when_dead=WorkerDown)
            except WorkerLost as exc:
                reason = str(exc)
        self._failure = reason
        logger.warning("worker=%s start failed, ending its process: %s", self.name, self._failure)
        ray.kill(self.handle, no_restart=False)
        raise WorkerDown(self._failure)

    def _note_all_gpus(self) -> None:
        """Ray may have given a new process another GPU than the old one's; a peer that does not answer keeps its."""
        from ray.exceptions import GetTimeoutError, RayError

        if self.peer is None:
            return
        before = self.gpus
        for worker in (self, self.peer):
            with contextlib.suppress(RayError, GetTimeoutError):
                worker.note_gpus(PROBE_S)
        if not set(self.gpus) <= set(before):
            logger.warning("worker=%s peer=%s does not see its GPU %s until it restarts", self.name, self.peer.name,
                           ",".join(self.gpus))  # fmt: skip

    def _answer(
        self, ref: Any, timeout_s: float, *, when_dead: type[WorkerDown | WorkerLost] = WorkerLost
    ) -> WorkerAddress | None:
        """What a call returned, with Ray's errors as the watch's."""
        import ray
        from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

        try:
            found: WorkerAddress | None = ray.get(ref, timeout=timeout_s)
            return found
        except ActorDiedError as exc:
            raise when_dead(first_line(exc)) from exc
        except RayActorError as exc:
            raise WorkerDown(first_line(exc)) from exc
        except GetTimeoutError as exc:
            raise WorkerDown(f"no answer within {timeout_s:g} s") from exc
        except RayTaskError as exc:
            raise WorkerLost(first_line(exc.cause or exc)) from exc


def first_line(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
