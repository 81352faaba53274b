"""gRPC front of a decode worker: admissions, event streams, and the KV receiver's news.

Owns: the order admit -> grant -> landing -> engine, and that a grant ends with its request. Runs on the event loop,
except the `DecodeSink` methods, which the engine thread calls.
"""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import Future

import grpc

from kvstore.errors import TransferRefused
from kvstore.transfer.landing import GrantInfo, ReceivedImage
from kvstore.transfer.receiver import KVReceiver
from workers.decode import DecodeWorker
from workers.errors import DeadlineExceeded, RequestAborted, RequestError, WorkerFull, WorkerUnavailable
from workers.messages import GenerateRequest, Grant, TokenEvent
from workers.service import codec
from workers.service.control import ENGINE_S, ControlServicer, Neighbours
from workers.service.events import EventHub, Key
from workers.service.status import abort_with, request_error_of
from workers.service.stubs import worker_pb2 as pb

logger = logging.getLogger(__name__)

WRITE_S = 30.0
"""Longest wait for a router to take one message; then its stream ends."""


class EngineOutput:
    """The `DecodeSink` of a served worker: events to the hub, ended grants to the receiver."""

    def __init__(self, hub: EventHub) -> None:
        self._hub = hub
        self.receiver: KVReceiver | None = None

    def publish(self, events: dict[str, list[TokenEvent]]) -> None:
        self._hub.publish(events)

    def closed(self, request_id: str, epoch: int) -> None:
        self._hub.forget(request_id, epoch)
        if self.receiver is not None:
            self.receiver.revoke(request_id, epoch)


class DecodeServicer(ControlServicer):
    """Serves `DecodeService` over one worker. `receiver` is set before the server starts."""

    def __init__(self, worker: DecodeWorker, hub: EventHub, neighbours: Neighbours) -> None:
        self.worker = worker
        self.neighbours = neighbours
        self.receiver: KVReceiver | None = None
        self._hub = hub

    # -- calls --------------------------------------------------------------------------------------------------------

    async def Admit(self, call: pb.Generate, context: grpc.aio.ServicerContext) -> pb.Grant:  # noqa: N802
        try:
            grant = await self.admit(codec.request_from_wire(call))
        except Exception as exc:
            await abort_with(context, request_error_of(exc))
            raise
        return codec.grant_to_wire(grant)

    async def Abort(self, call: pb.AbortCall, context: grpc.aio.ServicerContext) -> pb.AbortReply:  # noqa: N802
        try:
            async with asyncio.timeout(ENGINE_S):
                await asyncio.wrap_future(self.worker.abort(call.request_id))
        except Exception as exc:
            await abort_with(context, request_error_of(exc))
        return pb.AbortReply()

    async def Events(self, call: pb.EventsCall, context: grpc.aio.ServicerContext) -> None:  # noqa: N802
        stream = self._hub.stream(call.router_id)
        try:
            async with asyncio.timeout(WRITE_S):
                await context.send_initial_metadata(())
            async for events in stream:
                async with asyncio.timeout(WRITE_S):
                    await context.write(codec.batch_to_wire(events))
        except RequestError as exc:
            await abort_with(context, exc)
        except TimeoutError:
            await abort_with(context, WorkerUnavailable("the router does not read its events"))
        finally:
            await stream.aclose()  # type: ignore[attr-defined]

    # -- admission ----------------------------------------------------------------------------------------------------

    async def admit(self, request: GenerateRequest) -> Grant:
        """Waits for room in the pools, then in landing memory. Raises `RequestError`; nothing is held then."""
        limit_s = self.worker.config.admit_wait_s + ENGINE_S
        self._hub.expect(request.request_id, request.epoch, request.router_id)
        admitted = False
        try:
            async with asyncio.timeout(limit_s):
                await asyncio.wrap_future(self.worker.admit(request))
            admitted = True
            return self._grant(request)
        except asyncio.CancelledError:
            self.worker.abort(request.request_id, request.epoch)
            raise
        except Exception as exc:
            if admitted or isinstance(exc, TimeoutError):
                self.worker.abort(request.request_id, request.epoch, request_error_of(exc))
            elif getattr(exc, "code", "") != "duplicate_request":
                self._hub.forget(request.request_id, request.epoch)
            raise

    def _grant(self, request: GenerateRequest) -> Grant:
        assert self.receiver is not None
        try:
            info = self.receiver.grant(request.request_id, request.epoch, len(request.prompt_ids))
        except TransferRefused as exc:
            raise RequestAborted(f"request {request.request_id} epoch {request.epoch}: {exc}") from exc
        if info is None:
            raise WorkerFull("KV landing memory is full")
        return self.neighbours.peers.grant_of(info)

    # -- news of the KV receiver --------------------------------------------------------------------------------------

    def on_image(self, received: ReceivedImage) -> None:
        """A verified image: to the engine thread, then its landing memory is free."""
        if self.neighbours.takes(received):
            return
        token_id, logprob, expert_uses = codec.first_token_from_bytes(received.tail)
        if expert_uses:
            self.worker.expect_experts(expert_uses)
        landed = self.worker.land(received.request_id, received.epoch, received.image, token_id, logprob)
        landed.add_done_callback(lambda done: _release(received, done))

    def on_lost(self, grant: GrantInfo, reason: str) -> None:
        """An attempt ended without an image."""
        if self.neighbours.takes_loss(grant, reason):
            return
        error: RequestError = WorkerUnavailable(f"KV hand-off: {reason}")
        if "lease" in reason:
            error = DeadlineExceeded(f"KV hand-off: {reason}")
        self.worker.abort(grant.request_id, grant.epoch, error)

    def on_routers_lost(self, keys: list[Key]) -> None:
        """Requests that no router waits for any more."""
        for request_id, epoch in keys:
            self.worker.abort(request_id, epoch)


def _release(received: ReceivedImage, done: Future[None]) -> None:
    received.release()
    error = None if done.cancelled() else done.exception()
    if error is not None:
        logger.info("request=%s epoch=%d image not taken: %s", received.request_id, received.epoch, error)
