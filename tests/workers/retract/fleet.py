"""A prefill worker and two decode workers of fake models that know each other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from tests.workers.retract.harness import retract_config
from tests.workers.runtime.fake_model import fake_engine, oracle_tokens
from tests.workers.runtime.pair import tokens_of
from tests.workers.service.cluster import WAIT_S, Cluster, running_cluster
from workers.config import WorkerConfig
from workers.messages import GenerateRequest, RetractControl, WorkerRole
from workers.retract.config import RetractConfig
from workers.service.server import ServedDecode, serve_worker


@dataclass
class Fleet:
    """`home` serves requests; `peer` only keeps images."""

    cluster: Cluster
    peer: ServedDecode

    @property
    def home(self) -> ServedDecode:
        return self.cluster.decode

    async def control(self, **fields: object) -> None:
        await self.cluster.decode_client.control(RetractControl(**fields))  # type: ignore[arg-type]

    async def check_tokens(self, requests: Sequence[GenerateRequest]) -> None:
        for request in requests:
            tokens = tokens_of(await self.cluster.router.end_of(request.request_id))
            assert tokens == oracle_tokens(request.prompt_ids, request.sampling, request.request_id), request.request_id

    async def settled(self) -> None:
        """Waits until nothing moves any more, then checks that every part holds nothing."""
        guests = self.peer.neighbours.guests
        retract = self.home.worker.retract
        async with asyncio.timeout(WAIT_S):
            while retract.pending or guests.num_images:
                await asyncio.sleep(0.005)
        await asyncio.wrap_future(self.home.worker.loop.call(retract.check_integrity))
        guests.check_integrity()
        assert guests.used_bytes == 0
        report = await self.cluster.decode_client.retract_report()
        assert report.leaked_pages == report.parked_requests == 0


@contextlib.asynccontextmanager
async def running_fleet(*, retract: RetractConfig | None = None, with_prefill: bool = True) -> AsyncIterator[Fleet]:
    settings = {"retract": retract or retract_config(), "allow_retract_control": True}
    peer = await serve_worker(
        WorkerConfig(WorkerRole.DECODE, "peer", max_context=2048, drain_s=0.5, **settings),  # type: ignore[arg-type]
        fake_engine(),
    )
    assert isinstance(peer, ServedDecode)
    try:
        async with running_cluster(**settings) as cluster:
            fleet = Fleet(cluster, peer)
            prefill = [cluster.prefill.address] if with_prefill else []
            await cluster.decode_client.set_peers(prefill, [peer.address, cluster.decode.address])
            yield fleet
            await fleet.settled()
    finally:
        await peer.stop()
    assert not peer.worker.loop.failure
