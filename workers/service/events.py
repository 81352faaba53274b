"""`EventHub`: token events from the engine thread to one stream per router.

Owns: pending events by router, which stream of a router is current, who is told when a router is gone. Does not own:
requests. Everything runs on the event loop except `publish` and `forget`, which any thread may call.

A stream that ended may have swallowed events, so its router gives up every request it had there; the requests that were
admitted under a stream therefore end when that router's next stream opens, or after a grace time without one. Requests
admitted while the router had no stream (it is connecting) belong to the next one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable

from workers.errors import RequestError, WorkerFull
from workers.messages import TokenEvent

MAX_PENDING_EVENTS = 65536
"""Events a router may leave unread before its stream ends: some minutes of a full batch, a few MB."""

Key = tuple[str, int]


class StreamReplaced(RequestError):
    """A newer stream of the same router took over."""

    status = 409
    code = "stream_replaced"


class _Outbox:
    """One router."""

    def __init__(self) -> None:
        self.pending: list[TokenEvent] = []
        self.wake = asyncio.Event()
        self.stream: int | None = None
        """Number of the connected stream."""
        self.requests: dict[Key, int | None] = {}
        """Live requests and the stream they were admitted under."""
        self.timer: asyncio.TimerHandle | None = None


class EventHub:
    """All routers of one decode worker. Create on the event loop."""

    def __init__(self, grace_s: float, on_lost: Callable[[list[Key]], None]) -> None:
        """`on_lost` gets requests whose router gave them up or is gone."""
        self._grace_s = grace_s
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._outboxes: dict[str, _Outbox] = {}
        self._router_of: dict[Key, str] = {}
        self._closed = False

    @property
    def num_streams(self) -> int:
        """Routers connected now."""
        return sum(outbox.stream is not None for outbox in self._outboxes.values())

    def publish(self, events: dict[str, list[TokenEvent]]) -> None:
        """Events of one step by router. Any thread."""
        self._soon(self._deliver, events)

    def forget(self, request_id: str, epoch: int) -> None:
        """The attempt has ended. Any thread."""
        self._soon(self._forget, (request_id, epoch))

    def expect(self, request_id: str, epoch: int, router_id: str) -> None:
        """A request of this router was admitted."""
        outbox = self._outboxes.get(router_id)
        if outbox is None:
            outbox = self._outboxes[router_id] = _Outbox()
            self._start_timer(router_id, outbox)
        outbox.requests[request_id, epoch] = outbox.stream
        self._router_of[request_id, epoch] = router_id

    async def stream(self, router_id: str) -> AsyncIterator[list[TokenEvent]]:
        """Everything for this router from now on, merged while the reader is slower than the steps.

        Raises `StreamReplaced` when the router opens another one, `WorkerFull` when it leaves too much unread.
        """
        number = next(self._numbers)
        outbox = self._take_over(router_id, number)
        try:
            while outbox.pending or not self._closed:
                if not outbox.pending and outbox.stream == number:
                    await outbox.wake.wait()
                outbox.wake.clear()
                if outbox.stream != number:
                    raise StreamReplaced(f"router {router_id} opened a newer event stream")
                if len(outbox.pending) > MAX_PENDING_EVENTS:
                    raise WorkerFull(f"router {router_id} left {len(outbox.pending)} events unread")
                if outbox.pending:
                    events, outbox.pending = outbox.pending, []
                    yield events
        finally:
            if outbox.stream == number:
                outbox.stream = None
                outbox.pending.clear()
                self._start_timer(router_id, outbox)

    def close(self) -> None:
        """Ends every stream after what is pending."""
        self._closed = True
        for outbox in self._outboxes.values():
            self._stop_timer(outbox)
            outbox.wake.set()

    def _soon(self, action: Callable[..., None], argument: object) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(action, argument)

    def _take_over(self, router_id: str, number: int) -> _Outbox:
        outbox = self._outboxes.setdefault(router_id, _Outbox())
        self._stop_timer(outbox)
        outbox.stream = number
        outbox.wake.set()
        given_up = [key for key, stream in outbox.requests.items() if stream is not None]
        for key in outbox.requests:
            outbox.requests[key] = number
        if given_up:
            self._on_lost(given_up)
        return outbox

    def _deliver(self, events: dict[str, list[TokenEvent]]) -> None:
        for router_id, batch in events.items():
            outbox = self._outboxes.get(router_id)
            if outbox is not None:
                outbox.pending.extend(batch)
                outbox.wake.set()

    def _forget(self, key: Key) -> None:
        router_id = self._router_of.pop(key, None)
        outbox = self._outboxes.get(router_id) if router_id is not None else None
        if outbox is None:
            return
        outbox.requests.pop(key, None)
        if outbox.stream is None and not outbox.requests and outbox.timer is None:
            del self._outboxes[router_id]  # type: ignore[arg-type]

    def _start_timer(self, router_id: str, outbox: _Outbox) -> None:
        if not self._closed:
            outbox.timer = self._loop.call_later(self._grace_s, self._router_gone, router_id)

    def _stop_timer(self, outbox: _Outbox) -> None:
        if outbox.timer is not None:
            outbox.timer.cancel()
            outbox.timer = None

    def _router_gone(self, router_id: str) -> None:
        outbox = self._outboxes[router_id]
        outbox.timer = None
        lost = list(outbox.requests)
        outbox.pending.clear()
        if lost:
            self._on_lost(lost)
        else:
            del self._outboxes[router_id]
