"""`KVSender`: pushes one request's KV rows to the decode worker that granted them.

Owns: channels by address, one stream per attempt, credit, deadlines, the trace of every segment. `KVStream.enqueue` and
`finish` may be called from the prefill engine's thread and return at once, so that rows of one chunk travel while the
next chunk computes; everything else runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass

import grpc
import grpc.aio
import torch

from kvstore.checksum import CHECKSUM_NAME, checksum
from kvstore.config import KVStoreConfig
from kvstore.errors import TransferAborted, TransferError, TransferRefused, TransferTimeout, TransferUnavailable
from kvstore.spec import KVSpec, RowRange
from kvstore.transfer.relay import LoopRelay
from kvstore.transfer.stubs.kv_transfer_pb2 import Abort, Commit, Open, PushReply, PushRequest, Renew
from kvstore.transfer.wire import (
    PUSH_METHOD,
    WIRE_VERSION,
    channel_options,
    code_name,
    encode_request,
    encode_segment,
)

_BROKEN_STREAM = (grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What grpc.aio raises on a stream that ended: by status, by misuse, or because the call is over."""


@dataclass(slots=True)
class SegmentTrace:
    """When one segment was where; seconds of the sender's clock. The segment is on the wire in [sent_s, acked_s)."""

    place: RowRange
    enqueued_s: float
    sent_s: float = 0.0
    acked_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TransferResult:
    """A committed attempt."""

    num_segments: int
    num_bytes: int
    seconds: float
    traces: tuple[SegmentTrace, ...]


@dataclass(slots=True)
class _Item:
    place: RowRange
    rows: torch.Tensor
    trace: SegmentTrace


@dataclass(frozen=True, slots=True)
class _Finish:
    tail: bytes


