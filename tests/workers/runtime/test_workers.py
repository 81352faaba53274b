"""Prefill and decode workers with a model whose tokens depend on every KV row."""

from __future__ import annotations

import random
from concurrent.futures import Future

import pytest

from tests.workers.runtime.fake_model import VOCAB, FakeModel, fake_engine, oracle_tokens
from tests.workers.runtime.pair import WAIT_S, Pair, RowSink, image_of, make_request, tokens_of
from workers.engine import Engine
from workers.errors import (
    DeadlineExceeded,
    DeviceLost,
    RequestAborted,
    RequestError,
    RequestTooLong,
    WorkerFull,
    WorkerStopping,
)
from workers.messages import FinishReason


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 10_007 + length)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 127, 128, 129, 255, 256, 257, 400])
def test_tokens_over_the_hand_off_equal_the_oracle(length: int) -> None:
    request = make_request("a", prompt(length), max_tokens=9)
    with Pair() as pair:
        assert pair.run(request) == oracle_tokens(request.prompt_ids, request.sampling)


def test_output_across_a_page_and_a_compression_window_equals_the_oracle() -> None:
    request = make_request("a", prompt(250), max_tokens=20)
    with Pair() as pair:
        assert pair.run(request) == oracle_tokens(request.prompt_ids, request.sampling)


def test_seeded_sampling_with_penalties_equals_the_oracle() -> None:
    options = {
        "temperature": 0.9,
        "top_p": 0.9,
        "seed": 5,
        "frequency_penalty": 0.4,
        "min_tokens": 6,
        "ignore_eos": False,
    }
    request = make_request("a", prompt(40), max_tokens=30, **options)
    with Pair() as pair:
        assert pair.run(request) == oracle_tokens(request.prompt_ids, request.sampling)


def test_requests_joining_and_leaving_at_random_steps_get_the_tokens_they_get_alone(seed: int) -> None:
    rng = random.Random(seed)
    requests = [
        make_request(f"r{i}", prompt(rng.choice([2, 60, 130, 257]), i), max_tokens=rng.randint(1, 40),
                     temperature=rng.choice([0.0, 1.0]))
        for i in range(8)
    ]  # fmt: skip
    with Pair() as pair:
        for request in requests:
            pair.start(request)
        for request in requests:
            events = pair.events.rest(request.request_id)
            assert tokens_of(events) == oracle_tokens(request.prompt_ids, request.sampling, request.request_id)
    assert max(len(step) for step in pair.decode_engine.model.steps) > 1  # type: ignore[attr-defined]


def test_a_prompt_is_handed_out_chunk_by_chunk_and_every_row_once() -> None:
    request = make_request("a", prompt(520))
    with Pair() as pair:
        sink = pair.compute(request)
        assert len(sink.seen) == 5
        image_of(pair.decode_engine.spec, request, sink)
        assert sum(len(chunk) for chunk in pair.prefill_engine.model.steps) == 5  # type: ignore[attr-defined]
        assert pair.prefill.counters.tokens == 520 and pair.decode.counters.tokens == 0


def test_a_first_token_that_is_the_last_ends_the_request_at_once() -> None:
    with Pair() as pair:
        pair.start(make_request("a", prompt(10), max_tokens=1))
        events = pair.events.rest("a")
        assert [e.finish for e in events] == [FinishReason.LENGTH] and len(events[0].token_ids) == 1
        assert pair.decode_engine.model.steps == []  # type: ignore[attr-defined]


def test_a_stop_token_ends_the_request_unless_ignored() -> None:
    ids = prompt(20)
    with Pair() as pair:
        free = pair.run(make_request("a", ids, max_tokens=12))
        stop = free[5]
        stopped = pair.run(make_request("b", ids, max_tokens=12, ignore_eos=False, stop_token_ids=(stop,)))
        assert stopped == free[: free.index(stop) + 1]
        assert pair.run(make_request("c", ids, max_tokens=12, stop_token_ids=(stop,))) == free


def test_logprobs_come_with_every_token_from_the_first() -> None:
    with Pair() as pair:
        pair.start(make_request("a", prompt(20), max_tokens=4, logprobs=2))
        for event in pair.events.rest("a"):
            assert event.logprobs is not None and len(event.logprobs) == 1
            assert event.logprobs[0].token_id == event.token_ids[0] == event.logprobs[0].top[0][0]


