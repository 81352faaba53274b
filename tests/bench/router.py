"""Router overhead: first-token time it adds, and token events a second it relays. `python -m tests.bench.router`.

The router runs in its own process with scripted workers behind the backend protocols; this process is the client, over
raw sockets on 127.0.0.1 with reused connections and real HTTP/SSE. Answers are `data:` chunks of one token each.

Floor and prediction (two cores of a 2-3 GHz server CPU; measured parts on the bench machine, one event at a time):
  - relaying one token event costs 1.5-2 us in the recipe's parser with its JSON, 2-3 us to render, 6-8 us to wake the
    request's task, 12-20 us for aiohttp's chunked write with its send(2): about 30 us, so 25,000-30,000 events/s on one
    core if nothing else ran there. The scripted worker shares that core: predicted 15,000-20,000. Target >= 10,000.
  - first token: HTTP parse and prepare about 150 us, validation and prompt encoding 100 us, three task switches 50 us,
    metrics and response head 100 us: predicted 0.5-0.8 ms added. Target p50 <= 2 ms.

Measured on two shared cores (2026-11-21): 38,000-46,000 events/s and 0.36-0.40 ms added, better than predicted because
waking a task and the chunked write cost about half of the estimate.

With `--grpc` the scripted workers sit behind the workers' gRPC services in a third process, and the direct calls use
the real client; the added time is then router over service, and three processes share the cores. There the workers do
not wait for the relay, so a write may carry several chunks. Measured: 23,000-31,000 events/s, 0.54 ms added.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from router.config import RouterConfig
from router.model_info import ModelInfo
from router.server import start_router
from tests.bench import grpc_workers
from tests.bench.sse_load import SseLoad, request_bytes
from tests.support.chat_tokenizer import write_model_dir
from workers.messages import (
    FinishReason,
    GenerateRequest,
    Grant,
    PrefillResult,
    SamplingParams,
    TokenBatch,
    TokenEvent,
    WorkerRole,
    WorkerStats,
)
from workers.service.client import WorkerClient

TARGET_EVENTS_PER_S = 10_000
TARGET_ADDED_TTFT_MS = 2.0
FIRST_TOKEN_ID, NUM_TOKEN_IDS = 40, 60
"""Ids of printable ASCII in the test tokenizer's vocabulary."""


@dataclass
class SteppingDecode:
    """Emits one token of every running request a step, and waits for the relay of a step before the next.

    That forbids the router to coalesce several tokens of a stream into one write: the worst case for it.
    """

    name: str = "decode-0"
    running: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._wake = asyncio.Event()
        self._granted: dict[str, GenerateRequest] = {}

    async def admit(self, request: GenerateRequest) -> Grant:
        self._granted[request.request_id] = request
        return Grant(request.request_id, request.epoch, 30.0, 1 << 20, "local", "fp", "inc")

    def commit(self, request_id: str) -> None:
        request = self._granted.pop(request_id)
        self.running[request_id] = [request, 0]
        self._wake.set()

    async def events(self, router_id: str) -> AsyncIterator[TokenBatch]:
        while True:
            while not self.running:
                self._wake.clear()
                await self._wake.wait()
            events = []
            for request_id, progress in list(self.running.items()):
                request, index = progress
                progress[1] = index + 1
                finish = FinishReason.LENGTH if index + 1 == request.sampling.max_tokens else None
                if finish:
                    del self.running[request_id]
                token = FIRST_TOKEN_ID + index % NUM_TOKEN_IDS
                events.append(TokenEvent(request_id, request.epoch, index, (token,), None, finish))
            yield TokenBatch(tuple(events))
            for _ in range(3):
                await asyncio.sleep(0)

    async def abort(self, request_id: str) -> None:
        self._granted.pop(request_id, None)
        self.running.pop(request_id, None)

    async def stats(self) -> WorkerStats:
        return WorkerStats(self.name, WorkerRole.DECODE, "inc", "", 0.0, True, max_running=1024)


@dataclass
class InstantPrefill:
    """Hands over at once."""

    decode: SteppingDecode
    name: str = "prefill-0"

    async def prefill(self, request: GenerateRequest, grant: Grant) -> PrefillResult:
        self.decode.commit(request.request_id)
        return PrefillResult(request.request_id, request.epoch, len(request.prompt_ids), 0, 0.0, 0)

    async def abort(self, request_id: str) -> None:
        return None

    async def stats(self) -> WorkerStats:
        return WorkerStats(self.name, WorkerRole.PREFILL, "inc", "", 0.0, True)


