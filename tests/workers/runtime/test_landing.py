"""Hand-offs whose load into the pools takes a while, as it does on a GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from tests.workers.retract.harness import RetractPair, prompt
from tests.workers.runtime.pair import WAIT_S, image_of, make_request
from workers import landing
from workers.errors import RequestAborted
from workers.messages import FinishReason, GenerateRequest
from workers.sequence import SeqState


class SlowLoads:
    """Loads move their bytes at once and end, well or badly, when the test says so."""

    def __init__(self, start: Callable[..., object]) -> None:
        self.over = threading.Event()
        self.error: Exception | None = None
        self._start = start

    def __call__(self, *args: object) -> object:
        self._start(*args)
        return self

    def done(self) -> bool:
        if self.over.is_set() and self.error is not None:
            raise self.error
        return self.over.is_set()

    def wait(self) -> None:
        self.over.set()


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowLoads]:
    slow = SlowLoads(landing.start_copy_in)
    monkeypatch.setattr(landing, "start_copy_in", slow)
    yield slow
    slow.over.set()


def begin(pair: RetractPair, request: GenerateRequest) -> Future[None]:
    """Hands a request over up to the point at which its load is under way."""
    pair.admit(request)
    sink = pair.compute(request)
    assert sink.result is not None and sink.result.first.token_id is not None
    image = image_of(pair.decode_engine.spec, request, sink)
    landed = pair.decode.land(request.request_id, request.epoch, image, sink.result.first.token_id, None)
    state = pair.on_engine(lambda: pair.decode._attempts.find(request.request_id).state)
    assert state is SeqState.RESTORING and not landed.done()
    return landed


def test_the_batch_decodes_on_while_another_request_lands(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    running, late = make_request("a", prompt(20), max_tokens=60), make_request("b", prompt(140), max_tokens=20)
    with RetractPair() as pair:
        pair.start(running)
        loads: SlowLoads = request.getfixturevalue("loads")
        landed = begin(pair, late)
        pair.check_tokens([running])
        assert not landed.done()
        loads.over.set()
        pair.check_tokens([late])
        landed.result(WAIT_S)


def test_an_abort_while_landing_frees_pages_and_image_once_the_load_is_over(loads: SlowLoads) -> None:
    with RetractPair() as pair:
        landed = begin(pair, make_request("a", prompt(140)))
        assert pair.decode.abort("a").result(WAIT_S)
        assert pair.events.rest("a")[-1].finish is FinishReason.ABORTED
        pair.on_engine(pair.decode.retract.check_integrity)
        assert pair.on_engine(lambda: pair.decode_engine.allocators.num_held) > 0 and not landed.done()
        loads.over.set()
        landed.result(WAIT_S)
        assert pair.on_engine(lambda: pair.decode_engine.allocators.num_held) == 0


def test_a_load_that_fails_ends_its_request_alone(loads: SlowLoads) -> None:
    with RetractPair() as pair:
        landed = begin(pair, make_request("a", prompt(140)))
        loads.error = RuntimeError("copy engine fault")
        loads.over.set()
        last = pair.events.rest("a")[-1]
        assert last.error is not None and "copy engine fault" in last.error.message
        landed.result(WAIT_S)
        loads.error = None
        other = make_request("b", prompt(30))
        pair.start(other)
        pair.check_tokens([other])


def test_a_second_image_of_a_landing_request_is_refused(loads: SlowLoads) -> None:
    request = make_request("a", prompt(140), max_tokens=8)
    with RetractPair() as pair:
        begin(pair, request)
        again = image_of(pair.decode_engine.spec, request, pair.compute(request))
        with pytest.raises(RequestAborted, match="not waiting for KV"):
            pair.decode.land("a", 0, again, 5, None).result(WAIT_S)
        loads.over.set()
        pair.check_tokens([request])


def test_closing_the_worker_waits_for_a_load_under_way(loads: SlowLoads) -> None:
    pair = RetractPair()
    landed = begin(pair, make_request("a", prompt(140)))
    pair.decode.close()
    pair.prefill.close()
    last = pair.events.rest("a")[-1]
    assert last.error is not None and last.error.code == "worker_stopping"
    assert landed.done() and pair.decode_engine.allocators.num_held == 0