def test_one_message_a_step_and_router() -> None:
    with Pair() as pair:
        for i in range(3):
            pair.start(make_request(f"a{i}", prompt(5, i), max_tokens=200, router="one"))
        pair.start(make_request("b", prompt(5), max_tokens=200, router="two"))
        for name in ("a0", "a1", "a2", "b"):
            pair.events.rest(name)
        widest = max(pair.events.steps, key=lambda step: sum(map(len, step.values())))
        assert {router: len(events) for router, events in widest.items()} == {"one": 3, "two": 1}


# -- abort, failure, deadlines at each stage ---------------------------------------------------------------------------


def test_abort_before_kv_arrives_ends_once_and_frees_the_promise() -> None:
    request = make_request("a", prompt(20))
    with Pair() as pair:
        pair.admit(request)
        assert pair.decode.abort("a").result(WAIT_S)
        events = pair.events.rest("a")
        assert [e.finish for e in events] == [FinishReason.ABORTED] and events[0].index == 0
        assert pair.events.closed_keys == [("a", 0)]
        assert not pair.decode.abort("a").result(WAIT_S)


def test_kv_that_arrives_after_an_abort_is_refused_and_writes_nothing() -> None:
    request = make_request("a", prompt(200))
    with Pair() as pair:
        sink = pair.compute(request)
        pair.admit(request)
        pair.decode.abort("a").result(WAIT_S)
        before = [pool.data.clone() for pool in pair.decode_engine.pools.pools]
        with pytest.raises(RequestAborted):
            pair.land(request, sink)
        after = [pool.data for pool in pair.decode_engine.pools.pools]
        assert all(bool((a == b).all()) for a, b in zip(before, after, strict=True))


def test_kv_of_an_older_attempt_is_refused() -> None:
    old, new = make_request("a", prompt(50)), make_request("a", prompt(50), epoch=1)
    with Pair() as pair:
        sink = pair.compute(old)
        pair.admit(old)
        pair.admit(new)
        assert pair.events.rest("a")[-1].epoch == 0
        with pytest.raises(RequestAborted):
            pair.land(old, sink)
        pair.land(new, pair.compute(new))
        assert tokens_of(pair.events.rest("a")) == oracle_tokens(new.prompt_ids, new.sampling)


def test_abort_while_running_ends_within_a_step_and_others_go_on() -> None:
    long, other = make_request("long", prompt(20), max_tokens=1500), make_request("b", prompt(30), max_tokens=25)
    with Pair() as pair:
        pair.start(long)
        pair.start(other)
        pair.events.queue_of("long").get(timeout=WAIT_S)
        assert pair.decode.abort("long").result(WAIT_S)
        held = pair.decode.loop.call(lambda: [s.request.request_id for s in pair.decode.scheduler.sequences])
        assert "long" not in held.result(WAIT_S)
        assert pair.events.rest("long")[-1].finish is FinishReason.ABORTED
        assert tokens_of(pair.events.rest("b")) == oracle_tokens(other.prompt_ids, other.sampling)


def test_abort_while_prefilling_frees_pages_at_once() -> None:
    with Pair() as pair:
        gate: Future[None] = Future()
        pair.prefill.loop.call(lambda: gate.result(WAIT_S))
        sink = RowSink()
        submitted = pair.prefill.submit(make_request("a", prompt(700)), sink)
        aborted = pair.prefill.abort("a")
        gate.set_result(None)
        submitted.result(WAIT_S)
        assert aborted.result(WAIT_S)
        assert sink.finished.wait(WAIT_S) and isinstance(sink.error, RequestAborted)


def test_abort_after_prefill_and_before_release_frees_pages() -> None:
    request, sink = make_request("a", prompt(300)), RowSink()
    with Pair() as pair:
        pair.prefill.submit(request, sink).result(WAIT_S)
        assert sink.finished.wait(WAIT_S)
        assert pair.prefill_engine.allocators.num_held > 0
        assert pair.prefill.abort("a").result(WAIT_S)
        assert pair.prefill_engine.allocators.num_held == 0


def test_all_requests_of_a_router_end_and_those_of_others_stay() -> None:
    with Pair() as pair:
        pair.start(make_request("a", prompt(5), max_tokens=1500, router="gone"))
        pair.admit(make_request("b", prompt(5), router="gone"))
        other = make_request("c", prompt(5), max_tokens=30, router="here")
        pair.start(other)
        assert pair.decode.abort_router("gone").result(WAIT_S) == 2
        assert pair.events.rest("a")[-1].finish is pair.events.rest("b")[-1].finish is FinishReason.ABORTED
        assert tokens_of(pair.events.rest("c")) == oracle_tokens(other.prompt_ids, other.sampling)