async def direct_first_token_s(prefill: Any, decode: Any, rounds: int) -> list[float]:
    """Seconds from `admit` to the first token event, over the backend protocol itself."""
    inbox: asyncio.Queue[TokenBatch] = asyncio.Queue()

    async def read() -> None:
        async for batch in decode.events("bench-direct"):
            inbox.put_nowait(batch)

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.2)
    samples = []
    for index in range(rounds):
        request = GenerateRequest(
            f"direct-{index}", 0, tuple(range(40, 60)), SamplingParams(max_tokens=2), router_id="bench-direct"
        )
        start = time.perf_counter()
        grant = await decode.admit(request)
        call = asyncio.create_task(prefill.prefill(request, grant))
        event = (await inbox.get()).events[0]
        samples.append(time.perf_counter() - start)
        assert event.index == 0
        while event.finish is None:
            event = (await inbox.get()).events[-1]
        await call
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    return samples


async def _serve(pipe: Connection, model_dir: Path, rounds: int, grpc_port: int | None) -> None:
    decode: Any = SteppingDecode()
    prefill: Any = InstantPrefill(decode)
    if grpc_port is not None:
        prefill = WorkerClient("prefill-0", WorkerRole.PREFILL, f"127.0.0.1:{grpc_port}")
        decode = WorkerClient("decode-0", WorkerRole.DECODE, f"127.0.0.1:{grpc_port}")
    direct = await direct_first_token_s(prefill, decode, rounds)
    info = ModelInfo.from_dir(model_dir, name="bench")
    router = await start_router(RouterConfig(port=0, drain_s=0.0), [prefill], [decode], model_dir, info)
    pipe.send((router.port, direct))
    await asyncio.to_thread(pipe.recv)
    await router.close()
    if grpc_port is not None:
        await prefill.close()
        await decode.close()


def _serve_process(pipe: Connection, model_dir: Path, rounds: int, grpc_port: int | None) -> None:
    asyncio.run(_serve(pipe, model_dir, rounds, grpc_port))


def _worker_process(pipe: Connection) -> None:
    decode = SteppingDecode()
    asyncio.run(grpc_workers.serve(pipe, InstantPrefill(decode), decode))


class _Child:
    """A process that listens, tells where, and stops on request."""

    def __init__(self, target: Callable[..., None], *args: object) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *args))
        self._process.start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def body(max_tokens: int) -> bytes:
    """A streamed chat request of `max_tokens` one-token events."""
    fields = {
        "model": "bench",
        "messages": [{"role": "user", "content": "the answer to the question"}],
        "stream": True,
        "max_tokens": max_tokens,
        "temperature": 0,
        "thinking": {"type": "disabled"},
    }
    return json.dumps(fields).encode()


def measure(port: int, rounds: int, streams: int, tokens: int, repeats: int) -> tuple[list[float], list[float]]:
    """First-token seconds of lone requests on one connection, and token events a second of each repeat."""
    host = "127.0.0.1"
    lone = SseLoad(host, port, 1)
    request = request_bytes(host, body(2))
    first = [lone.round(request)[2][0] for _ in range(rounds)]
    lone.close()
    load = SseLoad(host, port, streams)
    request = request_bytes(host, body(tokens))
    rates = []
    for _ in range(repeats):
        chunks, seconds, _ = load.round(request)
        # Each stream adds a role chunk and a finish chunk to its tokens.
        assert chunks == streams * (tokens + 2), (chunks, streams, tokens)
        rates.append(streams * tokens / seconds)
    load.close()
    return first, rates


def main() -> None:
    """Prints both figures with their targets, and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--grpc", action="store_true", help="scripted workers behind real gRPC services")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model_dir = write_model_dir(Path(folder))
        workers = _Child(_worker_process) if args.grpc else None
        grpc_port = workers.pipe.recv() if workers else None
        server = _Child(_serve_process, model_dir, args.rounds, grpc_port)
        try:
            port, direct = server.pipe.recv()
            first, rates = measure(port, args.rounds, args.streams, args.tokens, args.repeats)
        finally:
            server.stop()
            if workers:
                workers.stop()
    skip = args.rounds // 10
    direct_ms = statistics.median(direct[skip:]) * 1e3
    router_ms = statistics.median(first[skip:]) * 1e3
    p99_ms = sorted(first[skip:])[int(0.99 * (len(first) - skip)) - 1] * 1e3
    added_ms, rate = router_ms - direct_ms, statistics.median(rates)
    print(f"first token    direct {direct_ms:.3f} ms, through the router {router_ms:.3f} ms (p99 {p99_ms:.3f})")
    share = added_ms / TARGET_ADDED_TTFT_MS
    print(f"added          {added_ms:.3f} ms p50, {share:.2f} x target ({TARGET_ADDED_TTFT_MS} ms)")
    print(f"token events   {rate:,.0f}/s with {args.streams} streams, {rate / TARGET_EVENTS_PER_S:.2f} x target")
    result = {
        "bench": "router-grpc" if args.grpc else "router",
        "direct_first_token_ms": round(direct_ms, 3),
        "router_first_token_ms": round(router_ms, 3),
        "added_first_token_ms": round(added_ms, 3),
        "events_per_s": round(rate),
        "events_per_s_runs": [round(value) for value in rates],
        "streams": args.streams,
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
