"""`dsv4 up`: one deployment in the foreground, from the first check to the last process gone.

Owns: what is refused before anything starts, signals, the watch loop, the state file's life. Does not own: starting and
stopping (`cluster/launch.py`). The first Ctrl-C or SIGTERM ends the deployment in order; later ones are ignored, as an
interrupted clean-up is what leaves processes behind.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

from cluster.config import ClusterConfig
from cluster.errors import ClusterError
from cluster.processes import ProcessRef
from cluster.state import ClusterState, end_leftovers, read_state, remove_state, write_state

WATCH_S = 1.0
"""Pause between two looks at the workers."""


class CannotStart(ClusterError):
    """Something is wrong before anything was started."""


class Interrupts:
    """Turns SIGINT and SIGTERM into one orderly stop. Main thread only."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._is_starting = True

    def install(self) -> None:
        """Takes the signals; Ray sets handlers of its own, so this is called again after it has started."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def started(self) -> None:
        """From now on a signal sets `stopped` instead of raising `KeyboardInterrupt`."""
        self._is_starting = False
        self.install()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.stopped.is_set():
            return
        self.stopped.set()
        if self._is_starting:
            raise KeyboardInterrupt


def check_startable(config: ClusterConfig, name: str) -> None:
    """Raises `CannotStart` with what to do about it."""
    if (running := read_state(name)) is not None:
        raise CannotStart(f"{name} already runs at {running.url} (pid {running.pid}); `dsv4 down` stops it")
    end_leftovers(name)
    check_model(config)
    if config.router.port:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.router.host, config.router.port))
            except OSError as exc:
                reason = f"{config.router.host}:{config.router.port}: {exc.strerror}"
                raise CannotStart(f"{reason}; choose another port with --port") from exc


def check_model(config: ClusterConfig) -> None:
    """Raises `CannotStart` when the model is not a checkpoint folder."""
    if not (config.model / "config.json").is_file():
        raise CannotStart(f"{config.model}: no checkpoint there (config.json is missing); choose one with --model")


def run_foreground(config: ClusterConfig, name: str, report: Callable[[str], None], *, began: float) -> int:
    """Runs until a signal or until the deployment cannot go on; returns the exit status.

    `began` is the `time.time()` of the command, from which the time to ready counts. Raises `CannotStart`,
    `StartFailed`, `DoesNotFit`.
    """
    check_startable(config, name)
    from cluster.launch import start_cluster

    interrupts = Interrupts()
    interrupts.install()
    status = 0
    try:
        with start_cluster(config, report) as cluster:
            interrupts.started()
            ready_s = time.time() - began
            write_state(_state(config, name, cluster.url, cluster.local_processes, ready_s))
            report(f"ready in {ready_s:.1f} s; Ctrl-C stops everything")
            watch = cluster.watch()
            while not interrupts.stopped.wait(WATCH_S):
                watch.check()
                cluster.check_router()
                if len(watch.lost) == len(watch.health):
                    report("every worker is lost")
                    status = 1
                    break
            report("stopping")
            interrupts.stopped.set()
    except KeyboardInterrupt:
        report("stopped while starting")
        status = 130
    finally:
        remove_state(name)
    return status


def _state(
    config: ClusterConfig, name: str, url: str, processes: tuple[ProcessRef, ...], ready_s: float
) -> ClusterState:
    own = ProcessRef.of(os.getpid())
    assert own is not None
    return ClusterState(
        name=name,
        url=url,
        model=config.served_name,
        pid=own.pid,
        created=own.created,
        api_key=config.router.api_keys[0] if config.router.api_keys else None,
        children=tuple((process.pid, process.created) for process in processes),
        ready_s=ready_s,
    )
