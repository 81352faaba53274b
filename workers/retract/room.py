"""`Room`: what the pools can still take: who is let in, who must leave, whether a parked request fits again.

Owns: the forecast of outputs, each request's history of retracts, the step count. Holds no memory. Torch-free, engine
thread only.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvstore.allocator import KVAllocators
from kvstore.spec import PAGE_TOKENS, KVSpec
from workers.messages import FinishReason, GenerateRequest
from workers.retract.config import RetractConfig
from workers.retract.forecast import OutputForecast
from workers.retract.victims import Candidate, VictimLimits, choose_victims, growth, total
from workers.scheduler.admission import Need, decode_need, pages_of
from workers.scheduler.decode import DecodeScheduler
from workers.sequence import SeqState, Sequence


@dataclass(slots=True)
class History:
    """What is remembered of a request between its retracts."""

    num_retracts: int = 0
    resumed_at_step: int | None = None


class Room:
    """The `ShortagePolicy` of a decode scheduler, and its admission rule. `scheduler` is set by whoever makes both."""

    scheduler: DecodeScheduler

    def __init__(
        self, config: RetractConfig, allocators: KVAllocators, spec: KVSpec, clock: Callable[[], float]
    ) -> None:
        self.config = config
        self.limits = VictimLimits(config.horizon_steps, config.max_retracts, config.min_run_steps)
        self.history: dict[tuple[str, int], History] = {}
        self.step = 0
        self.shortage_cause = "full_pages"
        """Which space the last shortage was in."""
        self._allocators, self._spec, self._clock = allocators, spec, clock
        self._forecast = OutputForecast(config.forecast_quantile, config.forecast_safety, config.forecast_initial)

    @property
    def predicted(self) -> bool:
        """Whether admission promises less than the most a request may need."""
        return self.config.admission == "predicted"

    def free(self) -> Need:
        """Units that can be had now."""
        allocators = self._allocators
        return Need(allocators.full.num_free, allocators.window.num_free, allocators.slots.num_free)

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self.history.pop(sequence.key, None)
        if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._forecast.observe(len(sequence.output_ids))

    # -- promises -----------------------------------------------------------------------------------------------------

    def need(self, request: GenerateRequest, window_tokens: int) -> Need:
        """What admission promises to a new request."""
        return self._need(request, window_tokens, 0)

    def resume_need(self, sequence: Sequence) -> Need:
        """What is promised to a request that comes back."""
        return self._need(sequence.request, self.scheduler.limits.window_tokens, len(sequence.output_ids))

    def _need(self, request: GenerateRequest, window_tokens: int, num_output: int) -> Need:
        if not self.predicted:
            return decode_need(request, window_tokens)
        need = self._forecast.need_after(request, window_tokens, num_output)
        return Need(need.full_pages, need.window_pages, 0 if self.config.extra_requests else 1)

    def may_admit(self, sequence: Sequence, need: Need, head: Sequence | None) -> bool:
        """Whether a new request is let in now, `head` being the first of those that wait to resume.

        With full promises there is nothing to ask: retracted requests keep theirs. Else the head's room is kept free,
        and there must be pages in fact for every prompt on its way and for the next steps of the batch.
        """
        scheduler = self.scheduler
        live = scheduler.num_granted + scheduler.num_running + scheduler.num_aside
        if not self.predicted or not live:
            return True
        if live >= self._allocators.slots.num_slots + self.config.extra_requests:
            return False
        if head is not None and not scheduler.ledger.has_room(total([need, self.resume_need(head)])):
            return False
        arriving = sum(pages_of(s.num_prompt) for s in (*scheduler.granted, sequence))
        ahead = total(growth(self.candidate(s), self.config.horizon_steps) for s in scheduler.running)
        return arriving + ahead.full_pages <= self.free().full_pages

    def fits(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether a parked request of `num_tokens` committed tokens could run for a while, and the batch with it.

        With full promises its pages are free, or soon will be.
        """
        if not self.predicted:
            return True
        running = [self.candidate(s) for s in self.scheduler.running]
        remaining = max(1, sequence.request.sampling.max_tokens - len(sequence.output_ids))
        own = Candidate(sequence.key, 0, 0.0, num_tokens, Need(0, 0, 0), 0, remaining)
        first_live = max(0, num_tokens - self.scheduler.limits.window_tokens) // PAGE_TOKENS
        placed = Need(0, pages_of(num_tokens) - first_live, 1)
        steps = self.config.horizon_steps if running else 1
        return total([placed, *(growth(c, steps) for c in (own, *running))]).fits(self.free())

    # -- shortage -----------------------------------------------------------------------------------------------------

    def victims(self, running: Seq[Sequence], blocked: Sequence) -> Seq[Sequence]:
        """As `ShortagePolicy`: enough for the next steps of those that stay, or none while pages are on their way."""
        free, leaving = self.free(), self._leaving()
        self.shortage_cause = "full_pages" if free.full_pages == 0 else "window_pages"
        by_key = {s.key: s for s in running}
        chosen = choose_victims([self.candidate(s) for s in running], total([free, leaving]), self.limits)
        if chosen:
            self._forecast.on_shortage()
            return [by_key[c.key] for c in chosen]
        return [] if leaving.full_pages or leaving.window_pages else [blocked]

    def slot_holder(self) -> Sequence | None:
        """Who gives its slot up for one that waits: it has run its time slice, and longer than all others."""
        ran = [(self._steps_here(s), s.key, s) for s in self.scheduler.running if self._may_leave(s)]
        steps, _, sequence = max(ran, default=(0, None, None))
        return sequence if steps >= self.config.time_slice_steps else None

    def _may_leave(self, sequence: Sequence) -> bool:
        return self.history.get(sequence.key, History()).num_retracts < self.config.max_retracts

    def _steps_here(self, sequence: Sequence) -> int:
        """Steps since the request joined the batch, for the first time or again."""
        resumed = self.history.get(sequence.key, History()).resumed_at_step
        return len(sequence.output_ids) if resumed is None else self.step - resumed

    def candidate(self, sequence: Sequence) -> Candidate:
        """A running request, as the choice of victims sees it."""
        kv, history = sequence.kv, self.history.get(sequence.key, History())
        assert kv is not None
        num_output, most = len(sequence.output_ids), sequence.request.sampling.max_tokens
        expected = self._forecast.expected(most, num_output) if self.predicted else most
        return Candidate(
            key=sequence.key,
            priority=sequence.request.priority,
            age_s=self._clock() - sequence.arrival_s,
            num_tokens=sequence.num_computed,
            held=Need(kv.num_full_pages, kv.num_window_pages, 1),
            move_bytes=self._spec.image_bytes(sequence.num_computed),
            remaining=max(1, expected - num_output),
            num_retracts=history.num_retracts,
            steps_since_resume=None if history.resumed_at_step is None else self.step - history.resumed_at_step,
        )

    def _leaving(self) -> Need:
        """Units that come free when copies under way are done."""
        draining = [s.kv for s in self.scheduler.aside if s.state is SeqState.DRAINING]
        kvs = [kv for kv in (*draining, *self.scheduler.lent) if kv is not None]
        return total(Need(kv.num_full_pages, kv.num_window_pages, 1) for kv in kvs)
