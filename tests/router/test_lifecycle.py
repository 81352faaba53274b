"""What happens when workers fail, clients leave and time runs out. After each test no worker may hold a request."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from router.config import RouterConfig
from router.fleet import PrefillSlot
from tests.router.conftest import Rig, chat_body
from tests.support.fake_backends import FakePrefill, until
from workers.errors import DeadlineExceeded, RequestError, WorkerFull, WorkerStopping, WorkerUnavailable
from workers.messages import FinishReason, TokenBatch, TokenEvent


async def open_stream(rig: Rig, **fields: Any) -> aiohttp.ClientResponse:
    """A streamed answer whose headers have come."""
    response: aiohttp.ClientResponse = await rig.session.post(
        rig.url + "/v1/chat/completions", json=chat_body(stream=True, **fields)
    )
    assert response.status == 200
    return response


def tokens(rig: Rig, text: str) -> list[int]:
    return rig.tokenizer.encode_raw(text, add_bos=False)


@pytest.mark.parametrize("error", [WorkerUnavailable("dead"), WorkerFull("busy"), WorkerStopping("bye")])
async def test_a_prefill_failure_is_hidden_by_another_worker(make_rig, say, error: RequestError):
    rig: Rig = await make_rig(say("</think>hello"), num_prefill=2)
    failing = rig.prefill[0]
    failing.errors.append(error)
    for _ in range(2):
        assert (await rig.chat())["choices"][0]["message"]["content"] == "hello"
    assert len(failing.prefilled) >= 1
    retried = [request for request in rig.decode[0].admitted if request.epoch == 1]
    assert len(retried) == 1
    first = next(r for r in rig.decode[0].admitted if r.request_id == retried[0].request_id and r.epoch == 0)
    assert first.sampling == retried[0].sampling
    assert first.request_id in rig.decode[0].aborted
    await until(lambda: first.request_id in failing.aborted)


@pytest.mark.parametrize("error", [WorkerUnavailable("dead"), WorkerFull("busy")])
async def test_an_admission_failure_is_hidden_by_another_decode_worker(make_rig, say, error: RequestError):
    rig: Rig = await make_rig(say("</think>hello"), num_decode=2)
    rig.decode[0].admit_errors.append(error)
    for _ in range(3):
        assert (await rig.chat())["choices"][0]["message"]["content"] == "hello"
    assert rig.decode[0].admit_errors == []


async def test_a_transfer_failure_is_tried_again_at_the_same_workers(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"))
    rig.prefill[0].errors.append(RequestError("checksum mismatch in segment 3"))
    assert (await rig.chat())["choices"][0]["message"]["content"] == "hello"
    assert [request.epoch for request in rig.decode[0].admitted] == [0, 1]


async def test_a_prefill_failure_that_decode_reports_first_is_blamed_on_prefill(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"), max_attempts=1)
    prefill, decode = rig.prefill[0], rig.decode[0]
    prefill.gate = asyncio.Event()
    prefill.errors.append(RequestError("expert 7 cannot be read"))
    asking = asyncio.create_task(rig.refused(500, json=chat_body()))
    await until(lambda: bool(prefill.prefilled))
    name = prefill.prefilled[0].request_id
    decode.emit(name, (), FinishReason.ERROR, error=WorkerUnavailable("KV hand-off: the sender gave up"))
    await asyncio.sleep(0.02)  # The event reaches the router before the prefill call returns.
    prefill.gate.set()
    assert "expert 7 cannot be read" in (await asking)["message"]
    prefill.gate = None
    assert (await rig.chat())["choices"][0]["message"]["content"] == "hello"


async def test_attempts_are_bounded(make_rig, say):
    rig: Rig = await make_rig(say("x"), max_attempts=3)
    rig.prefill[0].errors.extend([RequestError("broken")] * 5)
    error = await rig.refused(500, json=chat_body())
    assert "broken" in error["message"]
    assert [request.epoch for request in rig.decode[0].admitted] == [0, 1, 2]


async def test_a_refusal_that_cannot_change_is_not_retried(make_rig, say):
    rig: Rig = await make_rig(say("x"), num_prefill=2)
    for prefill in rig.prefill:
        prefill.errors.append(DeadlineExceeded("queue"))
    await rig.refused(504, json=chat_body())
    assert len(rig.decode[0].admitted) == 1


async def test_an_unexpected_exception_is_a_500_without_details(make_rig, say):
    rig: Rig = await make_rig(say("x"))
    rig.prefill[0].errors.append(KeyError("secret path"))
    error = await rig.refused(500, json=chat_body())
    assert "secret" not in error["message"]


async def test_decode_failing_before_the_first_token_is_hidden(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"), num_decode=2, manual=True)
    pending = asyncio.create_task(rig.chat())
    await until(lambda: any(decode.committed for decode in rig.decode))
    failing, other = sorted(rig.decode, key=lambda decode: not decode.committed)
    request = failing.committed[0]
    failing.emit(request.request_id, (), FinishReason.ERROR, error=WorkerStopping("draining"))
    again = await other.granted()
    assert (again.request_id, again.epoch) == (request.request_id, 1)
    other.play(again.request_id, other.script(again))
    assert (await pending)["choices"][0]["message"]["content"] == "hello"


async def test_a_lost_stream_before_the_first_token_is_hidden(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"), num_decode=2, manual=True)
    pending = asyncio.create_task(rig.chat())
    await until(lambda: any(decode.committed for decode in rig.decode))
    failing, other = sorted(rig.decode, key=lambda decode: not decode.committed)
    failing.break_stream()
    again = await other.granted()
    other.play(again.request_id, other.script(again))
    assert (await pending)["choices"][0]["message"]["content"] == "hello"


async def test_a_failure_in_mid_stream_is_an_error_event_and_no_clean_end(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True)
    opening = asyncio.create_task(open_stream(rig))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, tokens(rig, "hello"))
    response = await opening
    rig.decode[0].break_stream()
    text = await response.text()
    assert "[DONE]" not in text
    assert '"finish_reason": "stop"' not in text
    *_, last = text.strip().split("\n\n")
    lines = last.split("\n")
    assert lines[0].startswith(":") and lines[1] == "event: error"
    error = json.loads(lines[2].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["code"] == "worker_unavailable"


async def test_the_router_recovers_after_a_lost_stream(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"))
    rig.decode[0].break_stream()

    async def serves() -> bool:
        async with rig.post("/v1/chat/completions", json=chat_body()) as response:
            return bool(response.status == 200)

    async with asyncio.timeout(5):
        while not await serves():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_in_mid_answer_frees_both_workers(make_rig, say, stream: bool):
    rig: Rig = await make_rig(say(""), manual=True)
    pending = asyncio.create_task(rig.session.post(rig.url + "/v1/chat/completions", json=chat_body(stream=stream)))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, tokens(rig, "hello"))
    if stream:
        (await pending).close()
    else:
        pending.cancel()
    await until(lambda: request.request_id in rig.decode[0].aborted and request.request_id in rig.prefill[0].aborted)
    assert rig.leaks() == {}
    assert rig.router.active_requests == 0


async def test_a_client_that_leaves_during_prefill_frees_both_workers(make_rig, say):
    rig: Rig = await make_rig(say(""))
    rig.prefill[0].gate = asyncio.Event()
    pending = asyncio.create_task(rig.session.post(rig.url + "/v1/chat/completions", json=chat_body(stream=True)))
    await until(lambda: len(rig.prefill[0].prefilled) == 1)
    assert rig.leaks() != {}
    pending.cancel()
    await until(lambda: rig.leaks() == {})
    assert rig.decode[0].aborted and rig.prefill[0].aborted


async def test_leaving_aborts_every_choice(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True)
    opening = asyncio.create_task(open_stream(rig, n=3))
    request = await rig.decode[0].granted(3)
    rig.decode[0].emit(request.request_id, tokens(rig, "a"))
    (await opening).close()
    await until(lambda: len(set(rig.decode[0].aborted)) == 3)


async def test_one_failing_choice_fails_the_answer_and_frees_the_others(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True)
    pending = asyncio.create_task(rig.refused(500, json=chat_body(n=2)))
    request = await rig.decode[0].granted(2)
    rig.decode[0].emit(request.request_id, tokens(rig, "a"))
    rig.decode[0].emit(request.request_id, (), FinishReason.ERROR, error=RequestError("boom"))
    assert (await pending)["message"] == "boom"
    await until(lambda: rig.leaks() == {})


async def test_the_deadline_ends_a_request_with_504(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True, request_timeout_s=0.05)
    error = await rig.refused(504, json=chat_body())
    assert error["code"] == "deadline_exceeded"
    await until(lambda: rig.decode[0].aborted != [])


async def test_workers_are_told_the_time_that_is_left(make_rig, say):
    rig: Rig = await make_rig(say("</think>x"), request_timeout_s=50.0)
    await rig.chat()
    deadline_s = rig.decode[0].admitted[0].deadline_s
    assert deadline_s is not None and 49.0 < deadline_s <= 50.0


async def test_a_stalled_stream_fails(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True, stall_timeout_s=0.05)
    opening = asyncio.create_task(open_stream(rig))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, tokens(rig, "a"))
    text = await (await opening).text()
    assert "event: error" in text and "deadline_exceeded" in text


async def test_silence_is_bridged_by_comments(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True, keepalive_s=0.02)
    opening = asyncio.create_task(open_stream(rig))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, tokens(rig, "a"))
    response = await opening
    async with asyncio.timeout(5):
        while b": keepalive" not in await response.content.readline():
            pass
    rig.decode[0].emit(request.request_id, (), FinishReason.STOP)
    assert "[DONE]" in await response.text()


async def test_stale_and_repeated_events_are_dropped(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True)
    decode = rig.decode[0]
    pending = asyncio.create_task(rig.chat(thinking={"type": "disabled"}))
    request = await decode.granted()
    (queue,) = decode._streams.values()

    def raw(epoch: int, index: int, text: str) -> None:
        event = TokenEvent(request.request_id, epoch, index, tuple(tokens(rig, text)))
        queue.put_nowait(TokenBatch((event,)))

    raw(7, 0, "stale")
    raw(0, 0, "a")
    raw(0, 0, "a")
    raw(0, 1, "b")
    raw(0, 0, "a")
    decode._next_index[request.request_id] = 2
    decode.emit(request.request_id, (), FinishReason.STOP)
    assert (await pending)["choices"][0]["message"]["content"] == "ab"


async def test_a_gap_in_the_tokens_is_an_error_and_not_a_wrong_answer(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True)
    decode = rig.decode[0]
    pending = asyncio.create_task(rig.refused(500, json=chat_body()))
    request = await decode.granted()
    decode._next_index[request.request_id] = 3
    decode.emit(request.request_id, tokens(rig, "a"))
    assert "lost" in (await pending)["message"]
    await until(lambda: rig.leaks() == {})


async def test_closing_the_router_ends_streams_with_an_error(make_rig, say):
    rig: Rig = await make_rig(say(""), manual=True)
    opening = asyncio.create_task(open_stream(rig))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, tokens(rig, "a"))
    response = await opening
    await rig.router.close()
    assert "worker_stopping" in await response.text()
    assert rig.leaks() == {}


async def test_closing_lets_running_requests_finish_first(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"), manual=True, drain_s=5.0)
    pending = asyncio.create_task(rig.chat())
    request = await rig.decode[0].granted()
    closing = asyncio.create_task(rig.router.close())
    await asyncio.sleep(0)
    assert (await rig.refused(503, json=chat_body()))["code"] == "router_stopping"
    rig.decode[0].play(request.request_id, rig.decode[0].script(request))
    assert (await pending)["choices"][0]["message"]["content"] == "hello"
    await closing


async def test_unreachable_workers_come_back_by_themselves(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"))
    rig.prefill[0].down = True
    await rig.refused(503, json=chat_body())
    rig.prefill[0].down = False

    async def ready() -> bool:
        async with rig.session.get(rig.url + "/ready") as response:
            return bool(response.status == 200)

    async with asyncio.timeout(5):
        while not await ready():
            await asyncio.sleep(0.005)
    assert (await rig.chat())["choices"][0]["message"]["content"] == "hello"


async def test_a_worker_that_came_back_serves_ahead_of_its_next_probe(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"), stats_interval_s=1000.0)
    rig.prefill[0].down = True
    await rig.refused(503, json=chat_body())
    rig.prefill[0].down = False
    await rig.refused(503, json=chat_body())
    await rig.router.probe(rig.prefill[0].name)
    await rig.router.probe("nobody")
    assert (await rig.chat())["choices"][0]["message"]["content"] == "hello"


async def test_a_slow_probe_is_not_a_dead_worker():
    prefill = FakePrefill("p", {})
    slot = PrefillSlot(prefill, RouterConfig(stats_timeout_s=0.001, stats_interval_s=1000.0, missed_probes=3))
    # The slot's own first probe runs here; its next one is far away.
    await until(lambda: slot.reachable)
    prefill.stats = asyncio.Event().wait
    for _ in range(2):
        await slot.probe()
        assert slot.reachable
    await slot.probe()
    assert not slot.reachable
    await slot.close()


async def test_a_refused_probe_counts_at_once():
    prefill = FakePrefill("p", {})
    slot = PrefillSlot(prefill, RouterConfig(stats_interval_s=1000.0, missed_probes=3))
    await until(lambda: slot.reachable)
    prefill.down = True
    await slot.probe()
    assert not slot.reachable
    await slot.close()
