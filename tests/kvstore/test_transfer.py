"""The whole hand-off over a loopback socket: sender, wire, receiver, image, and every way it can end early."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

import grpc.aio
import pytest
import torch

from kvstore.config import KVStoreConfig
from kvstore.errors import TransferAborted, TransferRefused, TransferTimeout, TransferUnavailable
from kvstore.transfer import receiver
from kvstore.transfer.landing import ReceivedImage
from kvstore.transfer.sender import KVSender
from kvstore.transfer.stubs.kv_transfer_pb2 import PushReply, Refused
from kvstore.transfer.wire import PUSH_METHOD
from tests.kvstore.layouts import small_spec
from tests.kvstore.peers import SMALL, N, decode_worker, prefill_worker, prompt_image, raw_open, raw_stream, send_all


@pytest.mark.parametrize("inline_bytes", [0, receiver.INLINE_BYTES])
async def test_an_image_crosses_bit_for_bit_with_its_tail(inline_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "INLINE_BYTES", inline_bytes)
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            await send_all(stream, image)
            result = await stream.commit(b"first token and logprobs")
        with await decode.images.get() as received:
            received.image.verify()
            assert torch.equal(received.image.payload, image.payload)
            assert received.tail == b"first token and logprobs"
            assert (received.request_id, received.epoch, received.is_current) == ("r", 0, True)
        assert result.num_segments == len(image.header.segments)
        assert result.num_bytes == decode.spec.live_bytes(N) == decode.receiver.stats().landed_bytes
        decode.assert_empty()


async def test_chunks_enqueued_from_the_engines_thread_arrive_while_it_goes_on() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            first_landed = threading.Event()
            spec = decode.spec

            def engine() -> None:
                edges = [0, 128, 256, N]
                for start, end in zip(edges, edges[1:], strict=False):
                    for place in spec.chunk_ranges(start, end, N, 20_000):
                        stream.enqueue(place, image.payload[place.offset : place.offset + place.length])
                    if start == 0:
                        assert first_landed.wait(5.0), "nothing arrived before the second chunk"
                for place in spec.tail_ranges(N, 20_000):
                    stream.enqueue(place, image.payload[place.offset : place.offset + place.length])
                stream.finish(b"tail")

            work = asyncio.create_task(asyncio.to_thread(engine))
            while decode.receiver.stats().segments == 0:
                await asyncio.sleep(0)
            first_landed.set()
            result = await stream.committed()
            await work
        with await decode.images.get() as received:
            received.image.verify()
            assert [t.place for t in result.traces][:1] == spec.chunk_ranges(0, 128, N, 20_000)[:1]
        assert all(t.enqueued_s <= t.sent_s <= t.acked_s for t in result.traces)


async def test_ranges_longer_than_a_message_are_split() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            for pool in decode.spec.pools:
                rows = pool.live_rows(N)
                place = decode.spec.place(pool.name, rows.start, rows.stop, N)
                parts = [s for s in image.header.segments if s.place.pool is pool.name]
                whole = torch.cat([image.segment_rows(s, decode.spec) for s in parts], dim=1)
                await stream.send(place, whole)
            await stream.commit(b"")
        with await decode.images.get() as received:
            received.image.verify()
            assert max(s.place.length for s in received.image.header.segments) <= 20_000
            assert torch.equal(received.image.payload, image.payload)


async def test_the_sender_never_has_more_than_its_credit_unacknowledged() -> None:
    image = prompt_image()
    config = KVStoreConfig(landing_budget_bytes=4 << 20, credit_bytes=20_000, segment_bytes=20_000)
    async with decode_worker(config) as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            for segment in image.header.segments:
                stream.enqueue(segment.place, image.segment_rows(segment, decode.spec))
            result = await stream.commit(b"")
        (await decode.images.get()).release()
        events = sorted(
            [(t.sent_s, 1, t.place.length) for t in result.traces]
            + [(t.acked_s, 0, -t.place.length) for t in result.traces]
        )
        in_flight = most = 0
        for _, _, change in events:
            in_flight += change
            most = max(most, in_flight)
        assert 0 < most <= 20_000


async def test_leaving_without_a_commit_frees_the_landing_and_tells_decode_why() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            await stream.send(image.header.segments[0].place, image.segment_rows(image.header.segments[0], decode.spec))
        grant, reason = await decode.lost.get()
        assert grant.request_id == "r" and "before its commit" in reason
        with pytest.raises(TransferAborted):
            await stream.committed()
        decode.assert_empty()


async def test_a_senders_abort_carries_its_reason() -> None:
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            await stream.abort("client went away")
            await stream.abort("client went away")
        assert "client went away" in (await decode.lost.get())[1]
        decode.assert_empty()


async def _handed_over(sender: KVSender) -> None:
    """Until all that was enqueued before has reached the loop."""
    reached = asyncio.Event()
    sender.relay.post(reached.set)
    await reached.wait()


async def test_a_failed_stream_keeps_no_rows_alive() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            segments = image.header.segments
            stream.enqueue_chunk((s.place, image.segment_rows(s, decode.spec).clone()) for s in segments)
            await _handed_over(sender)
            assert stream.queued_bytes > 0
            await stream.abort("client went away")
            stream.enqueue(segments[0].place, image.segment_rows(segments[0], decode.spec))
            await _handed_over(sender)
            assert stream.queued_bytes == 0 and stream._queue.qsize() <= 1


async def test_a_sender_that_vanishes_frees_the_landing() -> None:
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with raw_stream(decode) as call:
            await raw_open(call, decode)
            call.cancel()
        assert (await decode.lost.get())[0].request_id == "r"
        decode.assert_empty()
        assert sender.spec == decode.spec


async def test_revoking_ends_the_senders_stream() -> None:
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            assert decode.receiver.revoke("r", 0)
            with pytest.raises(TransferRefused, match="REVOKED"):
                await stream.committed()
        decode.assert_empty()
        assert decode.lost.empty()


async def test_a_newer_epoch_ends_the_older_stream_and_succeeds_itself() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant(epoch=0)
        async with sender.open(decode.address, "r", 0, N) as old:
            await old.send(image.header.segments[0].place, image.segment_rows(image.header.segments[0], decode.spec))
            decode.grant(epoch=1)
            async with sender.open(decode.address, "r", 1, N) as new:
                await send_all(new, image)
                await new.commit(b"")
            with pytest.raises(TransferRefused, match="STALE_EPOCH"):
                await old.commit(b"")
        with await decode.images.get() as received:
            assert received.epoch == 1
            received.image.verify()
        assert decode.images.empty()
        decode.assert_empty()


async def test_an_expired_lease_ends_the_stream_and_is_reported_once() -> None:
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            decode.clock.advance(SMALL.lease_s + 1)
            decode.receiver.expire()
            with pytest.raises(TransferRefused, match="LEASE_EXPIRED"):
                await stream.committed()
        assert "expired" in (await decode.lost.get())[1]
        decode.assert_empty()
        assert decode.lost.empty()


async def test_an_idle_sender_keeps_its_lease_alive() -> None:
    config = KVStoreConfig(landing_budget_bytes=4 << 20, lease_s=0.06, stall_timeout_s=5.0)
    image = prompt_image()
    async with decode_worker(config) as decode, prefill_worker(config) as sender:
        decode.grant()
        renewed = asyncio.Event()
        renew = decode.receiver._table.renew

        def noticed(landing: object) -> None:
            renew(landing)  # type: ignore[arg-type]
            renewed.set()

        decode.receiver._table.renew = noticed  # type: ignore[method-assign,assignment]
        async with sender.open(decode.address, "r", 0, N) as stream:
            await asyncio.wait_for(renewed.wait(), 5.0)
            await send_all(stream, image)
            await stream.commit(b"")
        (await decode.images.get()).release()


@pytest.mark.parametrize(
    ("spec_fmt", "model_hash", "named"), [("fp32", "weights", "fingerprint"), ("fp8", "other", "model hash")]
)
async def test_a_foreign_sender_is_refused_with_both_values(spec_fmt: str, model_hash: str, named: str) -> None:
    async with decode_worker() as decode:
        decode.grant()
        foreign = KVSender(small_spec(spec_fmt), SMALL, model_hash=model_hash)  # type: ignore[arg-type]
        with pytest.raises(TransferRefused, match="SPEC_MISMATCH") as info:
            await foreign.open_stream(decode.address, "r", 0, N)
        assert named in str(info.value)
        ours = decode.spec.fingerprint if named == "fingerprint" else "weights"
        theirs = foreign.spec.fingerprint if named == "fingerprint" else "other"
        assert ours in str(info.value) and theirs in str(info.value)
        await foreign.close()


async def test_a_stream_without_a_grant_is_refused() -> None:
    async with decode_worker() as decode, prefill_worker() as sender:
        with pytest.raises(TransferRefused, match="NO_GRANT"):
            await sender.open_stream(decode.address, "r", 0, N)


async def test_a_commit_that_lacks_rows_is_refused_by_name() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            for segment in image.header.segments[:-1]:
                await stream.send(segment.place, image.segment_rows(segment, decode.spec))
            with pytest.raises(TransferRefused, match="GAP.*c128_state.*missing"):
                await stream.commit(b"")
        assert "c128_state" in (await decode.lost.get())[1]
        decode.assert_empty()


async def test_nobody_listening_is_unavailable() -> None:
    async with decode_worker() as decode:
        address = decode.address
    async with prefill_worker() as sender:
        with pytest.raises(TransferUnavailable):
            await sender.open_stream(address, "r", 0, N)


async def test_a_receiver_that_dies_in_mid_stream_is_unavailable() -> None:
    async with decode_worker() as decode, prefill_worker() as sender:
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            await decode.server.stop(None)
            with pytest.raises(TransferUnavailable):
                await stream.commit(b"")


async def test_a_callback_that_fails_refuses_the_transfer_and_frees_the_image() -> None:
    image = prompt_image()

    def broken(received: ReceivedImage) -> None:
        raise RuntimeError("no room in the engine")

    async with decode_worker() as decode, prefill_worker() as sender:
        decode.receiver._on_image = broken
        decode.grant()
        async with sender.open(decode.address, "r", 0, N) as stream:
            await send_all(stream, image)
            with pytest.raises(TransferRefused, match="could not take"):
                await stream.commit(b"")
        assert (await decode.lost.get())[0].epoch == 0
        decode.assert_empty()


@contextlib.asynccontextmanager
async def _served(push: Callable[..., Awaitable[None]]) -> AsyncIterator[str]:
    """Address of a server with this handler instead of a receiver."""
    service, method = PUSH_METHOD.lstrip("/").split("/")
    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(push)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextlib.asynccontextmanager
async def _silent_receiver(answer_open: bool) -> AsyncIterator[str]:
    """A server that takes everything and acknowledges nothing."""

    async def push(_requests: object, context: grpc.aio.ServicerContext) -> None:
        while await context.read() is not grpc.aio.EOF:
            if answer_open:
                await context.write(PushReply(opened={"credit_bytes": 64_000, "lease_s": 30.0}).SerializeToString())

    async with _served(push) as address:
        yield address


@contextlib.asynccontextmanager
async def _refusing_receiver() -> AsyncIterator[str]:
    """A server that grants credit, reads one message, refuses and hangs up."""

    async def push(_requests: object, context: grpc.aio.ServicerContext) -> None:
        await context.read()
        await context.write(PushReply(opened={"credit_bytes": 1 << 20, "lease_s": 30.0}).SerializeToString())
        await context.read()
        await context.write(PushReply(refused=Refused(code=Refused.REVOKED, message="enough")).SerializeToString())

    async with _served(push) as address:
        yield address


async def test_a_refusal_outlives_the_broken_stream_that_follows_it() -> None:
    image = prompt_image()
    async with _refusing_receiver() as address, prefill_worker() as sender:
        for _ in range(5):
            async with sender.open(address, "r", 0, N) as stream:
                stream.enqueue_chunk((s.place, image.segment_rows(s, sender.spec)) for s in image.header.segments)
                with pytest.raises(TransferRefused, match="REVOKED: enough"):
                    await stream.commit(b"")


async def test_no_answer_to_the_header_times_out() -> None:
    config = KVStoreConfig(connect_timeout_s=0.05)
    async with _silent_receiver(answer_open=False) as address, prefill_worker(config) as sender:
        with pytest.raises(TransferTimeout, match="Open"):
            await sender.open_stream(address, "r", 0, N)


async def test_segments_that_are_never_acknowledged_time_out() -> None:
    image = prompt_image()
    config = KVStoreConfig(stall_timeout_s=0.05, segment_bytes=20_000)
    async with (
        _silent_receiver(answer_open=True) as address,
        prefill_worker(config) as sender,
        sender.open(address, "r", 0, N) as stream,
    ):
        stream.enqueue(image.header.segments[0].place, image.segment_rows(image.header.segments[0], sender.spec))
        with pytest.raises(TransferTimeout, match="acknowledgements"):
            await stream.commit(b"")


async def test_eight_requests_at_once_do_not_mix() -> None:
    image = prompt_image()
    async with decode_worker() as decode, prefill_worker() as sender:

        async def one(i: int) -> None:
            decode.grant(f"r{i}")
            async with sender.open(decode.address, f"r{i}", 0, N) as stream:
                await send_all(stream, image)
                await stream.commit(str(i).encode())

        await asyncio.gather(*(one(i) for i in range(8)))
        for _ in range(8):
            with await decode.images.get() as received:
                assert received.request_id == f"r{received.tail.decode()}"
                assert torch.equal(received.image.payload, image.payload)
        decode.assert_empty()
