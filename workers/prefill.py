"""`PrefillWorker`: computes prompts in chunks and gives away their KV rows as they become final. Socket-free.

Owns: the prefill loop on its own thread and the life of each prompt there, until its hand-over is confirmed or given
up. Does not own: sending (`workers/service` feeds `kvstore/transfer`). Public methods may be called from any thread;
they return futures. Callbacks (`PrefillSink`) run on the engine thread and must not block.

Pages are held until `release`: the rows are copies by then, but pages that are still held are what bounds the host
memory of rows on their way, since a new prompt starts only when pages come back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from kvstore.spec import RowRange
from workers.attempts import Attempts
from workers.config import WorkerConfig
from workers.engine import BrokenLogits, Engine
from workers.errors import DeadlineExceeded, RequestAborted, RequestError, WorkerStopping
from workers.loop import EngineLoop, WorkCounters
from workers.messages import GenerateRequest
from workers.sampler import Sampled
from workers.scheduler.plan import Chunk
from workers.scheduler.prefill import PrefillLimits, PrefillScheduler
from workers.sequence import SeqState, Sequence

logger = logging.getLogger(__name__)

Rows = list[tuple[RowRange, Tensor]]
"""Row ranges of the final image and their bytes, uint8 [layers, rows, row_bytes] in host memory."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The end of one prompt: what only the last chunk decides."""

    rows: Rows
    first: Sampled
    num_cached_tokens: int
    prefill_s: float
    expert_uses: bytes = b""
    """Which experts the prompt used, for decode's cache; of prompts that ended in one step, all of them together."""


class PrefillSink(Protocol):
    """Where one prompt's rows go."""

    def rows(self, rows: Rows) -> None:
        """Rows that are final, while later chunks compute."""

    def done(self, result: Prefilled) -> None:
        """All rows are out; nothing else follows."""

    def failed(self, error: RequestError) -> None:
        """The prompt ended early; nothing else follows and its pages are free."""


