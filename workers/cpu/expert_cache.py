"""`CpuExperts`: the routed experts of a CPU worker whose fast memory holds only some of them.

Owns: one arena of exactly `num_slots` packed experts, allocated once; a scratch place for each thread; who sits where;
counters. Does not own: the slower tiers (`workers/experts/supply.py`), who deserves a slot (`Residency`), products. The
kernels look an expert up in `homes`; one that is absent is read and unpacked into the thread's place inside the step
and used from there, with the same bits as from a slot. Residency changes only between steps, so that nothing that a
step reads can move. Engine thread, except `fetch` (any thread of a step) and `stats_fields` (anyone).
"""

from __future__ import annotations

import ctypes
import logging
import time
from dataclasses import dataclass, field

import numpy as np

from kvstore.errors import IntegrityError
from workers.cpu import tables as t
from workers.cpu.arena import aligned_zeros
from workers.cpu.expert_panels import ExpertPanels
from workers.errors import WorkerError
from workers.experts.config import PRELOADS, SlotPlan, pays_little, plan_slots
from workers.experts.histogram import DISTINCT_BOUNDS, Histogram
from workers.experts.layout import Tier, code_of
from workers.experts.policy import POLICIES, Ids, highest
from workers.experts.profile import read_profile
from workers.experts.prompt_uses import encode_uses, shares_of
from workers.experts.residency import PROMPT_MOVES, URGENT_MOVES, Residency
from workers.experts.slots import SlotTable
from workers.experts.supply import ExpertSupply, ExpertUnavailable
from workers.model.config import ModelConfig

logger = logging.getLogger(__name__)

INTERVAL, MOVES = 4, 16
"""Steps between two decisions, and experts that one decision may bring in: each costs a read that no step waits for
in vain only if it is used again."""

LOAD_BOUNDS_S = (1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 1.0)
"""From a small expert out of memory to a slow disk's worst."""

PHASES, PATHS = ("prefill", "decode"), ("host", "disk")

_FETCH = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


@dataclass(slots=True)
class ExpertCounters:
    """Since start. Unique (layer, expert) pairs a step, as in `workers/experts/trace.py`."""

    lookups: Ids
    """int64 [L]; likewise `hits`."""
    hits: Ids
    cold: int = 0
    capacity: int = 0
    prefill: int = 0
    """Misses of steps that prefilled, of either kind."""
    loads: int = 0
    """Absent experts unpacked inside steps; one may be loaded several times a step, once by each tile of tokens."""
    stall_s: float = 0.0
    """Seconds inside steps spent on them, over all threads."""
    moved: int = 0
    useful: int = 0
    """Of these, used by a step before they left; `wasted`: they left unused."""
    wasted: int = 0
    evicted: int = 0
    move_s: float = 0.0
    step_s: dict[str, float] = field(default_factory=lambda: {"0": 0.0, "1+": 0.0})
    """Seconds of steps without and with a miss."""
    phase_lookups: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    """Of `lookups`, those of steps that prefilled and of others; likewise `phase_hits`."""
    phase_hits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    distinct: dict[str, Histogram] = field(
        default_factory=lambda: {phase: Histogram(DISTINCT_BOUNDS) for phase in PHASES}
    )
    """By phase: experts that one step needed of one layer."""
    load_s: dict[str, Histogram] = field(default_factory=lambda: {path: Histogram(LOAD_BOUNDS_S) for path in PATHS})
    """By path: seconds of one of `loads`, reading and unpacking."""


