"""A table points at the other worker's slab exactly while that worker lives, and never at another model's."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from kvstore.errors import IntegrityError
from workers.errors import WorkerError, WorkerStopping
from workers.experts.peer_link import PeerLink, offer_slab
from workers.experts.share import Share

BYTES = 4096


class FileSlab:
    """A slab in host memory: byte 0 of place i says what was written there."""

    def __init__(self, *values: int) -> None:
        self.fd = os.memfd_create("slab")
        for place, value in enumerate(values):
            os.pwrite(self.fd, bytes([value]) * BYTES, place * BYTES)
        self.block_bytes = len(values) * BYTES

    def export(self) -> int:
        return os.dup(self.fd)


class Worker:
    """Window and table of the worker under test; whatever happens to them is noted, with the engine's lock held."""

    def __init__(self, *, has_homes: bool = True) -> None:
        self.events: list[str] = []
        self.places: list[int] = []
        self.first_bytes = b""
        self.engine = threading.Lock()
        self.is_stopping = False
        self._has_homes = has_homes

    def call(self, command: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        with self.engine:
            try:
                if self.is_stopping:
                    raise WorkerStopping("closing")
                command()
                future.set_result(None)
            except Exception as exc:
                future.set_exception(exc)
        return future

    def open(self, fd: int, block_bytes: int) -> None:
        assert self.engine.locked()
        self.first_bytes = bytes(os.pread(fd, 1, place)[0] for place in range(0, block_bytes, BYTES))
        self.events.append("open")

    def shut(self) -> None:
        assert self.engine.locked()
        self.events.append("shut")

    def peer_came(self, pairs: npt.NDArray[np.int64]) -> None:
        self.places = pairs.tolist()
        self.events.append("came")

    def peer_left(self) -> None:
        self.events.append("left")
        if not self._has_homes:
            raise IntegrityError("pair 3 has no home")


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dsv4-") as name:
        yield Path(name)


@pytest.fixture
def link(folder: Path) -> Iterator[Callable[[Worker], PeerLink]]:
    share, links = Share(folder, "decode-0"), list[PeerLink]()

    def make(worker: Worker) -> PeerLink:
        links.append(PeerLink(share, "prefill-0", worker, worker, worker.call, key="m", expert_bytes=BYTES))
        links[-1].start()
        return links[-1]

    yield make
    for each in links:
        each.close()
    share.close()


def other(folder: Path, *pairs: int, key: str = "m") -> Share:
    """The other worker: its place i holds pairs[i], every byte of it the pair's number."""
    share, slab = Share(folder, "prefill-0"), FileSlab(*pairs)
    offer_slab(share, slab, pairs, key=key, expert_bytes=BYTES)
    os.close(slab.fd)
    return share


def test_a_peer_is_met_when_it_comes_left_when_it_goes_and_met_again(folder: Path, link: Callable) -> None:
    worker = Worker()
    peers = link(worker)
    time.sleep(0.1)
    assert not worker.events
    first = other(folder, 7, 4, 9)
    until(peers.is_met.is_set)
    assert worker.events == ["open", "came"] and worker.places == [7, 4, 9] == list(worker.first_bytes)
    first.close()
    until(lambda: len(worker.events) == 4)
    assert worker.events[2:] == ["left", "shut"], "no table points into a window that is shut"
    assert not peers.is_met.is_set()
    second = other(folder, 1, 2)
    until(peers.is_met.is_set)
    assert worker.places == [1, 2] and (peers.num_meetings, peers.num_partings) == (2, 1)
    second.close()


def test_experts_of_another_model_are_never_used(
    folder: Path, link: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker()
    peers = link(worker)
    stranger = other(folder, 1, 2, key="another")
    until(lambda: "not of m" in caplog.text)
    assert not worker.events and not peers.is_met.is_set()
    stranger.close()
    friend = other(folder, 5)
    until(peers.is_met.is_set)
    assert worker.places == [5]
    friend.close()


def test_an_offer_that_does_not_say_what_it_holds_is_not_used(
    folder: Path, link: Callable, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Worker()
    peers = link(worker)
    stranger, fd = Share(folder, "prefill-0"), os.memfd_create("slab")
    stranger.offer("slab", fd, {"block_bytes": BYTES})
    os.close(fd)
    until(lambda: "is not used" in caplog.text)
    stranger.close()
    friend = other(folder, 5)
    until(peers.is_met.is_set)
    assert worker.events == ["open", "came"]
    friend.close()


def test_a_window_that_cannot_be_opened_is_tried_again(folder: Path, link: Callable) -> None:
    worker = Worker()
    good, worker.open = worker.open, lambda fd, block_bytes: (_ for _ in ()).throw(WorkerError("no addresses"))  # type: ignore[method-assign]
    peers = link(worker)
    friend = other(folder, 5)
    time.sleep(0.2)
    assert not worker.events
    worker.open = good  # type: ignore[method-assign]
    until(peers.is_met.is_set)
    friend.close()


def test_memory_of_a_dead_peer_is_kept_when_nothing_can_replace_it(folder: Path, link: Callable) -> None:
    worker = Worker(has_homes=False)
    peers = link(worker)
    friend = other(folder, 3)
    until(peers.is_met.is_set)
    friend.close()
    until(lambda: peers.num_partings == 1 and worker.events[-1] == "left")
    again = other(folder, 4)
    time.sleep(0.7)
    assert worker.events == ["open", "came", "left"] and worker.places == [3]
    again.close()


def test_a_worker_that_closes_parts_first_and_so_does_one_that_is_told_to(folder: Path, link: Callable) -> None:
    worker = Worker()
    peers = link(worker)
    friend = other(folder, 3)
    until(peers.is_met.is_set)
    (folder / "peer-off").touch()
    until(lambda: worker.events == ["open", "came", "left", "shut"])
    (folder / "peer-off").unlink()
    until(peers.is_met.is_set)
    peers.close()
    assert worker.events == ["open", "came", "left", "shut"] * 2
    friend.close()


def test_a_worker_whose_engine_has_stopped_keeps_its_table(folder: Path, link: Callable) -> None:
    worker = Worker()
    peers = link(worker)
    friend = other(folder, 3)
    until(peers.is_met.is_set)
    worker.is_stopping = True
    peers.close()
    friend.close()
    assert worker.events == ["open", "came"]
