"""Calls of operators and of other workers on a decode worker: forced retracts, peers, parked images of others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import TypeVar

import grpc

from kvstore.transfer.landing import GrantInfo, ReceivedImage
from kvstore.transfer.receiver import KVReceiver
from kvstore.transfer.sender import KVSender
from workers.decode import DecodeWorker
from workers.errors import NotAllowed, WorkerFull
from workers.messages import RetractControl, RetractReport
from workers.service import codec
from workers.service.parking import GuestRoom, PeerTier
from workers.service.peers import Peers
from workers.service.recompute import PrefillAgain
from workers.service.status import abort_with, request_error_of
from workers.service.stubs import worker_pb2 as pb
from workers.service.stubs import worker_pb2_grpc

T = TypeVar("T")

ENGINE_S = 10.0
"""Longest wait for the engine thread's answer to a command; it answers between two steps."""


class Neighbours:
    """Everything of one decode worker that has to do with other workers."""

    def __init__(self, peers: Peers, guests: GuestRoom, tier: PeerTier, again: PrefillAgain, sender: KVSender) -> None:
        self.peers, self.guests, self.tier, self.again, self.sender = peers, guests, tier, again, sender

    def attach(self, receiver: KVReceiver, kv_address: str) -> None:
        """Before the server starts."""
        self.peers.receiver, self.peers.kv_address = receiver, kv_address

    def takes(self, received: ReceivedImage) -> bool:
        """Whether an arrived image is no hand-off of a router."""
        return self.peers.takes(received) or self.guests.takes(received)

    def takes_loss(self, grant: GrantInfo, reason: str) -> bool:
        """Whether a lost transfer was no hand-off of a router."""
        return self.peers.takes_loss(grant, reason) or self.guests.takes_loss(grant)

    async def close(self) -> None:
        """After the engine thread has ended."""
        await self.again.close()
        await self.tier.end()
        await self.peers.close()
        await self.sender.close()


class ControlServicer(worker_pb2_grpc.DecodeServiceServicer):
    """The part of `DecodeService` that routers do not call."""

    worker: DecodeWorker
    neighbours: Neighbours

    async def SetRetractControl(  # noqa: N802
        self, call: pb.RetractControlCall, context: grpc.aio.ServicerContext
    ) -> pb.RetractControlReply:
        async def run() -> None:
            if not self.worker.config.allow_retract_control:
                raise NotAllowed("this worker was not started with allow_retract_control")
            await self.control(codec.control_from_wire(call))

        await _served(run, context)
        return pb.RetractControlReply()

    async def GetRetractReport(  # noqa: N802
        self, call: pb.RetractReportCall, context: grpc.aio.ServicerContext
    ) -> pb.RetractReportReply:
        report = await _served(lambda: self.retract_report(reset=call.reset), context)
        return codec.report_to_wire(report)

    async def SetPeers(self, call: pb.PeersCall, context: grpc.aio.ServicerContext) -> pb.PeersReply:  # noqa: N802
        self.neighbours.peers.set(call.prefill, call.decode)
        return pb.PeersReply()

    async def GrantPark(self, call: pb.ParkCall, context: grpc.aio.ServicerContext) -> pb.Grant:  # noqa: N802
        async def run() -> pb.Grant:
            guests, peers = self.neighbours.guests, self.neighbours.peers
            guests.reserve(call.image_id, call.num_tokens)
            try:
                info = peers.receiver.grant(call.image_id, call.epoch, call.num_tokens)
                if info is None:
                    raise WorkerFull("KV landing memory is full")
            except Exception:
                guests.forget(call.image_id)
                raise
            return codec.grant_to_wire(peers.grant_of(info))

        return await _served(run, context)

    async def ReturnPark(self, call: pb.ReturnCall, context: grpc.aio.ServicerContext) -> pb.ReturnReply:  # noqa: N802
        grant = codec.grant_from_wire(call.grant)
        neighbours = self.neighbours
        await _served(lambda: neighbours.guests.give_back(call.image_id, neighbours.sender, grant), context)
        return pb.ReturnReply()

    async def ForgetPark(self, call: pb.ForgetCall, context: grpc.aio.ServicerContext) -> pb.ForgetReply:  # noqa: N802
        self.neighbours.guests.forget(call.image_id)
        return pb.ForgetReply()

    async def control(self, control: RetractControl) -> None:
        """Forces retracts from the next step on."""
        await _answer(self.worker.control(control))

    async def retract_report(self, *, reset: bool) -> RetractReport:
        """What was retracted and resumed."""
        return await _answer(self.worker.retract_report(reset=reset))


async def _served(run: Callable[[], Awaitable[T]], context: grpc.aio.ServicerContext) -> T:
    """Result of one call; its failure ends the call with the error that a client can read."""
    try:
        return await run()
    except Exception as exc:
        await abort_with(context, request_error_of(exc))
        raise


async def _answer(future: Future[T]) -> T:
    """Result of a command of the engine thread."""
    async with asyncio.timeout(ENGINE_S):
        return await asyncio.wrap_future(future)
