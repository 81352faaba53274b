"""`WorkerClient`: one worker as a router sees it, over gRPC.

Satisfies the router's `PrefillBackend` and `DecodeBackend` protocols without importing them. Owns: the channel,
deadlines of calls, mapping of every failure to `RequestError`. Lives on one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc

from workers.errors import DeadlineExceeded, RequestError, WorkerUnavailable
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
from workers.service import codec
from workers.service.status import error_of
from workers.service.stubs import worker_pb2 as pb
from workers.service.stubs import worker_pb2_grpc

MAX_MESSAGE_BYTES = 8 << 20
"""Bound of one request or token batch: a prompt of a million tokens is 3 MB."""

_OPTIONS = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    # An event stream may be silent for long; pings find a dead peer that closed nothing.
    ("grpc.keepalive_time_ms", 5000),
    ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted worker listens on a new port: waiting long for the old one only delays the news.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class WorkerClient:
    """One worker. Safe to use concurrently on its loop; `close` ends every open call."""

    def __init__(
        self,
        name: str,
        role: WorkerRole,
        address: str,
        *,
        short_call_s: float = 5.0,
        admit_s: float = 90.0,
        prefill_s: float = 660.0,
    ) -> None:
        """`admit_s` and `prefill_s` bound calls of requests that name no deadline."""
        self.role = role
        self.address = address
        self._name = name
        self._short_call_s, self._admit_s, self._prefill_s = short_call_s, admit_s, prefill_s
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        is_prefill = role is WorkerRole.PREFILL
        self._prefill_stub: Any = worker_pb2_grpc.PrefillServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._decode_stub: Any = worker_pb2_grpc.DecodeServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._stub: Any = self._prefill_stub if is_prefill else self._decode_stub

    @property
    def name(self) -> str:
        """Unique among the workers of its role."""
        return self._name

    async def prefill(self, request: GenerateRequest, grant: Grant) -> PrefillResult:
        """Computes the prompt and hands its KV over; returns once decode has committed the image."""
        call = pb.PrefillCall(request=codec.request_to_wire(request), grant=codec.grant_to_wire(grant))
        limit_s = self._prefill_s if request.deadline_s is None else request.deadline_s + self._short_call_s
        return codec.result_from_wire(await self._call(self._prefill_stub.Prefill, call, limit_s))

    async def admit(self, request: GenerateRequest) -> Grant:
        """Reserves room for prompt and output; may wait in the worker's queue."""
        limit_s = self._admit_s if request.deadline_s is None else min(self._admit_s, request.deadline_s)
        return codec.grant_from_wire(await self._call(self._decode_stub.Admit, codec.request_to_wire(request), limit_s))

    async def events(self, router_id: str) -> AsyncIterator[TokenBatch]:
        """Every event of this router's requests, until the worker ends the stream. Raises `WorkerUnavailable`."""
        call = self._decode_stub.Events(pb.EventsCall(router_id=router_id))
        try:
            async with asyncio.timeout(self._short_call_s):  # wait_for would lose a cancellation as the answer comes
                await call.initial_metadata()
            while (wire := await call.read()) is not grpc.aio.EOF:
                yield codec.batch_from_wire(wire)
            await self._raise_status(call)
        except grpc.aio.AioRpcError as exc:
            raise error_of(exc, self._name) from exc
        except TimeoutError as exc:
            raise WorkerUnavailable(f"worker {self._name}: no answer in {self._short_call_s:g} s") from exc
        except asyncio.CancelledError:
            if call.cancelled() and not _being_cancelled():
                raise WorkerUnavailable(f"worker {self._name}: the connection was closed") from None
            raise
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> None:
        """Forgets the request and frees what it holds; unknown requests are no error."""
        await self._call(self._stub.Abort, pb.AbortCall(request_id=request_id), self._short_call_s)

    async def stats(self) -> WorkerStats:
        """Counters and gauges now; also the liveness probe."""
        return codec.stats_from_wire(await self._call(self._stub.Stats, pb.StatsCall(), self._short_call_s))

    async def control(self, control: RetractControl) -> None:
        """Forces retracts on a decode worker that allows it; raises `RequestError` (403) where it does not."""
        call = codec.control_to_wire(control)
        await self._call(self._decode_stub.SetRetractControl, call, self._short_call_s)

    async def retract_report(self, reset: bool = False) -> RetractReport:
        """What a decode worker has retracted and resumed since it started or the last `reset`."""
        call = pb.RetractReportCall(reset=reset)
        return codec.report_from_wire(await self._call(self._decode_stub.GetRetractReport, call, self._short_call_s))

    async def set_peers(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Tells a decode worker the `host:port` of all prefill workers and of the other decode workers."""
        call = pb.PeersCall(prefill=prefill, decode=decode)
        await self._call(self._decode_stub.SetPeers, call, self._short_call_s)

    async def grant_park(self, image_id: str, num_tokens: int, fingerprint: str) -> Grant:
        """A place at this decode worker for a parked image, to be pushed under the grant."""
        call = pb.ParkCall(image_id=image_id, num_tokens=num_tokens, fingerprint=fingerprint)
        return codec.grant_from_wire(await self._call(self._decode_stub.GrantPark, call, self._short_call_s))

    async def return_park(self, image_id: str, grant: Grant) -> None:
        """Has this decode worker push a parked image back; it keeps its own copy until `forget_park`."""
        call = pb.ReturnCall(image_id=image_id, grant=codec.grant_to_wire(grant))
        await self._call(self._decode_stub.ReturnPark, call, self._prefill_s)

    async def forget_park(self, image_id: str) -> None:
        """Ends a parked image here."""
        await self._call(self._decode_stub.ForgetPark, pb.ForgetCall(image_id=image_id), self._short_call_s)

    async def close(self) -> None:
        """Closes the channel; open calls and streams end with `WorkerUnavailable`."""
        await self._channel.close()

    async def _call(self, method: Any, message: Any, limit_s: float) -> Any:
        try:
            return await method(message, timeout=limit_s)
        except grpc.aio.AioRpcError as exc:
            error = error_of(exc, self._name)
            if exc.code() is grpc.StatusCode.DEADLINE_EXCEEDED and isinstance(error, WorkerUnavailable):
                raise self._late(method, limit_s) from exc
            raise error from exc
        except grpc.aio.UsageError as exc:
            raise WorkerUnavailable(f"worker {self._name}: the client is closed") from exc
        except asyncio.CancelledError:
            if not _being_cancelled():
                raise WorkerUnavailable(f"worker {self._name}: the connection was closed") from None
            raise

    def _late(self, method: Any, limit_s: float) -> RequestError:
        text = f"worker {self._name}: no answer in {limit_s:g} s"
        return WorkerUnavailable(text) if limit_s == self._short_call_s else DeadlineExceeded(text)

    async def _raise_status(self, call: Any) -> None:
        if await call.code() is not grpc.StatusCode.OK:
            raise WorkerUnavailable(f"worker {self._name}: {await call.details()}")


def _being_cancelled() -> bool:
    """Whether the running task was asked to stop, as opposed to a call whose channel was closed under it."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
