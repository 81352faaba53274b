"""One HTTP request's answer: its choices run at the workers, parsed into deltas, counted.

Owns: the neutral event stream that every dialect renders, usage counts, latency metrics. Does not own: HTTP framing
(`app`), the dialect's JSON (`openai/render`). Invariants: each choice yields exactly one `ChoiceEnd`, or the whole
answer raises once; `close` leaves nothing running at any worker.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from router.chat.parsing import Delta, OutputParser
from router.errors import ApiError
from router.lifecycle import SILENCE, Dispatcher, Generation, Mailbox, Silence
from workers.errors import RequestError
from workers.messages import FinishReason, SamplingParams, TokenEvent


@dataclass(frozen=True, slots=True)
class ChoicePlan:
    """One choice to generate."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    parser: OutputParser
    echo: str = ""
    """Text that precedes the output in the answer (the prompt, when asked for)."""


@dataclass(slots=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int | None = None

    def as_dict(self, completion_tokens: int | None = None) -> dict[str, Any]:
        """OpenAI's usage object; with `completion_tokens`, as of an earlier moment."""
        completed = self.completion_tokens if completion_tokens is None else completion_tokens
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completed,
            "total_tokens": self.prompt_tokens + completed,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage


@dataclass(frozen=True, slots=True)
class ChoiceEnd:
    """The last event of one choice: stop, length or tool_calls."""

    reason: str


AnswerEvent = tuple[int, Delta | ChoiceEnd | Silence]


class Renderer(Protocol):
    """A dialect: how an answer looks as JSON and as a stream. One instance serves one request."""

    def start(self) -> bytes:
        """What precedes the first delta of a stream."""
        ...

    def delta(self, choice: int, delta: Delta, usage: Usage) -> bytes:
        """One streamed delta."""
        ...

    def end_choice(self, choice: int, reason: str, usage: Usage) -> bytes:
        """The end of one choice in a stream."""
        ...

    def end(self, usage: Usage) -> bytes:
        """The end of a stream that went well."""
        ...

    def error(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""
        ...

    def body(self, deltas: Sequence[Sequence[Delta]], reasons: Sequence[str], usage: Usage) -> dict[str, Any]:
        """The whole answer, when it is not streamed."""
        ...


class Answer:
    """Runs the choices of one request. `next` until `done`; `close` in any case."""

    def __init__(
        self, dispatcher: Dispatcher, answer_id: str, plans: Sequence[ChoicePlan], *, priority: int, prompt_tokens: int
    ) -> None:
        self.usage = Usage(prompt_tokens=prompt_tokens)
        self._metrics = dispatcher.metrics
        self._plans = plans
        self._mailbox = Mailbox()
        self._open = len(plans)
        self._last_event_s: list[float | None] = [None] * len(plans)
        self._started_s = time.monotonic()
        self._generations: list[Generation] = []
        for choice, plan in enumerate(plans):
            request_id = answer_id if choice == 0 else f"{answer_id}-{choice}"
            self._generations.append(
                dispatcher.start(
                    request_id,
                    plan.prompt_ids,
                    plan.sampling,
                    priority=priority,
                    choice=choice,
                    mailbox=self._mailbox,
                )
            )

    @property
    def done(self) -> bool:
        """True when every choice has ended."""
        return self._open == 0

    async def next(self) -> list[AnswerEvent]:
        """Events since the last call; waits for one. Raises the first choice's failure as `RequestError`."""
        events: list[AnswerEvent] = []
        for choice, item in await self._mailbox.take():
            if type(item) is TokenEvent:
                self._read(choice, item, events)
            elif item is SILENCE:
                events.append((choice, SILENCE))
            elif isinstance(item, RequestError):
                self._metrics.finished.labels("error").inc()
                raise item
        if self._open == 0:
            await self._settle()
        return events

    def close(self) -> None:
        """Aborts every choice that has not ended, at both of its workers."""
        for generation in self._generations:
            generation.close()
        self._metrics.request_s.observe(time.monotonic() - self._started_s)
        self._metrics.prompt_tokens.inc(self.usage.prompt_tokens)
        self._metrics.cached_tokens.inc(self.usage.cached_tokens)
        self._metrics.output_tokens.inc(self.usage.completion_tokens)

    def _read(self, choice: int, event: TokenEvent, events: list[AnswerEvent]) -> None:
        plan = self._plans[choice]
        parser = plan.parser
        if parser.stopped:
            return
        token_ids, logprobs = event.token_ids, event.logprobs
        if token_ids:
            self._observe(choice, len(token_ids))
            if event.finish is FinishReason.STOP and token_ids[-1] in plan.sampling.stop_token_ids:
                token_ids, logprobs = token_ids[:-1], logprobs[:-1] if logprobs else None
            if token_ids:
                for delta in parser.push(token_ids, logprobs):
                    delta.output_tokens = self.usage.completion_tokens
                    events.append((choice, delta))
        if parser.stopped:
            self._generations[choice].abort()
        elif event.finish is not None:
            for delta in parser.finish(event.finish):
                delta.output_tokens = self.usage.completion_tokens
                events.append((choice, delta))
        else:
            return
        self._end(choice, parser, events)

    def _end(self, choice: int, parser: OutputParser, events: list[AnswerEvent]) -> None:
        parser.stopped = True
        self._open -= 1
        self._metrics.finished.labels(parser.finish_reason).inc()
        if parser.reasoning_tokens is not None:
            self.usage.reasoning_tokens = (self.usage.reasoning_tokens or 0) + parser.reasoning_tokens
        events.append((choice, ChoiceEnd(parser.finish_reason)))

    def _observe(self, choice: int, num_tokens: int) -> None:
        now = time.monotonic()
        last = self._last_event_s[choice]
        if last is None:
            self._metrics.first_token_s.observe(now - self._started_s)
        else:
            self._metrics.token_gap_s.observe(now - last)
        self._last_event_s[choice] = now
        self.usage.completion_tokens += num_tokens

    async def _settle(self) -> None:
        counted: set[tuple[int, ...]] = set()
        for plan, generation in zip(self._plans, self._generations, strict=True):
            await generation.settle()
            # Choices of one prompt share its count: the first one's says what was cached before the request.
            if generation.prefill_result is not None and plan.prompt_ids not in counted:
                counted.add(plan.prompt_ids)
                self.usage.cached_tokens += generation.prefill_result.num_cached_tokens
