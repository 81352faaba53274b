"""`ExpertCache`: keeps one GPU's slab filled with the experts that its steps use, without ever stopping a step.

Owns: the order of table changes, slot writes and steps; use counters on their way to the host. Does not own: kernels
(they read the table and count uses), where the bytes of absent experts are (the bank), who deserves a slot
(`Residency`). One owner: the thread that launches the steps.

Every `interval` steps the thread looks once at what has finished and starts what is next; nothing waits:

    counters -> host      (event)  decide: leavers get their home's code in the table
    table change          (event)  every step launched before it is over: leaving slots are quiet, newcomers are copied
    copies into slots     (event)  newcomers get their slot's code in the table

A miss is read in place by the kernels, so all of this is about speed alone: tokens are the same bits at any residency.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kvstore.errors import IntegrityError
from workers.experts.histogram import DISTINCT_BOUNDS, Histogram
from workers.experts.layout import TIER_SHIFT, Tier
from workers.experts.policy import Values
from workers.experts.residency import PROMPT_MOVES, Residency
from workers.experts.slots import Change, SlotTable


class Mark(Protocol):
    """A point in the device's work."""

    def passed(self) -> bool:
        """Whether everything before it is over."""


class Lanes(Protocol):
    """How work reaches the device: `step_*` in order with the steps, `copy` beside them."""

    def step_mark(self) -> Mark:
        """After every step and table change launched so far."""

    def step_copy(self, target: Tensor, source: Tensor) -> None:
        """In order with the steps, without waiting for it."""

    def side_copy(self, target: Tensor, source: Tensor) -> None:
        """Beside the steps, in order with other side copies, without waiting for it."""

    def side_mark(self) -> Mark:
        """After every side copy so far."""


class Bank(Protocol):
    """Host memory with the experts that may be absent from the slab."""

    def expert(self, pair: int) -> Tensor:
        """uint8 [expert_bytes] of one (layer, expert) pair, pinned on a GPU host. Raises `OSError` when it is lost."""


Bring = Callable[[Sequence[int]], Sequence[Tensor]]
"""Bytes of up to `FILLED_AT_ONCE` pairs, as `Bank.expert` gives them, valid until the next call."""

INTERVAL, MOVES = 4, 8
"""Steps between two looks, and pairs that one decision brings in. A decision takes two looks: one move a step, 13 MB of
the link at V4-Flash's size. # simulated on V4-like routing: 135 -> 128 misses a step at 24 GB in all against 16 and 16,
31.1 -> 29.1 at 64 GB, the same at 122 GiB, where moves no longer pay."""

FILLED_AT_ONCE = 32
"""Pairs that `fill` brings in before it waits: 0.4 GB at V4-Flash's size, enough to keep the link busy."""


@dataclass(slots=True)
class CacheCounters:
    """Since start. Written by the owner, readable from anywhere."""

    steps: int = 0
    lookups: int = 0
    """Pairs that steps needed: once a step, however many tokens chose one."""
    hits: int = 0
    cold_misses: int = 0
    capacity_misses: int = 0
    peer_misses: int = 0
    """Of both kinds, those that the other GPU's slab answered."""
    moved_in: int = 0
    useful: int = 0
    """Of these, used by a step before they left; `wasted`: they left unused."""
    wasted: int = 0
    evicted: int = 0
    moved_bytes: int = 0
    io_errors: int = 0
    distinct: Histogram = field(default_factory=lambda: Histogram(DISTINCT_BOUNDS))
    """Pairs that a step needed of a layer: a layer's mean over the steps between two looks."""


@dataclass(slots=True)
class _Filling:
    pairs: list[int]
    mark: Mark


@dataclass(slots=True)
class _Leaving:
    slots: list[int]
    mark: Mark


@dataclass(slots=True)
class _Work:
    """What is under way."""

    filling: list[_Filling] = field(default_factory=list)
    leaving: list[_Leaving] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)
    snapshot: Mark | None = None


