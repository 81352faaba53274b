"""A prefill and a decode worker of fake models, joined without sockets."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvstore.image import ImageHeader, KVImage, Segment
from kvstore.spec import KVSpec
from tests.workers.runtime.fake_model import fake_engine
from workers.config import WorkerConfig
from workers.decode import DecodeWorker
from workers.engine import Engine
from workers.errors import RequestError
from workers.messages import GenerateRequest, SamplingParams, TokenEvent, WorkerRole
from workers.prefill import Prefilled, PrefillWorker, Rows

WAIT_S = 20.0
"""Longest wait of any test for a thread; reached only by a failing one."""


class Clock:
    """Monotonic seconds that only tests move."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class RowSink:
    """Collects one prompt's rows; `finished` is set by its end."""

    seen: list[Rows] = field(default_factory=list)
    result: Prefilled | None = None
    error: RequestError | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def rows(self, rows: Rows) -> None:
        self.seen.append(rows)

    def done(self, result: Prefilled) -> None:
        self.result = result
        self.finished.set()

    def failed(self, error: RequestError) -> None:
        self.error = error
        self.finished.set()


class EventSink:
    """Collects decode's events and hands them out by request."""

    def __init__(self) -> None:
        self.closed_keys: list[tuple[str, int]] = []
        self.steps: list[dict[str, list[TokenEvent]]] = []
        self._events: dict[str, queue.SimpleQueue[TokenEvent]] = {}
        self._lock = threading.Lock()

    def queue_of(self, request_id: str) -> queue.SimpleQueue[TokenEvent]:
        with self._lock:
            return self._events.setdefault(request_id, queue.SimpleQueue())

    def publish(self, events: dict[str, list[TokenEvent]]) -> None:
        self.steps.append(events)
        for batch in events.values():
            for event in batch:
                self.queue_of(event.request_id).put(event)

    def closed(self, request_id: str, epoch: int) -> None:
        self.closed_keys.append((request_id, epoch))

    def rest(self, request_id: str) -> list[TokenEvent]:
        """Every further event of a request up to its terminal one."""
        events = []
        while not events or events[-1].finish is None:
            events.append(self.queue_of(request_id).get(timeout=WAIT_S))
        return events


def image_of(spec: KVSpec, request: GenerateRequest, sink: RowSink) -> KVImage:
    """The image that a perfect network would deliver."""
    assert sink.result is not None
    n = len(request.prompt_ids)
    rows = sorted((r for batch in [*sink.seen, sink.result.rows] for r in batch), key=lambda r: r[0].offset)
    payload = torch.zeros(spec.image_bytes(n), dtype=torch.uint8)
    for place, data in rows:
        payload[place.offset : place.offset + place.length] = data.reshape(-1)
    segments = tuple(Segment(place) for place, _ in rows)
    header = ImageHeader(request.request_id, request.epoch, n, spec.fingerprint, "", payload.numel(), segments)
    return KVImage(header, payload)


def make_request(
    name: str,
    prompt: Sequence[int],
    *,
    epoch: int = 0,
    router: str = "r",
    deadline_s: float | None = None,
    **params: object,
) -> GenerateRequest:
    sampling = SamplingParams(**{"max_tokens": 12, "temperature": 0.0, "ignore_eos": True, **params})  # type: ignore[arg-type]
    return GenerateRequest(name, epoch, tuple(prompt), sampling, deadline_s=deadline_s, router_id=router)


class Pair:
    """Both workers. Use as a context manager: leaving checks that nothing leaked."""

    def __init__(
        self, *, prefill_engine: Engine | None = None, decode_engine: Engine | None = None, **config: object
    ) -> None:
        settings = {"max_context": 2048, "chunk_tokens": 128, **config}
        self.clock = Clock()
        self.events = EventSink()
        self.prefill_engine = prefill_engine or fake_engine()
        self.decode_engine = decode_engine or fake_engine()
        self.prefill = PrefillWorker(
            WorkerConfig(WorkerRole.PREFILL, "p", **settings),  # type: ignore[arg-type]
            self.prefill_engine,
            clock=self.clock,
        )
        self.decode = DecodeWorker(
            WorkerConfig(WorkerRole.DECODE, "d", **settings),  # type: ignore[arg-type]
            self.decode_engine,
            self.events,
            clock=self.clock,
        )

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        self.prefill.close()
        self.decode.close()
        if kind is None:
            assert not self.prefill.loop.failure and not self.decode.loop.failure
            assert self.prefill_engine.allocators.num_held == 0
            assert self.decode_engine.allocators.num_held == 0
            assert len(self.prefill.scheduler.ledger) == len(self.decode.scheduler.ledger) == 0

    def admit(self, request: GenerateRequest) -> None:
        self.decode.admit(request).result(WAIT_S)

    def compute(self, request: GenerateRequest) -> RowSink:
        """Prefills a prompt and frees its pages."""
        sink = RowSink()
        self.prefill.submit(request, sink).result(WAIT_S)
        assert sink.finished.wait(WAIT_S)
        if sink.error is None:
            self.prefill.release(request.request_id, request.epoch).result(WAIT_S)
        return sink

    def land(self, request: GenerateRequest, sink: RowSink) -> None:
        assert sink.result is not None
        image = image_of(self.decode_engine.spec, request, sink)
        first = sink.result.first
        assert first.token_id is not None
        landed = self.decode.land(request.request_id, request.epoch, image, first.token_id, first.logprob)
        landed.result(WAIT_S)

    def start(self, request: GenerateRequest) -> None:
        """Admits, prefills and lands: the request generates from here on."""
        self.admit(request)
        self.land(request, self.compute(request))

    def run(self, request: GenerateRequest) -> list[int]:
        self.start(request)
        return tokens_of(self.events.rest(request.request_id))


def tokens_of(events: Sequence[TokenEvent]) -> list[int]:
    """Token ids of one attempt's events, after checking that they are contiguous and end once."""
    tokens: list[int] = []
    for event in events:
        assert event.index == len(tokens)
        tokens.extend(event.token_ids)
    assert [e.finish is not None for e in events] == [False] * (len(events) - 1) + [True]
    return tokens
