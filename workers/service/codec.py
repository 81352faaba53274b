"""Messages of `workers/messages.py` to and from their wire form (`proto/worker.proto`). Pure; no sockets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields

from workers.errors import RequestError
from workers.messages import (
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    Grant,
    PrefillResult,
    RetractControl,
    RetractReport,
    SamplingParams,
    SpaceStats,
    TokenBatch,
    TokenEvent,
    TokenLogprob,
    WorkerRole,
    WorkerStats,
)
from workers.service.stubs import worker_pb2 as pb

_FINISH_TO_WIRE = {
    None: pb.FINISH_NONE,
    FinishReason.STOP: pb.FINISH_STOP,
    FinishReason.LENGTH: pb.FINISH_LENGTH,
    FinishReason.ABORTED: pb.FINISH_ABORTED,
    FinishReason.ERROR: pb.FINISH_ERROR,
}
_FINISH_FROM_WIRE = {wire: reason for reason, wire in _FINISH_TO_WIRE.items()}


class BadRequest(RequestError):
    """A message of the wire does not make a valid request."""

    status = 400
    code = "invalid_request"


def request_to_wire(request: GenerateRequest) -> pb.Generate:
    """`GenerateRequest` as sent to either worker."""
    params = request.sampling
    sampling = pb.Sampling(
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        seed=None if params.seed is None else params.seed % 2**64,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        min_tokens=params.min_tokens,
        logprobs=params.logprobs,
        logit_bias=[pb.LogitBias(token_id=i, bias=b) for i, b in params.logit_bias],
    )
    return pb.Generate(
        request_id=request.request_id,
        epoch=request.epoch,
        prompt_ids=request.prompt_ids,
        sampling=sampling,
        priority=request.priority,
        deadline_s=request.deadline_s,
        router_id=request.router_id,
    )


def request_from_wire(wire: pb.Generate) -> GenerateRequest:
    """Raises `BadRequest` naming the field that is out of range."""
    s = wire.sampling
    try:
        sampling = SamplingParams(
            max_tokens=s.max_tokens,
            temperature=s.temperature,
            top_p=s.top_p,
            top_k=s.top_k,
            min_p=s.min_p,
            seed=s.seed if s.HasField("seed") else None,
            presence_penalty=s.presence_penalty,
            frequency_penalty=s.frequency_penalty,
            repetition_penalty=s.repetition_penalty,
            stop_token_ids=tuple(s.stop_token_ids),
            ignore_eos=s.ignore_eos,
            min_tokens=s.min_tokens,
            logprobs=s.logprobs if s.HasField("logprobs") else None,
            logit_bias=tuple((b.token_id, b.bias) for b in s.logit_bias),
        )
        return GenerateRequest(
            request_id=wire.request_id,
            epoch=wire.epoch,
            prompt_ids=tuple(wire.prompt_ids),
            sampling=sampling,
            priority=wire.priority,
            deadline_s=wire.deadline_s if wire.HasField("deadline_s") else None,
            router_id=wire.router_id,
        )
    except ValueError as exc:
        raise BadRequest(str(exc)) from exc


def grant_to_wire(grant: Grant) -> pb.Grant:
    return pb.Grant(**{item.name: getattr(grant, item.name) for item in fields(grant)})


def grant_from_wire(wire: pb.Grant) -> Grant:
    return Grant(**{item.name: getattr(wire, item.name) for item in fields(Grant)})


def result_to_wire(result: PrefillResult) -> pb.PrefillReply:
    return pb.PrefillReply(**{item.name: getattr(result, item.name) for item in fields(result)})


def result_from_wire(wire: pb.PrefillReply) -> PrefillResult:
    return PrefillResult(**{item.name: getattr(wire, item.name) for item in fields(PrefillResult)})


def _logprob_to_wire(entry: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(
        token_id=entry.token_id,
        logprob=entry.logprob,
        top=[pb.TopLogprob(token_id=i, logprob=p) for i, p in entry.top],
    )


def _logprob_from_wire(wire: pb.TokenLogprob) -> TokenLogprob:
    return TokenLogprob(wire.token_id, wire.logprob, tuple((t.token_id, t.logprob) for t in wire.top))


def first_token_to_bytes(token_id: int, logprob: TokenLogprob | None, expert_uses: bytes = b"") -> bytes:
    """The token that rides with the last KV segment, and which experts its prompt used."""
    logprob_wire = None if logprob is None else _logprob_to_wire(logprob)
    wire = pb.FirstToken(token_id=token_id, logprob=logprob_wire, expert_uses=expert_uses)
    return bytes(wire.SerializeToString())


def first_token_from_bytes(raw: bytes) -> tuple[int, TokenLogprob | None, bytes]:
    """Inverse of `first_token_to_bytes`."""
    wire = pb.FirstToken.FromString(raw)
    logprob = _logprob_from_wire(wire.logprob) if wire.HasField("logprob") else None
    return wire.token_id, logprob, bytes(wire.expert_uses)


def error_to_wire(error: ErrorInfo) -> pb.ErrorInfo:
    return pb.ErrorInfo(status=error.status, code=error.code, message=error.message)


def error_from_wire(wire: pb.ErrorInfo) -> ErrorInfo:
    return ErrorInfo(wire.status, wire.code, wire.message)


def _event_to_wire(event: TokenEvent) -> pb.TokenEvent:
    return pb.TokenEvent(
        request_id=event.request_id,
        epoch=event.epoch,
        index=event.index,
        token_ids=event.token_ids,
        logprobs=[_logprob_to_wire(entry) for entry in event.logprobs or ()],
        finish=_FINISH_TO_WIRE[event.finish],
        error=None if event.error is None else error_to_wire(event.error),
    )


def _event_from_wire(wire: pb.TokenEvent) -> TokenEvent:
    return TokenEvent(
        request_id=wire.request_id,
        epoch=wire.epoch,
        index=wire.index,
        token_ids=tuple(wire.token_ids),
        logprobs=tuple(_logprob_from_wire(entry) for entry in wire.logprobs) if wire.logprobs else None,
        finish=_FINISH_FROM_WIRE[wire.finish],
        error=error_from_wire(wire.error) if wire.HasField("error") else None,
    )


def batch_to_wire(events: Sequence[TokenEvent]) -> pb.TokenBatch:
    """Events of one or more steps of one router, in order.

    Columns are read before events, so once a request has an event in long form, its later ones take that form too.
    """
    ids: list[str] = []
    epochs: list[int] = []
    indices: list[int] = []
    tokens: list[int] = []
    long_form: list[pb.TokenEvent] = []
    in_long_form: set[str] = set()
    for event in events:
        plain = event.finish is None and event.logprobs is None and len(event.token_ids) == 1
        if plain and event.request_id not in in_long_form:
            ids.append(event.request_id)
            epochs.append(event.epoch)
            indices.append(event.index)
            tokens.append(event.token_ids[0])
        else:
            in_long_form.add(event.request_id)
            long_form.append(_event_to_wire(event))
    return pb.TokenBatch(request_ids=ids, epochs=epochs, indices=indices, token_ids=tokens, events=long_form)


def batch_from_wire(wire: pb.TokenBatch) -> TokenBatch:
    columns = zip(wire.request_ids, wire.epochs, wire.indices, wire.token_ids, strict=True)
    plain = [TokenEvent(request_id, epoch, index, (token,)) for request_id, epoch, index, token in columns]
    return TokenBatch((*plain, *(_event_from_wire(event) for event in wire.events)))


def stats_to_wire(stats: WorkerStats) -> pb.StatsReply:
    return pb.StatsReply(json=json.dumps(stats.as_dict(), separators=(",", ":")))


def stats_from_wire(wire: pb.StatsReply) -> WorkerStats:
    """Fields this side does not know are ignored; missing ones take their defaults."""
    flat = json.loads(wire.json)
    values: dict[str, object] = {}
    for item in fields(WorkerStats):
        if f"{item.name}_total" in flat and f"{item.name}_free" in flat:
            values[item.name] = SpaceStats(flat[f"{item.name}_total"], flat[f"{item.name}_free"])
        elif item.name in flat:
            values[item.name] = flat[item.name]
    values["role"] = WorkerRole(flat["role"])
    return WorkerStats(**values)  # type: ignore[arg-type]


def control_to_wire(control: RetractControl) -> pb.RetractControlCall:
    return pb.RetractControlCall(json=json.dumps(control.as_dict(), separators=(",", ":")))


def control_from_wire(wire: pb.RetractControlCall) -> RetractControl:
    """Raises `BadRequest` naming the key or field that is unusable."""
    try:
        return RetractControl.from_dict(json.loads(wire.json))
    except (ValueError, TypeError, AttributeError) as exc:
        raise BadRequest(str(exc)) from exc


def report_to_wire(report: RetractReport) -> pb.RetractReportReply:
    return pb.RetractReportReply(json=json.dumps(report.as_dict(), separators=(",", ":")))


def report_from_wire(wire: pb.RetractReportReply) -> RetractReport:
    return RetractReport.from_dict(json.loads(wire.json))
