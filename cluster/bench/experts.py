"""`dsv4 bench experts`: decode and prefill of a whole model whose experts are partly in device memory, at every budget.

Owns: the order of a run and how one cell is measured. Does not own: which cells there are (`expert_sweep.py`), the
model (`expert_scene.py`), tables (`expert_results.py`).

A step is launched when the one before the last is over, as the engine does it: the cache then decides from counters as
old as in serving. Whatever the host does between steps and does not hide is in the time.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.bench.expert_results import ExpertResults, ExpertRow, PrefillCell
from cluster.bench.expert_scene import ExpertScene
from cluster.bench.expert_sweep import MOST_STEPS, Cell, Workload, batch_cells, budgets_of, first_cells, policy_cells
from cluster.bench.measure import machine
from workers.experts.cache import ExpertCache
from workers.experts.generator import V4_LIKE
from workers.experts.policy import POLICIES
from workers.experts.simulate import belady
from workers.model.config import ModelConfig

CHECKED_STEPS = 4
"""Steps after which logits are compared between budgets: from the same KV, before anything has moved in."""

WARM_STEPS = 8
CELL_S = 0.4
"""Seconds a cell is measured for, about; at least `LEAST_STEPS`."""

LEAST_STEPS = 3
AHEAD = 2
"""Steps that may be under way when another one is launched."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """What to run. The first routing, batch and policy are measured at all `budgets`, the others at a few.

    Attributes:
        few: budgets of the other routings and batches.
        compared: budgets of the other policies and of a text that is known.
        prefill: budgets of prefill.
    """

    budgets: tuple[str, ...]
    few: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    prefill: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    routings: tuple[str, ...] = ("v4-like",)
    policies: tuple[str, ...] = ("lfru",)
    json_file: Path | None = None

    @property
    def every_budget(self) -> tuple[str, ...]:
        """Each that is named anywhere."""
        return self.budgets + self.few + self.compared + self.prefill

    def workloads(self, layers: int, config: ModelConfig) -> list[Workload]:
        """The first routing at every batch, the others at the first two."""
        made = []
        for routing in self.routings:
            batches = self.batches if routing == self.routings[0] else self.batches[:2]
            made += [Workload(routing, b, layers, config.n_routed_experts, config.num_experts_per_tok) for b in batches]
        return made


def run_experts(config: ModelConfig, plan: ExpertPlan, *, layers: int, say: Say, **options: Any) -> ExpertResults:
    """Every cell; what is measured is written at once. `options`: more of `ExpertScene`.

    Raises `IntegrityError` when a slot holds another expert's bytes.
    """
    workloads = plan.workloads(layers, config)
    with ThreadPoolExecutor(len(workloads), thread_name_prefix="routing") as pool:
        # Drawn while the bank's pages are locked, which takes longer.
        drawn = [pool.submit(_draw, workload) for workload in workloads]
        plain = budgets_of([text for text in plan.every_budget if not text.endswith("t")], config, 0)
        most = min(max(budget.slots for budget in plain), layers * config.n_routed_experts)
        scene = ExpertScene(config, layers=layers, batches=plan.batches, most_slots=most, say=say, **options)
        for future in drawn:
            future.result()
    run = _Run(scene, workloads, plan, say)
    run.all()
    return run.results


def _draw(workload: Workload) -> None:
    """Makes what a workload computes at first use."""
    assert workload.needed


class _Run:
    """One run over one scene."""

    def __init__(self, scene: ExpertScene, workloads: Sequence[Workload], plan: ExpertPlan, say: Say) -> None:
        self._scene, self._workloads, self._plan, self._say = scene, workloads, plan, say
        self._expected: dict[Workload, torch.Tensor] = {}
        self._resident_ms: dict[Workload, float] = {}
        self._routed: Workload | None = None
        self._route(workloads[0])
        beside = _device_bytes(scene)
        named = (plan.budgets, plan.few, plan.compared, plan.prefill)
        self._budgets, self._few, self._compared, self._prefilled = (
            budgets_of(texts, scene.config, beside) for texts in named
        )
        setup = {
            "layers": scene.config.num_hidden_layers,
            "absent experts": "through scratch" if scene.memory.places.scratch else "read in place",
            "different experts a layer in the bank": scene.held,
            "context": scene.context,
            "routing": str(V4_LIKE),
            "past": f"{workloads[0].past} steps of profile, the last {workloads[0].replayed} replayed",
        }
        self.results = ExpertResults(_about(), setup, _memory(scene, beside))

    def _route(self, workload: Workload) -> None:
        """The next steps are the workload's. At its first turn also times it with a slot for everyone, which compiles
        and captures."""
        if workload is not self._routed:
            self._scene.route_as(workload)
            self._routed = workload
        if workload in self._resident_ms:
            return
        self._scene.all_resident()
        timed = _Timed(self._scene, workload, None)
        self._resident_ms[workload] = timed.measure().ms
        self._say(f"{workload.routing} batch {workload.batch}: all resident {self._resident_ms[workload]:.2f} ms")

    def all(self) -> None:
        """Every cell, the most wanted first. Belady's figures are computed beside the device's work."""
        first, others = self._workloads[0], self._workloads[1:]
        usual, policies = self._plan.policies[0], self._plan.policies[1:]
        with ThreadPoolExecutor(1, thread_name_prefix="belady") as pool:
            slots = {budget.slots for budget in (*self._budgets, *self._compared)}
            best = {count: pool.submit(_optimum, first, count) for count in sorted(slots)}
            for cell in first_cells(first, self._budgets, usual):
                self._cell(cell, best)
            self.prefill()
            for cell in batch_cells(others, self._few, usual):
                self._cell(cell, best)
            for cell in policy_cells(first, self._compared, policies):
                self._cell(cell, best)

    def _cache(self, cell: Cell) -> tuple[ExpertCache | None, float]:
        """The cell's cache with its first residents, and the seconds that bringing them in took."""
        scene, workload = self._scene, cell.workload
        if cell.budget is None:
            scene.all_at_home()
            return None, 0.0
        slots, policy = cell.budget.slots, POLICIES[cell.policy]
        if cell.same_text or not policy.admits:
            profile = workload.same_text() if cell.same_text else workload.profile(0, workload.past)
            cache = scene.cache(slots, policy, profile)
            return cache, scene.fill(cache, cache.residency.first_residents(slots))
        cache = scene.cache(slots, policy, workload.recorded())
        return cache, scene.fill(cache, workload.residents_after_past(cache.residency, slots))

    def _cell(self, cell: Cell, best: dict[int, Future[float]]) -> None:
        """One row."""
        scene, workload = self._scene, cell.workload
        self._route(workload)
        cache, fill_s = self._cache(cell)
        timed = _Timed(scene, workload, cache)
        found = timed.measure()
        expected = self._expected.setdefault(workload, timed.checked)
        if cache is not None:
            scene.keep_slots(cache)
        has_best = workload is self._workloads[0] and not cell.same_text
        row = ExpertRow(
            routing=f"{workload.routing}, same text" if cell.same_text else workload.routing,
            budget="off" if cell.budget is None else cell.budget.name,
            slots=0 if cell.budget is None else cell.budget.slots,
            share=0.0 if cell.budget is None else cell.budget.slots / workload.trace.num_pairs,
            batch=workload.batch,
            policy="" if cell.budget is None else cell.policy,
            steps=found.steps,
            ms=found.ms,
            resident_ms=self._resident_ms[workload],
            needed=found.needed / found.steps,
            hit_rate=found.hits / max(1, found.needed),
            best_rate=best[cell.budget.slots].result() if has_best and cell.budget is not None else None,
            misses=(found.needed - found.hits) / found.steps,
            expert_bytes=scene.expert_bytes,
            moved=found.moved / found.steps,
            host_ms=found.host_ms,
            fill_s=fill_s,
            identical=None if expected is timed.checked else bool(torch.equal(expected, timed.checked)),
        )
        self.results.rows.append(row)
        self.write()
        self._say(
            f"{row.routing} batch {row.batch} {row.budget} {row.policy}: {row.ms:.2f} ms, {row.tokens_s:.1f} tokens/s, "
            f"hit {row.hit_rate:.1%}, {row.misses:.1f} misses, {row.moved:.2f} moves, host {row.host_ms:.2f} ms, "
            f"filled {row.fill_s:.1f} s, same {row.identical}"
        )

    def prefill(self) -> None:
        """One chunk at each of its budgets; a layer holds an equal share, as on a worker without a profile."""
        scene = self._scene
        batch = scene.scene.prompt_batch(scene.chunk)
        expected: torch.Tensor | None = None
        for budget in sorted(set(self._prefilled), key=lambda b: -b.slots):
            cache = scene.cache(budget.slots, POLICIES["static"], None)
            scene.fill(cache, cache.residency.first_residents(budget.slots))
            scene.codes = cache.slots.codes
            if expected is None:
                try:
                    expected = scene.scene.model.forward(batch)  # compiles, and makes the buffers
                except torch.OutOfMemoryError as exc:
                    beside = scene.memory.places.total
                    self._say(f"prefill is left out: no room for its buffers beside {beside} experts ({exc})")
                    return
            scene.synchronize()
            before, began = scene.stream.copied_bytes, time.perf_counter()
            logits = scene.scene.model.forward(batch)
            scene.synchronize()
            seconds, copied = time.perf_counter() - began, scene.stream.copied_bytes - before
            scene.keep_slots(cache)
            same = bool(torch.equal(expected, logits))
            row = PrefillCell(budget.name, budget.slots, scene.chunk, 1e3 * seconds, copied, same)
            self.results.prefill.append(row)
            self.write()
            self._say(f"prefill of {scene.chunk}, {row.budget}: {row.ms:.0f} ms, {row.tokens_s:,.0f} tokens/s, "
                      f"{copied / 1e9:.1f} GB, same {same}")  # fmt: skip

    def write(self) -> None:
        """To the plan's file, if it names one."""
        if self._plan.json_file is not None:
            self.results.write(self._plan.json_file)


