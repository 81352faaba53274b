"""KV hand-off between two processes on loopback: GB/s against its floors, and the share hidden behind compute.

    python -m tests.bench.transfer [--tokens N] [--segment-mib 1,4,16] [--rounds R] [--chunk-tokens C] [--chunk-ms MS]

Floors, measured in the same run: memory copy and XXH3 on one core, and bare gRPC (the same bytes and acknowledgements,
no checksum, no landing copy). Rounds of the floor and of the real path alternate, because a busy neighbour moves both.
The hidden share runs a real matmul per chunk on an engine thread while the stream's loop sends the chunk before; rows
of the last chunk and the tail cannot be hidden. Both processes keep freed memory, as workers do. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import grpc.aio
import torch

from kvstore.checksum import checksum
from kvstore.config import KVStoreConfig
from kvstore.host_memory import keep_freed_memory
from kvstore.spec import KVSpec, RowRange
from kvstore.transfer.landing import ReceivedImage
from kvstore.transfer.overlap import Interval, measure_overlap, segments_behind_next_chunk
from kvstore.transfer.receiver import KVReceiver
from kvstore.transfer.sender import KVSender, KVStream
from kvstore.transfer.stubs.kv_transfer_pb2 import PushRequest, SegmentHeader
from kvstore.transfer.wire import channel_options, decode_request, encode_segment
from tests.kvstore.layouts import flash_spec

MIB = 1 << 20
RAW_METHOD = "/bench.Raw/Push"


def bench_config(segment_bytes: int) -> KVStoreConfig:
    """Settings of one segment size; everything else as workers have it."""
    return KVStoreConfig(
        segment_bytes=segment_bytes,
        max_message_bytes=max(8 * MIB, segment_bytes + MIB),
        landing_budget_bytes=1 << 30,
    )


def serve(port_out: Connection, config: KVStoreConfig, num_tokens: int) -> None:
    """The decode process: a receiver that grants the next transfer when one is done, and a bare gRPC sink."""
    keep_freed_memory()

    async def sink(_requests: object, context: grpc.aio.ServicerContext) -> None:
        while await context.read() is not grpc.aio.EOF:
            await context.write(b"ack")

    async def main() -> None:
        def took(received: ReceivedImage) -> None:
            received.release()
            receiver.grant(str(int(received.request_id) + 1), 0, num_tokens)

        receiver = KVReceiver(flash_spec(), config, on_image=took)
        server = grpc.aio.server(options=channel_options(config))
        receiver.add_to_server(server)
        service, method = RAW_METHOD.lstrip("/").split("/")
        raw = grpc.stream_stream_rpc_method_handler(sink)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: raw}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        receiver.grant("0", 0, num_tokens)
        port_out.send(port)
        await server.wait_for_termination()

    asyncio.run(main())


@contextlib.contextmanager
def decode_process(config: KVStoreConfig, num_tokens: int) -> Iterator[str]:
    """Address of a fresh decode process, ended with the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, config, num_tokens), daemon=True)
    process.start()
    try:
        yield f"127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def gb_per_s(num_bytes: int, work: Callable[[], object]) -> float:
    """Best of three."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return num_bytes / min(times) / 1e9


def memory_floors() -> dict[str, float]:
    """One core: copying and hashing warm memory, and framing a segment with and without protobuf's Python API."""
    size = 4 * MIB
    blocks = [torch.randint(0, 256, (size,), dtype=torch.uint8) for _ in range(8)]
    target = torch.zeros(size, dtype=torch.uint8)
    place = flash_spec().split_image(32_768, size)[0]

    def framed() -> None:
        for block in blocks:
            decode_request(encode_segment(place, 0, 0, block.numpy().data))

    def generated() -> None:
        for block in blocks:
            header = SegmentHeader(seq=0, pool="c4", length=size)
            data = PushRequest(segment=header, payload=block.numpy().tobytes()).SerializeToString()
            assert len(PushRequest.FromString(data).payload) == size

    return {
        "memcpy_gb_s": gb_per_s(8 * size, lambda: [target.copy_(block) for block in blocks]),
        "xxh3_gb_s": gb_per_s(8 * size, lambda: [checksum(block.numpy().data) for block in blocks]),
        "framing_gb_s": gb_per_s(8 * size, framed),
        "protobuf_gb_s": gb_per_s(8 * size, generated),
    }


async def push_raw(channel: grpc.aio.Channel, blocks: list[bytes]) -> float:
    """Seconds until every block was acknowledged by a sink that does nothing with it."""
    call = channel.stream_stream(RAW_METHOD)()
    start = time.perf_counter()

    async def write() -> None:
        for block in blocks:
            await call.write(block)
        await call.done_writing()

    writing = asyncio.create_task(write())
    while await call.read() is not grpc.aio.EOF:
        pass
    await writing
    return time.perf_counter() - start


