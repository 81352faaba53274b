"""Worker statistics as Prometheus text, and back: what `/metrics` adds for workers and what `dsv4 status` reads.

Owns: the metric names, types and labels of workers. Does not own: the router's own metrics, the statistics themselves
(`workers/messages.py`). Every field of `WorkerStats` that is a number appears here or in `NOT_EXPORTED`, which a test
checks, so that a new counter cannot be forgotten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workers.messages import SpaceStats, WorkerRole, WorkerStats


@dataclass(frozen=True, slots=True)
class Metric:
    """One exported series: `stats_field` of `WorkerStats` under `name`."""

    name: str
    stats_field: str
    help: str

    @property
    def kind(self) -> str:
        return kind_of(self.name)


def kind_of(name: str) -> str:
    """Prometheus type of a series: its name tells."""
    return "counter" if name.endswith("_total") else "gauge"


METRICS = (
    Metric("dsv4_worker_ready", "ready", "1 while the worker serves, 0 while it loads, drains or has stopped"),
    Metric("dsv4_worker_uptime_seconds", "uptime_s", "Seconds since the worker started"),
    Metric("dsv4_worker_rss_bytes", "rss_bytes", "Resident memory of the worker process"),
    Metric(
        "dsv4_worker_page_cache_bytes", "page_cache_bytes", "Files in memory, of the worker's control group or host"
    ),
    Metric("dsv4_max_context_tokens", "max_context", "Most prompt and output tokens of one request"),
    Metric("dsv4_max_running_requests", "max_running", "Largest batch"),
    Metric("dsv4_running_requests", "running", "Requests being computed"),
    Metric("dsv4_waiting_requests", "waiting", "Admitted requests that do not compute yet"),
    Metric("dsv4_retracted_requests", "parked", "Retracted requests, held outside the pools"),
    Metric("dsv4_transferring_requests", "draining", "Prefilled requests whose KV is on its way to decode"),
    Metric("dsv4_reserved_pages", "reserved_full_pages", "Pages promised to admitted requests and not allocated yet"),
    Metric("dsv4_leaked_pages", "leaked_pages", "Pages and slots that no live request owns; 0 unless there is a bug"),
    Metric("dsv4_requests_admitted_total", "requests_admitted", "Requests taken in"),
    Metric("dsv4_requests_finished_total", "requests_finished", "Requests ended by stop or length, or handed over"),
    Metric("dsv4_requests_failed_total", "requests_failed", "Requests ended by an error"),
    Metric("dsv4_requests_aborted_total", "requests_aborted", "Requests whose client went away"),
    Metric("dsv4_requests_refused_total", "requests_refused", "Requests refused at admission"),
    Metric("dsv4_tokens_generated_total", "tokens_generated", "Output tokens emitted"),
    Metric("dsv4_prefill_tokens_computed_total", "prefill_tokens", "Prompt tokens whose KV this worker computed"),
    Metric("dsv4_prefill_tokens_cached_total", "cached_tokens", "Prompt tokens served from a prefix cache"),
    Metric("dsv4_steps_total", "steps", "Engine steps"),
    Metric("dsv4_step_seconds_total", "step_s_total", "Seconds inside engine steps"),
    Metric("dsv4_step_mean_milliseconds", "step_ms_mean", "Mean duration of the latest engine steps"),
    Metric("dsv4_kv_bytes_sent_total", "kv_bytes_sent", "KV payload bytes pushed to decode workers"),
    Metric("dsv4_kv_bytes_received_total", "kv_bytes_received", "KV payload bytes received from prefill workers"),
    Metric("dsv4_kv_segments_sent_total", "kv_segments_sent", "KV segments pushed"),
    Metric("dsv4_kv_segments_received_total", "kv_segments_received", "KV segments received"),
    Metric("dsv4_kv_segments_dropped_total", "kv_segments_dropped", "Late, duplicate or foreign segments dropped"),
    Metric("dsv4_kv_checksum_failures_total", "kv_checksum_failures", "KV segments whose checksum did not match"),
    Metric("dsv4_kv_images_committed_total", "kv_images_committed", "Requests whose whole KV arrived and was verified"),
    Metric("dsv4_kv_send_seconds_total", "kv_send_s_total", "Seconds with KV on the wire"),
    Metric("dsv4_kv_send_hidden_seconds_total", "kv_hidden_s_total", "Of those, seconds behind running computation"),
    Metric("dsv4_leases_expired_total", "leases_expired", "Grants whose KV never arrived"),
    Metric("dsv4_parked_bytes", "parked_bytes", "KV payload bytes of parked requests, in any tier"),
    Metric("dsv4_retract_repeats_total", "retract_repeats", "Retracts of requests that had been retracted before"),
    Metric(
        "dsv4_retract_checksum_failures_total",
        "retract_checksum_failures",
        "Parked images that came back damaged; their requests were recomputed",
    ),
    Metric("dsv4_resumes_total", "resumes", "Retracted requests that joined the batch again"),
    Metric("dsv4_resume_wait_seconds_total", "resume_wait_s_total", "Seconds that resumes waited for room or bytes"),
    Metric("dsv4_expert_lookups_total", "expert_lookups", "Unique (layer, expert) pairs that steps needed"),
    Metric("dsv4_expert_hits_total", "expert_hits", "Of those, in fast memory before their step"),
    Metric("dsv4_expert_evictions_total", "expert_evictions", "Experts that gave up their slot"),
    Metric("dsv4_expert_moves_total", "expert_moves", "Experts brought into a slot between steps"),
    Metric("dsv4_expert_loads_total", "expert_loads", "Reads of absent experts inside steps"),
    Metric("dsv4_expert_stall_seconds_total", "expert_stall_s_total", "Seconds inside steps spent on absent experts"),
    Metric("dsv4_expert_read_seconds_total", "expert_read_s_total", "Seconds inside reads of experts"),
    Metric("dsv4_expert_io_errors_total", "expert_io_errors", "Reads of experts that failed or brought wrong bytes"),
    Metric("dsv4_expert_heat_share", "expert_heat_share", "Part of all recent uses that resident experts have"),
    Metric("dsv4_expert_oracle_hit_ratio", "expert_oracle_hit_ratio", "Hit rate of the best fixed set of that size"),
    Metric("dsv4_event_streams", "routers", "Routers connected for token events"),
    Metric("dsv4_kv_pool_bytes", "kv_bytes_total", "Bytes of all KV pools"),
)
"""Scalar series; the three occupancies are exported by `SPACES`."""

LABELLED = (
    ("dsv4_retracts_total", "retracts", ("cause",), "Requests taken out of the batch, by what was short or asked"),
    (
        "dsv4_retract_bytes_total",
        "retract_bytes",
        ("direction", "tier"),
        "KV bytes moved by retract and resume",
    ),
    ("dsv4_retract_milliseconds_total", "retract_ms", ("direction", "tier"), "Milliseconds that those bytes took"),
    ("dsv4_retract_fallbacks_total", "retract_fallbacks", ("what",), "What was done instead of the first choice"),
    ("dsv4_expert_misses_total", "expert_misses", ("cause",), "Needed experts that were not in fast memory"),
    ("dsv4_expert_prefetch_total", "expert_prefetch", ("result",), "Experts brought in, by whether a step used them"),
    ("dsv4_expert_bytes_total", "expert_bytes", ("path",), "Bytes of experts read, by where from"),
    ("dsv4_expert_step_seconds_total", "expert_step_s", ("miss",), "Seconds of steps, by misses in them"),
    ("dsv4_expert_slots", "expert_slots", ("state",), "Places of experts in fast memory"),
    ("dsv4_expert_budget_bytes", "expert_budget_bytes", ("kind",), "Fast memory for experts"),
    ("dsv4_expert_host_bytes", "expert_host_bytes", ("holder",), "Host memory for absent experts"),
    ("dsv4_expert_layer_lookups_total", "expert_layer_lookups", ("layer",), "Experts that steps needed of a layer"),
    ("dsv4_expert_layer_hits_total", "expert_layer_hits", ("layer",), "Of those, in fast memory before their step"),
    ("dsv4_expert_layer_resident", "expert_layer_resident", ("layer",), "Experts of a layer in fast memory"),
    ("dsv4_expert_phase_lookups_total", "expert_phase_lookups", ("phase",), "Experts that steps of a phase needed"),
    ("dsv4_expert_phase_hits_total", "expert_phase_hits", ("phase",), "Of those, in fast memory before their step"),
)
"""Mappings of `WorkerStats`: series name, field, labels that a key holds (joined by `/`), help."""

HISTOGRAMS = (
    (
        "dsv4_expert_distinct_per_layer",
        "expert_distinct",
        "phase",
        "Experts that a step needed of one layer (GPU: a mean of some)",
    ),
    ("dsv4_expert_load_seconds", "expert_load_s", "path", "Seconds that a step waited for one absent expert"),
)
"""Mappings of `WorkerStats` from `label/bound` to how many lay up to it: series name, field, label, help."""

SPACES = {"full": "full_pages", "window": "window_pages", "slot": "slots"}
"""Value of the `space` label of `dsv4_kv_units{space,state}` -> field of `WorkerStats`."""

NOT_EXPORTED = frozenset({"step_ms_last"})
"""Fields that another series already tells better."""


@dataclass(frozen=True, slots=True)
class Member:
    """One worker of the deployment, whether it answers or not."""

    name: str
    role: WorkerRole
    num_restarts: int


_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)$")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"')


def render(workers: Iterable[WorkerStats], members: Iterable[Member] = ()) -> str:
    """Prometheus text, one HELP and TYPE per series, labelled by role and worker name.

    `workers` are those that answered; `members` all of the deployment, so that one that is down still shows.
    """
    workers = list(workers)
    lines: list[str] = []
    for metric in METRICS:
        lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}"]
        for stats in workers:
            value = getattr(stats, metric.stats_field)
            lines.append(f"{metric.name}{_labels(stats)} {float(value):.17g}")
    for name, field, labels, text in LABELLED:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind_of(name)}"]
        for stats in workers:
            for key, value in sorted(getattr(stats, field).items()):
                extra = dict(zip(labels, key.split("/"), strict=True))
                lines.append(f"{name}{_labels(stats, **extra)} {float(value):.17g}")
    for name, field, label, text in HISTOGRAMS:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        for stats in workers:
            lines += _histogram(stats, name, getattr(stats, field), label)
    lines += [
        "# HELP dsv4_kv_units KV pages and request slots by space and state",
        "# TYPE dsv4_kv_units gauge",
    ]
    for stats in workers:
        for space, name in SPACES.items():
            occupancy: SpaceStats = getattr(stats, name)
            for state, value in (("free", occupancy.free), ("used", occupancy.used)):
                lines.append(f"dsv4_kv_units{_labels(stats, space=space, state=state)} {value}")
    lines += ["# HELP dsv4_worker_info Identity of each worker", "# TYPE dsv4_worker_info gauge"]
    for stats in workers:
        info = _labels(
            stats,
            address=stats.address,
            incarnation=stats.incarnation,
            model=stats.model_name,
            fingerprint=stats.fingerprint,
            failure=stats.failure,
        )
        lines.append(f"dsv4_worker_info{info} 1")
    members = list(members)
    answered = {stats.name for stats in workers}
    if members:
        lines += [
            "# HELP dsv4_worker_restarts_total Restarts of each worker",
            "# TYPE dsv4_worker_restarts_total counter",
        ]
        lines += [f"dsv4_worker_restarts_total{_labels(member)} {member.num_restarts}" for member in members]
        lines += ["# HELP dsv4_worker_up 1 when the worker answered just now", "# TYPE dsv4_worker_up gauge"]
        lines += [f"dsv4_worker_up{_labels(member)} {int(member.name in answered)}" for member in members]
    return "\n".join(lines) + "\n"


def _histogram(stats: WorkerStats, name: str, values: Mapping[str, float], label: str) -> list[str]:
    """Lines of one worker's histogram; buckets in the order of `values`, which ascends."""
    lines = []
    for key, value in values.items():
        which, bound = key.split("/")
        labels = {label: which}
        if bound == "sum":
            lines.append(f"{name}_sum{_labels(stats, **labels)} {value:.17g}")
        else:
            lines.append(f"{name}_bucket{_labels(stats, **labels, le=bound)} {value:.17g}")
        if bound == "+Inf":
            lines.append(f"{name}_count{_labels(stats, **labels)} {value:.17g}")
    return lines


