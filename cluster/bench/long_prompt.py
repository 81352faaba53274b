"""A long prompt from beginning to end: prefill in chunks, hand-off, decode, within memory that was reserved before.

Owns: the order, and the proof that the KV arrived: the first decode step is run in the old pages and, once those are
poisoned, in the new ones, and must give the same bits. The hand-off is that of a worker: an image of the live rows in
pinned host memory, then other pages and another slot; both ends are one process here, so the wire is not in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from cluster.bench.results import LongPrompt
from cluster.bench.scene import Scene
from kvstore.image import KVImage
from kvstore.tiers.base import planned_header
from workers.model.config import PAGE_TOKENS, LayerKind

NEW_TOKENS = PAGE_TOKENS
"""Decode tokens: one page of them, so that no step needs new tables."""

Say = Callable[[str], None]


def long_prompt(scene: Scene, tokens: int, chunk: int, say: Say, *, new_tokens: int = NEW_TOKENS) -> LongPrompt:
    """Run it. `tokens` is a multiple of `PAGE_TOKENS`. The copies' kernels are compiled before anything is timed."""
    if tokens % PAGE_TOKENS or not 0 < new_tokens <= PAGE_TOKENS:
        raise ValueError(f"{tokens} prompt tokens and {new_tokens} new ones, pages of {PAGE_TOKENS}")
    model, pools, cuda = scene.model, scene.pools, scene.model.device.type == "cuda"
    header = planned_header(pools.spec, tokens, request_id="long")
    image = KVImage(header, torch.empty(header.payload_bytes, dtype=torch.uint8, pin_memory=cuda))
    context = tokens + PAGE_TOKENS
    pools.load_cpu_copy(
        pools.get_cpu_copy(scene.indices(0, context, PAGE_TOKENS)), scene.indices(1, context, PAGE_TOKENS)
    )
    model.reserve_decode()
    model.reserve_prefill(chunk, num_entries=tokens // LayerKind.C4.value)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    reserved = torch.cuda.memory_allocated()
    prefill = 0.0
    for start in range(0, tokens, chunk):
        batch = scene.prompt_batch(min(chunk, tokens - start), start=start)
        prefill += _seconds(lambda batch=batch: model.forward(batch), cuda)  # type: ignore[misc]
        say(f"long prompt: {min(tokens, start + chunk)} tokens in {prefill:.2f} s")
    source, target = (scene.indices(number, context, tokens) for number in range(2))
    out = _seconds(lambda: pools.start_cpu_copy(source, into=image).wait(), cuda)
    scene.reseed()
    before = model.decode(scene.decode_batch(1, context, tokens)).clone()
    pools.poison(source)
    into = _seconds(lambda: pools.load_cpu_copy(image, target), cuda)
    scene.reseed()
    step = scene.decode_batch(1, context, tokens, first=1)
    after = model.decode(step).clone()

    def decode() -> None:
        model.start(step)
        for _ in range(new_tokens - 1):
            model.start_next()

    seconds = _seconds(decode, cuda)
    say(f"long prompt: hand-off {1e3 * out:.1f} + {1e3 * into:.1f} ms, {new_tokens} tokens in {seconds:.2f} s")
    return LongPrompt(
        tokens=tokens,
        chunk_tokens=chunk,
        prefill_s=prefill,
        new_tokens=new_tokens,
        decode_s=seconds,
        peak_bytes=torch.cuda.max_memory_allocated(),
        reserved_bytes=reserved,
        handoff_bytes=header.payload_bytes,
        out_s=out,
        in_s=into,
        same_logits=bool(after.isfinite().all()) and torch.equal(before, after),
    )


def _seconds(action: Callable[[], Any], cuda: bool) -> float:
    """Wall time of `action` and of the device work that it enqueues."""
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
