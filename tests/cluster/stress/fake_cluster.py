"""A scripted deployment: answers that depend on the request alone, unless a control says otherwise.

Each answer is `NUM_TOKENS` tokens with log-probabilities. Under a control with an interval, every request counts one
retract per interval of its tokens, and `damage` may change what comes out, as a lossy restore would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import urlsplit

from cluster.metrics import render
from tests.cluster.fake_router import FakeRouter, event, send, send_json
from workers.messages import RetractControl, RetractReport

NUM_TOKENS = 12

Damage = Callable[[RetractControl, int, int, float], float]
"""(control, request number, token, log-probability) -> what is reported."""


class FakeCluster(FakeRouter):
    """A router with `/admin/retract` unless `allows` is off."""

    def __init__(self) -> None:
        super().__init__()
        self.allows = True
        self.control = RetractControl()
        self.controls: list[RetractControl] = []
        self.events = 0
        self.leaked = 0
        self.cause = "forced"
        self.num_answers = 0
        self.fails_at: int | None = None
        self.failure = {"message": "boom", "code": "internal_error"}
        self.damage: Damage = lambda control, number, token, value: value
        self.on_answer: Callable[[int], None] = lambda number: None

    def answer_get(self, handler: BaseHTTPRequestHandler) -> None:
        url = urlsplit(handler.path)
        if url.path == "/admin/retract" and self.allows:
            report = RetractReport(
                events=self.events,
                bytes_out=self.events * 100,
                bytes_in=self.events * 100,
                by_cause={self.cause: self.events} if self.events else {},
                phase_ms={"copy_out": (self.events, 0.5, 1.5)},
                leaked_pages=self.leaked,
                contexts=(100, 300) * (self.events // 2),
            )
            send_json(handler, 200, {"workers": {"decode-0": report.as_dict()}})
            if "reset" in url.query:
                self.events = 0
        elif url.path == "/metrics":
            send(handler, 200, render(self.workers, self.members).encode(), "text/plain")
        else:
            super().answer_get(handler)

    def answer_delete(self, handler: BaseHTTPRequestHandler) -> None:
        self._set(RetractControl())
        send_json(handler, 200, {})

    def answer_post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if handler.path == "/admin/retract":
            self._set(RetractControl.from_dict(body))
            send_json(handler, 200, {})
            return
        self.bodies.append(body)
        number, self.num_answers = self.num_answers, self.num_answers + 1
        self.on_answer(number)
        if self.control.interval is not None:
            self.events += NUM_TOKENS // self.control.interval
        self._stream(handler, body, number)

    def _set(self, control: RetractControl) -> None:
        self.control = control
        self.controls.append(control)

    def _stream(self, handler: BaseHTTPRequestHandler, body: dict[str, Any], number: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        handler.close_connection = True
        question = body["messages"][-1]["content"]
        for at in range(NUM_TOKENS):
            value = -(hashlib.sha256(f"{question}{at}".encode()).digest()[0] + 1) / 7
            value = self.damage(self.control, number, at, value)
            entry = {"token": f"t{at} ", "logprob": value, "bytes": list(f"t{at} ".encode())}
            logprobs = {"content": [{**entry, "top_logprobs": [entry]}]}
            event(handler, {"choices": [{"delta": {"content": f"t{at} "}, "logprobs": logprobs}]})
            if number == self.fails_at and at == 3:
                event(handler, {"error": self.failure})
                return
        event(handler, {"choices": [{"delta": {}, "finish_reason": "stop"}]})
        event(handler, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": NUM_TOKENS + 1}})
        handler.wfile.write(b"data: [DONE]\n\n")