def test_a_failing_step_fails_its_requests_and_the_worker_serves_on() -> None:
    with Pair() as pair:
        model = pair.decode_engine.model
        assert isinstance(model, FakeModel)
        pair.admit(make_request("a", prompt(20), max_tokens=1500))
        sink = pair.compute(make_request("a", prompt(20), max_tokens=1500))
        model.fail_on = sink.result.first.token_id  # type: ignore[union-attr]
        pair.land(make_request("a", prompt(20), max_tokens=1500), sink)
        last = pair.events.rest("a")[-1]
        assert (
            last.finish is FinishReason.ERROR and last.error is not None and "fake model failure" in last.error.message
        )
        model.fail_on = None
        request = make_request("b", prompt(20))
        assert pair.run(request) == oracle_tokens(request.prompt_ids, request.sampling)


def test_a_lost_device_ends_every_request_and_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(engine: Engine) -> None:
        raise DeviceLost("an illegal memory access was encountered")

    monkeypatch.setattr(Engine, "check_device", lost)
    pair = Pair()
    for engine, worker in ((pair.decode_engine, pair.decode), (pair.prefill_engine, pair.prefill)):
        assert isinstance(engine.model, FakeModel)
        request = make_request("a", prompt(20), max_tokens=1500)
        if worker is pair.decode:
            pair.admit(request)
            sink = pair.compute(request)
            engine.model.fail_on = sink.result.first.token_id  # type: ignore[union-attr]
            pair.land(request, sink)
            assert pair.events.rest("a")[-1].finish is FinishReason.ERROR
        else:
            engine.model.fail_on = 7
            assert pair.compute(make_request("b", [*prompt(200), 7])).error is not None
        worker.loop.join(WAIT_S)
        assert not worker.loop.alive and "DeviceLost: an illegal memory access" in worker.loop.failure
    pair.prefill.close()
    pair.decode.close()


def test_a_failing_prefill_step_fails_its_prompt_and_the_worker_serves_on() -> None:
    with Pair() as pair:
        model = pair.prefill_engine.model
        assert isinstance(model, FakeModel)
        model.fail_on = 7
        sink = pair.compute(make_request("a", [*prompt(200), 7]))
        assert sink.error is not None and "fake model failure" in str(sink.error)
        model.fail_on = None
        assert pair.compute(make_request("b", prompt(200))).error is None


def test_a_row_of_nan_fails_its_request_alone() -> None:
    with Pair() as pair:
        model = pair.decode_engine.model
        assert isinstance(model, FakeModel)
        bad, good = make_request("bad", prompt(9), max_tokens=1500), make_request("good", prompt(8), max_tokens=20)
        expected = oracle_tokens(good.prompt_ids, good.sampling)
        model.nan_on = next(t for t in range(2, VOCAB) if t not in expected)
        bad = make_request("bad", prompt(9), max_tokens=1500, logit_bias=((model.nan_on, 1e4),))
        pair.start(good)
        pair.start(bad)
        last = pair.events.rest("bad")[-1]
        assert last.error is not None and last.error.code == "model_output_invalid"
        assert tokens_of(pair.events.rest("good")) == expected


def test_a_request_out_of_time_gets_a_deadline_error_in_every_stage() -> None:
    with Pair() as pair:
        pair.admit(make_request("waiting", prompt(5), deadline_s=5.0))
        pair.start(make_request("running", prompt(5), deadline_s=5.0, max_tokens=1500))
        sink = RowSink()
        pair.prefill.submit(make_request("draining", prompt(5), deadline_s=5.0), sink).result(WAIT_S)
        assert sink.finished.wait(WAIT_S)
        pair.clock.now_s = 6.0
        for worker in (pair.decode, pair.prefill):
            worker.loop.call(lambda: None).result(WAIT_S)
        for name in ("waiting", "running"):
            error = pair.events.rest(name)[-1].error
            assert error is not None and error.status == 504
        pair.prefill.loop.call(lambda: pair.prefill.sweep(pair.clock())).result(WAIT_S)
        assert isinstance(sink.error, DeadlineExceeded)


def test_requests_beyond_the_slots_wait_and_are_granted_as_others_end() -> None:
    with Pair(decode_engine=fake_engine(slots=1)) as pair:
        first, second = make_request("a", prompt(5)), make_request("b", prompt(6))
        pair.admit(first)
        waiting = pair.decode.admit(second)
        pair.decode.loop.call(lambda: None).result(WAIT_S)
        assert not waiting.done()
        pair.land(first, pair.compute(first))
        pair.events.rest("a")
        waiting.result(WAIT_S)
        pair.land(second, pair.compute(second))
        assert tokens_of(pair.events.rest("b")) == oracle_tokens(second.prompt_ids, second.sampling)


