"""Ends and failures while a request is draining, parked or restoring. Copies finish when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvstore.tiers.cascade import Cascade
from tests.workers.retract.harness import RetractPair, prompt, retract_config
from tests.workers.runtime.fake_model import fake_engine
from tests.workers.runtime.pair import WAIT_S, make_request
from workers.errors import RequestTooLong
from workers.messages import FinishReason, GenerateRequest
from workers.retract import parking
from workers.sequence import SeqState


class SlowCopies:
    """Copies that move their bytes at once and say so only after `release`."""

    def __init__(self) -> None:
        self.out, self.into = threading.Event(), threading.Event()
        self.num_out = self.num_into = 0

    def gate(self, event: threading.Event, start: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> object:
            start(*args)
            if event is self.out:
                self.num_out += 1
            else:
                self.num_into += 1
            copy = type("Slow", (), {"done": lambda _: event.is_set(), "wait": lambda _: None})()
            return copy

        return run


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[SlowCopies]:
    slow = SlowCopies()
    monkeypatch.setattr(parking, "start_copy_out", slow.gate(slow.out, parking.start_copy_out))
    monkeypatch.setattr(parking, "start_copy_in", slow.gate(slow.into, parking.start_copy_in))
    yield slow
    slow.out.set()
    slow.into.set()


def state_of(pair: RetractPair, name: str) -> SeqState | None:
    def look() -> SeqState | None:
        sequence = pair.decode._attempts.find(name)
        return None if sequence is None else sequence.state

    return pair.on_engine(look)


def wait_for(pair: RetractPair, name: str, state: SeqState) -> None:
    for _ in range(20_000):
        if state_of(pair, name) is state:
            return
    raise AssertionError(f"{name} is {state_of(pair, name)}, not {state}")


def bring_to(pair: RetractPair, copies: SlowCopies, request: GenerateRequest, state: SeqState) -> None:
    """Starts a request and leaves it in one of the states outside the batch."""
    pair.control(interval=4, victim="named", names=(request.request_id,), poison_freed=True, other_pages=True)
    if state is not SeqState.DRAINING:
        copies.out.set()
    if state is SeqState.PARKED:
        # Without pages for a restore it stays parked.
        pair.on_engine(lambda: setattr(pair.decode.retract.room, "fits", lambda *_: False))
    pair.start(request)
    wait_for(pair, request.request_id, state)


STATES = [SeqState.DRAINING, SeqState.PARKED, SeqState.RESTORING]


@pytest.mark.parametrize("state", STATES)
def test_an_abort_outside_the_batch_frees_all_once_the_copy_is_done(state: SeqState, copies: SlowCopies) -> None:
    request = make_request("a", prompt(140), max_tokens=50)
    with RetractPair() as pair:
        bring_to(pair, copies, request, state)
        pair.on_engine(pair.decode.retract.check_integrity)
        assert pair.decode.abort("a").result(WAIT_S)
        assert pair.events.rest("a")[-1].finish is FinishReason.ABORTED
        pair.on_engine(pair.decode.retract.check_integrity)
        held = pair.on_engine(lambda: pair.decode_engine.allocators.num_held)
        assert (held > 0) == (state is not SeqState.PARKED)
        assert pair.events.closed_keys == [("a", 0)]
        copies.out.set()
        copies.into.set()


@pytest.mark.parametrize("state", STATES)
def test_a_deadline_outside_the_batch_ends_the_request(state: SeqState, copies: SlowCopies) -> None:
    request = make_request("a", prompt(140), max_tokens=50, deadline_s=100.0)
    with RetractPair() as pair:
        bring_to(pair, copies, request, state)
        pair.clock.now_s = 101.0
        last = pair.events.rest("a")[-1]
        assert last.error is not None and last.error.code == "deadline_exceeded"
        pair.on_engine(pair.decode.retract.check_integrity)
        copies.out.set()
        copies.into.set()


@pytest.mark.parametrize("state", STATES)
def test_a_lost_router_ends_its_requests_outside_the_batch(state: SeqState, copies: SlowCopies) -> None:
    request = make_request("a", prompt(140), max_tokens=50, router="gone")
    with RetractPair() as pair:
        bring_to(pair, copies, request, state)
        assert pair.decode.abort_router("gone").result(WAIT_S) == 1
        assert pair.events.rest("a")[-1].finish is FinishReason.ABORTED
        copies.out.set()
        copies.into.set()


@pytest.mark.parametrize("state", STATES)
def test_a_newer_attempt_takes_over_from_one_outside_the_batch(state: SeqState, copies: SlowCopies) -> None:
    first = make_request("a", prompt(140), max_tokens=50)
    second = make_request("a", prompt(140), max_tokens=12, epoch=1)
    with RetractPair() as pair:
        bring_to(pair, copies, first, state)
        pair.admit(second)
        assert pair.events.rest("a")[-1].finish is FinishReason.ABORTED
        copies.out.set()
        copies.into.set()
        pair.control()
        pair.land(second, pair.compute(second))
        pair.check_tokens([second])


@pytest.mark.parametrize("state", STATES)
def test_the_rest_of_the_batch_goes_on_meanwhile(state: SeqState, copies: SlowCopies) -> None:
    slow, other = make_request("a", prompt(140), max_tokens=30), make_request("b", prompt(20), max_tokens=40)
    with RetractPair() as pair:
        room = pair.decode.retract.room
        fits = room.fits
        bring_to(pair, copies, slow, state)
        pair.start(other)
        pair.check_tokens([other])
        assert state_of(pair, "a") is state
        copies.out.set()
        copies.into.set()
        pair.on_engine(lambda: setattr(room, "fits", fits))
        pair.check_tokens([slow])


@pytest.mark.parametrize("state", STATES)
def test_closing_the_worker_ends_requests_outside_the_batch(state: SeqState, copies: SlowCopies) -> None:
    request = make_request("a", prompt(140), max_tokens=50)
    with RetractPair() as pair:
        bring_to(pair, copies, request, state)
        pair.decode.close()
        last = pair.events.rest("a")[-1]
        assert last.error is not None and last.error.code == "worker_stopping"
        pair.settle = lambda: None  # type: ignore[method-assign]


def test_slots_and_pages_are_used_again_while_others_are_out() -> None:
    requests = [make_request(f"r{i}", prompt(30 + i, i), max_tokens=20) for i in range(12)]
    with RetractPair(decode_engine=fake_engine(full_pages=8, window_pages=8, slots=3)) as pair:
        pair.control(interval=3, poison_freed=True)
        for request in requests:
            pair.start(request)
        pair.check_tokens(requests)
        assert pair.report().events >= 12 * 6


def break_file(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(bytes(data[: len(data) // 2]))
    elif how == "bit-flipped":
        data[len(data) // 3] ^= 1
        path.write_bytes(bytes(data))
    else:
        path.write_bytes(b"another file altogether" * 100)


@pytest.mark.parametrize("how", ["truncated", "bit-flipped", "foreign"])
def test_a_damaged_file_is_a_counted_miss_and_ends_only_its_request(how: str, tmp_path: Path) -> None:
    bad, good = make_request("bad", prompt(90), max_tokens=30), make_request("good", prompt(40), max_tokens=60)
    with RetractPair(retract=retract_config(disk=str(tmp_path))) as pair:
        cascade: Cascade = pair.decode.retract.cascade
        want = cascade.want

        def break_first(key: object, **kwargs: object) -> bool:
            for path in tmp_path.rglob("*.kv"):
                break_file(path, how)
            return want(key, **kwargs)  # type: ignore[arg-type]

        pair.on_engine(lambda: setattr(cascade, "want", break_first))
        pair.control(interval=9, victim="named", names=("bad",), tier="disk")
        pair.start(good)
        pair.start(bad)
        last = pair.events.rest("bad")[-1]
        assert last.error is not None and (last.error.status, last.error.code) == (503, "kv_lost")
        pair.check_tokens([good])
        report = pair.report()
        assert report.checksum_failures == 1 and report.fallbacks == {"lost": 1, "failed": 1}


def test_a_full_disk_leaves_the_image_in_the_host_tier(tmp_path: Path) -> None:
    request = make_request("a", prompt(90), max_tokens=30)
    with RetractPair(retract=retract_config(disk=str(tmp_path), disk_bytes=4096)) as pair:
        pair.control(interval=9, tier="disk")
        pair.start(request)
        pair.check_tokens([request])
        report = pair.report()
        assert report.by_tier == {"pinned": report.events} and report.fallbacks == {"disk_refused": report.events}


def test_a_copy_that_always_fails_spares_a_forced_victim(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        raise RuntimeError("no copy engine")

    monkeypatch.setattr(parking, "start_copy_out", broken)
    request = make_request("a", prompt(90), max_tokens=20)
    with RetractPair() as pair:
        pair.control(interval=5)
        pair.start(request)
        pair.check_tokens([request])
        report = pair.report()
        assert report.fallbacks == {
            "copy_failed": 2 * report.events, "copy_given_up": report.events, "spared": report.events
        }  # fmt: skip


def test_a_request_that_can_never_fit_is_refused_and_the_worker_goes_on() -> None:
    with RetractPair(
        decode_engine=fake_engine(full_pages=2), retract=retract_config(admission="predicted", forecast_initial=1)
    ) as pair:
        with pytest.raises(RequestTooLong, match="KV pages"):
            pair.admit(make_request("a", prompt(300), max_tokens=400))
        small = make_request("b", prompt(30))
        pair.start(small)
        pair.check_tokens([small])
