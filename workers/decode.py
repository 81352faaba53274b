"""`DecodeWorker`: admits requests, takes their KV, generates their tokens. Ray-free and socket-free.

Owns: the decode loop on its own thread, the life of each request there, exactly one terminal event for each admitted
request. Does not own: sockets (`workers/service`), KV landing and verification (`kvstore/transfer`). Public methods may
be called from any thread; they return futures. Callbacks (`DecodeSink`) run on the engine thread and must not block.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from kvstore.image import KVImage
from kvstore.tiers.cascade import Cascade, build_cascade
from workers.attempts import Attempts
from workers.config import WorkerConfig
from workers.engine import BrokenLogits, Engine
from workers.errors import DeadlineExceeded, RequestAborted, RequestError, WorkerFull, WorkerStopping
from workers.landing import Landings
from workers.loop import EngineLoop, WorkCounters
from workers.messages import GenerateRequest, RetractControl, RetractReport, TokenEvent, TokenLogprob
from workers.retract.controller import POLL_S, RetractController
from workers.retract.ticket import HeldImage
from workers.scheduler.decode import DecodeLimits
from workers.sequence import SeqState, Sequence

logger = logging.getLogger(__name__)


class DecodeSink(Protocol):
    """Where a decode worker's output goes."""

    def publish(self, events: dict[str, list[TokenEvent]]) -> None:
        """Events of one step by router id."""

    def closed(self, request_id: str, epoch: int) -> None:
        """An admitted attempt has ended and holds nothing any more: its grant is void."""