def test_a_wait_for_memory_ends_as_worker_full() -> None:
    with Pair(decode_engine=fake_engine(slots=1), admit_wait_s=3.0) as pair:
        pair.admit(make_request("a", prompt(5)))
        waiting = pair.decode.admit(make_request("b", prompt(5)))
        pair.decode.loop.call(lambda: None).result(WAIT_S)
        pair.clock.now_s = 4.0
        pair.decode.loop.call(lambda: pair.decode.sweep(pair.clock())).result(WAIT_S)
        with pytest.raises(WorkerFull):
            waiting.result(WAIT_S)


def test_refusals_name_their_reason_and_leave_no_trace() -> None:
    with Pair(max_waiting=0, max_context=64, decode_engine=fake_engine(slots=1)) as pair:
        with pytest.raises(RequestTooLong):
            pair.admit(make_request("a", prompt(60), max_tokens=10))
        with pytest.raises(RequestError, match=r"\[0, 61\)"):
            pair.admit(make_request("a", [VOCAB]))
        pair.admit(make_request("a", prompt(5)))
        with pytest.raises(WorkerFull):
            pair.admit(make_request("b", prompt(5)))
        assert pair.decode.counters.refused == 3 and pair.events.steps == []
        pair.decode.abort("a").result(WAIT_S)


def test_the_same_attempt_twice_is_refused_and_the_first_lives_on() -> None:
    request = make_request("a", prompt(5))
    with Pair() as pair:
        pair.admit(request)
        with pytest.raises(RequestError, match="already being served"):
            pair.admit(request)
        pair.land(request, pair.compute(request))
        assert tokens_of(pair.events.rest("a")) == oracle_tokens(request.prompt_ids, request.sampling)


def test_closing_ends_every_request_with_worker_stopping() -> None:
    with Pair() as pair:
        pair.start(make_request("a", prompt(5), max_tokens=1500))
        pair.admit(make_request("b", prompt(5)))
        pair.decode.close()
        for name in "ab":
            error = pair.events.rest(name)[-1].error
            assert error is not None and error.code == "worker_stopping"
        with pytest.raises(WorkerStopping):
            pair.admit(make_request("c", prompt(5)))


def test_a_leak_is_found_when_idle_and_stops_the_worker() -> None:
    pair = Pair()
    with pair:
        pair.run(make_request("a", prompt(5)))
        pair.decode.loop.call(lambda: None).result(WAIT_S)
        assert pair.decode.loop.alive and pair.decode.counters.leaked == 0
    pair = Pair()
    pair.admit(make_request("a", prompt(5)))
    pair.decode.loop.call(lambda: pair.decode_engine.allocators.full.allocate(1)).result(WAIT_S)
    pair.decode.abort("a").result(WAIT_S)
    pair.decode.loop.join(WAIT_S)
    assert pair.decode.counters.leaked == 1 and "integrity" in pair.decode.loop.failure
    with pytest.raises(WorkerStopping, match="integrity"):
        pair.admit(make_request("b", prompt(5)))
    pair.prefill.close()


class NotedExperts:
    """A cache of experts that keeps what it is told."""

    note = ""

    def __init__(self) -> None:
        self.asked = 0
        self.noted: list[bytes] = []

    def stats_fields(self) -> dict[str, object]:
        return {}

    def prompt_uses(self) -> bytes:
        self.asked += 1
        return b"uses %d" % self.asked

    def note_prompt(self, uses: bytes) -> None:
        self.noted.append(uses)


def test_what_a_prompt_used_of_the_experts_reaches_the_worker_that_decodes_it() -> None:
    with Pair() as pair:
        assert pair.compute(make_request("plain", prompt(5))).result.expert_uses == b""  # type: ignore[union-attr]
        pair.decode.expect_experts(b"nobody listens")
        pair.prefill_engine.experts, pair.decode_engine.experts = NotedExperts(), NotedExperts()
        request = make_request("a", prompt(700))
        sink = pair.compute(request)
        assert sink.result is not None and sink.result.expert_uses == b"uses 1"
        pair.admit(request)
        pair.decode.expect_experts(sink.result.expert_uses)
        pair.land(request, sink)
        pair.events.rest("a")
        assert pair.decode_engine.experts.noted == [b"uses 1"]