def _optimum(workload: Workload, slots: int) -> float:
    """Belady's hit rate over the steps that cells measure, warm from the past."""
    return belady(workload.trace, slots, warmup=workload.past + CHECKED_STEPS, needed=workload.needed).rate


@dataclass(slots=True)
class _Found:
    """Sums of measured steps; milliseconds of one."""

    ms: float
    steps: int
    hits: int
    needed: int
    moved: int
    host_ms: float
    """Of the cache's own work between steps."""


class _Timed:
    """One measurement: checked steps from a fixed state, warm steps, then as many as fit the time."""

    def __init__(self, scene: ExpertScene, workload: Workload, cache: ExpertCache | None) -> None:
        self._scene, self._workload, self._cache = scene, workload, cache
        self._next, self._host_s = 0, 0.0
        self._under_way: deque[torch.cuda.Event] = deque()
        self.checked = torch.empty(0)

    def _step(self) -> tuple[int, int]:
        """(pairs found in slots, pairs needed) of one step."""
        if len(self._under_way) >= AHEAD:
            self._under_way.popleft().synchronize()
        began = time.perf_counter()
        if self._cache is not None:
            self._cache.before_step()
        self._host_s += time.perf_counter() - began
        batch = self._workload.batch
        pairs = self._workload.needed[self._workload.past + self._next]
        ids = np.arange(self._next * batch, (self._next + 1) * batch, dtype=np.int64)
        self._scene.scene.model.start_next(ids)
        if self._scene.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._under_way.append(event)
        self._next += 1
        inside = 0 if self._cache is None else int((self._cache.slots.codes[pairs] >> 24 == 0).sum())
        return inside, len(pairs)

    def _run(self, steps: int) -> tuple[float, int, int]:
        """(milliseconds a step, hits, needed)."""
        self._scene.synchronize()
        began = time.perf_counter()
        counts = [self._step() for _ in range(steps)]
        self._scene.synchronize()
        ms = 1e3 * (time.perf_counter() - began) / steps
        return ms, sum(hits for hits, _ in counts), sum(needed for _, needed in counts)

    def measure(self) -> _Found:
        """Runs everything."""
        self._scene.restart(self._workload.batch)
        each = self._run(CHECKED_STEPS)[0]
        self.checked = self._scene.scene.model.logits().clone()
        steps = max(LEAST_STEPS, min(MOST_STEPS - CHECKED_STEPS - WARM_STEPS, int(1e3 * CELL_S / each)))
        if steps > WARM_STEPS:
            self._run(WARM_STEPS)
        before = 0 if self._cache is None else self._cache.counters.moved_in
        self._host_s = 0.0
        ms, hits, needed = self._run(steps)
        moved = 0 if self._cache is None else self._cache.counters.moved_in - before
        return _Found(ms, steps, hits, needed, moved, 1e3 * self._host_s / steps)


