"""The workers a router knows: liveness, load, and the event streams of decode workers.

Owns: one probe task per worker, one reader task per decode worker that hands each event to its request, and the choice
of workers, who are the same as long as the router lives: one that comes back does so behind its backend. Does not own:
the requests (`lifecycle`). Invariants: a request's events come through the slot it is registered at; when that stream
breaks, every request there is told exactly once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

from router.backend import DecodeBackend, PrefillBackend
from router.config import RouterConfig
from router.policy import WorkerView, choose_decode, choose_prefill
from workers.errors import RequestError, WorkerUnavailable
from workers.messages import TokenEvent, WorkerStats

logger = logging.getLogger(__name__)


class EventSink(Protocol):
    """A request that waits for events."""

    def deliver(self, event: TokenEvent) -> None:
        """One event of the request, in order. Must not block."""
        ...

    def lose(self, error: RequestError) -> None:
        """The stream its events come through is gone."""
        ...


class WorkerSlot:
    """Liveness and load of one worker, as this router sees it."""

    def __init__(self, backend: PrefillBackend | DecodeBackend, config: RouterConfig) -> None:
        self.name = backend.name
        self.requests = 0
        """Requests of this router that the worker holds."""
        self.tokens = 0
        """Prompt tokens of those requests."""
        self.stats: WorkerStats | None = None
        """Last report."""
        self._probed = backend
        self._config = config
        self._answers = False
        self._missed = 0
        self._tasks = [asyncio.create_task(self._probe_forever(), name=f"probe {self.name}")]

    @property
    def reachable(self) -> bool:
        """True while the worker answers probes and says that it is ready."""
        return self._answers

    def suspect(self) -> None:
        """A call found the worker unreachable: no new request until a probe succeeds."""
        self._answers = False

    def view(self) -> WorkerView:
        """The policy's view of this worker."""
        stats = self.stats
        return WorkerView(
            name=self.name,
            reachable=self.reachable,
            own_requests=self.requests,
            own_tokens=self.tokens,
            reported_requests=stats.running + stats.waiting + stats.parked if stats else 0,
            capacity=stats.max_running if stats else 0,
        )

    async def probe(self) -> None:
        """Asks the worker for its statistics, within the configured time."""
        try:
            async with asyncio.timeout(self._config.stats_timeout_s):
                self.stats = await self._probed.stats()
        except TimeoutError:
            self._missed += 1
            if self._missed >= self._config.missed_probes:
                self._lost("no answer to probes")
        except RequestError as exc:
            self._lost(str(exc))
        else:
            self._missed = 0
            self._answers = self.stats.ready

    def _lost(self, reason: str) -> None:
        if self._answers:
            logger.warning("worker=%s unreachable: %s", self.name, reason)
        self._answers = False

    async def close(self) -> None:
        """Stops this slot's tasks."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _probe_forever(self) -> None:
        while True:
            try:
                await self.probe()
            except Exception:
                logger.exception("worker=%s probe failed", self.name)
                self._answers = False
            await asyncio.sleep(self._config.stats_interval_s)


class PrefillSlot(WorkerSlot):
    """One prefill worker."""

    def __init__(self, backend: PrefillBackend, config: RouterConfig) -> None:
        super().__init__(backend, config)
        self.backend = backend


class DecodeSlot(WorkerSlot):
    """One decode worker and the stream of its events."""

    def __init__(self, backend: DecodeBackend, config: RouterConfig, router_id: str) -> None:
        super().__init__(backend, config)
        self.backend = backend
        self._router_id = router_id
        self._broken = False
        self._sinks: dict[str, EventSink] = {}
        self._tasks.append(asyncio.create_task(self._read_forever(), name=f"events {self.name}"))

    @property
    def reachable(self) -> bool:
        """Also false while the event stream is down: a request would never hear of its tokens."""
        return self._answers and not self._broken

    def register(self, request_id: str, sink: EventSink) -> None:
        """Events of `request_id` go to `sink` from now on."""
        self._sinks[request_id] = sink

    def unregister(self, request_id: str) -> None:
        """Drops later events of `request_id`; harmless when it is not registered."""
        self._sinks.pop(request_id, None)

    async def _read_forever(self) -> None:
        while True:
            error: RequestError
            try:
                await self._read()
                error = WorkerUnavailable(f"decode worker {self.name}: event stream ended")
            except RequestError as exc:
                error = exc
            except Exception as exc:
                logger.exception("worker=%s event stream failed", self.name)
                error = WorkerUnavailable(f"decode worker {self.name}: {exc}")
            self._lose_all(error)
            await asyncio.sleep(self._config.reconnect_s)
            self._broken = False

    async def _read(self) -> None:
        sinks = self._sinks
        async for batch in self.backend.events(self._router_id):
            for event in batch.events:
                sink = sinks.get(event.request_id)
                if sink is not None:
                    sink.deliver(event)

    def _lose_all(self, error: RequestError) -> None:
        self._broken = True
        lost, self._sinks = self._sinks, {}
        if lost:
            logger.warning("worker=%s lost_requests=%d: %s", self.name, len(lost), error)
        for sink in lost.values():
            sink.lose(error)


class Fleet:
    """The workers of both roles. Lives on one event loop; create it inside the loop."""

    def __init__(
        self,
        config: RouterConfig,
        router_id: str,
        prefill: Sequence[PrefillBackend],
        decode: Sequence[DecodeBackend],
    ) -> None:
        self._prefill = {backend.name: PrefillSlot(backend, config) for backend in prefill}
        self._decode = {backend.name: DecodeSlot(backend, config, router_id) for backend in decode}
        self._prefill_turn = itertools.count()
        self._decode_turn = itertools.count()

    async def probe_all(self) -> None:
        """Asks every worker once; whether one answers shows in its slot."""
        await asyncio.gather(*(slot.probe() for slot in self._slots()))

    async def probe(self, name: str) -> None:
        """Asks a worker at once, for it is known to have come back; an unknown name is nobody."""
        slot = self._prefill.get(name) or self._decode.get(name)
        if slot is not None:
            await slot.probe()

    def pick_prefill(self, excluded: Collection[str]) -> PrefillSlot:
        """The least loaded prefill worker outside `excluded`. Raises `WorkerUnavailable`."""
        name = choose_prefill(_views(self._prefill.values()), excluded, next(self._prefill_turn))
        if name is None:
            raise WorkerUnavailable("no prefill worker is available")
        return self._prefill[name]

    def pick_decode(self, excluded: Collection[str]) -> DecodeSlot:
        """The least loaded decode worker outside `excluded`. Raises `WorkerUnavailable`."""
        name = choose_decode(_views(self._decode.values()), excluded, next(self._decode_turn))
        if name is None:
            raise WorkerUnavailable("no decode worker is available")
        return self._decode[name]

    def can_serve(self, bad_prefill: Collection[str], bad_decode: Collection[str]) -> bool:
        """True when a worker of each role remains outside these."""
        return any(slot.reachable and slot.name not in bad_prefill for slot in self._prefill.values()) and any(
            slot.reachable and slot.name not in bad_decode for slot in self._decode.values()
        )

    def reachable(self) -> dict[str, int]:
        """Workers that can take a request, by role."""
        return {
            "prefill": sum(slot.reachable for slot in self._prefill.values()),
            "decode": sum(slot.reachable for slot in self._decode.values()),
        }

    async def close(self) -> None:
        """Stops every probe and reader."""
        await asyncio.gather(*(slot.close() for slot in self._slots()))

    def _slots(self) -> list[PrefillSlot | DecodeSlot]:
        return [*self._prefill.values(), *self._decode.values()]


def _views(slots: Iterable[WorkerSlot]) -> list[WorkerView]:
    return [slot.view() for slot in slots]
