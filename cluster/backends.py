"""Router backends whose worker may be replaced: the name stays, the connection behind it changes on a restart.

Owns: the swap. Does not own: the gRPC clients that it swaps (`workers/service/client.py`), noticing a restart
(`cluster/health.py`). The router keeps one object per worker for life; a stream of events that breaks is opened again
by the router and then reaches the new incarnation.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.backend import DecodeBackend, PrefillBackend, RetractBackend
from workers.errors import RequestError, WorkerUnavailable
from workers.messages import (
    GenerateRequest,
    Grant,
    PrefillResult,
    RetractControl,
    RetractReport,
    TokenBatch,
    WorkerRole,
    WorkerStats,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerAddress:
    """Where one incarnation of a worker listens."""

    name: str
    role: WorkerRole
    address: str
    """`host:port` of its gRPC service."""
    incarnation: str
    pid: int
    node: str
    """Ray node id."""
    start_s: float
    """Seconds it took to load and listen."""
    note: str = ""
    """What whoever started it should know."""


class Client(PrefillBackend, DecodeBackend, RetractBackend, Protocol):
    """What the service client offers: both halves, an operator's calls, and an end."""

    async def set_peers(self, prefill: Sequence[str], decode: Sequence[str]) -> None: ...

    async def close(self) -> None: ...


Connect = Callable[[WorkerAddress], Client]


class ReplaceableBackend:
    """One worker by name, as the router sees it. Lives on the router's event loop."""

    def __init__(self, name: str, role: WorkerRole, connect: Connect) -> None:
        self._name, self._role = name, role
        self._connect = connect
        self._client: Client | None = None
        self._incarnation = ""
        self.num_restarts = 0
        self.address: str | None = None
        """`host:port` of the incarnation that is bound; None while there is none."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def role(self) -> WorkerRole:
        return self._role

    async def bind(self, address: WorkerAddress) -> None:
        """Points to a new incarnation; the old connection is closed, which ends its event stream."""
        if address.incarnation == self._incarnation and self._client is not None:
            return
        old, self._client = self._client, self._connect(address)
        self.address = address.address
        if self._incarnation not in ("", address.incarnation):
            self.num_restarts += 1
        self._incarnation = address.incarnation
        if old is not None:
            await old.close()

    async def unbind(self) -> None:
        """Fails every call until the next `bind`: the worker is known to be down."""
        old, self._client = self._client, None
        self.address = None
        if old is not None:
            await old.close()

    async def prefill(self, request: GenerateRequest, grant: Grant) -> PrefillResult:
        return await self._bound().prefill(request, grant)

    async def admit(self, request: GenerateRequest) -> Grant:
        return await self._bound().admit(request)

    def events(self, router_id: str) -> AsyncIterator[TokenBatch]:
        return self._bound().events(router_id)

    async def abort(self, request_id: str) -> None:
        await self._bound().abort(request_id)

    async def stats(self) -> WorkerStats:
        return await self._bound().stats()

    async def control(self, control: RetractControl) -> None:
        await self._bound().control(control)

    async def retract_report(self, reset: bool) -> RetractReport:
        return await self._bound().retract_report(reset)

    async def set_peers(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Tells a decode worker where the others are; the lists replace what it was told before."""
        await self._bound().set_peers(prefill, decode)

    def _bound(self) -> Client:
        if self._client is None:
            raise WorkerUnavailable(f"worker {self._name} is restarting")
        return self._client


async def introduce(backends: Sequence[ReplaceableBackend]) -> None:
    """Tells every decode worker the addresses of the workers that a parked request may go to.

    A worker that does not answer is skipped: it is told when it is bound again.
    """
    bound = [backend for backend in backends if backend.address is not None]
    prefill = [str(backend.address) for backend in bound if backend.role is WorkerRole.PREFILL]
    for backend in bound:
        if backend.role is not WorkerRole.DECODE:
            continue
        others = [str(other.address) for other in bound if other.role is WorkerRole.DECODE and other is not backend]
        try:
            await backend.set_peers(prefill, others)
        except RequestError as exc:
            logger.warning("worker=%s not told of its peers: %s", backend.name, exc)
