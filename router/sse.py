"""Server-sent events as bytes (WHATWG HTML, section 9.2)."""

from __future__ import annotations

DONE = b"data: [DONE]\n\n"
KEEPALIVE = b": keepalive\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache, no-transform",
    "X-Accel-Buffering": "no",
}


def data(payload: bytes) -> bytes:
    """An unnamed event. `payload` must not contain a line break."""
    return b"data: " + payload + b"\n\n"


def error(payload: bytes) -> bytes:
    """An event that every tested client reports as a failure.

    Clients look either at the event's name or at the `error` key of its data; one shows the text only next to a
    comment line. Measured against eight clients.
    """
    return b": the stream failed\nevent: error\ndata: " + payload + b"\n\n"
