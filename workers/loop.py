"""`EngineLoop`: the thread that owns a worker's model, pools and scheduler.

Everyone else sends it commands; it runs them between steps, steps while there is work, and sleeps on a condition when
there is none (until a command or the next deadline). An exception of a step goes to `on_step_error`, which fails the
requests of that step; `IntegrityError` stops the loop for good, because what it would serve could be wrong.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvstore.errors import IntegrityError
from workers.errors import WorkerStopping

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Stepper(Protocol):
    """What an `EngineLoop` drives; every method runs on its thread."""

    def step(self) -> bool:
        """Does one unit of work; False when there was none."""

    def next_deadline_s(self) -> float | None:
        """Monotonic time of the next sweep; None when nothing can expire."""

    def sweep(self, now_s: float) -> None:
        """Ends what has expired."""

    def on_idle(self) -> None:
        """Runs once each time the loop is about to sleep."""

    def on_step_error(self, error: Exception) -> None:
        """A step raised: fails the requests it was computing. What this raises stops the loop for good."""

    def on_stop(self, failure: str) -> None:
        """Ends every request; `failure` is empty on an ordinary close."""


SWEEP_EVERY_S = 0.05
"""Longest time by which a deadline is noticed late while steps keep coming."""


@dataclass(slots=True)
class WorkCounters:
    """Counters of `WorkerStats`. Written by the engine thread, readable from anywhere."""

    admitted: int = 0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    refused: int = 0
    tokens: int = 0
    """Prompt tokens computed by prefill, output tokens of decode."""
    leaked: int = 0


class EngineLoop:
    """One named thread around a `Stepper`."""

    def __init__(self, name: str, stepper: Stepper, clock: Callable[[], float] = time.monotonic) -> None:
        self._stepper = stepper
        self._clock = clock
        self._commands: collections.deque[tuple[Future[object], Callable[[], object]]] = collections.deque()
        self._wake = threading.Condition()
        self._closing = False
        self._stopped = False
        self.failure = ""
        """Why the loop stopped by itself; empty while it is sound."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether commands are still served."""
        return not (self._stopped or self._closing)

    @property
    def has_ended(self) -> bool:
        """Whether the thread runs no more."""
        return not self._thread.is_alive()

    def call(self, command: Callable[[], T]) -> Future[T]:
        """Runs `command` on the thread between steps. Once stopped, the future fails with `WorkerStopping`."""
        future: Future[T] = Future()
        with self._wake:
            if self._stopped or self._closing:
                future.set_exception(WorkerStopping(self.failure or "the worker is shutting down"))
                return future
            self._commands.append((future, command))  # type: ignore[arg-type]
            self._wake.notify()
        return future

    def join(self, timeout_s: float) -> None:
        """Waits for the thread to end by itself or by `close`."""
        self._thread.join(timeout_s)

    def close(self, timeout_s: float = 10.0) -> None:
        """Ends every request, stops the thread and waits for it. Safe to call again."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            self._loop()
        except IntegrityError as error:
            self.failure = f"integrity: {error}"
            logger.critical("thread=%s stopped: %s", self._thread.name, error, exc_info=error)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            logger.critical("thread=%s stopped: %s", self._thread.name, error, exc_info=error)
        finally:
            with self._wake:
                self._stopped = True
                pending = list(self._commands)
                self._commands.clear()
            for future, _ in pending:
                if future.set_running_or_notify_cancel():
                    future.set_exception(WorkerStopping(self.failure or "the worker is shutting down"))
            try:
                self._stepper.on_stop(self.failure)
            except Exception:
                logger.exception("thread=%s could not end its requests", self._thread.name)

    def _loop(self) -> None:
        swept_s = self._clock()
        while not self._closing:
            self._run_commands()
            now_s = self._clock()
            if now_s - swept_s >= SWEEP_EVERY_S:
                self._stepper.sweep(now_s)
                swept_s = now_s
            try:
                busy = self._stepper.step()
            except IntegrityError:
                raise
            except Exception as error:
                logger.exception("thread=%s step failed", self._thread.name)
                self._stepper.on_step_error(error)
                busy = True
            if not busy:
                self._sleep()

    def _run_commands(self) -> None:
        while self._commands:
            future, command = self._commands.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(command())
            except IntegrityError as error:
                future.set_exception(error)
                raise
            except Exception as error:
                future.set_exception(error)

    def _sleep(self) -> None:
        if self._commands or self._closing:
            return
        self._stepper.on_idle()
        deadline_s = self._stepper.next_deadline_s()
        with self._wake:
            if not self._commands and not self._closing:
                wait_s = None if deadline_s is None else max(0.0, deadline_s - self._clock())
                self._wake.wait(wait_s)
        if deadline_s is not None and self._clock() >= deadline_s:
            self._stepper.sweep(self._clock())
