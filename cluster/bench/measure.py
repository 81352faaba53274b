"""The measurements of `dsv4 bench model`: per-kernel table, decode and prefill sweeps, a long prompt, the start.

Owns: what is run and for how long. Each function takes a built `Scene` and the ceilings of the same run.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from typing import Any

import torch

from cluster.bench import floors
from cluster.bench.costs import TOP, Cost, CostModel, operands
from cluster.bench.floors import Rates
from cluster.bench.results import DecodeRow, KernelRow, Machine, PrefillRow, Start
from cluster.bench.scene import Scene
from cluster.bench.timing import cold_ms, graph_ms
from workers.gpu.kernel_set import Launch
from workers.model.config import PAGE_TOKENS, LayerKind

DECODE_STEPS = 32
"""Consecutive tokens of one measurement. They lie inside one page, and one of them closes a C128 window."""

FIRST_OFFSET = 100
"""Position in its page of the first token: the C128 window closes 27 tokens later, after the warm-up."""

TAIL_LAUNCHES = 2
"""Launches after the last layer: collapse of the streams with the last norm, head."""

WARM_STEPS = 4
PREFILL_RUNS = 3
PACKED_PROMPTS = 4

Say = Callable[[str], None]


def machine() -> Machine:
    """This process's GPU and libraries."""
    found = {}
    for name in ("torch", "triton", "transformers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found |= {"cuda": str(torch.version.cuda), "python": platform.python_version()}
    gpu = torch.cuda.get_device_properties(0)
    return Machine(gpu.name, gpu.total_memory, datetime.now(UTC).strftime("%Y-%m-%d"), found)


def start_decode(scene: Scene) -> Start:
    """Compile what decode needs and capture all its graphs."""
    return _timed_start(scene.model.warm_up)


def start_prefill(scene: Scene) -> Start:
    """Compile what prefill needs, and run one small step."""

    def first() -> None:
        scene.model.warm_up_prefill()
        scene.model.forward(scene.prompt_batch(PAGE_TOKENS))

    return _timed_start(first)


def _timed_start(action: Callable[[], Any]) -> Start:
    from workers.kernels.compile_clock import CompileClock

    with CompileClock() as clock:
        seconds = _wall_ms(action) / 1e3
    return Start(seconds, clock.kernels, clock.compiled, clock.seconds)


def decode_rows(scene: Scene, rates: Rates, say: Say) -> Iterable[DecodeRow]:
    """Every batch at every context."""
    chosen = {batch: experts_read(scene, batch) for batch in scene.wanted.batches}
    heads = {batch: _head_ms(scene, batch) for batch in scene.wanted.batches}
    head_floor = rates.floor_ms(floors.head_flops(scene.config), 0.0)  # bf16: two bytes a weight, two operations
    for context in scene.wanted.contexts:
        for batch in scene.wanted.batches:
            ms = _decode_ms(scene, batch, context)
            experts = chosen[batch]
            floor = rates.floor_ms(floors.decode_bytes(scene.config, batch, context, experts), 0.0)
            full = rates.floor_ms(floors.decode_bytes(scene.wanted.config, batch, context, experts), 0.0)
            row = DecodeRow(batch, context, ms, floor, full, experts, heads[batch], head_floor)
            say(f"decode batch {batch} context {context}: {ms:.3f} ms, {row.share:.0%} of the floor")
            yield row


def _head_ms(scene: Scene, batch: int) -> float:
    """Milliseconds of what follows the last layer."""
    context = min(scene.wanted.contexts)
    launches = scene.model.launches(scene.decode_batch(batch, context, context - 1))
    return graph_ms([launch.call for launch in launches[-TAIL_LAUNCHES:]])


def _decode_ms(scene: Scene, batch: int, context: int) -> float:
    """Milliseconds of a step: greedy tokens and positions stay on the device, the host only enqueues."""
    model = scene.model
    first = (context - 1) // PAGE_TOKENS * PAGE_TOKENS + FIRST_OFFSET
    model.start(scene.decode_batch(batch, max(context, first + WARM_STEPS + DECODE_STEPS), first))
    for _ in range(WARM_STEPS - 1):
        model.start_next()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    for _ in range(DECODE_STEPS):
        model.start_next()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / DECODE_STEPS


def experts_read(scene: Scene, batch: int) -> float:
    """Distinct experts of a layer that one step reads, mean over layers; counted in an eager step."""
    context = min(scene.wanted.contexts)
    counts = []
    for launch in scene.model.launches(scene.decode_batch(batch, context, context - 1)):
        launch.call()
        if launch.op == "route":
            counts += [int(operand.num_active) for operand in operands(launch.call) if hasattr(operand, "num_active")]
    return statistics.mean(counts)


def decode_kernels(scene: Scene, rates: Rates, batch: int, context: int, say: Say) -> list[KernelRow]:
    """One row for each op and layer kind of the step whose token closes all its windows."""
    launches = scene.model.launches(scene.decode_batch(batch, context, context - 1))
    return _kernel_rows(scene, rates, launches, "decode", batch, context, say)


def prefill_kernels(scene: Scene, rates: Rates, tokens: int, say: Say) -> list[KernelRow]:
    """The same for a chunk of one prompt from its beginning."""
    launches = scene.model.prefill_launches(scene.prompt_batch(tokens))
    return _kernel_rows(scene, rates, launches, "prefill", tokens, tokens, say)


def _kernel_rows(
    scene: Scene, rates: Rates, launches: list[Launch], phase: str, tokens: int, context: int, say: Say
) -> list[KernelRow]:
    costs = CostModel(scene.config, scene.weights)
    groups: dict[tuple[str, str], list[tuple[Launch, Cost]]] = {}
    for launch in launches:
        launch.call()
        kind = LayerKind.SLIDING if launch.layer is None else scene.weights.layers[launch.layer].kind
        name = TOP if launch.layer is None else kind.name.lower()
        groups.setdefault((costs.name(launch), name), []).append((launch, costs.cost(launch, kind)))
    rows = []
    for (op, kind_name), members in groups.items():
        total = sum((cost for _, cost in members), Cost(0.0))
        calls = [launch.call for launch, _ in members]
        ms, count = cold_ms(calls, total.nbytes), len(members)
        nbytes, bf16, fp8 = (value / count for value in (total.nbytes, total.bf16_flops, total.fp8_flops))
        floor = rates.floor_ms(nbytes, bf16, fp8)
        rows.append(KernelRow(phase, op, kind_name, tokens, context, count, ms, nbytes, bf16, fp8, floor))
        say(f"{phase} {op} {kind_name}: {1e3 * ms:.1f} us, {rows[-1].share:.0%} of the floor")
    return rows


def prefill_rows(scene: Scene, rates: Rates, say: Say) -> Iterable[PrefillRow]:
    """One prompt of each chunk size, largest first so that buffers grow once; then packed prompts and a late chunk."""
    chunks = sorted(scene.wanted.chunks, reverse=True)
    shapes = [(tokens, 1, 0) for tokens in chunks]
    shapes.append((chunks[0], PACKED_PROMPTS, 0))
    for tokens, sequences, start in shapes:
        batch = scene.prompt_batch(tokens, sequences=sequences, start=start)
        torch.cuda.reset_peak_memory_stats()
        times = [_wall_ms(partial(scene.model.forward, batch)) for _ in range(PREFILL_RUNS + 1)]
        each = tokens // sequences
        done, full = (sequences * floors.prompt_flops(c, start, each) for c in (scene.config, scene.wanted.config))
        floor = rates.floor_ms(floors.decode_bytes(scene.config, tokens, each), done)
        ms, peak = statistics.median(times[1:]), torch.cuda.max_memory_allocated()
        row = PrefillRow(tokens, sequences, start, ms, done, full, floor, peak)
        say(f"prefill {tokens} tokens, {sequences} prompts: {ms:.1f} ms, {row.tflop_s:.0f} TFLOP/s")
        yield row


def _wall_ms(action: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)