def _about() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"gpu": "none: Triton's interpreter", "date": ""}
    found = machine()
    return {"gpu": found.gpu, "date": found.date, **found.versions}


def _device_bytes(scene: ExpertScene) -> int:
    """Device memory in use beside the slab: weights, pools, buffers, graphs, the driver's context."""
    if scene.device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - scene.memory.slab.numel()


def _memory(scene: ExpertScene, beside: int) -> dict[str, float]:
    """GB, and seconds of the start."""
    status = Path("/proc/self/status").read_text().splitlines()
    known = Path("/proc/meminfo").read_text().splitlines()
    slab, places = scene.memory.slab, scene.memory.places
    return {
        "device beside the slab, GB": beside / 1e9,
        "slab, GB": slab.numel() / 1e9,
        "of it scratch and staging, GB": (places.total - places.slots) * scene.expert_bytes / 1e9,
        "bank pinned, GB": scene.bank.nbytes / 1e9,
        "RSS, GB": _kilobytes(status, "VmRSS") * 1024 / 1e9,
        "page cache of the host, GB": _kilobytes(known, "Cached") * 1024 / 1e9,
        "model made in s": scene.model_s,
        "bank locked in s": scene.lock_s,
        "bank filled in s": scene.fill_s,
    }


def _kilobytes(lines: Sequence[str], name: str) -> int:
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
