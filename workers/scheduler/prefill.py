"""`PrefillScheduler`: chunked prefill of several prompts under one token budget a step.

Owns: the queue, the promise and the pages of each prompt until its image is handed over. Does not own: computing,
sending. Torch-free, engine thread only. A prompt is admitted when its whole need fits, so chunks never wait for pages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.allocator import KVAllocators
from kvstore.errors import IntegrityError
from kvstore.sequence_kv import SequenceKV, check_ownership
from workers.errors import RequestTooLong, WorkerFull
from workers.scheduler.admission import Ledger, Need, prefill_need
from workers.scheduler.plan import Chunk, PrefillPlan
from workers.scheduler.policy import split_budget
from workers.scheduler.queue import AdmissionQueue
from workers.sequence import SeqState, Sequence


@dataclass(frozen=True, slots=True)
class PrefillLimits:
    """Bounds of one prefill scheduler."""

    chunk_tokens: int
    """Prompt tokens of one step, over all prompts."""
    max_waiting: int
    """Prompts that may wait for pages."""
    max_context: int
    """Longest prompt, in tokens."""
    window_tokens: int


class PrefillScheduler:
    """Decides which prompt tokens the next step computes."""

    def __init__(
        self, allocators: KVAllocators, limits: PrefillLimits, *, on_open: Callable[[SequenceKV], None] | None = None
    ) -> None:
        """`on_open` runs on each newly opened `SequenceKV` (the engine resets its slot's rings)."""
        self.allocators = allocators
        self.limits = limits
        self.ledger = Ledger(allocators)
        self._on_open = on_open
        self._queue = AdmissionQueue()
        self._active: dict[tuple[str, int], Sequence] = {}

    @property
    def num_waiting(self) -> int:
        """Prompts without pages."""
        return len(self._queue)

    @property
    def num_computing(self) -> int:
        """Prompts partly computed. Any thread: the tuple is one step for the interpreter."""
        return sum(s.state is SeqState.WAITING_PROMPT for s in tuple(self._active.values()))

    @property
    def num_draining(self) -> int:
        """Prompts computed and still on their way to decode. Any thread."""
        return sum(s.state is SeqState.DRAINING for s in tuple(self._active.values()))

    @property
    def sequences(self) -> list[Sequence]:
        """Every request the scheduler knows, waiting and active."""
        return [*self._queue, *self._active.values()]

    def submit(self, sequence: Sequence) -> None:
        """Queues a prompt. Raises `RequestTooLong` when it can never fit, `WorkerFull` when it may not wait."""
        if sequence.num_prompt > self.limits.max_context:
            raise RequestTooLong(
                f"the prompt has {sequence.num_prompt} tokens; this worker takes at most {self.limits.max_context}"
            )
        need = self._need(sequence)
        self.ledger.require_possible(need)
        if len(self._queue) >= self.limits.max_waiting and (self._queue or not self.ledger.has_room(need)):
            raise WorkerFull(f"{len(self._queue)} prompts are already waiting")
        self._queue.push(sequence)

    def plan(self) -> PrefillPlan | None:
        """Chunks of the next step with their pages allocated; None when no prompt can compute."""
        for sequence in self._queue.take(self._admit):
            sequence.to(SeqState.WAITING_PROMPT)
            self._active[sequence.key] = sequence
        prompts = sorted(
            (s for s in self._active.values() if s.state is SeqState.WAITING_PROMPT), key=lambda s: s.order
        )
        grants = split_budget(
            [s.remaining_prompt for s in prompts], [s.num_computed for s in prompts], self.limits.chunk_tokens
        )
        chunks = []
        for sequence, count in zip(prompts, grants, strict=True):
            if count:
                chunks.append(self._place(sequence, count))
        return PrefillPlan(tuple(chunks)) if chunks else None

    def commit(self, chunk: Chunk) -> None:
        """Records that a chunk was computed, and frees the window pages nothing will read again."""
        chunk.sequence.num_computed = chunk.end
        assert chunk.sequence.kv is not None
        chunk.sequence.kv.reclaim_window(chunk.end)

    def drop(self, sequence: Sequence) -> None:
        """Forgets a request in any state and frees all it holds."""
        self._queue.remove(sequence)
        if self._active.get(sequence.key) is sequence:
            del self._active[sequence.key]
            self.ledger.withdraw(sequence.key)
        sequence.release()

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless the active prompts hold exactly what the allocators gave out."""
        self.ledger.check_integrity()
        check_ownership(self.allocators, (s.kv for s in self._active.values() if s.kv is not None))

    def _need(self, sequence: Sequence) -> Need:
        return prefill_need(sequence.request, self.limits.window_tokens, self.limits.chunk_tokens)

    def _admit(self, sequence: Sequence) -> bool:
        return self.ledger.promise(sequence.key, self._need(sequence))

    def _place(self, sequence: Sequence, count: int) -> Chunk:
        if sequence.kv is None:
            sequence.kv = SequenceKV.open(self.allocators, window_tokens=self.limits.window_tokens)
            if sequence.kv is None:
                raise IntegrityError(f"{sequence}: no slot although one was promised")
            if self._on_open is not None:
                self._on_open(sequence.kv)
        end = sequence.num_computed + count
        if not sequence.kv.grow_to(end):
            raise IntegrityError(f"{sequence}: no pages up to {end} although they were promised")
        return Chunk(sequence, sequence.num_computed, end)
