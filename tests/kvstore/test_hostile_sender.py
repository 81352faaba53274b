"""Senders that do not keep the contract: the receiver refuses them by name and nothing leaks."""

from __future__ import annotations

import asyncio
import threading

import grpc
import grpc.aio
import pytest
import torch

from kvstore.checksum import checksum
from kvstore.config import KVStoreConfig
from kvstore.transfer import receiver
from kvstore.transfer.stubs.kv_transfer_pb2 import Commit, Open, PushRequest, Renew, SegmentHeader
from kvstore.transfer.wire import PUSH_METHOD
from tests.kvstore.peers import (
    SMALL,
    N,
    decode_worker,
    opening_of,
    prefill_worker,
    prompt_image,
    raw_open,
    raw_segment,
    raw_stream,
    send_all,
)


async def test_duplicates_and_reversed_order_are_harmless_on_the_wire() -> None:
    image = prompt_image()
    count = len(image.header.segments)
    async with decode_worker() as decode, raw_stream(decode) as call:
        decode.grant()
        assert (await raw_open(call, decode)).opened.credit_bytes == SMALL.credit_bytes
        duplicates = 0
        for index in reversed(range(count)):
            for _ in range(2):
                await call.write(raw_segment(image, index))
                reply = await call.read()
                assert reply.ack.seq == index
                duplicates += reply.ack.duplicate
        assert duplicates == count == decode.receiver.stats().duplicates
        commit = Commit(num_segments=count, num_bytes=decode.spec.live_bytes(N), tail_checksum=checksum(b""))
        await call.write(PushRequest(commit=commit))
        assert (await call.read()).committed.num_segments == count
        with await decode.images.get() as received:
            received.image.verify()
            assert torch.equal(received.image.payload, image.payload)


async def test_a_bit_flip_on_the_wire_is_refused_and_reported() -> None:
    image = prompt_image()
    async with decode_worker() as decode, raw_stream(decode) as call:
        decode.grant()
        await raw_open(call, decode)
        await call.write(raw_segment(image, 0, flip=True))
        reply = await call.read()
        assert "checksum" in reply.refused.message
        assert "checksum" in (await decode.lost.get())[1]
        assert decode.receiver.stats().checksum_failures == 1
        decode.assert_empty()


async def test_a_sender_that_ignores_its_credit_is_refused() -> None:
    image = prompt_image()
    config = KVStoreConfig(landing_budget_bytes=4 << 20, credit_bytes=20_000, segment_bytes=20_000)
    async with decode_worker(config) as decode, raw_stream(decode) as call:
        decode.grant()
        place = decode.spec.place(image.header.segments[0].place.pool, N - 128, N, N)
        await raw_open(call, decode)
        header = SegmentHeader(
            pool=place.pool.value, row_start=N - 128, row_end=N, offset=place.offset, length=place.length
        )
        await call.write(PushRequest(segment=header, payload=bytes(place.length)))
        assert "credit 20000" in (await call.read()).refused.message
        decode.assert_empty()


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (PushRequest(renew=Renew()), "not open"),
        (PushRequest(), "not open"),
        (PushRequest(segment=SegmentHeader(pool="c4")), "not open"),
        (PushRequest(open=Open(version=99)), "version 99"),
    ],
)
async def test_a_stream_that_begins_wrongly_is_refused(request_: PushRequest, named: str) -> None:
    async with decode_worker() as decode, raw_stream(decode) as call:
        await call.write(request_)
        assert named in (await call.read()).refused.message


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (PushRequest(open=Open()), "unexpected message open"),
        (PushRequest(), "unexpected message None"),
        (PushRequest(segment=SegmentHeader(pool="mtp_window")), "unknown pool 'mtp_window'"),
        (PushRequest(commit=Commit(tail=b"x", tail_checksum=1)), "tail checksum"),
    ],
)
async def test_a_stream_that_goes_on_wrongly_is_refused(request_: PushRequest, named: str) -> None:
    async with decode_worker() as decode, raw_stream(decode) as call:
        decode.grant()
        await raw_open(call, decode)
        await call.write(request_)
        assert named in (await call.read()).refused.message
        assert named in (await decode.lost.get())[1]
        decode.assert_empty()


async def test_garbage_bytes_end_only_their_own_stream() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        async with grpc.aio.insecure_channel(decode.address) as channel:
            call = channel.stream_stream(PUSH_METHOD)()
            await call.write(b"\xff\xfe not a message")
            with pytest.raises(grpc.RpcError):
                await call.read()
                await call.read()
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            await send_all(stream, image)
            await stream.commit(b"")
        (await decode.images.get()).release()
        decode.assert_empty()


async def test_segments_still_waiting_for_the_landing_thread_do_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "INLINE_BYTES", 0)
    image = prompt_image()
    busy = threading.Event()
    async with decode_worker() as decode, raw_stream(decode) as call:
        decode.grant()
        occupied = decode.receiver._thread.submit(busy.wait, 10.0)
        await raw_open(call, decode)
        landing = decode.receiver._table._current["r"]
        for index in range(3):
            await call.write(raw_segment(image, index))
        while landing.in_flight < 3:
            await asyncio.sleep(0)
        call.cancel()
        await decode.lost.get()
        assert landing.in_flight == 1, "only the copy that was handed to the thread still counts"
        busy.set()
        await asyncio.to_thread(occupied.result)
        await asyncio.to_thread(decode.receiver._thread.submit(int).result)
        decode.assert_empty()
        assert decode.receiver.stats().late == 1


async def test_a_cancel_while_the_stream_ends_still_frees_the_landing(monkeypatch: pytest.MonkeyPatch) -> None:
    ending = asyncio.Event()

    async def stop_for_ever(self: object) -> None:
        ending.set()
        await asyncio.Event().wait()

    class GoneSender:
        """A gRPC context whose sender opened the stream and left."""

        def __init__(self, opening: PushRequest) -> None:
            self.messages = [opening]

        async def read(self) -> object:
            return self.messages.pop() if self.messages else grpc.aio.EOF

        async def write(self, reply: object) -> None:
            return None

    monkeypatch.setattr("kvstore.transfer.receiver._InboundStream.stop", stop_for_ever)
    async with decode_worker() as decode:
        decode.grant()
        handler = asyncio.create_task(decode.receiver._push(None, GoneSender(opening_of(decode))))  # type: ignore[arg-type]
        await ending.wait()
        handler.cancel()
        with pytest.raises(asyncio.CancelledError):
            await handler
        assert (await decode.lost.get())[0].request_id == "r"
        decode.assert_empty()