class DecodeWorker:
    """One decode engine and its thread."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        sink: DecodeSink,
        *,
        cascade: Cascade | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_thread_start: Callable[[], None] | None = None,
    ) -> None:
        """`cascade` defaults to the tiers of the config; `clock` is monotonic seconds."""
        self.config = config
        self.engine = engine
        self.counters = WorkCounters()
        self._sink = sink
        self._clock = clock
        self.retract = RetractController(
            config.retract,
            engine,
            DecodeLimits(config.max_waiting, config.max_context, engine.spec.window_tokens),
            cascade or build_cascade(config.retract.tiers, engine.spec, model_hash=engine.pools.model_hash),
            clock=clock,
            fail=self._end,
        )
        self.scheduler = self.retract.scheduler
        self._landings = Landings(engine.pools, self.scheduler)
        self._attempts = Attempts()
        self._dirty = False
        self._admissions: dict[tuple[str, int], tuple[Future[None], float]] = {}
        self._events: dict[str, list[TokenEvent]] = {}
        self.loop = EngineLoop(f"decode-{config.name}", self, clock)
        if on_thread_start is not None:
            self.loop.call(on_thread_start)
        self.loop.start()

    # -- commands, from any thread ------------------------------------------------------------------------------------

    def admit(self, request: GenerateRequest) -> Future[None]:
        """Done when memory for prompt and output is promised; fails with the `RequestError` that says why not."""
        granted: Future[None] = Future()
        # Running at once, so that a caller's cancel cannot race with the engine thread's answer.
        granted.set_running_or_notify_cancel()
        submitted = self.loop.call(lambda: self._submit(request, granted))
        submitted.add_done_callback(lambda done: _pass_on_failure(done, granted))
        return granted

    def land(
        self, request_id: str, epoch: int, image: KVImage, token_id: int, logprob: TokenLogprob | None
    ) -> Future[None]:
        """Scatters a verified image, emits the first token and lets the request join the batch.

        Done when the image is not needed any more; without room in the pools it may have to wait where it is.
        Fails with `RequestAborted` when the attempt is not waiting for KV any more; nothing is written then.
        """
        landed: Future[None] = Future()
        landed.set_running_or_notify_cancel()
        arrived = HeldImage(image, lambda: landed.set_result(None))
        submitted = self.loop.call(lambda: self._land(request_id, epoch, arrived, token_id, logprob))
        submitted.add_done_callback(lambda done: _pass_on_failure(done, landed))
        return landed

    def expect_experts(self, uses: bytes) -> None:
        """Which experts the prompt of a request that is about to land used (`workers/experts/prompt_uses.py`)."""
        if self.engine.experts is not None:
            self.loop.call(functools.partial(self.engine.experts.note_prompt, uses))

    def abort(self, request_id: str, epoch: int | None = None, error: RequestError | None = None) -> Future[bool]:
        """Ends a request (or one attempt of it) with `error`, default `RequestAborted`; False when unknown."""
        return self.loop.call(lambda: self._abort(request_id, epoch, error))

    def abort_router(self, router_id: str) -> Future[int]:
        """Ends every request of one router; how many there were."""
        return self.loop.call(lambda: self._abort_router(router_id))

    def control(self, control: RetractControl) -> Future[None]:
        """Forces retracts from the next step on, or stops doing so."""
        return self.loop.call(lambda: self.retract.set_control(control))

    def retract_report(self, *, reset: bool = False) -> Future[RetractReport]:
        """What was retracted and resumed; `reset` starts the counts anew."""
        return self.loop.call(lambda: self.retract.report(reset=reset))

    def close(self) -> None:
        """Ends every request with `WorkerStopping` and stops the thread."""
        self.loop.close()

    # -- engine thread ------------------------------------------------------------------------------------------------

    def _submit(self, request: GenerateRequest, granted: Future[None]) -> None:
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
        finally:
            self._flush()
        self._attempts.add(sequence)
        self._dirty = True
        self._admissions[sequence.key] = (granted, now_s + self.config.admit_wait_s)
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        for sequence in self.scheduler.admit(self.retract.may_admit):
            granted, _ = self._admissions.pop(sequence.key)
            self.counters.admitted += 1
            granted.set_result(None)

    def _land(
        self, request_id: str, epoch: int, arrived: HeldImage, token_id: int, logprob: TokenLogprob | None
    ) -> None:
        sequence = self._attempts.find(request_id, epoch)
        if sequence is None or sequence.state is not SeqState.WAITING_KV:
            raise RequestAborted(f"request {request_id} epoch {epoch} is not waiting for KV")
        image = arrived.image
        num_tokens = image.header.num_tokens
        if num_tokens != sequence.num_prompt:
            error = RequestError(f"image holds {num_tokens} tokens, the prompt has {sequence.num_prompt}")
            self._end(sequence, error)
            self._flush()
            raise error
        kv = self.scheduler.place(sequence, num_tokens)
        if kv is None:
            self.retract.parking.park_arrival(sequence, arrived)
            self._take(sequence, token_id, logprob)
            self._flush()
            return
        try:
            self._landings.begin(sequence, kv, arrived, token_id, logprob)
        except Exception as exc:
            self._end(sequence, RequestError(f"KV image refused: {exc}"))
            self._flush()
            raise
        self._settle_landings()
        self._flush()

    def _settle_landings(self) -> bool:
        """Whoever's KV is in its pages joins the batch with its first token; whether anyone did."""
        landed = self._landings.take_done() if self._landings.pending else []
        for landing in landed:
            try:
                landing.load.done()
            except Exception as exc:
                self._end(landing.sequence, RequestError(f"KV image refused: {exc}"))
            else:
                self.scheduler.join(landing.sequence, landing.arrived.image.header.num_tokens)
                self._take(landing.sequence, landing.token_id, landing.logprob)
            landing.arrived.release()
        return bool(landed)

    def _take(self, sequence: Sequence, token_id: int, logprob: TokenLogprob | None) -> None:
        """Adds a sampled token; ends the request when it was its last."""
        event = sequence.take_token(token_id, logprob)
        sequence.sampling.observe(token_id)  # type: ignore[attr-defined]
        self.counters.tokens += 1
        self._queue(sequence, event)
        if event.finish is not None:
            self.counters.finished += 1
            self._drop(sequence)

    def _queue(self, sequence: Sequence, event: TokenEvent) -> None:
        self._events.setdefault(sequence.request.router_id, []).append(event)

    def _flush(self) -> None:
        if self._events:
            events, self._events = self._events, {}
            self._sink.publish(events)

    def _end(self, sequence: Sequence, error: RequestError) -> None:
        """Ends a request that has not produced its last token."""
        admission = self._admissions.pop(sequence.key, None)
        if admission is not None:
            admission[0].set_exception(error)
        elif sequence.state is not SeqState.FINISHED:
            self._queue(sequence, sequence.failure_event(error))
        if isinstance(error, RequestAborted):
            self.counters.aborted += 1
        else:
            self.counters.failed += 1
            logger.warning("request=%s epoch=%d failed: %s", *sequence.key, error)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        if self._attempts.remove(sequence):
            self._landings.forget(sequence)
            self.retract.forget(sequence)
            self.scheduler.drop(sequence)
            self._sink.closed(*sequence.key)

    def _abort(self, request_id: str, epoch: int | None, error: RequestError | None) -> bool:
        sequence = self._attempts.find(request_id, epoch)
        if sequence is None:
            return False
        self._end(sequence, error or RequestAborted(f"request {request_id} was aborted"))
        self._admit_waiting()
        self._flush()
        return True

    def _abort_router(self, router_id: str) -> int:
        ended = [s for s in self._attempts if s.request.router_id == router_id]
        for sequence in ended:
            self._end(sequence, RequestAborted(f"router {router_id} is gone"))
        self._admit_waiting()
        self._flush()
        return len(ended)

    # -- Stepper ------------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One decode step of the whole batch. Who was retracted comes back before anyone new is let in."""
        changed = self._settle_landings()
        changed |= self.retract.before_step()
        if self.scheduler.num_waiting:
            self._admit_waiting()
        plan = self.scheduler.plan()
        if plan is None:
            self._flush()
            return changed
        self.retract.take_out_victims(plan.victims)
        if plan.sequences:
            for sequence, sampled in zip(plan.sequences, self.engine.decode(plan), strict=True):
                if sampled is None:
                    continue
                sequence.num_computed += 1
                if sampled.token_id is None:
                    self._end(sequence, BrokenLogits("the model's logits are not finite"))
                else:
                    self._take(sequence, sampled.token_id, sampled.logprob)
        self._flush()
        return True

    def on_step_error(self, error: Exception) -> None:
        """The whole batch was in the step that failed: all of it ends, everything else goes on if the device does."""
        for sequence in self._attempts:
            if sequence.state is SeqState.RUNNING:
                self._end(sequence, RequestError(f"decode step failed: {type(error).__name__}: {error}"))
        self._flush()
        self.engine.check_device()

    def next_deadline_s(self) -> float | None:
        waits = [limit for _, limit in self._admissions.values()]
        deadline_s = self._attempts.next_deadline_s()
        if self.retract.pending or self._landings.pending:
            waits.append(self._clock() + POLL_S)
        return min(waits if deadline_s is None else [*waits, deadline_s], default=None)

    def sweep(self, now_s: float) -> None:
        for sequence in self._attempts.expired(now_s):
            self._end(sequence, DeadlineExceeded(f"request {sequence.request.request_id} ran out of time"))
        for key, (_, limit_s) in tuple(self._admissions.items()):
            waiting = self._attempts.find(*key)
            if limit_s <= now_s and waiting is not None:
                self._end(waiting, WorkerFull(f"no KV memory became free within {self.config.admit_wait_s:g} s"))
        self._flush()

    def on_idle(self) -> None:
        """Once all work has ended: whatever no request owns has leaked, and a leak stops the worker."""
        if len(self._attempts) or not self._dirty or self.retract.pending or self._landings.pending:
            return
        self._dirty = False
        self.counters.leaked = self.engine.allocators.num_held
        self.retract.check_integrity()

    def on_stop(self, failure: str) -> None:
        for sequence in self._attempts:
            self._end(sequence, WorkerStopping(failure or "the worker is shutting down"))
        self._flush()
        self._landings.close()
        self.retract.close()


def _pass_on_failure(done: Future[None], granted: Future[None]) -> None:
    error = done.exception()
    if error is not None and not granted.done():
        granted.set_exception(error)
