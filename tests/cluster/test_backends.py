"""The router keeps one backend per worker while the process behind it changes."""

from __future__ import annotations

import pytest

from cluster.backends import ReplaceableBackend, WorkerAddress
from workers.errors import WorkerUnavailable
from workers.messages import WorkerRole, WorkerStats


class StatsClient:
    """Answers `stats` with its incarnation; records `close`."""

    def __init__(self, address: WorkerAddress) -> None:
        self.incarnation = address.incarnation
        self.closed = False

    async def stats(self) -> WorkerStats:
        return WorkerStats(
            name="decode-0", role=WorkerRole.DECODE, incarnation=self.incarnation, address="", uptime_s=0, ready=True
        )

    async def close(self) -> None:
        self.closed = True


def address(incarnation: str) -> WorkerAddress:
    return WorkerAddress("decode-0", WorkerRole.DECODE, "127.0.0.1:1", incarnation, 1, "n", 0.0)


@pytest.fixture
def backend() -> ReplaceableBackend:
    return ReplaceableBackend("decode-0", WorkerRole.DECODE, StatsClient)


async def test_calls_reach_the_latest_incarnation(backend: ReplaceableBackend) -> None:
    await backend.bind(address("a"))
    first = backend._client
    await backend.bind(address("b"))
    assert (await backend.stats()).incarnation == "b"
    assert first.closed
    assert backend.num_restarts == 1


async def test_an_unbound_worker_is_unavailable(backend: ReplaceableBackend) -> None:
    with pytest.raises(WorkerUnavailable, match="decode-0"):
        await backend.stats()
    await backend.bind(address("a"))
    await backend.unbind()
    with pytest.raises(WorkerUnavailable):
        backend.events("router")


async def test_the_same_incarnation_can_come_back_after_a_network_fault(backend: ReplaceableBackend) -> None:
    await backend.bind(address("a"))
    await backend.unbind()
    await backend.bind(address("a"))
    assert (await backend.stats()).incarnation == "a"
    assert backend.num_restarts == 0


async def test_binding_twice_keeps_the_connection(backend: ReplaceableBackend) -> None:
    await backend.bind(address("a"))
    first = backend._client
    await backend.bind(address("a"))
    assert backend._client is first