class ExpertCache:
    """Residency of one slab. `table` and `heat` are int32 [L * E] on the device; `slab` uint8 [slots, expert_bytes]."""

    def __init__(
        self,
        slab: Tensor,
        table: Tensor,
        heat: Tensor,
        bank: Bank | None,
        slots: SlotTable,
        residency: Residency,
        lanes: Lanes,
        *,
        interval: int = INTERVAL,
        moves: int = MOVES,
        verify: bool = False,
    ) -> None:
        """`moves`: pairs that may come in per interval, which bounds what copying takes from the link.

        `verify`: compare every slot with the bank before its code points at it (slow; for tests and fault hunts).

        Raises:
            ValueError: table, heat and slots do not describe the same pairs.
        """
        if not table.shape == heat.shape == (len(slots.codes),) or slab.shape[0] != slots.num_slots:
            raise ValueError(f"table {tuple(table.shape)}, heat {tuple(heat.shape)}, slab {tuple(slab.shape)} for "
                             f"{len(slots.codes)} pairs and {slots.num_slots} slots")  # fmt: skip
        self.slots, self.residency, self.counters = slots, residency, CacheCounters()
        self._slab, self._table, self._heat, self._bank, self._lanes = slab, table, heat, bank, lanes
        self._interval, self._moves, self._verify = interval, moves, verify
        pinned = table.device.type == "cuda"
        self._counts = torch.zeros(heat.shape, dtype=torch.int32, pin_memory=pinned)
        self._codes = torch.zeros(heat.shape, dtype=torch.int32, pin_memory=pinned)
        self._codes_mark: Mark | None = None
        self._last = np.zeros(len(slots.codes), np.int64)
        self._resident_then = np.zeros(len(slots.codes), bool)
        self._at_peer_then = np.zeros(len(slots.codes), bool)
        self._seen = np.zeros(len(slots.codes), bool)
        self._unused = np.zeros(len(slots.codes), bool)
        """Pairs that were brought in and not used yet."""
        self.pair_hits = np.zeros(len(slots.codes), np.int64)
        """Of `counters.hits`, each pair's; of `counters.lookups`, `pair_lookups`."""
        self.pair_lookups = np.zeros(len(slots.codes), np.int64)
        self._work = _Work()
        self._prompts = False
        """Whether a prompt came whose experts have not been chosen yet."""
        self._steps_since = 0
        """Steps launched since the counters were last copied."""

    def fill(self, pairs: Sequence[int], bring: Bring | None = None) -> None:
        """Brings pairs in before the first step, in order, waiting for the bytes. Raises ValueError beyond the slots.

        `bring`: where bytes come from instead of the bank.
        """
        if len(pairs) > self.slots.num_free:
            raise ValueError(f"{len(pairs)} experts for {self.slots.num_free} free slots")
        for first in range(0, len(pairs), FILLED_AT_ONCE):
            some = [int(pair) for pair in pairs[first : first + FILLED_AT_ONCE]]
            sources = [self._expert(pair) for pair in some] if bring is None else bring(some)
            for pair, source in zip(some, sources, strict=True):
                slot = self.slots.fill(pair)
                assert slot is not None
                self._lanes.side_copy(self._slab[slot], source)
            mark = self._lanes.side_mark()
            while not mark.passed():
                pass
            self._apply([self.slots.arrived(pair) for pair in some])
        self._note_residents()

    def _expert(self, pair: int) -> Tensor:
        """Bytes of an absent pair. Raises `OSError`."""
        if self._bank is None:
            raise OSError(f"expert pair {pair} is in no bank")
        return self._bank.expert(pair)

    def rehome(self, homes: npt.NDArray[np.int32]) -> None:
        """All absent pairs are found at these codes by whatever is launched from here on; see `SlotTable.rehome`."""
        self._apply(self.slots.rehome(homes))

    def before_step(self) -> None:
        """Call right before each step is launched, on the thread that launches."""
        self.counters.steps += 1
        if self._steps_since >= self._interval:
            self._advance()
        self._steps_since += 1

    def _advance(self) -> None:
        """Takes one look at everything under way; starts what follows."""
        changes = self._arrivals()
        for leaving in [entry for entry in self._work.leaving if entry.mark.passed()]:
            self._work.leaving.remove(leaving)
            for slot in leaving.slots:
                self.slots.quiet(slot)
        self._start_copies()
        left: list[int] = []
        if self._work.snapshot is not None and self._work.snapshot.passed():
            self._work.snapshot = None
            left = self._decide(changes)
        if self._apply(changes) and left:
            self._work.leaving.append(_Leaving(left, self._lanes.step_mark()))
        if self._work.snapshot is None:
            self._note_residents()
            self._lanes.step_copy(self._counts, self._heat)
            self._work.snapshot = self._lanes.step_mark()
            self._snapshot_steps, self._steps_since = self._steps_since, 0

    def _arrivals(self) -> list[Change]:
        changes = []
        for filling in [entry for entry in self._work.filling if entry.mark.passed()]:
            self._work.filling.remove(filling)
            for pair in filling.pairs:
                slot = self.slots.slot_of(pair)
                if self._verify and not torch.equal(self._slab[slot].cpu(), self._expert(pair)):
                    raise IntegrityError(f"slot {slot} does not hold the bytes of pair {pair}")
                changes.append(self.slots.arrived(pair))
                self._unused[pair] = True
                self.counters.moved_in += 1
        return changes

    def _start_copies(self) -> None:
        started: list[int] = []
        while self._work.wanted and self.slots.num_free:
            pair = self._work.wanted.pop(0)
            if self.slots.slot_of(pair) is not None:
                continue
            slot = self.slots.fill(pair)
            assert slot is not None
            try:
                self._lanes.side_copy(self._slab[slot], self._expert(pair))
            except OSError:
                self.counters.io_errors += 1
                self.slots.failed(pair)
                continue
            self.counters.moved_bytes += self._slab.shape[1]
            started.append(pair)
        if started:
            self._work.filling.append(_Filling(started, self._lanes.side_mark()))

    def _decide(self, changes: list[Change]) -> list[int]:
        """Counts uses, chooses moves; slots that leave. Their changes join `changes`."""
        counts = self._counts.numpy().astype(np.int64)
        uses = counts - self._last
        self._last = counts
        steps = max(1, self._snapshot_steps)
        self._count(uses)
        self.counters.distinct.add((self.residency.by_layer(uses).sum(axis=1) / steps).tolist())
        self.residency.note(uses, steps)
        if self._work.filling or self._work.leaving:
            return []
        most, self._prompts = PROMPT_MOVES if self._prompts else self._moves, False
        return self._choose(most, changes)

    def note_prompt(self, shares: Values) -> None:
        """A prompt used these shares of each layer's experts [L * E], and its decode steps are about to come.

        Call it between steps. What it brings in arrives while they run; while other copies are on their way it waits.
        """
        self.residency.note_prompt(shares)
        if self._work.filling or self._work.leaving or self._work.wanted:
            self._prompts = True
            return
        changes: list[Change] = []
        left = self._choose(PROMPT_MOVES, changes)
        self._apply(changes)
        if left:
            self._work.leaving.append(_Leaving(left, self._lanes.step_mark()))

    def _choose(self, most: int, changes: list[Change]) -> list[int]:
        """At most `most` pairs are wanted from now on; slots that leave for them. Their changes join `changes`."""
        moves = self.residency.decide(self.slots.held(), self.slots.num_free, most, keep=self.slots.in_flight)
        self._work.wanted = [int(pair) for pair in moves.enter]
        left = []
        self.counters.wasted += int(self._unused[moves.leave].sum())
        self._unused[moves.leave] = False
        for pair in moves.leave:
            slot, change = self.slots.leave(int(pair))
            left.append(slot)
            changes.append(change)
        self.counters.evicted += len(left)
        return left

    def _count(self, uses: np.ndarray) -> None:
        hits = int(uses[self._resident_then].sum())
        fresh = (uses > 0) & ~self._seen & ~self._resident_then
        self.pair_lookups += uses
        self.pair_hits += np.where(self._resident_then, uses, 0)
        counters = self.counters
        counters.lookups += int(uses.sum())
        counters.hits += hits
        counters.cold_misses += int(fresh.sum())
        counters.capacity_misses += int(uses.sum()) - hits - int(fresh.sum())
        counters.peer_misses += int(uses[self._at_peer_then].sum())
        self._seen |= uses > 0
        self.counters.useful += int((self._unused & (uses > 0)).sum())
        self._unused &= uses == 0

    def _note_residents(self) -> None:
        """Hits of the coming interval are counted against who is resident at its start."""
        self._resident_then = np.zeros(len(self._seen), bool)
        self._resident_then[self.slots.residents()] = True
        self._at_peer_then = self.slots.codes >> TIER_SHIFT == Tier.PEER

    def _apply(self, changes: list[Change]) -> bool:
        """The device's table follows `slots.codes`, in order with the steps."""
        if not changes:
            return False
        # The buffer is read by a copy in flight; a change is rare, and the one before is long over.
        while self._codes_mark is not None and not self._codes_mark.passed():
            pass
        self._codes.numpy()[:] = self.slots.codes
        self._lanes.step_copy(self._table, self._codes)
        self._codes_mark = self._lanes.step_mark()
        return True

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless slots and codes agree."""
        self.slots.check_integrity()
