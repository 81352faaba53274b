"""One choice of one request: admit, prefill, stream, finish; and what happens when a step fails.

Owns: the attempt loop (epoch + 1 on other workers while no token has come), the deadline, the abort of both workers,
and the mailbox through which tokens reach whoever renders them. Does not own: text, HTTP, worker liveness. Invariants:
a generation puts exactly one end into its mailbox (a terminal event or an error) unless it was aborted, then none; what
it registered and counted at workers is undone exactly once; an attempt is withdrawn before the next one begins.

    NEW -> PREFILLING -> STREAMING -> FINISHED
              |  ^ (retry)    |
              +--+            |
              +---------------+-> FAILED (an error was put) | ABORTED (the client or a stop string ended it)
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from enum import Enum
from typing import Any

from router.config import RouterConfig
from router.fleet import DecodeSlot, Fleet, PrefillSlot
from router.metrics import RouterMetrics
from workers.errors import DeadlineExceeded, RequestError, WorkerFull, WorkerStopping, WorkerUnavailable
from workers.messages import ErrorInfo, FinishReason, GenerateRequest, PrefillResult, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)

_WORTH_ANOTHER_ATTEMPT = frozenset({429, 500, 502, 503})
_CAUSE_S = 0.25
"""Wait for the other worker's account of an attempt that decode reports as lost."""

_SETTLE_S = 1.0
"""Patience with a prefill call that should have returned before the last token."""


class GenerationState(Enum):
    """Where a generation is."""

    NEW = "new"
    PREFILLING = "prefilling"
    STREAMING = "streaming"
    FINISHED = "finished"
    FAILED = "failed"
    ABORTED = "aborted"


_NEXT = {
    GenerationState.NEW: {GenerationState.PREFILLING, GenerationState.FAILED, GenerationState.ABORTED},
    GenerationState.PREFILLING: {
        GenerationState.STREAMING,
        GenerationState.FINISHED,
        GenerationState.FAILED,
        GenerationState.ABORTED,
    },
    GenerationState.STREAMING: {GenerationState.FINISHED, GenerationState.FAILED, GenerationState.ABORTED},
    GenerationState.FINISHED: set(),
    GenerationState.FAILED: set(),
    GenerationState.ABORTED: set(),
}


class Silence:
    """Put into a mailbox when nothing has come for a while; the client's connection should be kept alive."""


SILENCE = Silence()

Item = TokenEvent | RequestError | Silence


class Mailbox:
    """Everything that happens to the choices of one request, in order. One reader."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[tuple[int, Item]] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, choice: int, item: Item) -> None:
        """Adds an item and wakes the reader."""
        self._items.append((choice, item))
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None

    async def take(self) -> list[tuple[int, Item]]:
        """All items since the last call, at least one."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items


class Dispatcher:
    """Starts generations and owns everything they leave running. Lives on one event loop."""

    def __init__(self, config: RouterConfig, router_id: str, fleet: Fleet, metrics: RouterMetrics) -> None:
        self.config = config
        self.router_id = router_id
        self.fleet = fleet
        self.metrics = metrics
        self._live: set[Generation] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="router sweep")

    def start(
        self,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        priority: int,
        choice: int,
        mailbox: Mailbox,
    ) -> Generation:
        """Begins one choice; its events appear in `mailbox` under `choice`."""
        generation = Generation(self, request_id, prompt_ids, sampling, priority, choice, mailbox)
        self._live.add(generation)
        generation.begin()
        return generation

    def forget(self, generation: Generation) -> None:
        """Called by a generation that ended."""
        self._live.discard(generation)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs clean-up that must not delay anyone; `close` waits for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    async def close(self) -> None:
        """Aborts what still runs and waits until the workers were told."""
        self._sweeper.cancel()
        for generation in list(self._live):
            generation.fail(WorkerStopping("the router is shutting down"))
        while self._background:
            await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(self._sweeper, return_exceptions=True)

    async def _sweep_forever(self) -> None:
        period_s = min(1.0, self.config.keepalive_s, self.config.stall_timeout_s)
        while True:
            await asyncio.sleep(period_s)
            now = asyncio.get_running_loop().time()
            for generation in list(self._live):
                generation.check_silence(now)


