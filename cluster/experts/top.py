"""`dsv4 experts top`: which part of the experts each worker holds and hits, layer by layer, from the router's metrics.

Owns: reading and drawing. Does not own: series names (`cluster/metrics.py`). Rates are of the time between two
readings; the first one shows those since the workers started.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from rich.table import Table

from cluster.http_client import RouterClient
from cluster.metrics import parse
from cluster.status import bytes_text

PREFIX = "dsv4_expert_"


@dataclass(slots=True)
class WorkerExperts:
    """One worker's expert series: name without prefix -> label value (empty without one) -> value."""

    name: str
    role: str
    series: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))

    def value(self, name: str, label: str = "") -> float:
        """One sample; 0 when it is absent."""
        return self.series.get(name, {}).get(label, 0.0)

    @property
    def num_layers(self) -> int:
        """Layers that are told apart; 0 where all experts are resident."""
        return len(self.series.get("layer_lookups_total", {}))

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {"name": self.name, "role": self.role, **{key: dict(values) for key, values in self.series.items()}}


def read_experts(client: RouterClient) -> list[WorkerExperts]:
    """Every worker's series. Raises `ApiFailure` when the router does not answer."""
    return experts_of(client.get_text("/metrics"))


def experts_of(text: str) -> list[WorkerExperts]:
    """Workers on a metrics page, by name."""
    found: dict[str, WorkerExperts] = {}
    for sample in parse(text):
        worker = sample.labels.get("worker")
        if worker is None or not sample.name.startswith(PREFIX):
            continue
        row = found.setdefault(worker, WorkerExperts(worker, sample.labels.get("role", "")))
        label = "/".join(value for key, value in sample.labels.items() if key not in ("worker", "role"))
        row.series[sample.name.removeprefix(PREFIX)][label] = sample.value
    return [found[name] for name in sorted(found)]


def tables(now: list[WorkerExperts], before: list[WorkerExperts] | None = None) -> list[Table]:
    """One line a worker, then one table a worker with a line a layer."""
    earlier = {worker.name: worker for worker in before or ()}
    limited = [worker for worker in now if worker.num_layers]
    return [_workers(now, earlier), *(_layers(worker, earlier.get(worker.name)) for worker in limited)]


def _workers(now: list[WorkerExperts], earlier: dict[str, WorkerExperts]) -> Table:
    made = Table(title="experts in fast memory", title_justify="left")
    made.add_column("worker")
    heads = (
        "slots used",
        "hit",
        "in decode",
        "best fixed set",
        "cold",
        "capacity",
        "prefill",
        "moved in",
        "unused",
        "stall",
        "one load",
        "disk",
        "host",
        "errors",
    )
    for head in heads:
        made.add_column(head, justify="right")
    made.add_column("fast memory, of budget", justify="right")
    for worker in now:
        if not worker.num_layers:
            made.add_row(worker.name, "all resident")
            continue
        old = earlier.get(worker.name)
        slots = worker.series["slots"]
        used, measured = slots.get("used", 0.0), worker.value("budget_bytes", "measured")
        made.add_row(
            worker.name,
            f"{used:.0f} of {sum(slots.values()):.0f}",
            ratio(worker, old, "hits_total", "lookups_total"),
            ratio(worker, old, "phase_hits_total", "phase_lookups_total", "decode"),
            f"{worker.value('oracle_hit_ratio'):.1%}",
            f"{_since(worker, old, 'misses_total', 'cold'):,.0f}",
            f"{_since(worker, old, 'misses_total', 'capacity'):,.0f}",
            f"{_since(worker, old, 'misses_total', 'prefill'):,.0f}",
            f"{_since(worker, old, 'moves_total'):,.0f}",
            f"{_since(worker, old, 'prefetch_total', 'wasted'):,.0f}",
            _stall(worker, old),
            _load(worker, old),
            bytes_text(_since(worker, old, "bytes_total", "disk")),
            bytes_text(_since(worker, old, "bytes_total", "host")),
            f"{worker.value('io_errors_total'):.0f}",
            f"{bytes_text(measured)} of {bytes_text(worker.value('budget_bytes', 'requested'))}",
        )
    return made


def _layers(worker: WorkerExperts, old: WorkerExperts | None) -> Table:
    made = Table(title=worker.name, title_justify="left")
    for head in ("layer", "resident", "needed", "hit", ""):
        made.add_column(head, justify="left" if not head else "right")
    for layer in sorted(worker.series["layer_lookups_total"], key=int):
        needed = _since(worker, old, "layer_lookups_total", layer)
        hits = _since(worker, old, "layer_hits_total", layer)
        bar = "█" * round(20 * hits / needed) if needed else ""
        rate = f"{hits / needed:.1%}" if needed else ""
        made.add_row(layer, f"{worker.value('layer_resident', layer):.0f}", f"{needed:,.0f}", rate, bar)
    return made


def ratio(worker: WorkerExperts, old: WorkerExperts | None, part: str, whole: str, label: str = "") -> str:
    """Percentage of two counters since `old`; empty while nothing happened."""
    total = _since(worker, old, whole, label)
    return f"{_since(worker, old, part, label) / total:.1%}" if total else ""


def _stall(worker: WorkerExperts, old: WorkerExperts | None) -> str:
    """Part of the steps' time that absent experts took."""
    steps = sum(_since(worker, old, "step_seconds_total", miss) for miss in ("0", "1+"))
    return f"{_since(worker, old, 'stall_seconds_total') / steps:.0%}" if steps else ""


def _load(worker: WorkerExperts, old: WorkerExperts | None) -> str:
    """Mean time that a step waited for one absent expert; empty where no host thread waits."""
    count, seconds = (
        sum(_since(worker, old, f"load_seconds_{what}", path) for path in ("host", "disk")) for what in ("count", "sum")
    )
    return f"{1e3 * seconds / count:.2f} ms" if count else ""


def _since(worker: WorkerExperts, old: WorkerExperts | None, name: str, label: str = "") -> float:
    """A counter's growth; one that went back belongs to a worker that was started again."""
    value = worker.value(name, label)
    before = 0.0 if old is None else old.value(name, label)
    return value - before if value >= before else value
