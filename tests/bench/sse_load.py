"""A raw-socket SSE client that counts chunks, so that the load generator is never what a router bench measures.

It reuses its connections and does not parse JSON: one token event is one `data: {` in the bytes. Linux, one thread.
"""

from __future__ import annotations

import selectors
import socket
import time
from dataclasses import dataclass

CHUNK_MARK = b"data: {"
DONE_MARK = b"data: [DONE]"
# Both marks fit in this many bytes, which are kept from one read to the next.
_TAIL = 16


def request_bytes(host: str, body: bytes, path: str = "/v1/chat/completions") -> bytes:
    """One POST on a keep-alive connection."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass(slots=True)
class _Stream:
    socket: socket.socket
    tail: bytes = b""
    started_s: float = 0.0
    first_s: float | None = None
    done: bool = False


class SseLoad:
    """`num_streams` connections to one server, reused for every round."""

    def __init__(self, host: str, port: int, num_streams: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._streams = [_Stream(socket.create_connection((host, port))) for _ in range(num_streams)]
        for stream in self._streams:
            stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(stream.socket, selectors.EVENT_READ, stream)

    def round(self, request: bytes) -> tuple[int, float, list[float]]:
        """Sends `request` on every connection and reads all answers to their end.

        Returns chunks seen, seconds from the first byte sent to the last read, and seconds to the third chunk of each
        stream (the first two are the role and the first token).
        """
        start = time.perf_counter()
        for stream in self._streams:
            stream.tail, stream.first_s, stream.done = b"", None, False
            stream.started_s = time.perf_counter()
            stream.socket.sendall(request)
        chunks, open_streams = 0, len(self._streams)
        while open_streams:
            for key, _ in self._selector.select(30.0):
                stream = key.data
                data = stream.socket.recv(1 << 16)
                now = time.perf_counter()
                if not data:
                    raise ConnectionError("the server closed a connection")
                text = stream.tail + data
                # A mark that ends inside the kept tail was counted by the read before.
                chunks += text.count(CHUNK_MARK) - stream.tail.count(CHUNK_MARK)
                if stream.first_s is None and CHUNK_MARK in text:
                    stream.first_s = now - stream.started_s
                if not stream.done and DONE_MARK in text:
                    stream.done = True
                    open_streams -= 1
                stream.tail = text[-_TAIL:]
        return chunks, time.perf_counter() - start, [stream.first_s or 0.0 for stream in self._streams]

    def close(self) -> None:
        for stream in self._streams:
            self._selector.unregister(stream.socket)
            stream.socket.close()
        self._selector.close()
