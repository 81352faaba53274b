"""Both ends of a hand-off for tests: a decode worker's receiver on a real socket, a sender, and a hostile sender."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from kvstore.checksum import CHECKSUM_NAME, checksum
from kvstore.config import KVStoreConfig
from kvstore.image import KVImage
from kvstore.pools.aggregate import KVPools
from kvstore.transfer.landing import GrantInfo, ReceivedImage
from kvstore.transfer.receiver import KVReceiver
from kvstore.transfer.sender import KVSender, KVStream
from kvstore.transfer.stubs.kv_transfer_pb2 import Open, PushReply, PushRequest, SegmentHeader
from kvstore.transfer.wire import PUSH_METHOD, WIRE_VERSION, channel_options, encode_request
from tests.kvstore.clocks import ManualClock
from tests.kvstore.layouts import SMALL_SIZES, allocators, fill_random, opened, small_spec

N = 300
SMALL = KVStoreConfig(
    landing_budget_bytes=4 << 20,
    credit_bytes=64_000,
    segment_bytes=20_000,
    connect_timeout_s=5.0,
    stall_timeout_s=5.0,
)


class Decode:
    """A receiver behind a real server; images and losses land in queues."""

    def __init__(self, config: KVStoreConfig = SMALL) -> None:
        self.spec = small_spec()
        self.clock = ManualClock()
        self.images: asyncio.Queue[ReceivedImage] = asyncio.Queue()
        self.lost: asyncio.Queue[tuple[GrantInfo, str]] = asyncio.Queue()
        self.receiver = KVReceiver(
            self.spec,
            config,
            on_image=self.images.put_nowait,
            on_lost=lambda grant, reason: self.lost.put_nowait((grant, reason)),
            model_hash="weights",
            clock=self.clock,
        )
        self.server = grpc.aio.server(options=channel_options(config))
        self.receiver.add_to_server(self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port('127.0.0.1:0')}"

    def grant(self, request_id: str = "r", epoch: int = 0) -> GrantInfo:
        grant = self.receiver.grant(request_id, epoch, N)
        assert grant is not None
        return grant

    def assert_empty(self) -> None:
        self.receiver.check_integrity()
        assert self.receiver.stats().held_bytes == 0


@contextlib.asynccontextmanager
async def decode_worker(config: KVStoreConfig = SMALL) -> AsyncIterator[Decode]:
    decode = Decode(config)
    await decode.server.start()
    decode.receiver.start()
    try:
        yield decode
    finally:
        await decode.server.stop(None)
        await decode.receiver.close()


@contextlib.asynccontextmanager
async def prefill_worker(config: KVStoreConfig = SMALL, **changes: str) -> AsyncIterator[KVSender]:
    sender = KVSender(small_spec(), config, model_hash=changes.get("model_hash", "weights"))
    try:
        yield sender
    finally:
        await sender.close()


def prompt_image() -> KVImage:
    pools = KVPools(small_spec(), SMALL_SIZES)
    fill_random(pools, 21)
    return pools.get_cpu_copy(opened(allocators(), N).indices(), segment_bytes=20_000)


async def send_all(stream: KVStream, image: KVImage) -> None:
    for segment in image.header.segments:
        await stream.send(segment.place, image.segment_rows(segment, stream.spec))


@contextlib.asynccontextmanager
async def raw_stream(decode: Decode) -> AsyncIterator[grpc.aio.StreamStreamCall]:
    """A hostile sender: any messages in any order."""
    async with grpc.aio.insecure_channel(decode.address, options=channel_options(SMALL)) as channel:
        call = channel.stream_stream(
            PUSH_METHOD, request_serializer=encode_request, response_deserializer=PushReply.FromString
        )()
        yield call
        call.cancel()


def opening_of(decode: Decode, **changes: object) -> PushRequest:
    """The first message of a stream for the granted request "r"."""
    fields: dict[str, object] = {
        "version": WIRE_VERSION,
        "request_id": "r",
        "num_tokens": N,
        "fingerprint": decode.spec.fingerprint,
        "model_hash": "weights",
        "checksum_name": CHECKSUM_NAME,
    }
    return PushRequest(open=Open(**{**fields, **changes}))  # type: ignore[arg-type]


async def raw_open(call: grpc.aio.StreamStreamCall, decode: Decode, **changes: object) -> PushReply:
    await call.write(opening_of(decode, **changes))
    return await call.read()


def raw_segment(image: KVImage, index: int, *, flip: bool = False) -> PushRequest:
    segment = image.header.segments[index]
    place, payload = segment.place, bytearray(image.segment_bytes(segment))
    digest = checksum(bytes(payload))
    if flip:
        payload[0] ^= 0x80
    header = SegmentHeader(
        seq=index,
        pool=place.pool.value,
        row_start=place.row_start,
        row_end=place.row_end,
        offset=place.offset,
        length=place.length,
        checksum=digest,
    )
    return PushRequest(segment=header, payload=bytes(payload))