async def push_image(
    sender: KVSender, address: str, request_id: str, num_tokens: int, pieces: list[tuple[RowRange, torch.Tensor]]
) -> float:
    """Seconds from the first enqueue to the receiver's commit."""
    async with sender.open(address, request_id, 0, num_tokens) as stream:
        start = time.perf_counter()
        for place, rows in pieces:
            stream.enqueue(place, rows)
        await stream.commit(b"tail")
        return time.perf_counter() - start


async def measure_rates(segment_bytes: int, num_tokens: int, rounds: int) -> dict[str, float]:
    """Median GB/s of the real path and of bare gRPC at one segment size; the first round of each warms memory."""
    spec, config = flash_spec(), bench_config(segment_bytes)
    places = spec.split_image(num_tokens, segment_bytes)
    pieces = [(p, torch.randint(0, 256, (p.length,), dtype=torch.uint8)) for p in places]
    blocks = [rows.numpy().tobytes() for _, rows in pieces]
    total = sum(len(block) for block in blocks)
    ours, bare = [], []
    with decode_process(config, num_tokens) as address:
        sender = KVSender(spec, config)
        async with grpc.aio.insecure_channel(address, options=channel_options(config)) as channel:
            for i in range(rounds + 1):
                bare.append(total / await push_raw(channel, blocks) / 1e9)
                ours.append(total / await push_image(sender, address, str(i), num_tokens, pieces) / 1e9)
        await sender.close()
    return {
        "segment_mib": segment_bytes // MIB,
        "image_mb": total / 1e6,
        "num_segments": len(pieces),
        "kv_gb_s": statistics.median(ours[1:]),
        "kv_best_gb_s": max(ours[1:]),
        "grpc_gb_s": statistics.median(bare[1:]),
        "grpc_best_gb_s": max(bare[1:]),
    }


class MatmulEngine:
    """A stand-in for prefill compute: real single-thread matmuls for about `chunk_s` a chunk."""

    def __init__(self, chunk_s: float) -> None:
        self._left, self._right = torch.randn(2, 384, 384)
        start = time.monotonic()
        for _ in range(20):
            self._left @ self._right
        self._repeats = max(1, int(chunk_s / ((time.monotonic() - start) / 20)))

    def run_chunk(self) -> Interval:
        """Compute one chunk; returns when it ran, in seconds of `time.monotonic`."""
        start = time.monotonic()
        for _ in range(self._repeats):
            self._left @ self._right
        return start, time.monotonic()


def chunk_plan(spec: KVSpec, edges: list[int], segment_bytes: int) -> list[list[RowRange]]:
    """Row ranges to send after each chunk; the tail goes with the last."""
    n = edges[-1]
    plan = [spec.chunk_ranges(a, b, n, segment_bytes) for a, b in zip(edges, edges[1:], strict=False)]
    plan[-1] += spec.tail_ranges(n, segment_bytes)
    return plan


def prefill_thread(
    stream: KVStream, engine: MatmulEngine, plan: list[list[RowRange]], rows: dict[RowRange, torch.Tensor]
) -> list[Interval]:
    """What a prefill engine does: compute a chunk, enqueue its rows, go on. Returns when each chunk computed."""
    computes = []
    for places in plan:
        computes.append(engine.run_chunk())
        stream.enqueue_chunk((place, rows[place]) for place in places)
    stream.finish(b"first token")
    return computes