def _labels(worker: WorkerStats | Member, **extra: str) -> str:
    pairs = {"role": worker.role.value, "worker": worker.name, **extra}
    return "{" + ",".join(f'{key}="{_escape(value)}"' for key, value in pairs.items()) + "}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@dataclass(frozen=True, slots=True)
class Sample:
    """One line of Prometheus text."""

    name: str
    labels: dict[str, str]
    value: float


def parse(text: str) -> list[Sample]:
    """Samples of a Prometheus text page; lines that are not samples are skipped."""
    found = []
    for line in text.splitlines():
        if line.startswith("#") or (match := _SAMPLE.match(line)) is None:
            continue
        labels = {
            key: value.replace("\\n", "\n").replace('\\"', '"').replace("\\\\", "\\")
            for key, value in _LABEL.findall(match[2] or "")
        }
        found.append(Sample(match[1], labels, float(match[3])))
    return found


def worker_rows(text: str) -> dict[str, dict[str, object]]:
    """Worker name -> its values by `WorkerStats` field, as read from a `/metrics` page."""
    by_name = {metric.name: metric.stats_field for metric in METRICS}
    rows: dict[str, dict[str, object]] = {}
    for sample in parse(text):
        worker = sample.labels.get("worker")
        if worker is None:
            continue
        row = rows.setdefault(worker, {"name": worker})
        if sample.name in by_name:
            row["role"] = sample.labels.get("role", "")
            row[by_name[sample.name]] = int(sample.value) if sample.value == int(sample.value) else sample.value
        elif sample.name == "dsv4_kv_units":
            field = SPACES.get(sample.labels.get("space", ""), "")
            row[f"{field}_{sample.labels.get('state')}"] = int(sample.value)
        elif sample.name == "dsv4_worker_info":
            row |= {key: sample.labels.get(key, "") for key in ("address", "incarnation", "failure")}
        elif sample.name == "dsv4_worker_restarts_total":
            row |= {"role": sample.labels.get("role", ""), "restarts": int(sample.value)}
        elif sample.name == "dsv4_worker_up":
            row["up"] = bool(sample.value)
    return rows
