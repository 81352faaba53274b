"""`DecodeScheduler`: continuous batching. Requests join and leave at any step.

Owns: admission queue, promises, grants waiting for KV, the running batch, page growth. Does not own: computing, KV
arrival, events. Torch-free, engine thread only.

Life: submit -> (admit) WAITING_KV -> place + join RUNNING -> drop; between two runs `set_aside` -> place + join. With
the default need (prompt + max_tokens) a running request cannot run out of pages. A smaller, predicted need makes
shortage possible: then out-of-window pages are reclaimed from the whole batch first, and `ShortagePolicy` names
victims, which the plan carries out of the batch for the worker to retract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvstore.allocator import KVAllocators
from kvstore.sequence_kv import SequenceKV, check_ownership
from kvstore.spec import PAGE_TOKENS
from workers.errors import RequestTooLong, WorkerFull
from workers.messages import GenerateRequest
from workers.scheduler.admission import Ledger, Need, decode_need
from workers.scheduler.plan import DecodePlan
from workers.scheduler.policy import ShortagePolicy, TakeNewest
from workers.scheduler.queue import AdmissionQueue
from workers.sequence import SeqState, Sequence


@dataclass(frozen=True, slots=True)
class DecodeLimits:
    """Bounds of one decode scheduler."""

    max_waiting: int
    """Requests that may wait for a grant."""
    max_context: int
    """Most prompt + output tokens of one request."""
    window_tokens: int


class DecodeScheduler:
    """Decides who is granted memory and who runs in the next step."""

    def __init__(
        self,
        allocators: KVAllocators,
        limits: DecodeLimits,
        *,
        need: Callable[[GenerateRequest, int], Need] = decode_need,
        shortage: ShortagePolicy | None = None,
    ) -> None:
        """`need(request, window tokens)` is what admission promises."""
        self.allocators = allocators
        self.limits = limits
        self.ledger = Ledger(allocators)
        self._need = need
        self._shortage = shortage or TakeNewest()
        self._queue = AdmissionQueue()
        self._granted: dict[tuple[str, int], Sequence] = {}
        self._running: dict[tuple[str, int], Sequence] = {}
        self._aside: dict[tuple[str, int], Sequence] = {}
        self.lent: list[SequenceKV] = []
        """Pages of ended requests that a copy still uses; whoever waits for the copy frees them."""
        self._composition = 0
        self._batch: tuple[Sequence, ...] = ()

    @property
    def num_waiting(self) -> int:
        """Requests without a grant."""
        return len(self._queue)

    @property
    def num_granted(self) -> int:
        """Requests whose KV has not arrived."""
        return len(self._granted)

    @property
    def num_running(self) -> int:
        """Requests in the batch."""
        return len(self._running)

    @property
    def num_aside(self) -> int:
        """Requests that were taken out of the batch and have not come back."""
        return len(self._aside)

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The batch."""
        return tuple(self._running.values())

    @property
    def aside(self) -> tuple[Sequence, ...]:
        """Requests that were taken out of the batch and have not come back."""
        return tuple(self._aside.values())

    @property
    def granted(self) -> tuple[Sequence, ...]:
        """Requests whose KV has not arrived."""
        return tuple(self._granted.values())

    @property
    def sequences(self) -> list[Sequence]:
        """Every request the scheduler knows."""
        return [*self._queue, *self._granted.values(), *self._running.values(), *self._aside.values()]

    def submit(self, sequence: Sequence) -> None:
        """Queues a request. Raises `RequestTooLong` when it can never fit, `WorkerFull` when it may not wait."""
        total = sequence.num_prompt + sequence.request.sampling.max_tokens
        if total > self.limits.max_context:
            raise RequestTooLong(
                f"prompt and max_tokens are {total} tokens; this worker takes at most {self.limits.max_context}"
            )
        # Alone, it must be able to run to its end, whatever admission promises: retracting others then always helps.
        self.ledger.require_possible(decode_need(sequence.request, self.limits.window_tokens))
        need = self._need(sequence.request, self.limits.window_tokens)
        if len(self._queue) >= self.limits.max_waiting and (self._queue or not self.ledger.has_room(need)):
            raise WorkerFull(f"{len(self._queue)} requests are already waiting")
        self._queue.push(sequence)

    def admit(self, may: Callable[[Sequence, Need], bool] = lambda sequence, need: True) -> list[Sequence]:
        """Promises memory to waiting requests that fit now; returns them, to be granted. `may` says who is let in."""

        def accept(sequence: Sequence) -> bool:
            need = self._need(sequence.request, self.limits.window_tokens)
            return may(sequence, need) and self.ledger.promise(sequence.key, need)

        taken = self._queue.take(accept)
        for sequence in taken:
            sequence.to(SeqState.WAITING_KV)
            self._granted[sequence.key] = sequence
        return taken

    def place(self, sequence: Sequence, num_tokens: int) -> SequenceKV | None:
        """Pages and a slot for an image of `num_tokens` tokens; `None` and no change when there are none now."""
        kv = SequenceKV.open(self.allocators, window_tokens=self.limits.window_tokens)
        if kv is None:
            return None
        if not kv.grow_to(num_tokens, window_from=max(0, num_tokens - self.limits.window_tokens)):
            kv.free()
            return None
        sequence.kv = kv
        return kv

    def set_aside(self, sequence: Sequence) -> None:
        """Takes a request out of the batch, or keeps one whose KV has arrived from joining. It keeps its pages."""
        self._granted.pop(sequence.key, None)
        if self._running.pop(sequence.key, None) is not None:
            self._batch_changed()
        self._aside[sequence.key] = sequence

    def join(self, sequence: Sequence, num_tokens: int) -> None:
        """A request whose KV of `num_tokens` tokens is in its pages runs from the next step on."""
        sequence.to(SeqState.RUNNING)
        sequence.num_computed = num_tokens
        self._granted.pop(sequence.key, None)
        self._aside.pop(sequence.key, None)
        self._running[sequence.key] = sequence
        self._batch_changed()

    def plan(self) -> DecodePlan | None:
        """The next step with every page allocated; None when nothing runs."""
        victims: list[Sequence] = []
        stalled: set[tuple[str, int]] = set()
        for sequence in tuple(self._running.values()):
            # A page boundary is the only moment at which a table can change: one new token a step.
            if sequence.key in self._running and sequence.num_computed % PAGE_TOKENS == 0:
                self._batch_changed()
                if not self._grow(sequence, victims):
                    stalled.add(sequence.key)
        if not self._batch:
            self._batch = tuple(s for key, s in self._running.items() if key not in stalled)
        if not self._batch and not victims:
            return None
        plan = DecodePlan(self._batch, self._composition, tuple(victims))
        if stalled:
            self._batch_changed()
        return plan

    def drop(self, sequence: Sequence) -> None:
        """Forgets a request in any state and frees all it holds."""
        self._queue.remove(sequence)
        self._granted.pop(sequence.key, None)
        self._aside.pop(sequence.key, None)
        if self._running.pop(sequence.key, None) is not None:
            self._batch_changed()
        self.ledger.withdraw(sequence.key)
        sequence.release()

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless the known requests hold exactly what the allocators gave out."""
        self.ledger.check_integrity()
        check_ownership(self.allocators, [*self.lent, *(s.kv for s in self.sequences if s.kv is not None)])

    def _batch_changed(self) -> None:
        self._composition += 1
        self._batch = ()

    def _grow(self, sequence: Sequence, victims: list[Sequence]) -> bool:
        """A page for the sequence's next token; False when it must sit this step out (or was itself taken out)."""
        kv = sequence.kv
        assert kv is not None
        kv.reclaim_window(sequence.num_computed)
        if kv.grow_to(sequence.num_computed + 1):
            return True
        reclaimed = sum(s.kv.reclaim_window(s.num_computed) for s in self._running.values() if s.kv is not None)
        if reclaimed and kv.grow_to(sequence.num_computed + 1):
            return True
        if not victims:
            # The pages of victims stay theirs until the worker has copied or dropped them: one round of victims a
            # plan, and whoever is still blocked tries again at the next step.
            for victim in self._shortage.victims(tuple(self._running.values()), sequence):
                self.set_aside(victim)
                victims.append(victim)
        return False
