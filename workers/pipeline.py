"""`DecodePipeline`: decode steps of a model that runs beside the host, each launched before the last one's host work.

Owns: which step is on its way and which of its results still count. As soon as the tokens of a step are known, the next
one is launched for every request that goes on for certain; the engine's caller then takes tokens, publishes events and
plans while the device works. Does not own: the plan, sampling, memory. Engine thread only.

Exactness: a request may leave the batch (retract, abort) while its next step is on its way. That step writes only the
request's row at its own position and no row that a copy of it would carry, before anything that is enqueued later; its
result is dropped, and a request that comes back computes it again. A result counts only if the request still holds the
same pages and stands at the same position. A request that joins waits for the step on its way, never the other way
around, and its numbers do not depend on that, because they do not depend on the batch.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from kvstore.sequence_kv import SequenceKV
from kvstore.spec import PAGE_TOKENS
from workers.batch import ForwardBatch
from workers.sampler import Sampled, SampleState, sample
from workers.scheduler.plan import DecodePlan
from workers.sequence import Sequence


class AheadModel(Protocol):
    """A model whose decode steps are enqueued; `workers.gpu.model.GpuModel` is one."""

    def start(self, batch: ForwardBatch) -> None:
        """Enqueue a step of any composition. `batch` is in host memory."""

    def start_next(self, token_ids: np.ndarray | None) -> None:
        """Enqueue the step after the last: same sequences and pages, one position on; None: its own greedy ids."""

    def greedy(self) -> tuple[list[int], list[bool]]:
        """Best id of each row of the last step and whether its logits are finite. Waits for the step."""

    def logits(self) -> Tensor:
        """fp32 [B, V] of the last step, valid until the next is enqueued."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One request in a step: the token at position `start`, in the pages of `kv`."""

    sequence: Sequence
    kv: SequenceKV
    start: int

    @property
    def counts(self) -> bool:
        """Whether the request is where it was when the step was launched."""
        return self.sequence.kv is self.kv and self.sequence.num_computed == self.start


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step. Equal compositions mean equal page tables of the same requests."""

    rows: tuple[_Row, ...]
    composition: int


class DecodePipeline:
    """Steps of one model, at most one on its way."""

    def __init__(self, model: AheadModel) -> None:
        self._model = model
        self._flight: _Flight | None = None

    def forget(self) -> None:
        """Drops the step on its way: its results will not be used."""
        self._flight = None

    def step(self, plan: DecodePlan) -> list[Sampled | None]:
        """One more token for each sequence of the plan; None for one that has joined since the step was launched.

        At least one sequence gets a token. Raises what the model raises; nothing is on its way then.
        """
        flight, self._flight = self._flight, None
        planned = set(map(id, plan.sequences))
        if flight is None or not any(id(row.sequence) in planned and row.counts for row in flight.rows):
            flight = self._launch(tuple(_known_row(s) for s in plan.sequences), plan.composition)
        places = [i for i, row in enumerate(flight.rows) if id(row.sequence) in planned and row.counts]
        sampled = self._sample(flight, places)
        found = {id(flight.rows[i].sequence): result for i, result in zip(places, sampled, strict=True)}
        self._launch_ahead(plan, flight, found)
        return [found.get(id(sequence)) for sequence in plan.sequences]

    def _sample(self, flight: _Flight, places: Seq[int]) -> list[Sampled]:
        """Results of the rows `places` of the flight."""
        states = [_state_of(flight.rows[i].sequence) for i in places]
        if all(_is_plain_greedy(state) for state in states):
            ids, finite = self._model.greedy()
            return [Sampled(ids[i] if finite[i] else None, None) for i in places]
        logits = self._model.logits()
        return sample(logits if len(places) == len(flight.rows) else logits[list(places)], states)

    def _launch_ahead(self, plan: DecodePlan, flight: _Flight, found: dict[int, Sampled]) -> None:
        """Launch the next step for every sequence whose next token and page are known."""
        rows, token_ids, chosen_by_host = [], [], False
        for sequence in plan.sequences:
            result, start = found.get(id(sequence)), sequence.num_computed
            token_id = sequence.output_ids[-1] if result is None else result.token_id
            if result is not None:
                start += 1
                if token_id is None or _ends(sequence, token_id) or start % PAGE_TOKENS == 0:
                    continue
                chosen_by_host |= not _is_plain_greedy(_state_of(sequence))
            assert sequence.kv is not None and token_id is not None
            rows.append(_Row(sequence, sequence.kv, start))
            token_ids.append(token_id)
        if not rows:
            return
        moved_on = tuple(_Row(row.sequence, row.kv, row.start + 1) for row in flight.rows)
        if flight.composition == plan.composition and moved_on == tuple(rows):
            self._model.start_next(np.array(token_ids, dtype=np.int32) if chosen_by_host else None)
            self._flight = _Flight(moved_on, plan.composition)
        else:
            self._flight = self._launch(tuple(rows), plan.composition, token_ids)

    def _launch(self, rows: tuple[_Row, ...], composition: int, token_ids: Seq[int] | None = None) -> _Flight:
        """Launch a step of these rows; by default each runs its last known token."""
        known = [row.sequence.output_ids[-1] for row in rows] if token_ids is None else token_ids
        items = [(r.kv.indices(r.start + 1), r.start, (token,)) for r, token in zip(rows, known, strict=True)]
        self._model.start(ForwardBatch.build(items))
        return _Flight(rows, composition)


def _known_row(sequence: Sequence) -> _Row:
    assert sequence.kv is not None
    return _Row(sequence, sequence.kv, sequence.num_computed)


def _state_of(sequence: Sequence) -> SampleState:
    state = sequence.sampling
    assert isinstance(state, SampleState), f"{sequence} has no sampling state"
    return state


def _is_plain_greedy(state: SampleState) -> bool:
    """Whether the next token is the best of the logits as they come, and nothing else of them is wanted."""
    return state.params.greedy and state.plain and state.params.logprobs is None


def _ends(sequence: Sequence, token_id: int) -> bool:
    """Whether `token_id` will be the last of the output."""
    return sequence.stop.finish(token_id, len(sequence.output_ids) + 1) is not None