class CpuExperts:
    """Residency of one model. `attach` it to the model's tables, then call `end_step` after every step."""

    def __init__(
        self,
        config: ModelConfig,
        supply: ExpertSupply,
        *,
        num_threads: int,
        interval: int = INTERVAL,
        moves: int = MOVES,
    ) -> None:
        """Allocates everything and preloads. Raises `BadConfig` below the smallest budget, `ExpertUnavailable`."""
        self._config, self._supply, self._interval, self._moves = config, supply, interval, moves
        layers, experts, top_k = config.num_hidden_layers, config.n_routed_experts, config.num_experts_per_tok
        self.panels = ExpertPanels(config, supply.records.form)
        slot_bytes = self.panels.slot_bytes
        self.plan: SlotPlan = plan_slots(
            supply.config, slot_bytes, num_threads, layers=layers, experts=experts, top_k=top_k
        )
        few = self.plan.num_slots < layers * experts and pays_little(self.plan.num_slots, layers, top_k)
        self.note = f"experts: {few}" if few else ""
        self._arena = aligned_zeros(self.plan.num_slots * slot_bytes)
        self._places = [aligned_zeros(slot_bytes) for _ in range(num_threads)]
        self._records = [np.zeros(supply.record_bytes, np.uint8) for _ in range(num_threads)]
        pairs = layers * experts
        self.homes = np.zeros(pairs, np.int64)
        self.slots = SlotTable(
            np.array([code_of(Tier.HOST, pair) for pair in range(pairs)], np.int32), self.plan.num_slots
        )
        preload = supply.config.preload
        profile = None if preload in PRELOADS else read_profile(preload, layers, experts)
        self.residency = Residency(layers, experts, top_k, POLICIES[supply.config.policy], profile)
        self.counters = ExpertCounters(np.zeros(layers, np.int64), np.zeros(layers, np.int64))
        self._seen = np.zeros(pairs, bool)
        self._since_prompt = np.zeros(pairs, np.int64)
        self._needed = np.zeros(pairs, np.int64)
        """Steps that needed each pair."""
        self._unused = np.zeros(pairs, bool)
        self._steps = 0
        self._failure: BaseException | None = None
        self._callback = _FETCH(self._fetch)
        first = self.residency.first_residents(self.plan.num_slots)
        self._fill_bank(first)
        if preload != "none":
            self._bring_in(first)
        self._unused[:] = False
        self.counters.moved, self.counters.move_s = 0, 0.0  # what the preload moved is no use of the policy's
        logger.info(
            "experts: %d of %d in %d slots of %d bytes, %d scratch places, source=%s policy=%s bank_bytes=%d",
            len(self.slots.residents()), pairs, self.plan.num_slots, slot_bytes, num_threads,
            supply.config.source, supply.config.policy, supply.bank_bytes,
        )  # fmt: skip

    def _fill_bank(self, first: Ids) -> None:
        """The host bank takes those first that will not sit in a slot. Engines that share a supply share its bank."""
        if self._supply.bank is not None:
            return
        order = self.residency.first_residents(len(self.homes))
        if self.residency.usage.profile.any():
            order = highest(self.residency.usage.profile, order, len(order))
        is_first = np.zeros(len(self.homes), bool)
        is_first[first] = self._supply.config.preload != "none"
        self._supply.fill_bank([*order[~is_first[order]].tolist(), *order[is_first[order]].tolist()])

    def attach(self, model: np.ndarray, layers: np.ndarray) -> None:
        """Writes addresses into the kernels' tables; they are valid while this object lives."""
        experts = self._config.n_routed_experts
        model[t.FETCH_EXPERT] = ctypes.cast(self._callback, ctypes.c_void_p).value
        for index, row in enumerate(layers):
            row[t.EXPERT_HOMES] = self.homes[index * experts :].ctypes.data
            row[t.W13_ELEMENT], row[t.W2_ELEMENT] = self.panels.element13, self.panels.element2
            row[t.W2_OFFSET] = self.panels.w2_offset

    def _fetch(self, pair: int, thread: int) -> int:
        """Called from the kernels: the address of an absent expert in the thread's place; 0 when it cannot be had."""
        began = time.perf_counter()
        try:
            place = self._places[thread]
            self._supply.read(pair, self._records[thread])
            self.panels.unpack(self._records[thread], place)
        except BaseException as exc:  # noqa: BLE001  (nothing may cross the kernels; `end_step` raises it)
            self._failure = exc
            return 0
        seconds = time.perf_counter() - began
        self.counters.loads += 1
        self.counters.stall_s += seconds
        self.counters.load_s[self._supply.path_of(pair)].add([seconds])
        return int(place.ctypes.data)

    def end_step(self, uses: np.ndarray, seconds: float, *, prefills: bool) -> None:
        """After a step: counts `uses` int64 [threads, L * E] and clears them, then moves experts now and then.

        A step that `prefills` takes free slots and no others: it needs nearly every expert once, decode the same few
        again and again. What the policy knows of decode it leaves alone.

        Raises what a fetch of the step raised: its result is worthless.
        """
        counts = uses.sum(axis=0)
        uses[:] = 0
        if (failure := self._failure) is not None:
            self._failure = None
            if isinstance(failure, ExpertUnavailable):
                raise failure
            raise ExpertUnavailable(f"an expert could not be unpacked: {failure}") from failure
        self._since_prompt += counts
        self._count(counts, seconds, prefills=prefills)
        free = self.slots.num_free
        if prefills and not free:
            return
        self.residency.note(counts, 1)
        self._steps += 1
        if self._steps % self._interval == 0:
            if prefills:
                self._move(min(self._moves, free), urgent_moves=0)
            else:
                self._move(self._moves)

    def _count(self, counts: Ids, seconds: float, *, prefills: bool) -> None:
        shape = (self._config.num_hidden_layers, self._config.n_routed_experts)
        needed, resident = counts > 0, self.homes != 0
        hit, missed = needed & resident, needed & ~resident
        distinct = needed.reshape(shape).sum(axis=1)
        phase = "prefill" if prefills else "decode"
        self.counters.distinct[phase].add(distinct.tolist())
        self.counters.phase_lookups[phase] += int(distinct.sum())
        self.counters.phase_hits[phase] += int(hit.sum())
        self.counters.lookups += distinct
        self.counters.hits += hit.reshape(shape).sum(axis=1)
        misses, cold = int(missed.sum()), int((missed & ~self._seen).sum())
        if prefills:
            self.counters.prefill += misses
        else:
            self.counters.cold += cold
            self.counters.capacity += misses - cold
        self._needed += needed
        self.counters.step_s["1+" if missed.any() else "0"] += seconds
        self._seen |= needed
        self.counters.useful += int((self._unused & needed).sum())
        self._unused &= ~needed

    def _move(self, most: int, *, urgent_moves: int = URGENT_MOVES) -> None:
        """One decision of the policy; a failed read leaves its slot free and is tried again when it is worth it."""
        keep = lambda pairs: np.zeros(len(pairs), bool)  # noqa: E731  (no step runs now)
        free = self.slots.num_free
        moves = self.residency.decide(self.slots.held(), free, most, keep=keep, urgent_moves=urgent_moves)
        self.counters.wasted += int(self._unused[moves.leave].sum())
        self._unused[moves.leave] = False
        for pair in moves.leave.tolist():
            slot, _ = self.slots.leave(pair)
            self.homes[pair] = 0
            self.slots.quiet(slot)
            self.counters.evicted += 1
        self._bring_in(moves.enter)

    def _bring_in(self, pairs: Ids) -> None:
        began = time.perf_counter()
        for pair in pairs.tolist():
            slot = self.slots.fill(pair)
            if slot is None:
                raise IntegrityError(f"no free slot for expert pair {pair}")
            memory = self._slot(slot)
            try:
                self._supply.read(pair, self._records[0], stream=True)
                self.panels.unpack(self._records[0], memory)
            except WorkerError as exc:
                self.slots.failed(pair)
                logger.warning("experts: pair=%d stays away: %s", pair, exc)
                continue
            if self._supply.config.verify:
                self._check_slot(pair, memory)
            self.slots.arrived(pair)
            self._unused[pair] = True
            self.homes[pair] = memory.ctypes.data
            self.counters.moved += 1
        self.counters.move_s += time.perf_counter() - began

    def _slot(self, slot: int) -> np.ndarray:
        size = self.plan.slot_bytes
        return self._arena[slot * size : (slot + 1) * size]

    def _check_slot(self, pair: int, memory: np.ndarray) -> None:
        self._supply.read(pair, self._records[0])
        self.panels.unpack(self._records[0], self._places[0])
        if not np.array_equal(memory, self._places[0]):
            raise IntegrityError(f"the slot of expert pair {pair} does not hold it")

    def prompt_uses(self) -> bytes:
        """Steps' needs since the last call, for the worker that will decode. Engine thread, as `note_prompt`."""
        uses, self._since_prompt = self._since_prompt, np.zeros_like(self._since_prompt)
        return encode_uses(uses)

    def note_prompt(self, uses: bytes) -> None:
        """Brings in what a prompt used whose decode steps are about to come."""
        shape = (self._config.num_hidden_layers, self._config.num_experts_per_tok)
        shares = shares_of(uses, len(self.homes), layers=shape[0], top_k=shape[1])
        if shares is not None:
            self.residency.note_prompt(shares)
            self._move(PROMPT_MOVES)

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless slots, homes and arena agree."""
        self.slots.check_integrity()
        base = self._arena.ctypes.data
        for pair in range(len(self.homes)):
            slot = self.slots.slot_of(pair)
            expected = 0 if slot is None else base + slot * self.plan.slot_bytes
            if self.homes[pair] != expected:
                raise IntegrityError(f"expert pair {pair} is looked for at {self.homes[pair]:#x}, not {expected:#x}")

    @property
    def nbytes(self) -> int:
        """Fast memory: slots and places, counted from the arrays themselves."""
        return int(self._arena.nbytes) + sum(place.nbytes for place in self._places)

    def stats_fields(self) -> dict[str, object]:
        """This part's fields of `WorkerStats`. Any thread; gauges may be a step apart."""
        counters, supply, plan = self.counters, self._supply, self.plan
        reads = supply.counters
        shape = (self._config.num_hidden_layers, self._config.n_routed_experts)
        resident = (self.homes != 0).reshape(shape).sum(axis=1)
        best = np.sort(self._needed)[::-1][: plan.num_slots].sum()
        requested = supply.config.hbm_bytes or (plan.num_slots + plan.num_places) * plan.slot_bytes
        return {
            "expert_lookups": int(counters.lookups.sum()),
            "expert_hits": int(counters.hits.sum()),
            "expert_misses": {"cold": counters.cold, "capacity": counters.capacity, "prefill": counters.prefill},
            "expert_evictions": counters.evicted,
            "expert_moves": counters.moved,
            "expert_prefetch": {"useful": counters.useful, "wasted": counters.wasted},
            "expert_heat_share": self.residency.heat_share(self.homes != 0),
            "expert_loads": counters.loads,
            "expert_stall_s_total": counters.stall_s,
            "expert_bytes": {"disk": reads.disk_bytes, "host": reads.bank_bytes},
            "expert_read_s_total": reads.read_s,
            "expert_io_errors": reads.io_errors,
            "expert_step_s": dict(counters.step_s),
            "expert_slots": {"used": int(resident.sum()), "free": plan.num_slots - int(resident.sum())},
            "expert_budget_bytes": {"requested": requested, "effective": plan.total_bytes, "measured": self.nbytes},
            "expert_host_bytes": {"bank": supply.bank_bytes, supply.config.source: supply.disk.held_bytes},
            "expert_oracle_hit_ratio": float(best / max(1, self._needed.sum())),
            "expert_layer_lookups": {str(layer): int(n) for layer, n in enumerate(counters.lookups)},
            "expert_layer_hits": {str(layer): int(n) for layer, n in enumerate(counters.hits)},
            "expert_layer_resident": {str(layer): int(n) for layer, n in enumerate(resident)},
            "expert_phase_lookups": dict(counters.phase_lookups),
            "expert_phase_hits": dict(counters.phase_hits),
            "expert_distinct": _joined(counters.distinct),
            "expert_load_s": _joined(counters.load_s),
        }


def _joined(histograms: dict[str, Histogram]) -> dict[str, float]:
    """One field of `WorkerStats` from a histogram for each label."""
    return {key: value for label, one in histograms.items() for key, value in one.fields(label).items()}
