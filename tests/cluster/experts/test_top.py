"""`dsv4 experts top` turns a metrics page into lines a worker and a layer, with rates between readings."""

from __future__ import annotations

import io

from rich.console import Console

from cluster.experts.top import experts_of, ratio, tables
from cluster.metrics import render
from workers.messages import WorkerRole, WorkerStats


def page(lookups: int, hits: int, **values: object) -> str:
    fields: dict[str, object] = {
        "expert_lookups": lookups,
        "expert_hits": hits,
        "expert_misses": {"cold": 4, "capacity": lookups - hits - 4},
        "expert_prefetch": {"useful": 31, "wasted": 17},
        "expert_slots": {"used": 5, "free": 1},
        "expert_budget_bytes": {"requested": 4096, "effective": 3072, "measured": 2048},
        "expert_layer_lookups": {"0": lookups // 2, "1": lookups - lookups // 2},
        "expert_layer_hits": {"0": hits // 2, "1": hits - hits // 2},
        "expert_layer_resident": {"0": 3, "1": 2},
        **values,
    }
    worker = WorkerStats(
        name="decode-0",
        role=WorkerRole.DECODE,
        incarnation="i",
        address="a:1",
        uptime_s=1,
        ready=True,
        **fields,  # type: ignore[arg-type]
    )
    whole = WorkerStats(name="prefill-0", role=WorkerRole.PREFILL, incarnation="i", address="a", uptime_s=1, ready=True)
    return render([worker, whole])


def text_of(now: str, before: str | None = None) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    for table in tables(experts_of(now), None if before is None else experts_of(before)):
        console.print(table)
    return console.export_text()


def test_totals_and_layers_are_shown() -> None:
    text = text_of(page(100, 60))
    assert "5 of 6" in text and "60.0%" in text and "2.0 KiB of 4.0 KiB" in text
    assert "all resident" in text and "17" in text
    assert [line.split("│")[2].strip() for line in text.splitlines() if line.startswith(("│     0", "│     1"))]


def test_a_second_reading_shows_what_happened_between() -> None:
    now, before = experts_of(page(200, 150)), experts_of(page(100, 60))
    assert ratio(now[0], before[0], "hits_total", "lookups_total") == "90.0%"
    assert "90.0%" in text_of(page(200, 150), page(100, 60))


def test_a_restarted_worker_counts_from_its_own_start() -> None:
    now, before = experts_of(page(50, 40)), experts_of(page(100, 60))
    assert ratio(now[0], before[0], "hits_total", "lookups_total") == "80.0%"


def test_decode_and_single_loads_are_shown_where_they_are_known() -> None:
    loads = {"disk/0.1": 2, "disk/+Inf": 4, "disk/sum": 0.5, "host/0.1": 1, "host/+Inf": 1, "host/sum": 0.125}
    known = {"expert_phase_lookups": {"decode": 40, "prefill": 60}, "expert_phase_hits": {"decode": 38, "prefill": 2}}
    text = text_of(page(100, 40, expert_load_s=loads, **known))
    assert "40.0%" in text and "95.0%" in text and "125.00 ms" in text
    before = page(100, 40, expert_load_s={**loads, "disk/+Inf": 2, "disk/sum": 0.3}, **known)
    assert "100.00 ms" in text_of(page(100, 40, expert_load_s=loads, **known), before)
    assert " ms" not in text_of(page(100, 40))


def test_gauges_and_counters_have_their_types() -> None:
    text = page(10, 5)
    assert "# TYPE dsv4_expert_slots gauge" in text and "# TYPE dsv4_expert_misses_total counter" in text
    assert 'dsv4_expert_layer_hits_total{role="decode",worker="decode-0",layer="1"} 3' in text
