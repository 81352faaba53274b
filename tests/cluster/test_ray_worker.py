"""A worker's restarted process is loaded once, with a deadline, and told which GPUs its peer has now."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from cluster.backends import WorkerAddress
from cluster.health import WorkerDown, WorkerLost
from cluster.ray_worker import RayWorker
from workers.messages import WorkerRole

HERE = WorkerAddress("decode-0", WorkerRole.DECODE, "127.0.0.1:1", "i", 1, "n", 0.5)


@dataclass(eq=False)
class Ref:
    """What a remote call returned; `value` may be an error."""

    value: Any = None
    is_ready: bool = True


@dataclass
class Method:
    answer: Ref
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    def remote(self, *arguments: Any) -> Ref:
        self.calls.append(arguments)
        return self.answer


class Handle:
    """An actor handle whose answers the test sets."""

    def __init__(self, *gpus: str) -> None:
        self.gpus = Method(Ref(value=gpus))
        self.start = Method(Ref(is_ready=False))
        self.address = Method(Ref())


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """Handles whose process was ended; Ray answers from `Ref`s."""

    def get(ref: Ref, timeout: float) -> Any:
        assert ref.is_ready
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    found: list[Handle] = []
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: ([ref for ref in refs if ref.is_ready], []))
    monkeypatch.setattr(ray, "kill", lambda handle, no_restart: found.append(handle))
    return found


def test_a_start_under_way_is_looked_at_and_not_begun_again(killed: list[Handle]) -> None:
    handle = Handle()
    worker = RayWorker(handle, "decode-0", 60.0)
    assert worker.address() is None
    assert worker.start() is None and worker.start() is None
    handle.start.answer.is_ready, handle.start.answer.value = True, HERE
    assert worker.start() is HERE
    assert handle.start.calls == [((),)] and not killed


def test_a_start_that_takes_too_long_ends_the_process(killed: list[Handle]) -> None:
    handle, clock = Handle(), Clock()
    worker = RayWorker(handle, "decode-0", 60.0, clock=clock)
    assert worker.start() is None
    clock.now = 60.0
    with pytest.raises(WorkerDown, match="not ready after 60 s"):
        worker.start()
    assert killed == [handle]
    assert worker.start() is None and len(handle.start.calls) == 2


def test_an_answer_of_a_process_that_is_gone_is_not_taken_for_its_successors(killed: list[Handle]) -> None:
    """The start ended between two looks, and the process died later."""
    handle = Handle()
    worker = RayWorker(handle, "decode-0", 60.0)
    assert worker.start() is None
    handle.address.answer.value = HERE
    assert worker.address() is HERE
    handle.address.answer.value, handle.start.answer = None, Ref(is_ready=False)
    assert worker.address() is None and worker.start() is None
    assert len(handle.start.calls) == 2


def test_who_fails_to_start_gets_another_process_until_there_is_none(killed: list[Handle]) -> None:
    handle = Handle()
    worker = RayWorker(handle, "decode-0", 60.0)
    assert worker.start() is None
    handle.start.answer.is_ready = True
    handle.start.answer.value = RayTaskError("start", "out of memory", RuntimeError("no room"))
    with pytest.raises(WorkerDown, match="no room"):
        worker.start()
    assert killed == [handle]
    handle.start.answer = Ref(is_ready=False)
    assert worker.address() is None and worker.start() is None
    handle.address.answer.value = ActorDiedError()
    with pytest.raises(WorkerLost, match="its last start: no room"):
        worker.address()


def test_the_successor_of_a_process_that_died_over_its_start_is_left_alone(killed: list[Handle]) -> None:
    handle = Handle()
    worker = RayWorker(handle, "decode-0", 60.0)
    assert worker.start() is None
    handle.start.answer.is_ready, handle.start.answer.value = True, ActorDiedError()
    with pytest.raises(WorkerDown):
        worker.start()
    assert not killed
    handle.start.answer = Ref(is_ready=False)
    assert worker.start() is None and len(handle.start.calls) == 2


def test_a_restarted_worker_is_told_the_gpus_that_its_peer_has_now(
    killed: list[Handle], caplog: pytest.LogCaptureFixture
) -> None:
    own, other = Handle("0"), Handle("1")
    worker, peer = RayWorker(own, "prefill-0", 60.0), RayWorker(other, "decode-0", 60.0)
    worker.peer, peer.peer = peer, worker
    for each in (worker, peer):
        each.note_gpus(1.0)
    assert (worker.beside, peer.beside) == (("1",), ("0",))
    own.gpus.answer.value, other.gpus.answer.value = ("0",), ("3",)
    worker.start()
    assert own.start.calls == [(("3",),)] and "does not see" not in caplog.text
    other.gpus.answer.value = ActorUnavailableError("restarting", None)
    own.start.answer.is_ready, own.start.answer.value = True, HERE
    assert worker.start() is HERE
    own.gpus.answer.value = ("2",)
    worker.start()
    assert worker.beside == ("3",), "as last heard"
    assert "peer=decode-0 does not see its GPU 2" in caplog.text
