"""What crosses process borders between router and workers: requests, grants, token events, statistics.

Owns: the frozen values and their cheap validation. Does not own: their wire encoding (`workers/service/codec.py`), the
KV protocol (`kvstore/transfer`), HTTP fields (`router`). Torch-free and grpc-free, so that the router may import it.
Invariants: one request id lives in many attempts, each with its own epoch; the events of one attempt carry contiguous
`index` values from 0 and end with exactly one event whose `finish` is set.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from workers.errors import (
    DeadlineExceeded,
    KVLost,
    RequestAborted,
    RequestError,
    RequestTooLong,
    WorkerFull,
    WorkerStopping,
    WorkerUnavailable,
)

MAX_TOP_LOGPROBS = 20
"""Most alternatives a token may report (the OpenAI API's limit); bounds the size of one event."""


class FinishReason(enum.Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    ERROR = "error"


class WorkerRole(enum.Enum):
    """Which half of a request's life a worker serves."""

    PREFILL = "prefill"
    DECODE = "decode"


MIN_TEMPERATURE = 1e-5
"""Below this, sampling is greedy: logits divided by less would overflow fp32, and no other token has a chance."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How output tokens are chosen. Raises `ValueError` naming the field when a value is out of range."""

    max_tokens: int
    """Most output tokens, >= 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is off."""
    min_p: float = 0.0
    seed: int | None = None
    """64-bit; None lets the router draw one, so that every attempt of a request samples alike."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request, besides the model's end-of-sequence id."""
    ignore_eos: bool = False
    """Neither the end-of-sequence id nor `stop_token_ids` end the request."""
    min_tokens: int = 0
    """Output tokens before which no stop id may be sampled."""
    logprobs: int | None = None
    """None: no log-probabilities; N: of the sampled token and of the N best alternatives."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, bias added to its logit)."""

    def __post_init__(self) -> None:
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, ">= 1")
        _check("temperature", self.temperature, 0.0 <= self.temperature < math.inf, ">= 0")
        _check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "in (0, 1]")
        _check("top_k", self.top_k, self.top_k >= 0, ">= 0 (0 is off)")
        _check("min_p", self.min_p, 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        _check("presence_penalty", self.presence_penalty, math.isfinite(self.presence_penalty), "finite")
        _check("frequency_penalty", self.frequency_penalty, math.isfinite(self.frequency_penalty), "finite")
        _check("repetition_penalty", self.repetition_penalty, 0.0 < self.repetition_penalty < math.inf, "> 0")
        _check("min_tokens", self.min_tokens, 0 <= self.min_tokens <= self.max_tokens, "in [0, max_tokens]")
        if self.logprobs is not None:
            _check("logprobs", self.logprobs, 0 <= self.logprobs <= MAX_TOP_LOGPROBS, f"in [0, {MAX_TOP_LOGPROBS}]")
        if self.seed is not None:
            _check("seed", self.seed, -(2**63) <= self.seed < 2**64, "a 64-bit integer")
        for token_id, bias in self.logit_bias:
            _check("logit_bias", (token_id, bias), token_id >= 0 and not math.isnan(bias), "(id >= 0, number)")

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature < MIN_TEMPERATURE or self.top_k == 1

    @property
    def edits_logits(self) -> bool:
        """True when logits change before sampling (penalties, bias, suppressed stop ids)."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
            or self.min_tokens > 0
            or bool(self.logit_bias)
        )


def _check(name: str, value: object, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: found {value!r}, expected {expected}")


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One attempt at one request. `sampling.seed` should be set by the router before the first attempt."""

    request_id: str
    epoch: int
    """Attempt number, from 0; data of an older epoch is dropped everywhere."""
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    """Larger goes first."""
    deadline_s: float | None = None
    """Seconds the whole request may still take, from its arrival at the worker; None: the worker's own limit."""
    router_id: str = ""
    """Names the event stream that gets this request's tokens."""

    def __post_init__(self) -> None:
        _check("request_id", self.request_id, bool(self.request_id), "a non-empty string")
        _check("epoch", self.epoch, self.epoch >= 0, ">= 0")
        _check("prompt_ids", "()", bool(self.prompt_ids), "at least one token id")
        if self.deadline_s is not None:
            _check("deadline_s", self.deadline_s, self.deadline_s > 0, "> 0 seconds")


@dataclass(frozen=True, slots=True)
class Grant:
    """Decode's permission to send one request's KV image: valid for `lease_s`, at most `credit_bytes` in flight."""

    request_id: str
    epoch: int
    lease_s: float
    credit_bytes: int
    kv_address: str
    """`host:port` of the decode worker's KV receiver."""
    fingerprint: str
    """Hex layout fingerprint of the receiver's `KVSpec`; a sender with another one must refuse."""
    incarnation: str
    """Changes when the worker restarts, so that a grant never outlives the process that gave it."""


@dataclass(frozen=True, slots=True)
class PrefillResult:
    """What prefilling one prompt took. Returned once decode has committed the image."""

    request_id: str
    epoch: int
    num_prompt_tokens: int
    num_cached_tokens: int
    prefill_s: float
    kv_bytes_sent: int


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log-probability of one output token, and of the best alternatives (best first)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class ErrorInfo:
    """A `RequestError` as a value: HTTP status, OpenAI error code, message for the client."""

    status: int
    code: str
    message: str

    @classmethod
    def from_error(cls, error: RequestError) -> ErrorInfo:
        """The value form of `error`."""
        return cls(error.status, error.code, str(error))

    def to_error(self) -> RequestError:
        """The exception form: the subclass whose `code` this is, else a plain `RequestError` with the same status."""
        kind = _ERROR_BY_CODE.get(self.code, RequestError)
        error = kind(self.message)
        error.status, error.code = self.status, self.code
        return error


_ERROR_BY_CODE: dict[str, type[RequestError]] = {
    kind.code: kind
    for kind in (
        RequestTooLong,
        WorkerFull,
        DeadlineExceeded,
        RequestAborted,
        WorkerStopping,
        WorkerUnavailable,
        KVLost,
    )
}


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request, or its end, or both. A terminal event may carry no token."""

    request_id: str
    epoch: int
    index: int
    """0-based output index of the first of `token_ids`; for a terminal event without tokens, the number emitted."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry a token, when asked for."""
    finish: FinishReason | None = None
    """Set on the last event of the attempt and only there."""
    error: ErrorInfo | None = None
    """Set exactly when `finish` is ERROR."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Events of one step for one router."""

    events: tuple[TokenEvent, ...]


@dataclass(frozen=True, slots=True)
class RetractControl:
    """Forced retracts of one decode worker, for proofs. The default value forces nothing and mends what was forced.

    Raises `ValueError` naming the field when a value is out of range.
    """

    interval: int | None = None
    """`all` and `named`: a request leaves after each so many of its own tokens, at an offset drawn from `seed` and its
    id. `policy` and `random`: one running request leaves every so many steps. None: nobody is forced."""
    victim: str = "all"
    """One of `VICTIM_RULES`."""
    names: tuple[str, ...] = ()
    """`named`: ids, or beginnings of ids, of the requests that leave."""
    seed: int = 0
    tier: str = "auto"
    """One of `TIER_CHOICES`: where a forced image must go before it may come back."""
    poison_freed: bool = False
    """Fill what retracted and ended requests give back with NaN bytes."""
    other_pages: bool = False
    """Never resume a request in a page or slot that it had before, as long as others are free."""
    fail_copy: int | None = None
    """The copy out of the pools with this number, counted from 1 since this control was set, fails."""
    mutate: str | None = None
    """One of `MUTATIONS`, applied to every restore after its image was verified."""

    def __post_init__(self) -> None:
        _check("interval", self.interval, self.interval is None or self.interval >= 1, ">= 1 or null")
        _check("victim", self.victim, self.victim in VICTIM_RULES, f"one of {VICTIM_RULES}")
        _check("tier", self.tier, self.tier in TIER_CHOICES, f"one of {TIER_CHOICES}")
        _check("mutate", self.mutate, self.mutate is None or self.mutate in MUTATIONS, f"one of {MUTATIONS} or null")
        _check("fail_copy", self.fail_copy, self.fail_copy is None or self.fail_copy >= 1, ">= 1 or null")

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, flat: Mapping[str, object]) -> RetractControl:
        """Inverse of `as_dict`. Raises `ValueError` for unknown keys and bad values."""
        unknown = set(flat) - {item.name for item in fields(cls)}
        if unknown:
            raise ValueError(f"retract control: unknown keys {sorted(unknown)}")
        return cls(**{**flat, "names": tuple(flat.get("names", ()))})  # type: ignore[arg-type]