class Generation:
    """One choice. Created by `Dispatcher.start`; implements `fleet.EventSink`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        request_id: str,
        prompt_ids: tuple[int, ...],
        sampling: SamplingParams,
        priority: int,
        choice: int,
        mailbox: Mailbox,
    ) -> None:
        self.request_id = request_id
        self.state = GenerationState.NEW
        self.prefill_result: PrefillResult | None = None
        self._dispatcher = dispatcher
        self._config = dispatcher.config
        self._prompt_ids = prompt_ids
        self._sampling = sampling
        self._priority = priority
        self._choice = choice
        self._mailbox = mailbox
        self._epoch = 0
        self._num_tokens = 0
        self._decode: DecodeSlot | None = None
        self._prefill: PrefillSlot | None = None
        self._bad_decode: set[str] = set()
        self._bad_prefill: set[str] = set()
        self._loop = asyncio.get_running_loop()
        self._first: asyncio.Future[None] = self._loop.create_future()
        self._task: asyncio.Task[None] | None = None
        now = self._loop.time()
        self._deadline = now + self._config.request_timeout_s
        self._last_event = self._last_sign = now
        self._timer = self._loop.call_at(self._deadline, self._expire)

    def begin(self) -> None:
        """Starts the first attempt."""
        self._task = asyncio.create_task(self._drive(), name=f"generate {self.request_id}")

    @property
    def ended(self) -> bool:
        """True after the last thing that can happen."""
        return not _NEXT[self.state]

    def deliver(self, event: TokenEvent) -> None:
        """Takes an event of the current attempt; others, and repeated ones, are dropped."""
        if event.epoch != self._epoch or self.ended or self._attempt_lost():
            return
        if event.finish is FinishReason.ERROR or event.finish is FinishReason.ABORTED:
            self._stumble(_event_error(event))
            return
        if event.token_ids:
            if event.index != self._num_tokens:
                if event.index > self._num_tokens:
                    self.fail(RequestError(f"token {self._num_tokens} was lost between decode worker and router"))
                return
            self._num_tokens += len(event.token_ids)
        self._last_event = self._last_sign = self._loop.time()
        if self.state is GenerationState.PREFILLING:
            self._move(GenerationState.STREAMING)
            if not self._first.done():
                self._first.set_result(None)
        self._mailbox.put(self._choice, event)
        if event.finish is not None:
            self._end(GenerationState.FINISHED)

    def lose(self, error: RequestError) -> None:
        """The decode worker's stream broke."""
        self._stumble(error)

    def fail(self, error: RequestError) -> None:
        """Ends with `error`, and tells both workers."""
        if not self.ended:
            self._mailbox.put(self._choice, error)
            self._end(GenerationState.FAILED)

    def abort(self) -> None:
        """Ends without another word, and tells both workers. Harmless when it has ended."""
        if not self.ended:
            self._end(GenerationState.ABORTED)

    async def settle(self) -> None:
        """Waits, shortly, for the prefill call to return, which says how many prompt tokens were cached."""
        if self._task is not None and not self._task.done() and self.state is GenerationState.FINISHED:
            await asyncio.wait({self._task}, timeout=_SETTLE_S)

    def close(self) -> None:
        """Aborts what has not ended, and stops waiting for anything."""
        self.abort()
        if self._task is not None:
            self._task.cancel()

    def check_silence(self, now: float) -> None:
        """Fails a stream that stalled; otherwise reports its long silences."""
        if self.state is not GenerationState.STREAMING:
            return
        if now - self._last_event > self._config.stall_timeout_s:
            self.fail(DeadlineExceeded(f"no token for {self._config.stall_timeout_s:g} s"))
        elif now - self._last_sign > self._config.keepalive_s:
            self._last_sign = now
            self._mailbox.put(self._choice, SILENCE)

    def _expire(self) -> None:
        self.fail(DeadlineExceeded(f"the request took longer than {self._config.request_timeout_s:g} s"))

    def _stumble(self, error: RequestError) -> None:
        """A failure seen in the event stream: a reason to retry before the first token, the end after it."""
        if self.state is GenerationState.PREFILLING and not self._first.done():
            self._first.set_exception(error)
            self._first.exception()  # The attempt may be looking elsewhere; this marks the exception as seen.
        else:
            self.fail(error)

    def _attempt_lost(self) -> bool:
        return self.state is GenerationState.PREFILLING and self._first.done()

    def _move(self, state: GenerationState) -> None:
        if state not in _NEXT[self.state]:
            raise AssertionError(f"request {self.request_id}: {self.state} cannot become {state}")
        self.state = state

    def _end(self, state: GenerationState) -> None:
        self._move(state)
        self._timer.cancel()
        self._dispatcher.forget(self)
        decode, prefill = self._unbind()
        if state is GenerationState.FINISHED:
            return
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._dispatcher.spawn(self._tell_abort(decode, prefill))

    async def _drive(self) -> None:
        """Attempts until one has produced its first token, or no attempt is left."""
        while True:
            try:
                await self._attempt()
                return
            except RequestError as exc:
                error = exc
            except Exception:
                logger.exception("request=%s attempt failed", self.request_id)
                self.fail(RequestError("internal error"))
                return
            if self.ended:
                return
            if not self._may_retry(error):
                self.fail(error)
                return
            await self._withdraw(error)

    async def _attempt(self) -> None:
        decode = self._dispatcher.fleet.pick_decode(self._bad_decode)
        prefill = self._dispatcher.fleet.pick_prefill(self._bad_prefill)
        self._bind(decode, prefill)
        request = GenerateRequest(
            request_id=self.request_id,
            epoch=self._epoch,
            prompt_ids=self._prompt_ids,
            sampling=self._sampling,
            priority=self._priority,
            deadline_s=max(0.001, self._deadline - self._loop.time()),
            router_id=self._dispatcher.router_id,
        )
        try:
            async with asyncio.timeout(self._config.admit_timeout_s):
                grant = await decode.backend.admit(request)
        except TimeoutError:
            raise self._blame(decode, WorkerFull(f"no room at decode worker {decode.name} in time")) from None
        except RequestError as exc:
            raise self._blame(decode, exc) from exc
        call = asyncio.ensure_future(prefill.backend.prefill(request, grant))
        try:
            waits: list[asyncio.Future[Any]] = [call, self._first]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if self._first.done() and (lost := self._first.exception()) is not None:
                await self._let_prefill_fail(prefill, call)
                raise self._blame(decode, lost) if isinstance(lost, RequestError) else lost
            await self._finish_prefill(prefill, call)
        finally:
            call.cancel()
        try:
            await self._first
        except RequestError as exc:
            raise self._blame(decode, exc) from exc

    async def _let_prefill_fail(self, prefill: PrefillSlot, call: asyncio.Future[PrefillResult]) -> None:
        """Decode has lost the attempt: when prefill fails too, it is the cause and decode is not to blame.

        Decode may notice that a hand-off ended before the prefill call returns with the reason.
        """
        await asyncio.wait({call}, timeout=_CAUSE_S)
        if call.done() and isinstance(failure := call.exception(), RequestError):
            raise self._blame(prefill, failure) from failure

    async def _finish_prefill(self, prefill: PrefillSlot, call: asyncio.Future[PrefillResult]) -> None:
        try:
            self.prefill_result = await call
        except RequestError as exc:
            if self.state is GenerationState.PREFILLING:
                raise self._blame(prefill, exc) from exc
            logger.warning("request=%s prefill failed after its first token: %s", self.request_id, exc)

    def _bind(self, decode: DecodeSlot, prefill: PrefillSlot) -> None:
        if self.state is GenerationState.NEW:
            self._move(GenerationState.PREFILLING)
        self._first = self._loop.create_future()
        self._decode, self._prefill = decode, prefill
        decode.register(self.request_id, self)
        for slot in (decode, prefill):
            slot.requests += 1
            slot.tokens += len(self._prompt_ids)

    def _unbind(self) -> tuple[DecodeSlot | None, PrefillSlot | None]:
        decode, prefill, self._decode, self._prefill = self._decode, self._prefill, None, None
        if decode is not None:
            decode.unregister(self.request_id)
        for slot in (decode, prefill):
            if slot is not None:
                slot.requests -= 1
                slot.tokens -= len(self._prompt_ids)
        return decode, prefill

    def _blame(self, slot: DecodeSlot | PrefillSlot, error: RequestError) -> RequestError:
        """Keeps the worker out of the next attempts when it cannot serve now."""
        if isinstance(error, WorkerUnavailable):
            slot.suspect()
        if isinstance(error, WorkerUnavailable | WorkerStopping | WorkerFull):
            bad = self._bad_decode if isinstance(slot, DecodeSlot) else self._bad_prefill
            bad.add(slot.name)
        logger.warning("request=%s epoch=%d worker=%s failed: %s", self.request_id, self._epoch, slot.name, error)
        return error

    def _may_retry(self, error: RequestError) -> bool:
        if self.state is not GenerationState.PREFILLING or self._epoch + 1 >= self._config.max_attempts:
            return False
        if error.status not in _WORTH_ANOTHER_ATTEMPT:
            return False
        return self._dispatcher.fleet.can_serve(self._bad_prefill, self._bad_decode)

    async def _withdraw(self, error: RequestError) -> None:
        """Ends the attempt at its workers and opens the next epoch."""
        decode, prefill = self._unbind()
        self._epoch += 1
        self._dispatcher.metrics.retries.labels(error.code).inc()
        waits = []
        for slot, bad in ((decode, self._bad_decode), (prefill, self._bad_prefill)):
            if slot is None:
                continue
            task = self._dispatcher.spawn(self._abort_at(slot))
            # An abort under way could hit the next attempt at the same worker. At a worker that this request will not
            # use again nobody need wait for it: that one may be dead.
            if slot.name not in bad:
                waits.append(task)
        if waits:
            await asyncio.wait(waits)

    async def _tell_abort(self, *slots: DecodeSlot | PrefillSlot | None) -> None:
        # Not before the calls of the attempt are cancelled: an abort must not overtake an admission.
        if self._task is not None and not self._task.done():
            await asyncio.wait({self._task}, timeout=self._config.abort_timeout_s)
        await asyncio.gather(*(self._abort_at(slot) for slot in slots if slot is not None))

    async def _abort_at(self, slot: DecodeSlot | PrefillSlot) -> None:
        try:
            async with asyncio.timeout(self._config.abort_timeout_s):
                await slot.backend.abort(self.request_id)
        except (TimeoutError, RequestError) as exc:
            logger.warning("request=%s abort at %s failed: %s", self.request_id, slot.name, str(exc) or "timed out")
        except Exception:
            logger.exception("request=%s abort at %s failed", self.request_id, slot.name)


def _event_error(event: TokenEvent) -> RequestError:
    if event.error is not None:
        return event.error.to_error()
    info = ErrorInfo(503, "aborted", "the worker ended the request")
    return info.to_error()