async def measure_hidden(edges: list[int], chunk_ms: float, segment_bytes: int) -> dict[str, float]:
    """Hidden share of one prompt's transfer with chunks between `edges`, after one prompt that warms memory."""
    spec, config, num_tokens = flash_spec(), bench_config(segment_bytes), edges[-1]
    plan = chunk_plan(spec, edges, segment_bytes)
    rows = {p: torch.randint(0, 256, (p.length,), dtype=torch.uint8) for places in plan for p in places}
    torch.set_num_threads(1)
    engine = MatmulEngine(chunk_ms / 1e3)
    with decode_process(config, num_tokens) as address:
        sender = KVSender(spec, config)
        await push_image(sender, address, "0", num_tokens, list(rows.items()))
        alone = await asyncio.to_thread(lambda: [engine.run_chunk() for _ in plan])
        async with sender.open(address, "1", 0, num_tokens) as stream:
            computes = await asyncio.to_thread(prefill_thread, stream, engine, plan, rows)
            result = await stream.committed()
            committed_s = time.monotonic()
        await sender.close()
    chunk_of = {place: chunk for chunk, places in enumerate(plan) for place in places}
    wire = [(chunk_of[t.place], (t.sent_s, t.acked_s)) for t in result.traces]
    print_timeline(computes, wire)
    overlap = measure_overlap([interval for _, interval in wire], computes)
    behind = segments_behind_next_chunk(wire, computes)
    return {
        "tokens": num_tokens,
        "chunks": len(computes),
        "kv_mb": result.num_bytes / 1e6,
        "compute_ms_per_chunk": 1e3 * statistics.median(end - start for start, end in computes),
        "transfer_ms_per_chunk": 1e3 * overlap.transfer_s / len(computes),
        "hidden_share": overlap.hidden_share,
        "exposed_ms": 1e3 * (overlap.transfer_s - overlap.hidden_s),
        "prefill_alone_ms": 1e3 * (alone[-1][1] - alone[0][0]),
        "prefill_sending_ms": 1e3 * (computes[-1][1] - computes[0][0]),
        "commit_after_prefill_ms": 1e3 * (committed_s - computes[-1][1]),
        "chunks_sent_behind_the_next": sum(count > 0 for count in behind.values()),
    }


def print_timeline(computes: list[Interval], wire: list[tuple[int, Interval]]) -> None:
    """One line a chunk: when it computed and when its segments were on the wire, ms from the first compute."""
    zero = computes[0][0]
    print(f"{'chunk':>5} {'compute ms':>19} {'segments on the wire ms':>25} {'segments':>8}")
    for chunk, (start, end) in enumerate(computes):
        sent = [interval for owner, interval in wire if owner == chunk]
        first, last = min(i[0] for i in sent), max(i[1] for i in sent)
        times = [f"{1e3 * (t - zero):.1f}" for t in (start, end, first, last)]
        print(f"{chunk:>5} {times[0]:>9}-{times[1]:>9} {times[2]:>12}-{times[3]:>12} {len(sent):>8}")


def chunk_edges(num_tokens: int, chunk_tokens: int, last_chunk_tokens: int) -> list[int]:
    """Token positions between chunks; a short last chunk leaves less to send after all compute is over."""
    return [*range(0, num_tokens - last_chunk_tokens, chunk_tokens), num_tokens - last_chunk_tokens, num_tokens]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32_768, help="prompt length, V4-Flash layout")
    parser.add_argument("--segment-mib", default="1,4,16", help="segment sizes of the rate table")
    parser.add_argument("--rounds", type=int, default=5, help="timed transfers for each size, after one to warm up")
    parser.add_argument("--hidden-segment-mib", type=int, default=2, help="segment size of the hidden-share run")
    parser.add_argument("--chunk-tokens", type=int, default=2_048)
    parser.add_argument("--last-chunk-tokens", type=int, default=None, help="default: as the others")
    parser.add_argument("--chunk-ms", type=float, default=40.0, help="simulated compute of one chunk")
    return parser.parse_args()


def main() -> None:
    """Print the tables and one JSON line."""
    arguments = parse_arguments()
    keep_freed_memory()
    floors = memory_floors()
    print("  ".join(f"{name} {value:.1f}" for name, value in floors.items()))
    print(f"{'segment':>8} {'KV GB/s':>8} {'best':>6} {'bare gRPC':>10} {'best':>6} {'share':>6}")
    rates = []
    for size in arguments.segment_mib.split(","):
        rate = asyncio.run(measure_rates(int(size) * MIB, arguments.tokens, arguments.rounds))
        rates.append(rate)
        share = rate["kv_gb_s"] / rate["grpc_gb_s"]
        ours = f"{rate['kv_gb_s']:>8.2f} {rate['kv_best_gb_s']:>6.2f}"
        print(f"{size:>4} MiB {ours} {rate['grpc_gb_s']:>10.2f} {rate['grpc_best_gb_s']:>6.2f} {share:>6.2f}")
    last = arguments.last_chunk_tokens or arguments.chunk_tokens
    edges = chunk_edges(arguments.tokens, arguments.chunk_tokens, last)
    hidden = asyncio.run(measure_hidden(edges, arguments.chunk_ms, arguments.hidden_segment_mib * MIB))
    print(
        f"hidden {hidden['hidden_share']:.1%} of the transfer, {hidden['exposed_ms']:.1f} ms exposed; "
        f"prefill alone {hidden['prefill_alone_ms']:.0f} ms, while sending {hidden['prefill_sending_ms']:.0f} ms, "
        f"commit {hidden['commit_after_prefill_ms']:.1f} ms later"
    )
    print(json.dumps({"bench": "transfer", "floors": floors, "rates": rates, "hidden": hidden}))


if __name__ == "__main__":
    main()
