"""A small blocking client of the router's own HTTP interface, for the commands that talk to a running cluster.

Owns: JSON requests, server-sent events, timing of the first token, errors as one exception. Standard library only, so
that `dsv4 chat` and `dsv4 status` start at once. One instance holds one connection and belongs to one thread, except
`interrupt`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from cluster.errors import ClusterError


class ApiFailure(ClusterError):
    """The router answered with an error, or not at all (`status` 0)."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """One streamed piece of an answer; the last one carries usage and the reason of the end."""

    reasoning: str = ""
    content: str = ""
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    logprobs: tuple[dict[str, Any], ...] = ()
    """Entries of the tokens of this piece, in order, when they were asked for."""


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """One whole answer and what it took."""

    reasoning: str
    content: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    first_token_s: float
    total_s: float


class RouterClient:
    """One keep-alive connection to the router at `url` (with or without `/v1`)."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme != "http" or not parts.hostname:
            raise ApiFailure(0, f"{url}: expected an address such as http://127.0.0.1:8000")
        self._host, self._port = parts.hostname, parts.port or 80
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._api_key, self._timeout_s = api_key, timeout_s
        self._connection: http.client.HTTPConnection | None = None
        self._socket: socket.socket | None = None
        """Of the last connection: http.client lets go of it when the server will close it after this answer."""
        self._is_interrupted = False

    @property
    def address(self) -> str:
        return f"http://{self._host}:{self._port}{self._prefix}"

    def close(self) -> None:
        """Ends the connection; a stream that is still read is cut, which the router takes as a disconnect."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def interrupt(self) -> None:
        """Ends, from any thread, the request that the client's own thread is in, and every later one: `ApiFailure`."""
        # The flag first: a request that looks at it before has a socket by then, and finds that shut.
        self._is_interrupted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> RouterClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def get_text(self, path: str) -> str:
        """Body of a GET. Raises `ApiFailure`."""
        return self._request("GET", path, None).read().decode()

    def get_json(self, path: str) -> Any:
        return json.loads(self.get_text(path))

    def post_json(self, path: str, body: dict[str, Any]) -> Any:
        return json.loads(self._request("POST", path, body).read())

    def delete(self, path: str) -> None:
        """A DELETE whose answer does not matter. Raises `ApiFailure`."""
        self._request("DELETE", path, None).read()

    def model(self) -> str:
        """Name of the served model."""
        return str(self.get_json("/v1/models")["data"][0]["id"])

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
        """Streams one answer. Raises `ApiFailure`, also when the stream breaks off before it is finished."""
        payload = {**body, "stream": True, "stream_options": {"include_usage": True}}
        response = self._request("POST", "/v1/chat/completions", payload)
        finished = False
        for data in _events(response):
            if data == "[DONE]":
                finished = True
                break
            chunk = json.loads(data)
            if "error" in chunk:
                self.close()
                raise ApiFailure(502, chunk["error"].get("message", "stream error"), chunk["error"].get("code"))
            yield _delta_of(chunk)
        if not finished:
            self.close()
            raise ApiFailure(0, "the stream broke off")
        response.read()

    def chat(self, body: dict[str, Any]) -> ChatAnswer:
        """One whole answer through the streaming interface, with its first-token time."""
        start = time.perf_counter()
        reasoning: list[str] = []
        content: list[str] = []
        usage: dict[str, Any] = {}
        finish: str | None = None
        first: float | None = None
        for delta in self.stream_chat(body):
            if first is None and (delta.reasoning or delta.content):
                first = time.perf_counter() - start
            reasoning.append(delta.reasoning)
            content.append(delta.content)
            finish = delta.finish_reason or finish
            usage = delta.usage or usage
        total = time.perf_counter() - start
        return ChatAnswer(
            reasoning="".join(reasoning),
            content="".join(content),
            finish_reason=finish,
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
            first_token_s=total if first is None else first,
            total_s=total,
        )

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> http.client.HTTPResponse:
        """Sends one request; an idle connection that the router closed is opened again, once."""
        headers = {"Accept": "application/json, text/event-stream, text/plain"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if self._api_key:
            headers["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        for is_fresh in (self._connection is None, True):
            connection = self._connect()
            if self._is_interrupted:
                self.close()
                raise ApiFailure(0, "interrupted")
            try:
                connection.request(method, self._prefix + path, body=data, headers=headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as exc:
                self.close()
                if is_fresh:
                    raise ApiFailure(0, f"{self.address} does not answer: {exc}") from exc
                continue
            if response.status >= 400:
                raise _failure_of(response)
            return response
        raise AssertionError("unreachable")

    def _connect(self) -> http.client.HTTPConnection:
        if self._connection is None:
            self._connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
            try:
                self._connection.connect()
            except OSError as exc:
                self._connection = None
                raise ApiFailure(0, f"{self.address} does not answer: {exc}") from exc
            self._socket = self._connection.sock
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self._connection


def _events(response: http.client.HTTPResponse) -> Iterator[str]:
    """`data` of each server-sent event."""
    try:
        for line in response:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()
    except (OSError, http.client.HTTPException) as exc:
        raise ApiFailure(0, f"the stream broke off: {exc}") from exc


def _delta_of(chunk: dict[str, Any]) -> ChatDelta:
    choices = chunk.get("choices") or []
    usage = chunk.get("usage")
    if not choices:
        return ChatDelta(usage=usage)
    delta = choices[0].get("delta") or {}
    logprobs = choices[0].get("logprobs") or {}
    return ChatDelta(
        reasoning=delta.get("reasoning_content") or "",
        content=delta.get("content") or "",
        finish_reason=choices[0].get("finish_reason"),
        usage=usage,
        logprobs=(*(logprobs.get("reasoning_content") or ()), *(logprobs.get("content") or ())),
    )


def _failure_of(response: http.client.HTTPResponse) -> ApiFailure:
    text = response.read().decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return ApiFailure(response.status, str(error["message"]), error.get("code"))
    except (ValueError, KeyError, TypeError):
        return ApiFailure(response.status, text.strip() or response.reason)
