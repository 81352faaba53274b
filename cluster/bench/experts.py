"""`dsv4 bench experts`: decode of a whole model whose experts are partly in device memory, at every budget.

Owns: the model with one table of experts by token id in every layer, so that a step's routing is the trace's and not
that of random weights; the host bank; the cells. A token id of step s and sequence b is `s * B + b`, and its row of
every layer's table is what the trace chose there: the same kernels as in serving, in the same graphs.

One bank and one slab serve all budgets: a budget uses the first slots of the slab and everything else is read in place.
The policy's profile is the trace's own past (the steps before the measured ones), as a server that has run for a while.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.bench import floors
from cluster.bench.expert_results import ExpertResults, ExpertRow, PrefillCell
from cluster.bench.measure import machine
from cluster.bench.scene import Scene, Wanted, fill_plausibly
from workers.experts.bank import HostBank
from workers.experts.cache import ExpertCache
from workers.experts.generator import UNIFORM, V4_LIKE, generate
from workers.experts.layout import ExpertShape, Tier, code_of
from workers.experts.places import Places
from workers.experts.policy import POLICIES
from workers.experts.trace import RoutingTrace
from workers.gpu.cached_experts import ExpertMemory
from workers.gpu.expert_stream import ExpertFetch, ExpertStream
from workers.gpu.synthetic import layer_experts
from workers.model.config import PAGE_TOKENS, ModelConfig

PAST_STEPS = 600
"""Steps of a trace that are only counted: the profile."""

WARM_STEPS, MOST_STEPS = 48, 128
CHECKED_STEPS = 6
"""Steps after which logits are compared between budgets: from the same KV, before anything has moved in."""

CELL_S = 2.5
"""Seconds a cell is measured for, about."""

CONTEXT, CHUNK = 4096, 8192

STAGED = 64
"""Experts of one staging half of prefill: 0.86 GB at V4-Flash's size, twice; they count as part of no budget here."""

MOST_SCRATCH = 128
"""Experts of decode's scratch: 1.7 GB at V4-Flash's size."""

HOST = code_of(Tier.HOST, 0)

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Budget:
    """A name for tables and the slots that it buys."""

    name: str
    slots: int


