"""Tables and JSON of the stress runs.

Owns: what the user reads and what a results file keeps. Figures are the workers' own (`RetractReport`) except scores,
identity and wall time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from rich.table import Table

from cluster.status import bytes_text
from cluster.stress.mutations import Caught
from cluster.stress.options import StressOptions
from cluster.stress.runs import Row

SHOWN_DIFFERENCES = 20
"""Differences of one run that the JSON lists."""


def run_table(rows: Sequence[Row]) -> Table:
    """One line a run."""
    table = Table(
        "run", "time", "tokens/s", "events", "far", "out", "in", "added step p50 / p99", "score", "identical", "leaked",
        "verdict",
    )  # fmt: skip
    for row in rows:
        report = row.report
        added = f"{report.added_step_ms_p50:.2f} / {report.added_step_ms_p99:.2f} ms"
        table.add_row(
            row.name,
            f"{row.wall_s:.1f} s",
            f"{row.output_tokens / row.wall_s:.0f}" if row.wall_s else "",
            str(report.events),
            f"{row.far_events / row.known_events:.0%}" if row.known_events else "",
            bytes_text(report.bytes_out) if report.events else "",
            bytes_text(report.bytes_in) if report.events else "",
            added if report.events else "",
            "" if row.score is None else f"{row.score:.1%} ({row.right})",
            f"{row.identical} of {row.compared}" if row.compared else "",
            str(row.rest.leaked),
            "[red]failed[/red]" if row.problems else "[green]passed[/green]",
        )
    return table


def phase_table(rows: Sequence[Row]) -> Table | None:
    """Milliseconds of each phase of the runs with retracts; None without any."""
    retracted = [row for row in rows if row.report.events]
    if not retracted:
        return None
    table = Table("run", "phase", "count", "p50", "p99", "causes", "tiers", "most of one request", "fallbacks")
    for row in retracted:
        report = row.report
        counts = (_counts(report.by_cause), _counts(report.by_tier), str(report.repeat_max), _counts(report.fallbacks))
        for number, (phase, (count, p50, p99)) in enumerate(report.phase_ms.items()):
            head = row.name if number == 0 else ""
            tail = counts if number == 0 else ("", "", "", "")
            table.add_row(head, phase, str(count), f"{p50:.2f} ms", f"{p99:.2f} ms", *tail)
    return table


def mutation_table(caught: Sequence[Caught]) -> Table:
    """One line a mutation."""
    table = Table("mutation", "caught", "by", "events", "answers", "time", "verdict")
    for item in caught:
        where = "" if item.first is None else f"sample {item.first.index}, token {item.first.at}"
        by = "" if item.first is None else item.first.parting.value
        verdict = "[red]SURVIVED[/red]" if item.survived else "[green]caught[/green]"
        problem = f" [yellow]{item.problem[:80]}[/yellow]" if item.problem else ""
        table.add_row(
            item.name, where, by, str(item.events), str(item.asked), f"{item.wall_s:.1f} s", verdict + problem
        )
    return table


def problem_lines(rows: Sequence[Row]) -> list[str]:
    """Everything that failed, a line each."""
    return [f"{row.name}: {problem}" for row in rows for problem in row.problems]


def as_json(
    options: StressOptions, rows: Sequence[Row], caught: Sequence[Caught], *, passed: bool
) -> dict[str, object]:
    """All figures of the command."""
    return {
        "command": "stress retract",
        "passed": passed,
        "options": asdict(options),
        "runs": [_row_dict(row) for row in rows],
        "mutations": [item.as_dict() for item in caught],
    }


def _row_dict(row: Row) -> dict[str, object]:
    report = {key: value for key, value in row.report.as_dict().items() if key != "contexts"}
    prompts = [answer.prompt_tokens for answer in row.answers]
    return {
        "run": row.name,
        "samples": row.samples,
        "answered": len(row.answers),
        "errors": row.errors,
        "score": row.score,
        "right": row.right,
        "compared": row.compared,
        "identical": row.identical,
        "wall_s": round(row.wall_s, 3),
        "prompt_tokens": sum(prompts),
        "longest_prompt": max(prompts, default=0),
        "completion_tokens": row.output_tokens,
        "shortest_output": min((answer.completion_tokens for answer in row.answers), default=0),
        "far_events": row.far_events,
        "known_events": row.known_events,
        "leaked": row.rest.leaked,
        "problems": list(row.problems),
        "differences": [item.as_dict() for item in row.differences[:SHOWN_DIFFERENCES]],
        "report": report,
    }


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
