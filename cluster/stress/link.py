"""The operator's side of `/admin/retract`, and the state of the workers between runs.

Owns: setting and taking back controls, one report of all decode workers, waiting until nothing runs and counting what
leaked. One instance holds one connection and belongs to one thread.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.http_client import ApiFailure, RouterClient
from cluster.metrics import worker_rows
from workers.messages import RetractControl, RetractReport

PATH = "/admin/retract"

IDLE_S = 30.0
"""Longest wait for the workers to end what a run left behind."""

POLL_S = 0.05

BUSY_FIELDS = ("running", "waiting", "parked", "draining")
"""Gauges that are 0 when a worker holds no request."""


class NotForced(ClusterError):
    """The deployment does not let anyone force retracts."""


@dataclass(frozen=True, slots=True)
class Rest:
    """What the workers hold once nothing should run any more."""

    leaked: int
    """Pages and slots without an owner."""
    problem: str = ""
    """What still runs, or which worker failed; empty when all is quiet."""


class RetractLink:
    """Forces retracts through one router."""

    def __init__(self, client: RouterClient) -> None:
        self._client = client

    def require(self) -> None:
        """Raises `NotForced` with what to do when the deployment has no admin path."""
        try:
            self._client.get_json(PATH)
        except ApiFailure as exc:
            if exc.status == 404:
                advice = "start it with `admin: {allow_retract_control: true}`"
                raise NotForced(f"{self._client.address} does not serve {PATH}; {advice}") from exc
            raise

    def force(self, control: RetractControl) -> None:
        """Every decode worker does `control` from now on."""
        self._client.post_json(PATH, control.as_dict())

    def clear(self) -> None:
        """Nothing is forced any more."""
        self._client.delete(PATH)

    def report(self, *, reset: bool = False) -> RetractReport:
        """All decode workers together since the last reset."""
        found = self._client.get_json(f"{PATH}?reset=true" if reset else PATH)
        return merged(RetractReport.from_dict(flat) for flat in found["workers"].values())

    def rest(self, limit_s: float = IDLE_S) -> Rest:
        """Waits until no worker holds a request, at most `limit_s`."""
        deadline = time.monotonic() + limit_s
        while True:
            workers = list(worker_rows(self._client.get_text("/metrics")).values())
            busy = [text for worker in workers for text in _busy(worker)]
            if not busy or time.monotonic() > deadline:
                break
            time.sleep(POLL_S)
        report = self.report()
        leaked = report.leaked_pages + sum(int(str(worker.get("leaked_pages", 0))) for worker in workers)
        failed = [f"{worker['name']}: {worker['failure']}" for worker in workers if worker.get("failure")]
        parked = [f"{report.parked_requests} still parked"] if report.parked_requests else []
        return Rest(leaked, "; ".join([*failed, *busy, *parked]))


def _busy(worker: Mapping[str, object]) -> list[str]:
    gauges = {field: int(str(worker.get(field, 0))) for field in BUSY_FIELDS}
    return [f"{worker['name']} still has {count} {field}" for field, count in gauges.items() if count]


def merged(reports: Iterable[RetractReport]) -> RetractReport:
    """Sums; of percentiles the worst, as the ones of the union cannot be had from them."""
    items = list(reports)
    if len(items) == 1:
        return items[0]
    return RetractReport(
        events=sum(item.events for item in items),
        resumes=sum(item.resumes for item in items),
        bytes_out=sum(item.bytes_out for item in items),
        bytes_in=sum(item.bytes_in for item in items),
        by_cause=_summed([item.by_cause for item in items]),
        by_tier=_summed([item.by_tier for item in items]),
        phase_ms=_worst([item.phase_ms for item in items]),
        parked_requests=sum(item.parked_requests for item in items),
        parked_bytes=sum(item.parked_bytes for item in items),
        checksum_failures=sum(item.checksum_failures for item in items),
        fallbacks=_summed([item.fallbacks for item in items]),
        repeat_max=max((item.repeat_max for item in items), default=0),
        added_step_ms_p50=max((item.added_step_ms_p50 for item in items), default=0.0),
        added_step_ms_p99=max((item.added_step_ms_p99 for item in items), default=0.0),
        leaked_pages=sum(item.leaked_pages for item in items),
        contexts=tuple(context for item in items for context in item.contexts),
    )


def _summed(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = sorted({name for count in counts for name in count})
    return {name: sum(count.get(name, 0) for count in counts) for name in names}


def _worst(phases: Sequence[Mapping[str, tuple[int, float, float]]]) -> dict[str, tuple[int, float, float]]:
    found: dict[str, tuple[int, float, float]] = {}
    for phase in phases:
        for name, (count, p50, p99) in phase.items():
            old = found.get(name, (0, 0.0, 0.0))
            found[name] = (old[0] + count, max(old[1], p50), max(old[2], p99))
    return found