def budgets_of(texts: Sequence[str], config: ModelConfig, beside_bytes: int) -> list[Budget]:
    """`64` buys slots of 64 GB; `24t` what a GPU of 24 GB in all has left beside `beside_bytes`."""
    size = ExpertShape(config.hidden_size, config.moe_intermediate_size).expert_bytes
    most, found = config.num_hidden_layers * config.n_routed_experts, []
    for text in texts:
        total = text.endswith("t")
        amount = float(text.rstrip("t")) * 1e9 - (beside_bytes if total else 0)
        slots = max(config.num_experts_per_tok, min(most, int(amount // size)))
        found.append(Budget(f"{text.rstrip('t')} GB{' total' if total else ''}", slots))
    return found


def routed_by_token(config: ModelConfig, layers: int) -> ModelConfig:
    """The trunk's first layers, each of which takes its experts from a table of token ids."""
    return dataclasses.replace(floors.trunk(config), num_hash_layers=layers)


class ExpertScene:
    """Model, bank and slab."""

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        batches: Sequence[int],
        most_slots: int,
        say: Say,
        *,
        fetch: bool,
        bank_experts: int | None,
    ) -> None:
        """`fetch`: absent experts of a decode step are copied to scratch first, instead of being read in place.

        `bank_experts`: different experts of a layer in the bank, where host memory cannot hold all; others share bytes.
        """
        self.fetch = fetch
        self.scratch_experts = min(max(batches) * config.num_experts_per_tok, MOST_SCRATCH)
        began = time.perf_counter()
        wanted = Wanted("experts", routed_by_token(config, layers), layers, True, tuple(batches), (CONTEXT,), (CHUNK,))
        self.scene = Scene(
            dataclasses.replace(wanted, config=wanted.config), experts_held=2 * config.num_experts_per_tok
        )
        self.config = self.scene.config
        say(f"model beside its experts: {self.scene.weights.nbytes / 1e9:.1f} GB, {time.perf_counter() - began:.1f} s")
        shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
        pairs = layers * config.n_routed_experts
        self.held = min(bank_experts or config.n_routed_experts, config.n_routed_experts)
        layer, expert = np.divmod(np.arange(pairs), config.n_routed_experts)
        self.bank = HostBank(
            range(layers * self.held), pairs, shape.expert_bytes, places=layer * self.held + expert % self.held
        )
        began = time.perf_counter()
        self.bank.lock()
        self.lock_s = time.perf_counter() - began
        say(f"bank: {self.bank.nbytes / 1e9:.1f} GB locked in {self.lock_s:.1f} s")
        began = time.perf_counter()
        self._fill_bank(shape, layers)
        self.fill_s = time.perf_counter() - began
        say(f"bank filled in {self.fill_s:.1f} s, {self.bank.nbytes / 1e9 / self.fill_s:.1f} GB/s")
        places = Places(most_slots, self.scratch_experts if fetch else 0, min(STAGED, config.n_routed_experts))
        self.memory = ExpertMemory.allocate(self.config, places, self.bank, "cuda")
        self.codes = self.bank.place.astype(np.int32) | HOST
        self.stream = ExpertStream(self.memory, lambda: self.codes)
        self._use(self.memory.attach(self.scene.weights))

    def _fill_bank(self, shape: ExpertShape, layers: int) -> None:
        """Every expert from its own seed, a layer at a time on the device, straight into its place."""
        experts = self.config.n_routed_experts
        staging = torch.empty(experts, shape.expert_bytes, dtype=torch.uint8, device="cuda")
        places = self.bank.memory.view(layers, self.held, shape.expert_bytes)
        for layer in range(layers):
            layer_experts(staging, shape, layer)
            # One copy an expert: the driver refuses a copy over the border of two pieces that were locked apart.
            for expert in range(self.held):
                places[layer, expert].copy_(staging[expert], non_blocking=True)
        torch.cuda.synchronize()

    def _use(self, weights: Any) -> None:
        """A model over other weights, with graphs of its own. The old one's buffers go first."""
        from workers.gpu.model import GpuModel

        scene = self.scene
        scene.model = None
        torch.cuda.empty_cache()
        scene.weights = weights
        scene.model = GpuModel(
            self.config,
            weights,
            scene.pools,
            max_running=max(scene.wanted.batches),
            max_context=scene.wanted.max_context,
            expert_stream=self.stream,
            decode_experts=ExpertFetch(self.memory) if self.fetch else None,
        )
        scene.model.warm_up()

    def route_as(self, trace: RoutingTrace) -> None:
        """Every layer's table follows the trace. Raises ValueError for more steps than there are token ids."""
        steps, layers, batch, chosen = trace.experts.shape
        if steps * batch > self.config.vocab_size:
            raise ValueError(f"{steps} steps of {batch} sequences need more than {self.config.vocab_size} token ids")
        rows = torch.from_numpy(trace.experts.astype(np.int32))
        for index, layer in enumerate(self.scene.weights.layers):
            assert layer.tid2eid is not None
            layer.tid2eid[: steps * batch].copy_(rows[:, index].reshape(-1, chosen))

    def restart(self, batch: int) -> None:
        """The same KV and positions for every cell of a batch; nothing has run yet."""
        fill_plausibly(self.scene.pools, self.config, 0)
        self.scene.reseed()
        first = CONTEXT - PAGE_TOKENS - MOST_STEPS - WARM_STEPS
        self.scene.model.start(self.scene.decode_batch(batch, CONTEXT, first))

    def all_resident(self) -> None:
        """Every expert in a slot; where they do not fit, several share one: the speed of a model without a cache."""
        slots = self.memory.places.slots
        self.memory.table.copy_(torch.arange(self.memory.table.numel(), dtype=torch.int32) % slots)

    def all_at_home(self) -> None:
        """No expert in a slot."""
        self.memory.table.copy_(torch.from_numpy(self.bank.place.astype(np.int32) | HOST))


def run_experts(
    config: ModelConfig,
    *,
    layers: int,
    budgets: Sequence[str],
    batches: Sequence[int],
    routings: Sequence[str],
    policy: str,
    json_file: Path | None,
    say: Say,
    fetch: bool = True,
    bank_experts: int | None = None,
) -> ExpertResults:
    """Every routing x batch x budget; what is measured is written at once."""
    named = budgets_of([b for b in budgets if not b.endswith("t")], config, 0)
    scene = ExpertScene(
        config, layers, batches, max(b.slots for b in named), say, fetch=fetch, bank_experts=bank_experts
    )
    beside = torch.cuda.memory_allocated() - scene.memory.slab.numel()
    named = budgets_of(budgets, scene.config, beside)
    setup = {
        "layers": layers,
        "policy": policy,
        "absent experts": "copied" if fetch else "read in place",
        "context": CONTEXT,
        "routing": str(V4_LIKE),
    }
    results = ExpertResults(_about(), setup, _memory(scene, beside))
    for routing in routings:
        model = V4_LIKE if routing == "v4-like" else UNIFORM
        for batch in batches:
            steps = PAST_STEPS + WARM_STEPS + MOST_STEPS
            trace = generate(model, steps=steps, layers=layers, experts=config.n_routed_experts, batch=batch,
                             top_k=config.num_experts_per_tok, seed=17)  # fmt: skip
            scene.route_as(trace)
            _cells(scene, trace, routing, batch, named, policy, results, say)
            if json_file is not None:
                results.write(json_file)
    _prefill(scene, named, results, say)
    if json_file is not None:
        results.write(json_file)
    return results


def _prefill(scene: ExpertScene, budgets: Sequence[Budget], results: ExpertResults, say: Say) -> None:
    """One chunk at each budget; without a profile each layer holds an equal share. Copied bytes are of one chunk."""
    batch = scene.scene.prompt_batch(CHUNK)
    for budget in sorted(budgets, key=lambda b: -b.slots):
        cache = scene.memory.cache(num_slots=budget.slots)
        scene.codes = cache.slots.codes
        times, before = [], scene.stream.copied_bytes
        for _ in range(3):
            torch.cuda.synchronize()
            began = time.perf_counter()
            scene.scene.model.forward(batch)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
        copied = (scene.stream.copied_bytes - before) / len(times)
        row = PrefillCell(budget.name, budget.slots, CHUNK, 1e3 * min(times[1:]), copied)
        results.prefill.append(row)
        say(f"prefill of {CHUNK}, {row.budget}: {row.ms:.0f} ms, {row.tokens_s:,.0f} tokens/s, {copied / 1e9:.1f} GB")


def _cells(
    scene: ExpertScene,
    trace: RoutingTrace,
    routing: str,
    batch: int,
    budgets: Sequence[Budget],
    policy: str,
    results: ExpertResults,
    say: Say,
) -> None:
    """All budgets of one batch, largest first: its logits are what the others are compared with."""
    needed = trace.all_needed()
    profile = np.zeros(trace.num_pairs)
    for pairs in needed[:PAST_STEPS]:
        profile[pairs] += 1 / PAST_STEPS
    scene.all_resident()
    resident_ms = _Cell(scene, trace, needed, None).measure()[0]
    say(f"{routing} batch {batch}: all resident {resident_ms:.2f} ms")
    expected: torch.Tensor | None = None
    for budget in [*sorted(budgets, key=lambda b: -b.slots), None]:
        cache = None
        if budget is None:
            scene.all_at_home()
        else:
            options: dict[str, Any] = {"policy": POLICIES[policy], "profile": profile}
            cache = scene.memory.cache(num_slots=budget.slots, **options)
        cell = _Cell(scene, trace, needed, cache)
        ms, steps, hits, total, moved = cell.measure()
        same = None if expected is None else bool(torch.equal(cell.checked, expected))
        expected = cell.checked if expected is None else expected
        size = scene.bank.expert_bytes
        row = ExpertRow(
            routing=routing,
            budget="off" if budget is None else budget.name,
            slots=0 if budget is None else budget.slots,
            share=0.0 if budget is None else budget.slots / trace.num_pairs,
            batch=batch,
            steps=steps,
            ms=ms,
            resident_ms=resident_ms,
            needed=total / steps,
            hit_rate=hits / max(1, total),
            misses=(total - hits) / steps,
            read_bytes=(total - hits) / steps * size,
            moved_bytes=moved / steps * size,
            identical=same,
        )
        results.rows.append(row)
        say(f"{routing} batch {batch} {row.budget}: {ms:.2f} ms, {row.tokens_s:.1f} tokens/s, hit {row.hit_rate:.1%}, "
            f"{row.misses:.1f} misses, same {same}")  # fmt: skip


class _Cell:
    """One measurement: checked steps from a fixed state, warm steps, then as many as fit the time."""

    def __init__(
        self, scene: ExpertScene, trace: RoutingTrace, needed: Sequence[Any], cache: ExpertCache | None
    ) -> None:
        self._scene, self._needed, self._cache = scene, needed, cache
        self._batch, self._next = trace.experts.shape[2], PAST_STEPS
        self.checked = torch.empty(0)

    def _step(self) -> tuple[int, int]:
        """(pairs found in slots, pairs needed) of one step."""
        if self._cache is not None:
            self._cache.before_step()
        pairs = self._needed[self._next]
        ids = np.arange(self._next * self._batch, (self._next + 1) * self._batch, dtype=np.int64)
        self._scene.scene.model.start_next(ids)
        self._next += 1
        inside = 0 if self._cache is None else int((self._cache.slots.codes[pairs] >> 24 == 0).sum())
        return inside, len(pairs)

    def measure(self) -> tuple[float, int, int, int, int]:
        """(ms a step, steps, hits, needed pairs, pairs moved in)."""
        self._scene.restart(self._batch)
        for _ in range(CHECKED_STEPS):
            self._step()
        self.checked = self._scene.scene.model.logits().clone()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(2):
            self._step()
        torch.cuda.synchronize()
        each = (time.perf_counter() - began) / 2
        steps = max(4, min(MOST_STEPS, int(CELL_S / each)))
        for _ in range(min(WARM_STEPS - CHECKED_STEPS - 2, steps)):
            self._step()
        before = 0 if self._cache is None else self._cache.counters.moved_in
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        hits = total = 0
        begin.record()
        for _ in range(steps):
            found, count = self._step()
            hits, total = hits + found, total + count
        end.record()
        end.synchronize()
        moved = 0 if self._cache is None else self._cache.counters.moved_in - before
        return begin.elapsed_time(end) / steps, steps, hits, total, moved


def _about() -> dict[str, Any]:
    found = machine()
    return {"gpu": found.gpu, "date": found.date, **found.versions}


def _memory(scene: ExpertScene, beside: int) -> dict[str, float]:
    status = Path("/proc/self/status").read_text().splitlines()
    rss = next((int(line.split()[1]) for line in status if line.startswith("VmRSS")), 0)
    return {
        "beside experts, GB": beside / 1e9,
        "slab, GB": scene.memory.slab.numel() / 1e9,
        "bank pinned, GB": scene.bank.nbytes / 1e9,
        "bank locked in s": scene.lock_s,
        "bank filled in s": scene.fill_s,
        "RSS, GB": rss * 1024 / 1e9,
    }
