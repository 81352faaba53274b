"""Scripted prefill and decode workers: deterministic, no model, no clock.

A decode worker answers a request with the tokens its script gives, as soon as the prefill worker hands it over; with
`manual` set, the test emits them. Both count what they hold, so that a test can see a leak.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from workers.errors import RequestError, WorkerUnavailable
from workers.messages import (
    ErrorInfo,
    FinishReason,
    GenerateRequest,
    Grant,
    PrefillResult,
    TokenBatch,
    TokenEvent,
    TokenLogprob,
    WorkerRole,
    WorkerStats,
)


@dataclass(frozen=True)
class Script:
    """What a fake decode worker says: one event a token, the last one with `finish`."""

    token_ids: tuple[int, ...]
    finish: FinishReason = FinishReason.STOP
    error: RequestError | None = None
    """With it, the output ends with an ERROR event after `token_ids`."""
    tokens_per_event: int = 1


@dataclass
class FakeDecode:
    """A decode worker. `held` must be empty when every request has ended."""

    name: str
    script: Callable[[GenerateRequest], Script]
    manual: bool = False
    max_running: int = 64
    held: dict[str, GenerateRequest] = field(default_factory=dict)
    admitted: list[GenerateRequest] = field(default_factory=list)
    committed: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    admit_errors: list[BaseException] = field(default_factory=list)
    """Raised by the next admissions, in order."""
    down: bool = False

    def __post_init__(self) -> None:
        self._streams: dict[str, asyncio.Queue[TokenBatch | RequestError]] = {}
        self._next_index: dict[str, int] = {}

    async def admit(self, request: GenerateRequest) -> Grant:
        self._check()
        if self.admit_errors:
            raise self.admit_errors.pop(0)
        assert request.request_id not in self.held, "the attempt before this one was not withdrawn"
        self.held[request.request_id] = request
        self.admitted.append(request)
        self._next_index[request.request_id] = 0
        return Grant(request.request_id, request.epoch, 30.0, 1 << 20, self.name, "fp", "inc-0")

    async def events(self, router_id: str) -> AsyncIterator[TokenBatch]:
        self._check()
        queue = self._streams[router_id] = asyncio.Queue()
        while True:
            item = await queue.get()
            if isinstance(item, RequestError):
                raise item
            yield item

    async def abort(self, request_id: str) -> None:
        self._check()
        self.aborted.append(request_id)
        self.held.pop(request_id, None)
        self._next_index.pop(request_id, None)

    async def stats(self) -> WorkerStats:
        self._check()
        return WorkerStats(
            self.name,
            WorkerRole.DECODE,
            "inc-0",
            "fake:0",
            1.0,
            True,
            max_running=self.max_running,
            running=len(self.held),
        )

    async def granted(self, count: int = 1) -> GenerateRequest:
        """Waits until `count` requests in all have their KV here; returns the newest."""
        await until(lambda: len(self.committed) >= count)
        return self.committed[-1]

    def commit(self, request_id: str, epoch: int) -> None:
        """The KV has arrived."""
        request = self.held.get(request_id)
        if request is None or request.epoch != epoch:
            return
        self.committed.append(request)
        if not self.manual:
            self.play(request_id, self.script(request))

    def play(self, request_id: str, script: Script) -> None:
        """Emits a whole script, one batch an event."""
        width = script.tokens_per_event
        pieces = [script.token_ids[at : at + width] for at in range(0, len(script.token_ids), width)] or [()]
        for piece in pieces[:-1]:
            self.emit(request_id, piece)
        if script.error is not None:
            self.emit(request_id, pieces[-1])
            self.emit(request_id, (), FinishReason.ERROR, error=script.error)
        else:
            self.emit(request_id, pieces[-1], script.finish)

    def emit(
        self,
        request_id: str,
        token_ids: Sequence[int],
        finish: FinishReason | None = None,
        *,
        error: RequestError | None = None,
    ) -> None:
        """One event; a terminal one frees the request."""
        request = self.held[request_id]
        index = self._next_index[request_id]
        self._next_index[request_id] += len(token_ids)
        event = TokenEvent(
            request_id,
            request.epoch,
            index,
            tuple(token_ids),
            _logprobs(request, token_ids),
            finish,
            ErrorInfo.from_error(error) if error is not None else None,
        )
        if finish is not None:
            del self.held[request_id], self._next_index[request_id]
        self._streams[request.router_id].put_nowait(TokenBatch((event,)))

    def break_stream(self) -> None:
        """The connection is lost: every event stream ends with an error."""
        for queue in self._streams.values():
            queue.put_nowait(WorkerUnavailable(f"{self.name}: connection reset"))
        self.held.clear()
        self._next_index.clear()

    def _check(self) -> None:
        if self.down:
            raise WorkerUnavailable(f"{self.name} is down")


@dataclass
class FakePrefill:
    """A prefill worker that hands over at once, or when `gate` opens."""

    name: str
    peers: dict[str, FakeDecode]
    cached_tokens: int = 0
    held: dict[str, GenerateRequest] = field(default_factory=dict)
    prefilled: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    """Raised by the next prefills, in order."""
    gate: asyncio.Event | None = None
    down: bool = False

    async def prefill(self, request: GenerateRequest, grant: Grant) -> PrefillResult:
        self._check()
        self.held[request.request_id] = request
        self.prefilled.append(request)
        if self.gate is not None:
            await self.gate.wait()
        self._check()
        if self.errors:
            del self.held[request.request_id]
            raise self.errors.pop(0)
        # A request aborted meanwhile is not here any more; a cancelled call is, until its abort comes.
        self.held.pop(request.request_id, None)
        self.peers[grant.kv_address].commit(request.request_id, grant.epoch)
        return PrefillResult(
            request.request_id, request.epoch, len(request.prompt_ids), self.cached_tokens, 0.001, 4096
        )

    async def abort(self, request_id: str) -> None:
        self._check()
        self.aborted.append(request_id)
        self.held.pop(request_id, None)

    async def stats(self) -> WorkerStats:
        self._check()
        return WorkerStats(self.name, WorkerRole.PREFILL, "inc-0", "fake:1", 1.0, True, running=len(self.held))

    def _check(self) -> None:
        if self.down:
            raise WorkerUnavailable(f"{self.name} is down")


async def until(condition: Callable[[], bool], patience_s: float = 5.0) -> None:
    """Lets the loop run until `condition` holds. Raises `TimeoutError`."""
    async with asyncio.timeout(patience_s):
        while not condition():
            await asyncio.sleep(0.001)


def _logprobs(request: GenerateRequest, token_ids: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
    if request.sampling.logprobs is None:
        return None
    num_top = request.sampling.logprobs
    return tuple(
        TokenLogprob(token, -0.25, tuple((other, -0.25 - other) for other in range(10, 10 + num_top)))
        for token in token_ids
    )
