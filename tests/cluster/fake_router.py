"""A scripted HTTP server with the router's surface: what the client and the commands are tested against."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cluster.metrics import Member, render
from workers.messages import WorkerRole, WorkerStats


class FakeRouter:
    """Answers chat with `pieces`; records the bodies it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.pieces: list[dict[str, str]] = [
            {"reasoning_content": "2 + 2 = 4."},
            {"content": "The answer "},
            {"content": "is 4."},
        ]
        self.finish = "stop"
        self.truncate = False
        self.stream_error: dict[str, str] | None = None
        self.required_key: str | None = None
        self.ready = True
        self.gate: threading.Event | None = None
        """Chat answers begin when this is set."""
        self.between: threading.Event | None = None
        """They go on after their first piece when this is set."""
        self.workers = [
            WorkerStats("prefill-0", WorkerRole.PREFILL, "a", "127.0.0.1:1", 1.0, True, prefill_tokens=12),
            WorkerStats("decode-0", WorkerRole.DECODE, "b", "127.0.0.1:2", 1.0, True, kv_bytes_received=4096),
        ]
        self.members = [Member("prefill-0", WorkerRole.PREFILL, 0), Member("decode-0", WorkerRole.DECODE, 1)]
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *values: object) -> None:
                return

            def do_GET(self) -> None:
                fake.answer_get(self)

            def do_POST(self) -> None:
                fake.answer_post(self)

            def do_DELETE(self) -> None:
                fake.answer_delete(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        # Clients that go away in the middle of an answer are part of the tests.
        self._server.handle_error = lambda request, address: None  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer_get(self, handler: BaseHTTPRequestHandler) -> None:
        if handler.path == "/metrics":
            send(handler, 200, render(self.workers, self.members).encode(), "text/plain")
        elif handler.path == "/ready":
            send_json(handler, 200 if self.ready else 503, {"error": {"message": "no worker", "code": None}})
        elif handler.path == "/v1/models":
            send_json(handler, 200, {"data": [{"id": "fake-model"}]})
        else:
            send(handler, 404, b"nothing here", "text/plain")

    def answer_delete(self, handler: BaseHTTPRequestHandler) -> None:
        send(handler, 404, b"nothing here", "text/plain")

    def answer_post(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.bodies.append(body)
        if self.gate is not None:
            self.gate.wait(20.0)
        if self.required_key and handler.headers.get("Authorization") != f"Bearer {self.required_key}":
            send_json(handler, 401, {"error": {"message": "wrong key", "code": "invalid_api_key"}})
            return
        if body["messages"][-1]["content"] == "refuse":
            send_json(handler, 429, {"error": {"message": "full", "code": "rate_limit_exceeded"}})
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Connection", "close")
        handler.end_headers()
        for piece in self.pieces:
            event(handler, {"choices": [{"delta": piece, "finish_reason": None}], "usage": None})
            if self.between is not None:
                self.between.wait(20.0)
        if self.stream_error:
            handler.wfile.write(b"event: error\n")
            event(handler, {"error": self.stream_error})
        elif not self.truncate:
            event(handler, {"choices": [{"delta": {}, "finish_reason": self.finish}]})
            event(handler, {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}})
            handler.wfile.write(b": keep-alive\n\ndata: [DONE]\n\n")
        handler.close_connection = True


def event(handler: BaseHTTPRequestHandler, value: object) -> None:
    handler.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")


def send_json(handler: BaseHTTPRequestHandler, status: int, value: object) -> None:
    send(handler, status, json.dumps(value).encode(), "application/json")


def send(handler: BaseHTTPRequestHandler, status: int, body: bytes, kind: str) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", kind)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