class PrefillWorker:
    """One prefill engine and its thread."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_thread_start: Callable[[], None] | None = None,
    ) -> None:
        """`clock` is monotonic seconds; tests pass their own."""
        self.config = config
        self.engine = engine
        self.counters = WorkCounters()
        self._clock = clock
        limits = PrefillLimits(config.chunk_tokens, config.max_waiting, config.max_context, engine.spec.window_tokens)
        self.scheduler = PrefillScheduler(engine.allocators, limits, on_open=engine.open_slot)
        self._attempts = Attempts()
        self._dirty = False
        self._sinks: dict[tuple[str, int], PrefillSink] = {}
        self._in_step: tuple[Chunk, ...] = ()
        self._uses: bytes | None = None
        """Experts that this step's prompts used, once somebody has asked."""
        self.loop = EngineLoop(f"prefill-{config.name}", self, clock)
        if on_thread_start is not None:
            self.loop.call(on_thread_start)
        self.loop.start()

    # -- commands, from any thread ------------------------------------------------------------------------------------

    def submit(self, request: GenerateRequest, sink: PrefillSink) -> Future[None]:
        """Queues a prompt; fails with the `RequestError` that says why not. `sink` is told everything after that."""
        return self.loop.call(lambda: self._submit(request, sink))

    def release(self, request_id: str, epoch: int) -> Future[None]:
        """The image was committed: frees the prompt's pages."""
        return self.loop.call(lambda: self._release(request_id, epoch))

    def abort(self, request_id: str, epoch: int | None = None, error: RequestError | None = None) -> Future[bool]:
        """Ends a prompt in any state with `error`, default `RequestAborted`; False when unknown."""
        return self.loop.call(lambda: self._abort(request_id, epoch, error))

    def close(self) -> None:
        """Ends every prompt with `WorkerStopping` and stops the thread."""
        self.loop.close()

    # -- engine thread ------------------------------------------------------------------------------------------------

    def _submit(self, request: GenerateRequest, sink: PrefillSink) -> None:
        now_s = self._clock()
        try:
            older = self._attempts.superseded_by(request.request_id, request.epoch)
            limit_s = min(request.deadline_s or self.config.request_timeout_s, self.config.request_timeout_s)
            sequence = self.engine.new_sequence(request, arrival_s=now_s, deadline_s=now_s + limit_s)
            if older is not None:
                self._end(older, RequestAborted(f"superseded by epoch {request.epoch}"))
            self.scheduler.submit(sequence)
        except RequestError:
            self.counters.refused += 1
            raise
        self.counters.admitted += 1
        self._attempts.add(sequence)
        self._dirty = True
        self._sinks[sequence.key] = sink

    def _release(self, request_id: str, epoch: int) -> None:
        sequence = self._attempts.find(request_id, epoch)
        if sequence is not None:
            self.counters.finished += 1
            self._drop(sequence)

    def _abort(self, request_id: str, epoch: int | None, error: RequestError | None) -> bool:
        sequence = self._attempts.find(request_id, epoch)
        if sequence is None:
            return False
        self._end(sequence, error or RequestAborted(f"request {request_id} was aborted"))
        return True

    def _end(self, sequence: Sequence, error: RequestError) -> None:
        sink = self._sinks.get(sequence.key)
        if isinstance(error, RequestAborted):
            self.counters.aborted += 1
        else:
            self.counters.failed += 1
            logger.warning("request=%s epoch=%d prefill failed: %s", *sequence.key, error)
        self._drop(sequence)
        if sink is not None:
            sink.failed(error)

    def _drop(self, sequence: Sequence) -> None:
        if self._attempts.remove(sequence):
            self._sinks.pop(sequence.key, None)
            self.scheduler.drop(sequence)

    # -- Stepper ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step over the chunks of several prompts."""
        plan = self.scheduler.plan()
        if plan is None:
            return False
        self._in_step, self._uses = plan.chunks, None
        for chunk, first in zip(plan.chunks, self.engine.prefill(plan), strict=True):
            self.counters.tokens += chunk.end - chunk.start
            self.scheduler.commit(chunk)
            self._hand_out(chunk, first)
        self._in_step = ()
        return True

    def _hand_out(self, chunk: Chunk, first: Sampled | None) -> None:
        sequence = chunk.sequence
        sink = self._sinks[sequence.key]
        if chunk.is_last and (first is None or first.token_id is None):
            self._end(sequence, BrokenLogits("the model's logits are not finite"))
            return
        rows = self.engine.finished_rows(chunk)
        if rows:
            sink.rows(rows)
        if chunk.is_last:
            assert first is not None
            sequence.to(SeqState.DRAINING)
            if self._uses is None:
                self._uses = b"" if self.engine.experts is None else self.engine.experts.prompt_uses()
            seconds = self._clock() - sequence.arrival_s
            sink.done(Prefilled(self.engine.tail_rows(chunk), first, 0, seconds, self._uses))

    def on_step_error(self, error: Exception) -> None:
        """The prompts of the step that failed end; everything else goes on if the device does."""
        chunks, self._in_step = self._in_step, ()
        for chunk in chunks:
            if self._attempts.find(*chunk.sequence.key) is chunk.sequence:
                self._end(chunk.sequence, RequestError(f"prefill step failed: {type(error).__name__}: {error}"))
        self.engine.check_device()

    def next_deadline_s(self) -> float | None:
        return self._attempts.next_deadline_s()

    def sweep(self, now_s: float) -> None:
        for sequence in self._attempts.expired(now_s):
            self._end(sequence, DeadlineExceeded(f"request {sequence.request.request_id} ran out of time"))

    def on_idle(self) -> None:
        """Once all work has ended: whatever no prompt owns has leaked, and a leak stops the worker."""
        if len(self._attempts) or not self._dirty:
            return
        self._dirty = False
        self.counters.leaked = self.engine.allocators.num_held
        self.scheduler.check_integrity()

    def on_stop(self, failure: str) -> None:
        for sequence in self._attempts:
            self._end(sequence, WorkerStopping(failure or "the worker is shutting down"))
