"""KV hand-off of real prompts: how much of it hides behind prefill, and what it adds to the first token.

    python -m tests.bench.handoff [--tokens N] [--chunk C] [--rounds R]

A prefill worker (this process) and a decode worker (its own process) run dsv4-nano on one core each and talk gRPC over
loopback. Per chunk, compute is the engine's step; its rows leave while the next chunk computes. Rows of the last chunk,
the window and the compressor states cannot hide: with c chunks of equal transfer time at most (c - 1) / c of the
growing rows can, and the fixed tail comes on top. First token: from the admission call to the first event at the
router's client, against the time the engine needs for the same prompt alone. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from kvstore.spec import IndexSpace, KVSpec, RowRange
from kvstore.transfer.overlap import measure_overlap, segments_behind_next_chunk
from workers.config import WorkerConfig
from workers.messages import GenerateRequest, SamplingParams, WorkerRole
from workers.model.presets import PRESETS
from workers.model.weights import random_named_weights
from workers.model_bundle import ModelBundle, build_engine
from workers.service.client import WorkerClient
from workers.service.server import ServedPrefill, serve_worker

BUNDLED = Path(__file__).resolve().parents[2] / "deploy" / "demo" / "dsv4-nano"
CONTEXT = 16384


def bundle() -> ModelBundle:
    """The bundled model, or random weights of its shape where it is not there."""
    if (BUNDLED / "model.safetensors.index.json").exists():
        return ModelBundle.load(BUNDLED)
    return ModelBundle.from_named(PRESETS["nano"], random_named_weights(PRESETS["nano"], seed=1), "nano")


def worker_config(role: WorkerRole, chunk: int) -> WorkerConfig:
    return WorkerConfig(role, role.value, max_running=2, max_context=CONTEXT, chunk_tokens=chunk)


def serve_decode(pipe: Connection, chunk: int) -> None:
    """The decode process: sends its address, stops when something comes back."""

    async def main() -> None:
        config = worker_config(WorkerRole.DECODE, chunk)
        worker = await serve_worker(config, build_engine(config, bundle()))
        pipe.send(worker.address)
        await asyncio.to_thread(pipe.recv)
        await worker.stop()

    asyncio.run(main())


@contextlib.contextmanager
def decode_process(chunk: int) -> Iterator[str]:
    """Address of a decode worker that lives as long as the block."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_decode, args=(theirs, chunk), daemon=True)
    process.start()
    try:
        yield ours.recv()
        ours.send("stop")
        process.join(10)
    finally:
        process.terminate()
        process.join()


def chunk_of(place: RowRange, spec: KVSpec, chunk: int, num_chunks: int) -> int:
    """The chunk whose end made these rows final; the tail belongs to the last."""
    pool = spec.pool(place.pool)
    if pool.space is not IndexSpace.FULL_PAGE:
        return num_chunks - 1
    return (place.row_end * pool.ratio - 1) // chunk


async def first_token_s(prefill: WorkerClient, decode: WorkerClient, request: GenerateRequest) -> float:
    """Seconds from admission to the first event. The event stream is opened before."""
    arrived: asyncio.Future[float] = asyncio.get_running_loop().create_future()

    async def read() -> None:
        async for batch in decode.events(request.router_id):
            if any(event.request_id == request.request_id for event in batch.events) and not arrived.done():
                arrived.set_result(time.perf_counter())

    reader = asyncio.create_task(read())
    while (await decode.stats()).routers == 0:
        await asyncio.sleep(0.01)
    began = time.perf_counter()
    grant = await decode.admit(request)
    await prefill.prefill(request, grant)
    seconds = await asyncio.wait_for(arrived, 60) - began
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    return seconds


async def measure(tokens: int, chunk: int, rounds: int) -> dict[str, float]:
    config = worker_config(WorkerRole.PREFILL, chunk)
    with decode_process(chunk) as address:
        served = await serve_worker(config, build_engine(config, bundle()))
        assert isinstance(served, ServedPrefill)
        prefill = WorkerClient("prefill", WorkerRole.PREFILL, served.address)
        decode = WorkerClient("decode", WorkerRole.DECODE, address)
        vocab = served.engine.facts.vocab_size
        results: list[dict[str, float]] = []
        for number in range(rounds + 1):
            prompt = torch.randint(300, vocab, (tokens,), generator=torch.Generator().manual_seed(number)).tolist()
            sampling = SamplingParams(max_tokens=1, temperature=0.0)
            request = GenerateRequest(f"b{number}", 0, tuple(prompt), sampling, router_id=f"bench{number}")
            before = len(served.engine.times.recent)
            seconds = await first_token_s(prefill, decode, request)
            results.append(figures(served, list(served.engine.times.recent)[before:], seconds, chunk))
        await prefill.close()
        await decode.close()
        await served.stop()
    return {key: statistics.median(r[key] for r in results[1:]) for key in results[0]}


def figures(
    served: ServedPrefill, computes: list[tuple[float, float]], first_token: float, chunk: int
) -> dict[str, float]:
    """One round."""
    transfer = served.servicer.last_transfer
    assert transfer is not None
    wire = [(trace.sent_s, trace.acked_s) for trace in transfer.traces]
    overlap = measure_overlap(wire, computes)
    spec = served.engine.spec
    by_chunk = [
        (chunk_of(trace.place, spec, chunk, len(computes)), interval)
        for trace, interval in zip(transfer.traces, wire, strict=True)
    ]
    behind = segments_behind_next_chunk(by_chunk, computes)
    return {
        "chunks": len(computes),
        "kv_mb": transfer.num_bytes / 1e6,
        "compute_ms_per_chunk": 1e3 * statistics.median(end - start for start, end in computes),
        "transfer_ms_total": 1e3 * overlap.transfer_s,
        "hidden_share": overlap.hidden_share,
        "exposed_ms": 1e3 * (overlap.transfer_s - overlap.hidden_s),
        "chunks_on_the_wire_during_the_next": sum(count > 0 for count in behind.values()),
        "prefill_tok_s": chunk * len(computes) / overlap.compute_s,
        "first_token_ms": 1e3 * first_token,
        "first_token_over_compute": first_token / overlap.compute_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = asyncio.run(measure(args.tokens, args.chunk, args.rounds))
    for key, value in result.items():
        print(f"{key:36} {value:12.3f}")
    print(json.dumps({"bench": "handoff", "tokens": args.tokens, "chunk": args.chunk, **result}))


if __name__ == "__main__":
    main()
