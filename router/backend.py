"""The seam between router and workers: what a prefill and a decode worker must offer.

Owns: the Protocols. Implemented over gRPC by the workers' service client and by the scripted fakes of the tests.
Invariants every backend keeps: expected failures are `workers.errors.RequestError` subclasses, a lost connection is
`WorkerUnavailable`; `abort` of an unknown request is not an error; `admit` for a request id that was aborted before is
a new request; events of one attempt arrive in order, through exactly one `events` stream of the router that sent it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from workers.messages import (
    GenerateRequest,
    Grant,
    PrefillResult,
    RetractControl,
    RetractReport,
    TokenBatch,
    WorkerStats,
)


class PrefillBackend(Protocol):
    """Computes prompts and pushes their KV to a decode worker."""

    @property
    def name(self) -> str:
        """Unique among the prefill workers, stable over restarts."""
        ...

    async def prefill(self, request: GenerateRequest, grant: Grant) -> PrefillResult:
        """Computes the prompt and hands its KV over under `grant`; returns once decode has committed the image."""
        ...

    async def abort(self, request_id: str) -> None:
        """Forgets the request and frees what it holds."""
        ...

    async def stats(self) -> WorkerStats:
        """The worker's counters and gauges now; also the liveness probe."""
        ...


class DecodeBackend(Protocol):
    """Grants room for KV, generates tokens, reports them in batches."""

    @property
    def name(self) -> str:
        """Unique among the decode workers, stable over restarts."""
        ...

    async def admit(self, request: GenerateRequest) -> Grant:
        """Reserves room for prompt and output. Raises `WorkerFull` (not now) or `RequestTooLong` (never)."""
        ...

    def events(self, router_id: str) -> AsyncIterator[TokenBatch]:
        """Every event of this router's requests, one batch a step, until the connection ends or is lost."""
        ...

    async def abort(self, request_id: str) -> None:
        """Forgets the request and frees what it holds."""
        ...

    async def stats(self) -> WorkerStats:
        """The worker's counters and gauges now; also the liveness probe."""
        ...


class RetractBackend(Protocol):
    """A decode worker whose retracts an operator may force and read; only deployments that allow it are given any."""

    @property
    def name(self) -> str:
        """The decode worker's name."""
        ...

    async def control(self, control: RetractControl) -> None:
        """Replaces what is forced; the default value forces nothing."""
        ...

    async def retract_report(self, reset: bool) -> RetractReport:
        """Retracts since the last reset."""
        ...
