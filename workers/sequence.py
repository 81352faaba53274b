"""`Sequence`: one request inside one worker, as counters and a state with legal transitions.

Owns: tokens known and computed, why and when it ended, its KV handle. Does not own: who runs next
(`workers/scheduler`), tensors, events on the wire. Torch-free. One class serves both roles: prefill is "computed
catches up with the prompt", decode is "computed stays one behind the known tokens". Engine thread only.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from kvstore.sequence_kv import SequenceKV
from workers.errors import RequestError
from workers.messages import ErrorInfo, FinishReason, GenerateRequest, TokenEvent, TokenLogprob


class SeqState(enum.Enum):
    """What a request waits for or does."""

    WAITING_ADMISSION = "waiting_admission"
    """No pages are promised yet."""
    WAITING_PROMPT = "waiting_prompt"
    """Prefill: admitted, some prompt tokens are not computed."""
    WAITING_KV = "waiting_kv"
    """Decode: granted, its image is not here."""
    RUNNING = "running"
    """Decode: in the batch."""
    DRAINING = "draining"
    """Its pages belong to a copy in flight: hand-off to decode, later retract."""
    PARKED = "parked"
    """Retracted: no pages, its image is in a tier."""
    RESTORING = "restoring"
    """It has pages again, and its image is on the way into them."""
    FINISHED = "finished"


_LEGAL: dict[SeqState, frozenset[SeqState]] = {
    SeqState.WAITING_ADMISSION: frozenset({SeqState.WAITING_PROMPT, SeqState.WAITING_KV, SeqState.FINISHED}),
    SeqState.WAITING_PROMPT: frozenset({SeqState.DRAINING, SeqState.RUNNING, SeqState.FINISHED}),
    SeqState.WAITING_KV: frozenset({SeqState.RESTORING, SeqState.PARKED, SeqState.FINISHED}),
    SeqState.RUNNING: frozenset({SeqState.DRAINING, SeqState.FINISHED}),
    SeqState.DRAINING: frozenset({SeqState.PARKED, SeqState.RUNNING, SeqState.FINISHED}),
    SeqState.PARKED: frozenset({SeqState.RESTORING, SeqState.FINISHED}),
    SeqState.RESTORING: frozenset({SeqState.RUNNING, SeqState.PARKED, SeqState.FINISHED}),
    SeqState.FINISHED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class StopRule:
    """When output ends: shared by both roles, so that they always agree."""

    stop_ids: frozenset[int]
    max_tokens: int
    ends_on_stop: bool

    @classmethod
    def of(cls, request: GenerateRequest, eos_token_id: int) -> StopRule:
        """The rule of `request`: the model's end id and its own stop ids, unless it ignores them."""
        params = request.sampling
        return cls(frozenset({eos_token_id, *params.stop_token_ids}), params.max_tokens, not params.ignore_eos)

    def finish(self, token_id: int, num_output: int) -> FinishReason | None:
        """Whether the output of `num_output` tokens ends with `token_id`, its last."""
        if self.ends_on_stop and token_id in self.stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_output >= self.max_tokens else None


class Sequence:
    """One request in one worker."""

    def __init__(self, request: GenerateRequest, *, stop: StopRule, arrival_s: float, deadline_s: float) -> None:
        """`arrival_s` and `deadline_s` are times of the worker's monotonic clock."""
        self.request = request
        self.stop = stop
        self.arrival_s = arrival_s
        self.deadline_s = deadline_s
        self.state = SeqState.WAITING_ADMISSION
        self.output_ids: list[int] = []
        self.num_computed = 0
        """Tokens whose KV is committed."""
        self.num_emitted = 0
        self.kv: SequenceKV | None = None
        self.sampling: object | None = None
        """The engine's `SampleState`; opaque here, kept with the request across retracts."""
        self.finish_reason: FinishReason | None = None

    def __repr__(self) -> str:
        return (
            f"Sequence({self.request.request_id} epoch={self.request.epoch} {self.state.value} "
            f"prompt={self.num_prompt} output={len(self.output_ids)} computed={self.num_computed})"
        )

    @property
    def key(self) -> tuple[str, int]:
        """(request id, epoch): what identifies an attempt."""
        return self.request.request_id, self.request.epoch

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def remaining_prompt(self) -> int:
        """Prompt tokens not computed yet."""
        return max(0, self.num_prompt - self.num_computed)

    @property
    def order(self) -> tuple[int, float]:
        """Sort key of queues: priority first, then arrival."""
        return -self.request.priority, self.arrival_s

    def to(self, state: SeqState) -> None:
        """Changes state. Raises `AssertionError` on an illegal change, which is our bug."""
        assert state in _LEGAL[self.state], f"{self}: illegal change to {state.value}"
        self.state = state

    def take_token(self, token_id: int, logprob: TokenLogprob | None) -> TokenEvent:
        """Adds one output token and returns its event, terminal when the output ends with it."""
        index = len(self.output_ids)
        self.output_ids.append(token_id)
        self.num_emitted = index + 1
        self.finish_reason = self.stop.finish(token_id, index + 1)
        request = self.request
        logprobs = None if logprob is None else (logprob,)
        return TokenEvent(request.request_id, request.epoch, index, (token_id,), logprobs, self.finish_reason)

    def failure_event(self, error: RequestError) -> TokenEvent:
        """The terminal event of a request that ends without its last token."""
        self.finish_reason = FinishReason.ABORTED if error.code == "aborted" else FinishReason.ERROR
        info = None if self.finish_reason is FinishReason.ABORTED else ErrorInfo.from_error(error)
        request = self.request
        return TokenEvent(request.request_id, request.epoch, self.num_emitted, (), None, self.finish_reason, info)

    def release(self) -> None:
        """Ends the sequence and frees its pages and slot; safe to call again."""
        if self.state is not SeqState.FINISHED:
            self.to(SeqState.FINISHED)
        if self.kv is not None:
            kv, self.kv = self.kv, None
            kv.free()
