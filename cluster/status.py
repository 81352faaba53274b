"""`dsv4 status`: what a router's `/metrics` and `/ready` say, as tables or JSON.

Owns: reading and drawing. Does not own: the metric names (`cluster/metrics.py`). Works on any router address: nothing
here needs Ray or the machine that the workers run on.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from cluster.http_client import ApiFailure, RouterClient
from cluster.metrics import worker_rows


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """One deployment at one moment."""

    url: str
    model: str
    ready: bool
    workers: list[dict[str, object]]
    """Values by `WorkerStats` field; occupancies as `<space>_free` and `<space>_used`."""

    @property
    def leaked_pages(self) -> int:
        """Pages and slots that no request owns, over all workers."""
        return sum(int(str(worker.get("leaked_pages", 0))) for worker in self.workers)

    def as_dict(self) -> dict[str, object]:
        return {
            "url": self.url,
            "model": self.model,
            "ready": self.ready,
            "leaked_pages": self.leaked_pages,
            "workers": self.workers,
        }


def read_status(client: RouterClient) -> ClusterStatus:
    """Asks the router. Raises `ApiFailure` when it does not answer."""
    text = client.get_text("/metrics")
    try:
        client.get_text("/ready")
        ready = True
    except ApiFailure as exc:
        if exc.status != 503:
            raise
        ready = False
    rows = worker_rows(text)
    return ClusterStatus(client.address, client.model(), ready, [rows[name] for name in sorted(rows, reverse=True)])


def status_tables(found: ClusterStatus) -> list[Table]:
    """Load and memory of each worker, then its counters."""
    state = "ready" if found.ready else "not ready"
    load = Table(
        "worker", "state", "running", "waiting", "retracted", "pages", "windows", "slots", "leaked", "rss", "address",
        title=f"{found.model} at {found.url}/v1: {state}", title_justify="left",
    )  # fmt: skip
    totals = Table(
        "worker", "finished", "failed", "aborted", "refused", "prefilled", "generated", "KV sent", "KV received",
        "dropped", "step", "restarts",
    )  # fmt: skip
    for row in found.workers:
        load.add_row(
            str(row["name"]),
            _state(row),
            f"{row.get('running', 0)}/{row.get('max_running', 0)}",
            *(str(row.get(key, 0)) for key in ("waiting", "parked")),
            *(_occupancy(row, space) for space in ("full_pages", "window_pages", "slots")),
            str(row.get("leaked_pages", 0)),
            bytes_text(row.get("rss_bytes", 0)),
            str(row.get("address", "")),
        )
        totals.add_row(
            str(row["name"]),
            *(str(row.get(f"requests_{end}", 0)) for end in ("finished", "failed", "aborted", "refused")),
            *(str(row.get(key, 0)) for key in ("prefill_tokens", "tokens_generated")),
            *(bytes_text(row.get(key, 0)) for key in ("kv_bytes_sent", "kv_bytes_received")),
            str(row.get("kv_segments_dropped", 0)),
            f"{float(str(row.get('step_ms_mean', 0))):.1f} ms",
            str(row.get("restarts", 0)),
        )
    return [load, totals]


def _state(row: dict[str, object]) -> str:
    if not row.get("up", True):
        return "[red]down[/red]"
    if row.get("failure"):
        return f"[red]{row['failure']}[/red]"
    return "[green]ready[/green]" if row.get("ready") else "[yellow]not ready[/yellow]"


def _occupancy(row: dict[str, object], space: str) -> str:
    used, free = int(str(row.get(f"{space}_used", 0))), int(str(row.get(f"{space}_free", 0)))
    return f"{used}/{used + free}"


def bytes_text(value: object) -> str:
    """1536 -> `1.5 KiB`."""
    size = float(str(value))
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
