"""A served prefill and decode worker of fake models with clients, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tests.workers.runtime.fake_model import fake_engine
from workers.config import WorkerConfig
from workers.engine import Engine
from workers.messages import GenerateRequest, PrefillResult, TokenEvent, WorkerRole
from workers.service.client import WorkerClient
from workers.service.server import ServedDecode, ServedPrefill, serve_worker

WAIT_S = 20.0
"""Longest wait of any test; reached only by a failing one."""


@dataclass
class Router:
    """Reads one event stream and sorts events by request."""

    client: WorkerClient
    router_id: str = "r"
    received: dict[str, list[TokenEvent]] = field(default_factory=dict)
    error: BaseException | None = None

    def __post_init__(self) -> None:
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async for batch in self.client.events(self.router_id):
                for event in batch.events:
                    self.received.setdefault(event.request_id, []).append(event)
                self._changed.set()
        except Exception as exc:
            self.error = exc
        self._changed.set()

    async def until(self, request_id: str, count: int) -> list[TokenEvent]:
        """Waits for `count` events of a request."""
        async with asyncio.timeout(WAIT_S):
            while len(self.received.get(request_id, ())) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.received[request_id]

    async def end_of(self, request_id: str) -> list[TokenEvent]:
        """Every event of a request up to its terminal one."""
        async with asyncio.timeout(WAIT_S):
            while not self.received.get(request_id) or self.received[request_id][-1].finish is None:
                self._changed.clear()
                await self._changed.wait()
        return self.received[request_id]

    async def lost(self) -> BaseException | None:
        """Waits for the stream to end; why it did."""
        await asyncio.wait_for(asyncio.shield(self._task), WAIT_S)
        return self.error

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@dataclass
class Cluster:
    """Two workers, two clients, one router."""

    prefill: ServedPrefill
    decode: ServedDecode
    prefill_client: WorkerClient
    decode_client: WorkerClient
    router: Router

    async def start(self, request: GenerateRequest) -> PrefillResult:
        """The router's part of a request's life, up to the committed hand-over."""
        grant = await self.decode_client.admit(request)
        return await self.prefill_client.prefill(request, grant)

    async def idle(self) -> None:
        """Waits until both engine threads have nothing left, then checks that nothing is held anywhere."""
        for running in (self.prefill, self.decode):
            async with asyncio.timeout(WAIT_S):
                while await asyncio.wrap_future(running.worker.loop.call(lambda r=running: len(r.worker._attempts))):
                    await asyncio.sleep(0.005)
            assert running.engine.allocators.num_held == 0
            stats = await running.stats()
            assert stats.leaked_pages == 0 and stats.running == stats.waiting == stats.draining == 0
        async with asyncio.timeout(WAIT_S):
            while self.decode.receiver.stats().open_grants or self.decode.receiver.stats().held_bytes:
                await asyncio.sleep(0.005)
        self.decode.receiver.check_integrity()


@contextlib.asynccontextmanager
async def running_cluster(
    *, prefill_engine: Engine | None = None, decode_engine: Engine | None = None, **config: object
) -> AsyncIterator[Cluster]:
    """Leaving the block checks that nothing leaked and that every thread ended."""
    settings = {"max_context": 2048, "chunk_tokens": 128, "drain_s": 0.5, **config}
    prefill = await serve_worker(
        WorkerConfig(WorkerRole.PREFILL, "p", **settings),  # type: ignore[arg-type]
        prefill_engine or fake_engine(),
    )
    decode = await serve_worker(
        WorkerConfig(WorkerRole.DECODE, "d", **settings),  # type: ignore[arg-type]
        decode_engine or fake_engine(),
    )
    assert isinstance(prefill, ServedPrefill) and isinstance(decode, ServedDecode)
    clients = [
        WorkerClient("p", WorkerRole.PREFILL, prefill.address),
        WorkerClient("d", WorkerRole.DECODE, decode.address),
    ]
    cluster = Cluster(prefill, decode, *clients, Router(clients[1]))
    try:
        yield cluster
        if prefill.worker.loop.alive and decode.worker.loop.alive:
            await cluster.idle()
    finally:
        await cluster.router.close()
        for client in clients:
            await client.close()
        await prefill.stop()
        await decode.stop()
    assert not prefill.worker.loop.failure and not decode.worker.loop.failure
