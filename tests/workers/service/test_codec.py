"""Every message survives the wire, and the usual event is small."""

from __future__ import annotations

import pytest

from workers.errors import RequestTooLong
from workers.messages import (
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    Grant,
    PrefillResult,
    SamplingParams,
    SpaceStats,
    TokenBatch,
    TokenEvent,
    TokenLogprob,
    WorkerRole,
    WorkerStats,
)
from workers.service import codec
from workers.service.stubs import worker_pb2 as pb

FULL = SamplingParams(
    max_tokens=9, temperature=0.3, top_p=0.9, top_k=4, min_p=0.1, seed=2**64 - 3, presence_penalty=-0.5,
    frequency_penalty=0.25, repetition_penalty=1.1, stop_token_ids=(5, 6), ignore_eos=True, min_tokens=2, logprobs=0,
    logit_bias=((3, 1.5),),
)  # fmt: skip


@pytest.mark.parametrize(
    "request_",
    [
        GenerateRequest("a", 0, (1, 2, 129_279), SamplingParams(max_tokens=1)),
        GenerateRequest("b", 7, tuple(range(1000)), FULL, priority=-3, deadline_s=1.5, router_id="r"),
    ],
)
def test_requests_survive_the_wire(request_: GenerateRequest) -> None:
    raw = codec.request_to_wire(request_).SerializeToString()
    assert codec.request_from_wire(pb.Generate.FromString(raw)) == request_


def test_a_bad_value_is_a_bad_request_that_names_the_field() -> None:
    wire = codec.request_to_wire(GenerateRequest("a", 0, (1,), FULL))
    wire.sampling.top_p = 7.0
    with pytest.raises(codec.BadRequest, match="top_p"):
        codec.request_from_wire(wire)


def test_grants_and_results_survive_the_wire() -> None:
    grant = Grant("a", 3, 12.5, 1 << 40, "127.0.0.1:1", "ff", "inc")
    result = PrefillResult("a", 3, 100, 7, 0.25, 1 << 41)
    assert codec.grant_from_wire(codec.grant_to_wire(grant)) == grant
    assert codec.result_from_wire(codec.result_to_wire(result)) == result


def test_first_token_survives_the_wire() -> None:
    logprob = TokenLogprob(9, -0.5, ((9, -0.5), (4, -2.0)))
    assert codec.first_token_from_bytes(codec.first_token_to_bytes(9, logprob)) == (9, logprob, b"")
    assert codec.first_token_from_bytes(codec.first_token_to_bytes(0, None)) == (0, None, b"")
    assert codec.first_token_from_bytes(codec.first_token_to_bytes(0, None, b"\x00\xff")) == (0, None, b"\x00\xff")


EVENTS = (
    TokenEvent("a", 1, 0, (5,)),
    TokenEvent("b", 0, 3, (7,), (TokenLogprob(7, -0.25, ((7, -0.25),)),)),
    TokenEvent("c", 0, 4, (1,), None, FinishReason.STOP),
    TokenEvent("d", 2, 9, (), None, FinishReason.ERROR, ErrorInfo(504, "deadline_exceeded", "too late")),
    TokenEvent("e", 2, 9, (), None, FinishReason.ABORTED),
)


def test_events_survive_the_wire() -> None:
    raw = codec.batch_to_wire(EVENTS).SerializeToString()
    assert codec.batch_from_wire(pb.TokenBatch.FromString(raw)) == TokenBatch(EVENTS)


def test_events_of_one_request_keep_their_order_in_a_merged_batch() -> None:
    events = (
        TokenEvent("a", 0, 0, (5,), (TokenLogprob(5, -1.0),)),
        TokenEvent("b", 0, 0, (5,)),
        TokenEvent("a", 0, 1, (6,)),
        TokenEvent("b", 0, 1, (6,), None, FinishReason.STOP),
    )
    decoded = codec.batch_from_wire(codec.batch_to_wire(events)).events
    for name in "ab":
        assert [e.index for e in decoded if e.request_id == name] == [0, 1]


def test_the_usual_event_takes_few_bytes() -> None:
    events = [TokenEvent("x" * 16, 0, i, (i,)) for i in range(64)]
    assert codec.batch_to_wire(events).ByteSize() <= 64 * 24


def test_stats_survive_the_wire_and_unknown_fields_are_ignored() -> None:
    stats = WorkerStats("d0", WorkerRole.DECODE, "i", "h:1", 1.5, True, full_pages=SpaceStats(9, 4), leaked_pages=2)
    wire = codec.stats_to_wire(stats)
    assert codec.stats_from_wire(wire) == stats
    wire.json = wire.json.replace('{"name"', '{"later_field":1,"name"')
    assert codec.stats_from_wire(wire) == stats


def test_errors_keep_class_status_and_code() -> None:
    info = codec.error_from_wire(codec.error_to_wire(ErrorInfo.from_error(RequestTooLong("9000 tokens"))))
    error = info.to_error()
    assert type(error) is RequestTooLong and str(error) == "9000 tokens" and error.status == 400
    odd = ErrorInfo(418, "teapot", "x").to_error()
    assert (odd.status, odd.code) == (418, "teapot")
