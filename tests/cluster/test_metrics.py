"""Worker statistics survive the way to Prometheus text and back into the status table."""

from __future__ import annotations

import dataclasses

from cluster.metrics import HISTOGRAMS, LABELLED, METRICS, NOT_EXPORTED, SPACES, Member, parse, render, worker_rows
from workers.experts.histogram import Histogram
from workers.messages import SpaceStats, WorkerRole, WorkerStats


def stats(role: WorkerRole, **values: object) -> WorkerStats:
    base = WorkerStats(
        name=f"{role.value}-0", role=role, incarnation="i1", address="127.0.0.1:1", uptime_s=2.5, ready=True
    )
    return dataclasses.replace(base, **values)


def test_every_number_of_the_statistics_is_exported() -> None:
    numbers = {
        item.name
        for item in dataclasses.fields(WorkerStats)
        if item.type in ("int", "float", "bool") and item.name not in NOT_EXPORTED
    }
    assert {metric.stats_field for metric in METRICS} == numbers
    spaces = {item.name for item in dataclasses.fields(WorkerStats) if item.type == "SpaceStats"}
    assert set(SPACES.values()) == spaces


def test_every_mapping_of_the_statistics_is_exported_with_labels() -> None:
    mappings = {item.name for item in dataclasses.fields(WorkerStats) if str(item.type).startswith("Mapping")}
    assert {field for _, field, _, _ in (*LABELLED, *HISTOGRAMS)} == mappings
    text = render([stats(WorkerRole.DECODE, retracts={"forced": 3}, retract_bytes={"out/disk": 10, "in/pinned": 7})])
    assert 'dsv4_retracts_total{role="decode",worker="decode-0",cause="forced"} 3\n' in text
    assert 'dsv4_retract_bytes_total{role="decode",worker="decode-0",direction="out",tier="disk"} 10\n' in text


def test_histograms_are_cumulative_and_read_back() -> None:
    loads = Histogram((0.001, 0.5))
    loads.add([0.001, 0.25, 0.25, 2.0])
    text = render([stats(WorkerRole.DECODE, expert_load_s=loads.fields("disk"))])
    assert "# TYPE dsv4_expert_load_seconds histogram\n" in text
    found = [
        (sample.name.removeprefix("dsv4_expert_load_seconds_"), sample.labels.get("le"), sample.value)
        for sample in parse(text)
        if sample.labels.get("path") == "disk"
    ]
    assert found == [
        ("bucket", "0.001", 1.0),
        ("bucket", "0.5", 3.0),
        ("bucket", "+Inf", 4.0),
        ("count", None, 4.0),
        ("sum", None, 2.501),
    ]


def test_metric_names_are_unique_and_have_help() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.help and not metric.help.endswith(".") for metric in METRICS)


def test_roles_are_told_apart() -> None:
    text = render([stats(WorkerRole.PREFILL, prefill_tokens=7), stats(WorkerRole.DECODE, kv_bytes_received=99)])
    assert 'dsv4_prefill_tokens_computed_total{role="prefill",worker="prefill-0"} 7\n' in text
    assert 'dsv4_prefill_tokens_computed_total{role="decode",worker="decode-0"} 0\n' in text
    assert 'dsv4_kv_bytes_received_total{role="decode",worker="decode-0"} 99\n' in text


def test_type_lines_follow_the_name() -> None:
    text = render([stats(WorkerRole.DECODE)])
    assert "# TYPE dsv4_kv_bytes_received_total counter" in text
    assert "# TYPE dsv4_leaked_pages gauge" in text
    assert text.count("# TYPE dsv4_leaked_pages") == 1
    assert text.endswith("\n")


def test_status_rows_round_trip() -> None:
    decode = stats(
        WorkerRole.DECODE,
        full_pages=SpaceStats(64, 60),
        leaked_pages=0,
        running=3,
        step_ms_mean=1.25,
        failure='a "b"\nc',
    )
    rows = worker_rows(render([decode], [Member("decode-0", WorkerRole.DECODE, 2)]))
    row = rows["decode-0"]
    assert (row["role"], row["running"], row["leaked_pages"], row["step_ms_mean"]) == ("decode", 3, 0, 1.25)
    assert (row["full_pages_free"], row["full_pages_used"]) == (60, 4)
    assert (row["failure"], row["incarnation"], row["restarts"]) == ('a "b"\nc', "i1", 2)


def test_a_worker_that_does_not_answer_still_shows() -> None:
    rows = worker_rows(render([], [Member("decode-0", WorkerRole.DECODE, 1)]))
    assert rows == {"decode-0": {"name": "decode-0", "role": "decode", "restarts": 1, "up": False}}


def test_foreign_lines_are_skipped() -> None:
    samples = parse('# HELP x y\nx 1\nrouter_requests{code="200"} 5 \nnonsense\n')
    assert [(sample.name, sample.labels, sample.value) for sample in samples][:1] == [("x", {}, 1.0)]
