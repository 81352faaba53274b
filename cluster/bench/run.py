"""One run of `dsv4 bench model`: the peer first, because it needs the memory; then ceilings, model and measurements.

Owns: the order, and that what was measured is on disk before the next part begins, so that a failure costs only itself.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cluster.bench.results import Results, Start
from cluster.bench.scene import Scene, Wanted
from cluster.errors import ClusterError

PEER_CONTEXT = 4096
PEER_PREFILL = 4096

Say = Callable[[str], None]


class NoGpu(ClusterError):
    """There is no CUDA device, or no Triton."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, by the names of the command's parts."""

    parts: frozenset[str]
    kernels_at: tuple[tuple[int, int], ...]
    kernel_chunk: int
    experts_held: int | None = None
    json_file: Path | None = None

    def extended(self, wanted: Wanted) -> Wanted:
        """The scene that also has room for the kernel tables. Raises `ClusterError` where they ask for more."""
        batches, contexts, chunks = set(wanted.batches), set(wanted.contexts), set(wanted.chunks)
        if "kernels" in self.parts:
            chunks |= {self.kernel_chunk}
        for batch, context in self.kernels_at if self.parts & {"kernels", "invariance"} else ():
            if batch > max(batches) or context > max(contexts):
                raise ClusterError(f"the kernel table {batch}:{context} lies outside --batches and --contexts")
        return dataclasses.replace(wanted, chunks=tuple(sorted(chunks)))


def run(wanted: Wanted, plan: Plan, say: Say) -> Results:
    """Raises `NoGpu`, `DoesNotFitDevice`; a part that fails is reported by `say` and left out."""
    import torch

    if not torch.cuda.is_available():
        raise NoGpu("no CUDA device")
    from cluster.bench import measure
    from cluster.bench.peer import measure_peer
    from cluster.bench.timing import measure_rates

    wanted = plan.extended(wanted)
    peer = None
    if "peer" in plan.parts:
        peer = measure_peer(wanted.config, context=PEER_CONTEXT, prefill_tokens=PEER_PREFILL, seed=wanted.seed)
        say(f"peer: {peer}")
    rates = measure_rates()
    torch.cuda.empty_cache()
    say(f"ceilings: {rates}")
    scene = Scene(wanted, plan.experts_held)
    results = Results(measure.machine(), scene.setup, rates, memory=scene.memory, peer=peer)
    if "start" not in plan.parts:
        _warm_up(scene, plan.parts)
    peak = 0
    for part, action in _parts(scene, results, plan, say):
        if part not in plan.parts:
            continue
        try:
            action()
        except Exception:  # the other parts, and what this one has found, are still worth having
            say(f"{part} failed:\n{traceback.format_exc()}")
        peak = max(peak, torch.cuda.max_memory_allocated())
        if plan.json_file is not None:
            results.memory = dataclasses.replace(scene.memory, peak=peak)
            results.write(plan.json_file)
    results.memory = dataclasses.replace(scene.memory, peak=peak)
    return results


def _warm_up(scene: Scene, parts: frozenset[str]) -> None:
    """Compile side by side what the parts would compile kernel by kernel."""
    if parts & {"decode", "kernels", "invariance", "long"}:
        scene.model.warm_up()
    if parts & {"prefill", "kernels", "invariance", "long"}:
        scene.model.warm_up_prefill()


def _parts(scene: Scene, results: Results, plan: Plan, say: Say) -> list[tuple[str, Callable[[], None]]]:
    """(part of the command, measurement) in order: decode before prefill, which takes the most memory."""
    from cluster.bench import measure

    rates, wanted = results.rates, scene.wanted

    def start(measured: Callable[[Scene], Start]) -> None:
        found = measured(scene)
        results.start = found if results.start is None else results.start + found
        say(f"start: {found}")

    def decode_kernels() -> None:
        for batch, context in plan.kernels_at:
            results.kernels += measure.decode_kernels(scene, rates, batch, context, say)

    def invariance() -> None:
        from cluster.bench.invariance import invariance_rows

        for batch, context in plan.kernels_at:
            results.invariance += invariance_rows(scene, batch, context, say)

    def long() -> None:
        from cluster.bench.long_prompt import long_prompt

        results.long_prompt = long_prompt(scene, wanted.long_prompt, min(8192, wanted.chunk_tokens), say)

    return [
        ("start", lambda: start(measure.start_decode)),
        ("decode", lambda: results.decode.extend(measure.decode_rows(scene, rates, say))),
        ("kernels", decode_kernels),
        ("start", lambda: start(measure.start_prefill)),
        ("prefill", lambda: results.prefill.extend(measure.prefill_rows(scene, rates, say))),
        ("kernels", lambda: results.kernels.extend(measure.prefill_kernels(scene, rates, plan.kernel_chunk, say))),
        ("invariance", invariance),
        ("long", long),
    ]
