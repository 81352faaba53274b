"""gRPC front of a prefill worker: one call computes a prompt while its rows stream to the decode worker of the grant.

Owns: the KV stream of each call and the order submit -> rows -> tail -> commit -> release, and that whatever ends a
call early (cancel, failure, deadline) frees the prompt. Runs on the event loop; rows go from the engine thread straight
into the stream's queue, so the rows of one chunk travel while the next chunk computes.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from kvstore.errors import SpecMismatch
from kvstore.transfer.overlap import measure_overlap
from kvstore.transfer.sender import KVSender, KVStream, TransferResult
from workers.errors import RequestError
from workers.messages import GenerateRequest, Grant, PrefillResult
from workers.prefill import Prefilled, PrefillWorker, Rows
from workers.service import codec
from workers.service.status import abort_with, request_error_of
from workers.service.stubs import worker_pb2 as pb
from workers.service.stubs import worker_pb2_grpc

ENGINE_S = 30.0
"""Longest wait for the engine thread's answer to a command; it answers between two steps."""


class _StreamSink:
    """Feeds one prompt's rows into its KV stream. Called on the engine thread."""

    def __init__(self, stream: KVStream, loop: asyncio.AbstractEventLoop) -> None:
        self._stream = stream
        self._loop = loop
        self.computed: asyncio.Future[Prefilled] = loop.create_future()

    def rows(self, rows: Rows) -> None:
        self._stream.enqueue_chunk(rows)

    def done(self, result: Prefilled) -> None:
        self.rows(result.rows)
        assert result.first.token_id is not None
        tail = (result.first.token_id, result.first.logprob, result.expert_uses)
        self._stream.finish(codec.first_token_to_bytes(*tail))
        self._loop.call_soon_threadsafe(self._set_result, result)

    def failed(self, error: RequestError) -> None:
        self._loop.call_soon_threadsafe(self._set_error, error)

    def _set_result(self, result: Prefilled) -> None:
        if not self.computed.done():
            self.computed.set_result(result)

    def _set_error(self, error: RequestError) -> None:
        if not self.computed.done():
            self.computed.set_exception(error)


class TransferCounters:
    """What left this worker. Event loop only."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_segments = 0
        self.send_s = 0.0
        self.hidden_s = 0.0


class PrefillServicer(worker_pb2_grpc.PrefillServiceServicer):
    """Serves `PrefillService` over one worker."""

    def __init__(self, worker: PrefillWorker, sender: KVSender) -> None:
        self.worker = worker
        self.counters = TransferCounters()
        self._sender = sender
        self.last_transfer: TransferResult | None = None
        """Traces of the last committed image, for benchmarks."""

    async def Prefill(self, call: pb.PrefillCall, context: grpc.aio.ServicerContext) -> pb.PrefillReply:  # noqa: N802
        try:
            request = codec.request_from_wire(call.request)
            result = await self.prefill(request, codec.grant_from_wire(call.grant))
        except Exception as exc:
            await abort_with(context, request_error_of(exc))
            raise
        return codec.result_to_wire(result)

    async def Abort(self, call: pb.AbortCall, context: grpc.aio.ServicerContext) -> pb.AbortReply:  # noqa: N802
        try:
            await _within(self.worker.abort(call.request_id), ENGINE_S)
        except Exception as exc:
            await abort_with(context, request_error_of(exc))
        return pb.AbortReply()

    async def prefill(self, request: GenerateRequest, grant: Grant) -> PrefillResult:
        """Computes and hands over one prompt. Raises `RequestError` or `KVStoreError`; nothing is held then."""
        if grant.fingerprint != self._sender.spec.fingerprint:
            raise SpecMismatch("layout fingerprint", self._sender.spec.fingerprint, grant.fingerprint)
        config = self.worker.config
        limit_s = min(request.deadline_s or config.request_timeout_s, config.request_timeout_s)
        async with asyncio.timeout(limit_s + ENGINE_S):
            stream = await self._sender.open_stream(
                grant.kv_address, request.request_id, request.epoch, len(request.prompt_ids)
            )
            try:
                return await self._run(request, stream)
            except BaseException:
                self.worker.abort(request.request_id, request.epoch)
                raise
            finally:
                await stream.close()

    async def _run(self, request: GenerateRequest, stream: KVStream) -> PrefillResult:
        sink = _StreamSink(stream, asyncio.get_running_loop())
        await _within(self.worker.submit(request, sink), ENGINE_S)
        committed = asyncio.ensure_future(stream.committed())
        waits: list[asyncio.Future[Any]] = [sink.computed, committed]
        try:
            # The stream may fail before the prompt is computed; the prompt may fail with the stream sound.
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if committed.done():
                committed.result()
            prefilled = await sink.computed
            transfer = await committed
        finally:
            committed.cancel()
            sink.computed.cancel()
        self.worker.release(request.request_id, request.epoch)
        self._count(transfer)
        return PrefillResult(
            request_id=request.request_id,
            epoch=request.epoch,
            num_prompt_tokens=len(request.prompt_ids),
            num_cached_tokens=prefilled.num_cached_tokens,
            prefill_s=prefilled.prefill_s,
            kv_bytes_sent=transfer.num_bytes,
        )

    def _count(self, transfer: TransferResult) -> None:
        on_wire = [(trace.sent_s, trace.acked_s) for trace in transfer.traces]
        counters = self.counters
        counters.num_bytes += transfer.num_bytes
        counters.num_segments += transfer.num_segments
        overlap = measure_overlap(on_wire, _since(min((sent for sent, _ in on_wire), default=0.0), self.worker))
        counters.send_s += overlap.transfer_s
        counters.hidden_s += overlap.hidden_s
        self.last_transfer = transfer


def _since(began_s: float, worker: PrefillWorker) -> list[tuple[float, float]]:
    """Steps that ended after `began_s`."""
    return [step for step in tuple(worker.engine.times.recent) if step[1] > began_s]


async def _within(future: object, limit_s: float) -> object:
    """Result of a future of the engine thread, within `limit_s`."""
    async with asyncio.timeout(limit_s):
        return await asyncio.wrap_future(future)  # type: ignore[arg-type]
