"""`dsv4 status`: what a router's `/metrics` and `/ready` say, as tables or JSON.

Owns: reading and drawing. Does not own: the metric names (`cluster/metrics.py`). Works on any router address: nothing
here needs Ray or the machine that the workers run on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

from cluster.http_client import ApiFailure, RouterClient
from cluster.metrics import worker_rows

Cell = Callable[[dict[str, object]], str]


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


def _count(key: str) -> Cell:
    return lambda row: str(row.get(key, 0))


def _bytes(key: str) -> Cell:
    return lambda row: bytes_text(row.get(key, 0))


def _units(space: str) -> Cell:
    return lambda row: _occupancy(row, space)


LINES: tuple[tuple[str, Cell], ...] = (
    ("state", _state),
    ("address", lambda row: str(row.get("address", ""))),
    ("running", lambda row: f"{row.get('running', 0)} of {row.get('max_running', 0)}"),
    ("waiting", _count("waiting")),
    ("retracted", _count("parked")),
    ("pages", _units("full_pages")),
    ("window pages", _units("window_pages")),
    ("request slots", _units("slots")),
    ("leaked pages", _count("leaked_pages")),
    ("step", lambda row: f"{float(str(row.get('step_ms_mean', 0))):.1f} ms"),
    ("process memory", _bytes("rss_bytes")),
    ("KV pools", _bytes("kv_bytes_total")),
    ("prompt tokens computed", _count("prefill_tokens")),
    ("tokens generated", _count("tokens_generated")),
    ("KV sent", _bytes("kv_bytes_sent")),
    ("KV received", _bytes("kv_bytes_received")),
    ("segments dropped", _count("kv_segments_dropped")),
    ("finished", _count("requests_finished")),
    ("failed", _count("requests_failed")),
    ("aborted", _count("requests_aborted")),
    ("refused", _count("requests_refused")),
    ("restarts", _count("restarts")),
)
"""Rows of the status table: label and how a worker's values become its cell."""

SECTION_ENDS = {"address", "leaked pages", "KV pools", "segments dropped"}


def status_tables(found: ClusterStatus) -> list[Table]:
    """One table with a column per worker: what it does now, then what it has done since it started."""
    state = "ready" if found.ready else "not ready"
    table = Table(title=f"{found.model} at {found.url}/v1: {state}", title_justify="left")
    table.add_column("")
    for row in found.workers:
        table.add_column(str(row["name"]), justify="right")
    for label, cell in LINES:
        table.add_row(label, *(cell(row) for row in found.workers), end_section=label in SECTION_ENDS)
    return [table]
