"""Runs the tasks of `dsv4 eval` against one address, with progress, and draws the result.

Owns: what the user sees while it runs, and the table. Does not own: asking and scoring (`cluster/evaluation.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cluster.evaluation import Outcome, TaskReport, ask_all, held_out_samples, report_of
from cluster.http_client import RouterClient
from cluster.tasks.sample import Task

SCORED = (Task.ARITHMETIC, Task.RECALL)


def tasks_named(name: str) -> tuple[Task, ...]:
    """`arithmetic`, `recall` or `all`. Raises `ValueError` naming the choices."""
    if name == "all":
        return SCORED
    for task in SCORED:
        if task.value == name:
            return (task,)
    raise ValueError(f"found {name!r}, expected one of {', '.join(task.value for task in SCORED)}, all")


def run_tasks(
    url: str,
    api_key: str | None,
    tasks: Sequence[Task],
    count: int,
    context_tokens: int | None,
    concurrency: int,
    seed: int,
    show_wrong: int,
    console: Console,
) -> list[TaskReport]:
    """One report per task. Raises `ApiFailure` when the address does not answer at all."""
    with RouterClient(url, api_key) as client:
        model = client.model()
    reports = []
    for task in tasks:
        samples = held_out_samples(task, count, seed, context_tokens)
        with _progress(console) as bar:
            row = bar.add_task(task.value, total=len(samples), score="")
            seen: list[Outcome] = []

            def advance(outcome: Outcome, seen: list[Outcome] = seen, bar: Progress = bar, row: object = row) -> None:
                seen.append(outcome)
                right = sum(item.correct for item in seen)
                bar.update(row, advance=1, score=f"{right / len(seen):.1%} right")  # type: ignore[arg-type]

            outcomes, wall_s = ask_all(samples, model, lambda: RouterClient(url, api_key), concurrency, advance)
        _print_wrong([outcome for outcome in outcomes if not outcome.correct][:show_wrong], console)
        reports.append(report_of(task, context_tokens, outcomes, wall_s))
    return reports


def report_table(reports: Sequence[TaskReport]) -> Table:
    """One column per task."""
    table = Table("")
    for report in reports:
        name = f"{report.task}, {report.context_tokens} tokens" if report.context_tokens else report.task
        table.add_column(name, justify="right")
    for label, cell in _ROWS:
        table.add_row(label, *(cell(report) for report in reports))
    return table


_ROWS: tuple[tuple[str, Callable[[TaskReport], str]], ...] = (
    ("right", lambda report: f"{report.correct} of {report.samples}"),
    ("score", lambda report: f"{report.score:.1%}"),
    ("errors", lambda report: str(report.errors)),
    ("prompt tokens/s", lambda report: f"{report.prompt_tokens_per_s:.0f}"),
    ("generated tokens/s", lambda report: f"{report.completion_tokens_per_s:.0f}"),
    ("first token, median", lambda report: f"{report.first_token_p50_s * 1e3:.0f} ms"),
    ("first token, 95 %", lambda report: f"{report.first_token_p95_s * 1e3:.0f} ms"),
    ("time", lambda report: f"{report.wall_s:.0f} s"),
)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[score]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _print_wrong(outcomes: Sequence[Outcome], console: Console) -> None:
    for outcome in outcomes:
        question = outcome.sample.turns[-1].user
        console.print(f"[bold]question[/bold] {question[-300:]}", markup=True)
        console.print(f"  expected {outcome.sample.answer}", markup=False)
        if outcome.answer is None:
            console.print(f"  failed: {outcome.error}", markup=False)
        else:
            console.print(f"  reasoning {outcome.answer.reasoning!r}", markup=False)
            console.print(f"  answered {outcome.answer.content!r}", markup=False)