class KVSender:
    """Streams to any number of decode workers; one channel per address."""

    def __init__(
        self,
        spec: KVSpec,
        config: KVStoreConfig,
        *,
        model_hash: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create on the event loop that will run the streams. `clock` only stamps traces."""
        self.spec, self.config, self.model_hash = spec, config, model_hash
        self.relay = LoopRelay()
        self._clock = clock
        self._channels: dict[str, grpc.aio.Channel] = {}

    @contextlib.asynccontextmanager
    async def open(self, address: str, request_id: str, epoch: int, num_tokens: int) -> AsyncIterator[KVStream]:
        """A stream under the grant (request, epoch). Leaving the block without a commit aborts the attempt.

        Raises:
            TransferRefused, TransferTimeout, TransferUnavailable.
        """
        stream = await self.open_stream(address, request_id, epoch, num_tokens)
        try:
            yield stream
        finally:
            await stream.close()

    async def open_stream(self, address: str, request_id: str, epoch: int, num_tokens: int) -> KVStream:
        """As `open`, for a stream that outlives the caller's frame: the owner must await `KVStream.close`."""
        stream = KVStream(self._channel(address), self, request_id, epoch, num_tokens, self._clock)
        try:
            await stream.start()
        except BaseException:
            await stream.close()
            raise
        return stream

    def _channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            self._channels[address] = grpc.aio.insecure_channel(address, options=channel_options(self.config))
        return self._channels[address]

    async def close(self) -> None:
        """Close every channel; open streams fail."""
        channels, self._channels = list(self._channels.values()), {}
        for channel in channels:
            await channel.close()
        await self.relay.close()


class KVStream:
    """One attempt. Fails once: after the first error every wait raises that error."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        sender: KVSender,
        request_id: str,
        epoch: int,
        num_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        """Use `KVSender.open`."""
        self.spec, self._config, self._model_hash = sender.spec, sender.config, sender.model_hash
        self.request_id, self.epoch, self.num_tokens = request_id, epoch, num_tokens
        self._relay, self._clock = sender.relay, clock
        self._loop = asyncio.get_running_loop()
        self._call = channel.stream_stream(
            PUSH_METHOD, request_serializer=encode_request, response_deserializer=PushReply.FromString
        )()
        self._queue: asyncio.Queue[_Item | _Finish] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.Task[None] | None = None
        self._done: asyncio.Future[TransferResult] = self._loop.create_future()
        self._unacked: dict[int, _Item] = {}
        self._unacked_bytes = self._credit = 0
        self._queued_bytes = 0
        self._lease_s = self._config.lease_s
        self._progress = asyncio.Event()
        self._started_s = clock()
        self._traces: list[SegmentTrace] = []
        self._abort_reason: str | None = None
        self._num_bytes = 0

    @property
    def queued_bytes(self) -> int:
        """Bytes enqueued and not yet acknowledged: host memory that the stream keeps alive."""
        return self._queued_bytes

    @property
    def traces(self) -> tuple[SegmentTrace, ...]:
        """One entry per segment sent so far, in order."""
        return tuple(self._traces)

    async def start(self) -> None:
        """Send the header and wait for the receiver's credit."""
        open_ = Open(
            version=WIRE_VERSION,
            request_id=self.request_id,
            epoch=self.epoch,
            num_tokens=self.num_tokens,
            payload_bytes=self.spec.image_bytes(self.num_tokens),
            fingerprint=self.spec.fingerprint,
            model_hash=self._model_hash,
            checksum_name=CHECKSUM_NAME,
        )
        deadline = self._config.connect_timeout_s
        try:
            async with asyncio.timeout(deadline):
                await self._call.write(PushRequest(open=open_))
                reply = await self._call.read()
        except TimeoutError as exc:
            raise self._timeout(f"no answer to Open in {deadline} s") from exc
        except _BROKEN_STREAM as exc:
            raise self._unavailable(exc) from exc
        if reply is grpc.aio.EOF:
            raise self._unavailable("the receiver closed the stream")
        if reply.WhichOneof("kind") == "refused":
            raise self._refusal(reply)
        self._credit, self._lease_s = reply.opened.credit_bytes, reply.opened.lease_s
        self._reader = self._loop.create_task(self._guard(self._read_all()), name="kv-acks")
        self._writer = self._loop.create_task(self._run_writer(), name="kv-send")

    def enqueue(self, place: RowRange, rows: torch.Tensor) -> None:
        """Queue rows, uint8 [layers, rows, row_bytes] in host memory, unchanged until acknowledged. Any thread.

        Ranges longer than one message are split. Errors surface in `committed`.
        """
        self.enqueue_chunk([(place, rows)])

    def enqueue_chunk(self, pieces: Iterable[tuple[RowRange, torch.Tensor]]) -> None:
        """`enqueue` for all rows of a chunk, in one hand-over. Any thread."""
        items = [item for place, rows in pieces for item in self._items(place, rows)]
        self._relay.post(lambda: self._put(items))

    def finish(self, tail: bytes) -> None:
        """No more rows: commit with these opaque bytes once all rows are acknowledged. Any thread."""
        self._relay.post(lambda: self._queue.put_nowait(_Finish(tail)))

    def _put(self, items: list[_Item]) -> None:
        if self._done.done():
            return
        for item in items:
            self._queued_bytes += item.place.length
            self._queue.put_nowait(item)

    def _items(self, place: RowRange, rows: torch.Tensor) -> list[_Item]:
        now = self._clock()
        return [_Item(piece, part, SegmentTrace(piece, now)) for piece, part in self._pieces(place, rows)]

    def _pieces(self, place: RowRange, rows: torch.Tensor) -> list[tuple[RowRange, torch.Tensor]]:
        if rows.numel() != place.length or rows.dtype != torch.uint8:
            raise ValueError(f"{place}: {tuple(rows.shape)} {rows.dtype} is not {place.length} bytes")
        limit = min(self._config.max_segment_bytes, self._credit)
        if place.length <= limit:
            return [(place, rows.contiguous())]
        split = self.spec.split(place.pool, range(place.row_start, place.row_end), self.num_tokens, limit)
        shaped = rows.view(-1, place.num_rows, self.spec.pool(place.pool).row_bytes)
        first = place.row_start
        return [(p, shaped[:, p.row_start - first : p.row_end - first].contiguous()) for p in split]

    async def send(self, place: RowRange, rows: torch.Tensor) -> None:
        """Queue rows and wait until at most one credit of bytes is unacknowledged: back-pressure for async callers."""
        self._put(self._items(place, rows))
        while self._queued_bytes > self._credit:
            await self._wait_progress("an acknowledgement")

    async def commit(self, tail: bytes) -> TransferResult:
        """`finish`, then `committed`."""
        self.finish(tail)
        return await self.committed()

    async def committed(self) -> TransferResult:
        """Wait for the receiver's commit. Bounded: the stream's own tasks end it when the receiver stalls.

        Raises:
            TransferError: whatever ended the attempt.
        """
        return await asyncio.shield(self._done)

    async def abort(self, reason: str) -> None:
        """Give the attempt up and tell the receiver, which frees its memory. Idempotent."""
        if not self._done.done():
            self._abort_reason = reason
            self._fail(TransferAborted(reason, request_id=self.request_id, epoch=self.epoch))
            if self._writer is not None:
                await asyncio.wait([self._writer], timeout=self._config.connect_timeout_s)
        await self._stop()

    async def close(self) -> None:
        """End the stream. Without a commit this aborts the attempt."""
        await self.abort("the sender closed the stream before its commit")

    async def _stop(self) -> None:
        tasks = [task for task in (self._reader, self._writer) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._call.cancel()

    def _fail(self, error: TransferError) -> bool:
        """Record the attempt's one error; `False` when it has ended already."""
        if self._done.done():
            return False
        self._done.set_exception(error)
        self._done.exception()  # retrieved: an owner that never waits must not cause a log line
        while not self._queue.empty():
            self._queue.get_nowait()
        self._unacked.clear()
        self._queued_bytes = 0
        self._queue.put_nowait(_Finish(b""))  # wakes the writer
        self._progress.set()
        return True

    async def _run_writer(self) -> None:
        await self._guard(self._write_all())
        if self._abort_reason is not None:
            with contextlib.suppress(*_BROKEN_STREAM, TimeoutError):
                await self._write(PushRequest(abort=Abort(reason=self._abort_reason)))
                await self._call.done_writing()

    async def _guard(self, work: Coroutine[None, None, None]) -> None:
        """Run one direction of the stream; whatever ends it becomes the attempt's error."""
        try:
            await work
        except TransferError as exc:
            self._fail(exc)
        except TimeoutError:
            self._fail(self._timeout(f"the receiver made no progress in {self._config.stall_timeout_s} s"))
        except _BROKEN_STREAM as exc:
            # A refusal may still wait to be read; it says more than the broken stream that follows it.
            if self._reader is not None and asyncio.current_task() is not self._reader:
                await asyncio.wait([self._reader], timeout=self._config.connect_timeout_s)
            self._fail(self._unavailable(exc))

    async def _write_all(self) -> None:
        seq = 0
        while True:
            item = await self._next_item()
            if self._done.done():
                self._done.result()
            if isinstance(item, _Finish):
                break
            while self._unacked_bytes and self._unacked_bytes + item.place.length > self._credit:
                await self._wait_progress("credit")
            payload = item.rows.view(-1).numpy().data
            message = encode_segment(item.place, seq, checksum(payload), payload)
            self._unacked[seq] = item
            self._unacked_bytes += item.place.length
            self._traces.append(item.trace)
            item.trace.sent_s = self._clock()
            await self._write(message)
            self._num_bytes += item.place.length
            seq += 1
        while self._unacked:
            await self._wait_progress("acknowledgements")
        commit = Commit(num_segments=seq, num_bytes=self._num_bytes, tail=item.tail, tail_checksum=checksum(item.tail))
        await self._write(PushRequest(commit=commit))
        async with asyncio.timeout(self._config.stall_timeout_s):
            await asyncio.shield(self._done)

    async def _next_item(self) -> _Item | _Finish:
        """The next queued item; keeps the lease alive while the engine computes."""
        while self._queue.empty():
            try:
                async with asyncio.timeout(self._lease_s / 3):
                    return await self._queue.get()
            except TimeoutError:
                await self._write(PushRequest(renew=Renew()))
        return self._queue.get_nowait()

    async def _write(self, message: PushRequest | bytes) -> None:
        async with asyncio.timeout(self._config.stall_timeout_s):
            await self._call.write(message)

    async def _wait_progress(self, what: str) -> None:
        if self._done.done():
            self._done.result()
        self._progress.clear()
        deadline = self._config.stall_timeout_s
        try:
            async with asyncio.timeout(deadline):
                await self._progress.wait()
        except TimeoutError as exc:
            raise self._timeout(f"no {what} in {deadline} s") from exc
        if self._done.done():
            self._done.result()

    async def _read_all(self) -> None:
        while True:
            reply = await self._call.read()
            if reply is grpc.aio.EOF:
                raise self._unavailable("the receiver closed the stream")
            kind = reply.WhichOneof("kind")
            if kind == "ack":
                self._acknowledge(reply.ack.seq)
            elif kind == "committed":
                seconds = self._clock() - self._started_s
                totals = (reply.committed.num_segments, reply.committed.num_bytes)
                if not self._done.done():
                    self._done.set_result(TransferResult(*totals, seconds, self.traces))
                    self._progress.set()
                return
            elif kind == "refused":
                raise self._refusal(reply)

    def _acknowledge(self, seq: int) -> None:
        item = self._unacked.pop(seq, None)
        if item is None:
            return
        item.trace.acked_s = self._clock()
        self._unacked_bytes -= item.place.length
        self._queued_bytes -= item.place.length
        self._progress.set()

    def _refusal(self, reply: PushReply) -> TransferRefused:
        code = code_name(reply.refused.code)
        return TransferRefused(reply.refused.message, request_id=self.request_id, epoch=self.epoch, code=code)

    def _timeout(self, message: str) -> TransferTimeout:
        return TransferTimeout(message, request_id=self.request_id, epoch=self.epoch)

    def _unavailable(self, cause: object) -> TransferUnavailable:
        text = f"{cause.code().name}: {cause.details()}" if isinstance(cause, grpc.aio.AioRpcError) else str(cause)
        return TransferUnavailable(text, request_id=self.request_id, epoch=self.epoch)