VICTIM_RULES = ("all", "policy", "random", "named")
TIER_CHOICES = ("auto", "pinned", "disk", "peer", "recompute")

_POOLS = ("window", "c4", "c4_indexer", "c128", "c4_state", "c4_indexer_state", "c128_state")
MUTATIONS = (*(f"skip:{pool}" for pool in _POOLS), *(f"corrupt:{pool}" for pool in _POOLS), "sampler_position")
"""Planned errors of a restore; see `workers/retract/mutation.py`. `sampler_position` shows in sampled requests only."""


@dataclass(frozen=True, slots=True)
class RetractReport:
    """Retracts and resumes of one decode worker since it started or the report was reset."""

    events: int = 0
    """Requests taken out of the batch."""
    resumes: int = 0
    bytes_out: int = 0
    """Payload bytes copied out of the pools; `bytes_in` back into them."""
    bytes_in: int = 0
    by_cause: Mapping[str, int] = field(default_factory=dict)
    """Events by cause: `full_pages`, `window_pages`, `slots` (shortage), `landing`, `forced`."""
    by_tier: Mapping[str, int] = field(default_factory=dict)
    """Resumes by the lowest tier that the image was in: `pinned`, `disk`, `peer`, `landing`, `recompute`."""
    phase_ms: Mapping[str, tuple[int, float, float]] = field(default_factory=dict)
    """Phase -> (count, p50, p99) milliseconds: `copy_out`, `parked`, `resume_wait`, `copy_in`, `recompute`."""
    parked_requests: int = 0
    """Gauge: requests out of the batch now, in any state."""
    parked_bytes: int = 0
    """Gauge: payload bytes of parked images."""
    checksum_failures: int = 0
    """Images that came back damaged; their requests were recomputed."""
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Count by what was done instead of the first choice."""
    repeat_max: int = 0
    """Most retracts of one request."""
    added_step_ms_p50: float = 0.0
    """Time that retract work added to the steps in which there was any."""
    added_step_ms_p99: float = 0.0
    leaked_pages: int = 0
    """Pages and slots that the allocators gave out and no request holds, now."""
    contexts: tuple[int, ...] = ()
    """Committed tokens at each of the latest events."""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, flat: Mapping[str, object]) -> RetractReport:
        """Inverse of `as_dict`; fields this side does not know are ignored."""
        known = {item.name: flat[item.name] for item in fields(cls) if item.name in flat}
        phases = known.get("phase_ms", {})
        assert isinstance(phases, Mapping)
        known["phase_ms"] = {name: tuple(values) for name, values in phases.items()}
        known["contexts"] = tuple(known.get("contexts", ()))  # type: ignore[arg-type]
        return cls(**known)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class SpaceStats:
    """Occupancy of one index space, in its own units (pages or slots)."""

    total: int
    free: int

    @property
    def used(self) -> int:
        return self.total - self.free


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One worker at one moment. Counters count since the worker started; gauges are of now."""

    name: str
    role: WorkerRole
    incarnation: str
    address: str
    """`host:port` of its gRPC service."""
    uptime_s: float
    ready: bool
    """False while it loads, drains, or has stopped on an integrity error."""
    model_name: str = ""
    fingerprint: str = ""
    max_context: int = 0
    """Most prompt + output tokens of one request."""
    max_running: int = 0
    running: int = 0
    """Gauge: requests in the current batch (decode) or being computed (prefill)."""
    waiting: int = 0
    """Gauge: admitted requests not yet computing (queued prompts; grants whose KV has not arrived)."""
    parked: int = 0
    """Gauge: retracted requests, held outside the pools."""
    draining: int = 0
    """Gauge: prefilled requests whose KV is still on its way to decode."""
    full_pages: SpaceStats = SpaceStats(0, 0)
    window_pages: SpaceStats = SpaceStats(0, 0)
    slots: SpaceStats = SpaceStats(0, 0)
    reserved_full_pages: int = 0
    """Gauge: pages promised to admitted requests and not allocated yet."""
    leaked_pages: int = 0
    """Gauge: pages and slots that no live request owns; checked when idle, 0 unless there is a bug."""
    requests_admitted: int = 0
    requests_finished: int = 0
    """Counter: ended by stop or length (prefill: handed over)."""
    requests_failed: int = 0
    requests_aborted: int = 0
    requests_refused: int = 0
    """Counter: refused at admission (full, too long, stopping)."""
    tokens_generated: int = 0
    """Counter: output tokens emitted by this worker."""
    prefill_tokens: int = 0
    """Counter: prompt tokens whose KV this worker computed."""
    cached_tokens: int = 0
    """Counter: prompt tokens served from a prefix cache."""
    steps: int = 0
    step_s_total: float = 0.0
    """Counter: seconds inside engine steps."""
    step_ms_last: float = 0.0
    step_ms_mean: float = 0.0
    """Gauge: exponential mean over about the last 50 steps."""
    kv_bytes_sent: int = 0
    kv_bytes_received: int = 0
    kv_segments_sent: int = 0
    kv_segments_received: int = 0
    kv_segments_dropped: int = 0
    """Counter: late, duplicate or foreign segments, dropped in host memory."""
    kv_checksum_failures: int = 0
    kv_images_committed: int = 0
    kv_send_s_total: float = 0.0
    """Counter: seconds with KV on the wire."""
    kv_hidden_s_total: float = 0.0
    """Counter: of those, seconds during which this worker also computed."""
    leases_expired: int = 0
    routers: int = 0
    """Gauge: event streams open (decode)."""
    parked_bytes: int = 0
    """Gauge: payload bytes of parked images, in any tier."""
    retracts: Mapping[str, int] = field(default_factory=dict)
    """Counter by cause, as in `RetractReport.by_cause`."""
    retract_bytes: Mapping[str, int] = field(default_factory=dict)
    """Counter by `direction/tier`: out of the pools or the tier above, and back in."""
    retract_ms: Mapping[str, float] = field(default_factory=dict)
    """Counter by `direction/tier`: milliseconds that those bytes took."""
    retract_fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Counter by what was done instead of the first choice."""
    retract_repeats: int = 0
    """Counter: retracts of requests that had been retracted before."""
    retract_checksum_failures: int = 0
    """Counter: parked images that came back damaged."""
    resumes: int = 0
    resume_wait_s_total: float = 0.0
    """Counter: seconds between a resume's turn and its first step."""
    expert_lookups: int = 0
    """Counter: unique (layer, expert) pairs that steps needed, where some experts are absent from fast memory."""
    expert_hits: int = 0
    """Counter: those that were in fast memory before their step."""
    expert_misses: Mapping[str, int] = field(default_factory=dict)
    """Counter by cause: `cold` (first use), `capacity`, `prefill` (either, in steps that prefilled)."""
    expert_evictions: int = 0
    expert_moves: int = 0
    """Counter: experts brought into a slot between steps."""
    expert_prefetch: Mapping[str, int] = field(default_factory=dict)
    """Counter: of those, `useful` (a step used it before it left) and `wasted` (it left unused)."""
    expert_loads: int = 0
    """Counter: reads of absent experts inside steps; a long step may read one more than once."""
    expert_stall_s_total: float = 0.0
    """Counter: seconds inside steps spent on absent experts."""
    expert_bytes: Mapping[str, int] = field(default_factory=dict)
    """Counter by path: `disk`, `host` (bank), `peer` (the other GPU); `moves` into slots; `prefill`'s staging."""
    expert_read_s_total: float = 0.0
    """Counter: seconds inside reads of either path."""
    expert_io_errors: int = 0
    """Counter: reads of experts that failed or brought wrong bytes, each try counted."""
    expert_step_s: Mapping[str, float] = field(default_factory=dict)
    """Counter by misses of the step, `0` or `1+`: seconds."""
    expert_slots: Mapping[str, int] = field(default_factory=dict)
    """Gauge by state: `used`, `free`; `peer`, absent experts that are read from the other GPU's slots."""
    expert_budget_bytes: Mapping[str, int] = field(default_factory=dict)
    """Gauge: bytes of fast memory `requested`, `effective` (what the plan takes of it), `measured`."""
    expert_host_bytes: Mapping[str, int] = field(default_factory=dict)
    """Gauge by holder: the `bank`, and what the disk strategy keeps."""
    expert_heat_share: float = 0.0
    """Gauge: part of all recent uses that resident experts account for."""
    expert_oracle_hit_ratio: float = 0.0
    """Gauge: hit rate so far of the best fixed set of as many experts, known only afterwards."""
    expert_layer_lookups: Mapping[str, int] = field(default_factory=dict)
    """Counter by layer; likewise hits."""
    expert_layer_hits: Mapping[str, int] = field(default_factory=dict)
    expert_layer_resident: Mapping[str, int] = field(default_factory=dict)
    """Gauge by layer: experts in slots."""
    expert_phase_lookups: Mapping[str, int] = field(default_factory=dict)
    """Counter by phase of the step, `prefill` or `decode`, where that is known; likewise hits."""
    expert_phase_hits: Mapping[str, int] = field(default_factory=dict)
    expert_distinct: Mapping[str, float] = field(default_factory=dict)
    """Histogram by `phase/bound`: experts that one step needed of one layer; on a GPU the mean of a few steps."""
    expert_load_s: Mapping[str, float] = field(default_factory=dict)
    """Histogram by `path/bound`: seconds that a step waited for one absent expert."""
    rss_bytes: int = 0
    page_cache_bytes: int = 0
    kv_bytes_total: int = 0
    """Bytes of all KV pools."""
    failure: str = ""
    """Why the worker stopped by itself; empty while it is sound."""

    def as_dict(self) -> dict[str, object]:
        """Flat mapping for JSON and metrics: spaces become `<space>_total` and `<space>_free`."""
        flat: dict[str, object] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, SpaceStats):
                flat[f"{item.name}_total"], flat[f"{item.name}_free"] = value.total, value.free
            elif isinstance(value, Mapping):
                flat[item.name] = dict(value)
            else:
                flat[item.name] = value.value if isinstance(value, enum.Enum) else value
        return flat
