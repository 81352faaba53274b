"""`KVReceiver`: the gRPC side of a decode worker's landing memory.

Owns: streams in, acknowledgements out, the sweep that ends expired leases. The rules are `LandingTable`'s. Everything
async runs on the loop of the gRPC server; `grant`, `revoke`, `stats` and a `ReceivedImage`'s methods may be called from
any thread. Payloads are verified and copied on one landing thread while the loop reads the next message.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import grpc.aio

from kvstore.checksum import checksum
from kvstore.config import KVStoreConfig
from kvstore.errors import TransferRefused
from kvstore.spec import KVSpec, RowRange
from kvstore.transfer.landing import GrantInfo, Landing, LandingStats, LandingTable, ReceivedImage
from kvstore.transfer.stubs.kv_transfer_pb2 import Ack, Commit, Committed, Opened, PushReply, PushRequest, Refused
from kvstore.transfer.wire import PUSH_METHOD, WIRE_VERSION, SegmentMessage, decode_request, place_of

logger = logging.getLogger(__name__)

INLINE_BYTES = 128 << 10
"""Segments below this are landed on the loop: handing them to a thread costs more than the copy."""

_EXPECTED_ENDS = (Refused.REVOKED, Refused.STALE_EPOCH, Refused.LEASE_EXPIRED)
"""Ends that our own side caused or reported already: no `on_lost` from the stream."""

ImageCallback = Callable[[ReceivedImage], None]
LostCallback = Callable[[GrantInfo, str], None]


class KVReceiver:
    """Grants transfers and receives them."""

    def __init__(
        self,
        spec: KVSpec,
        config: KVStoreConfig,
        *,
        on_image: ImageCallback,
        on_lost: LostCallback | None = None,
        model_hash: str = "",
        pinned: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Reserve the landing budget.

        Args:
            on_image: gets each complete, verified image on the event loop and must not block; the image is its own to
                `release`. Check `is_current` again right before the rows go into the pools.
            on_lost: told, on the event loop, that an attempt ended without an image, and why (abort, broken stream,
                expired lease, refusal). Not called for `revoke` or a newer epoch.
            pinned: allocate landing memory for direct copies to a GPU.
        """
        self.config = config
        self._table = LandingTable(
            spec,
            model_hash=model_hash,
            budget_bytes=config.landing_budget_bytes,
            credit_bytes=config.credit_bytes,
            max_lease_s=config.max_lease_s,
            clock=clock,
            pinned=pinned,
        )
        self._on_image, self._on_lost = on_image, on_lost
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kv-landing")
        self._sweeper: asyncio.Task[None] | None = None

    def add_to_server(self, server: grpc.aio.Server) -> None:
        """Serve `Push` on a server made with `wire.channel_options`."""
        service, method = PUSH_METHOD.lstrip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(
            self._push, request_deserializer=decode_request, response_serializer=PushReply.SerializeToString
        )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))

    def start(self) -> None:
        """Begin to end expired leases, four times a lease. Call on the server's loop."""
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), name="kv-lease-sweep")

    async def close(self) -> None:
        """Stop sweeping and landing. The server must have stopped before."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._sweeper
            self._sweeper = None
        self._thread.shutdown(wait=True)

    def grant(self, request_id: str, epoch: int, num_tokens: int, lease_s: float | None = None) -> GrantInfo | None:
        """Permission for one attempt to send `num_tokens` tokens of KV; `None` when landing memory is full now.

        Raises:
            TransferRefused: STALE_EPOCH.
        """
        return self._table.grant(request_id, epoch, num_tokens, self.config.lease_s if lease_s is None else lease_s)

    def can_ever_grant(self, num_tokens: int) -> bool:
        """Whether an empty landing memory would hold this many tokens; if not, refuse the request for good."""
        return self._table.spec.image_bytes(num_tokens) <= self.config.landing_budget_bytes

    def revoke(self, request_id: str, epoch: int) -> bool:
        """End an attempt from our side; its sender is told. `False` when it is not current."""
        return self._table.revoke(request_id, epoch)

    def expire(self) -> list[GrantInfo]:
        """End attempts whose lease ran out. The sweep calls this; tests with their own clock do too."""
        expired = self._table.expire()
        for grant in expired:
            self._lost(grant, f"lease of {grant.lease_s} s expired")
        return expired

    def stats(self) -> LandingStats:
        """Counters and current use."""
        return self._table.stats()

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless landing memory is owned exactly once."""
        self._table.check_integrity()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self.config.lease_s / 4)
            self.expire()

    def _lost(self, grant: GrantInfo, reason: str) -> None:
        logger.info("request=%s epoch=%d kv transfer lost: %s", grant.request_id, grant.epoch, reason)
        if self._on_lost is not None:
            self._on_lost(grant, reason)

    async def _push(self, _requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        try:
            async with asyncio.timeout(self.config.connect_timeout_s):
                first = await context.read()
            landing = self._open(first)
        except TimeoutError:
            await self._refuse(context, Refused.PROTOCOL, "no Open message in time")
            return
        except TransferRefused as exc:
            await self._refuse(context, Refused.Code.Value(exc.code), str(exc))
            return
        stream = _InboundStream(self._table, landing, context, self.config, self._thread, self._on_image)
        refusal: TransferRefused | None = None
        try:
            await stream.run()
        except TransferRefused as exc:
            refusal = exc
        finally:
            # gRPC may cancel this handler while it already ends: what must happen stands in finally blocks.
            try:
                await stream.stop()
            finally:
                self._table.abort(landing, "the stream ended before its commit")
                if not stream.delivered and landing.close_code not in _EXPECTED_ENDS:
                    self._lost(landing.grant, landing.close_reason or "the image was not taken")
        if refusal is not None:
            await self._refuse(context, Refused.Code.Value(refusal.code), str(refusal))

    def _open(self, first: object) -> Landing:
        kind = first.WhichOneof("kind") if isinstance(first, PushRequest) else None
        if not isinstance(first, PushRequest) or kind != "open":
            raise TransferRefused(f"first message is {kind}, not open", request_id="", epoch=0, code="PROTOCOL")
        open_ = first.open
        if open_.version != WIRE_VERSION:
            text = f"wire version {open_.version}, this receiver speaks {WIRE_VERSION}"
            raise TransferRefused(text, request_id=open_.request_id, epoch=open_.epoch, code="PROTOCOL")
        return self._table.open(
            open_.request_id,
            open_.epoch,
            num_tokens=open_.num_tokens,
            fingerprint=open_.fingerprint,
            model_hash=open_.model_hash,
            checksum_name=open_.checksum_name,
        )

    async def _refuse(self, context: grpc.aio.ServicerContext, code: Refused.Code, message: str) -> None:
        logger.info("kv transfer refused: %s", message)
        reply = PushReply(refused=Refused(code=code, message=message))
        with contextlib.suppress(grpc.RpcError, grpc.aio.BaseError, TimeoutError):
            async with asyncio.timeout(self.config.stall_timeout_s):
                await context.write(reply)


class _InboundStream:
    """One open stream: a reader that admits, a lander that copies and answers in order."""

    def __init__(
        self,
        table: LandingTable,
        landing: Landing,
        context: grpc.aio.ServicerContext,
        config: KVStoreConfig,
        thread: ThreadPoolExecutor,
        on_image: ImageCallback,
    ) -> None:
        self._table, self._landing, self._context = table, landing, context
        self._config, self._thread, self._on_image = config, thread, on_image
        self._queue: asyncio.Queue[tuple[RowRange, SegmentMessage] | Ack | Commit | None] = asyncio.Queue()
        self._closed = asyncio.Event()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._closed.set)

        landing.wake = wake
        self._tasks: list[asyncio.Task[Any]] = []
        self.delivered = False

    async def run(self) -> None:
        """Until the commit was answered or the sender left. Raises `TransferRefused` when the attempt ended early."""
        grant = self._landing.grant
        await self._write(PushReply(opened=Opened(credit_bytes=grant.credit_bytes, lease_s=grant.lease_s)))
        reader = asyncio.create_task(self._read())
        lander = asyncio.create_task(self._land())
        closed = asyncio.create_task(self._closed.wait())
        self._tasks = [reader, lander, closed]
        pending: set[asyncio.Task[Any]] = {reader, lander, closed}
        while lander in pending and closed in pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        if lander in pending:
            raise self._table.closed(self._landing)

    async def stop(self) -> None:
        """End what still runs and give up admitted segments that nobody will land."""
        self._landing.wake = None
        for task in self._tasks:
            task.cancel()
        try:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        finally:
            while not self._queue.empty():
                item = self._queue.get_nowait()
                if isinstance(item, tuple):
                    self._table.drop(self._landing, item[0])

    async def _read(self) -> None:
        while True:
            message = await self._context.read()
            if message is grpc.aio.EOF:
                self._queue.put_nowait(None)
                return
            if isinstance(message, SegmentMessage):
                self._admit(message)
                continue
            kind = message.WhichOneof("kind")
            if kind == "renew":
                self._table.renew(self._landing)
            elif kind == "abort":
                self._table.abort(self._landing, f"the sender gave up: {message.abort.reason}")
                self._queue.put_nowait(None)
                return
            elif kind == "commit":
                self._queue.put_nowait(message.commit)
                return
            else:
                raise self._protocol_error(f"unexpected message {kind}")

    def _admit(self, message: SegmentMessage) -> None:
        header = message.header
        place = place_of(header)
        if place is None:
            raise self._protocol_error(f"unknown pool {header.pool!r}")
        if self._table.accept(self._landing, place, len(message.payload)):
            self._queue.put_nowait((place, message))
        else:
            self._queue.put_nowait(Ack(seq=header.seq, length=place.length, duplicate=True))

    def _protocol_error(self, text: str) -> TransferRefused:
        grant = self._landing.grant
        self._table.abort(self._landing, text)
        return TransferRefused(text, request_id=grant.request_id, epoch=grant.epoch, code="PROTOCOL")

    async def _land(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            item = await self._queue.get()
            if item is None:
                return
            if isinstance(item, Commit):
                await self._commit(item)
                return
            if isinstance(item, Ack):
                await self._write(PushReply(ack=item))
                continue
            place, message = item
            arguments = (self._landing, place, message.payload, message.header.checksum)
            if place.length < INLINE_BYTES:
                self._table.land(*arguments)
            else:
                copy = loop.run_in_executor(self._thread, self._table.land, *arguments)
                copy.add_done_callback(_retrieve)
                # Shielded: a stream that is cancelled here must not skip a copy that was admitted.
                await asyncio.shield(copy)
            await self._write(PushReply(ack=Ack(seq=message.header.seq, length=place.length)))

    async def _commit(self, commit: Commit) -> None:
        if checksum(commit.tail) != commit.tail_checksum:
            raise self._protocol_error("tail checksum does not match")
        image = self._table.commit(
            self._landing, num_segments=commit.num_segments, num_bytes=commit.num_bytes, tail=commit.tail
        )
        try:
            self._on_image(image)
        except Exception:
            logger.exception("request=%s epoch=%d image callback failed", image.request_id, image.epoch)
            image.release()
            raise self._protocol_error("the receiver could not take the image") from None
        self.delivered = True
        await self._write(PushReply(committed=Committed(num_segments=commit.num_segments, num_bytes=commit.num_bytes)))

    async def _write(self, reply: PushReply) -> None:
        async with asyncio.timeout(self._config.stall_timeout_s):
            await self._context.write(reply)


def _retrieve(copy: asyncio.Future[None]) -> None:
    """Look at the outcome, so that a refusal that nobody waits for any more is not logged as unhandled."""
    if not copy.cancelled():
        copy.exception()
