"""All levels of `dsv4 bench serve` against one address, with progress on the terminal.

Owns: their order, the bar, what is written after each. Does not own: one level (`serve.py`), starting a deployment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.bench.serve import CannotMeasure, Load, Prompts, measure_level, warm_up
from cluster.bench.serve_results import Level, Machine, Served, ServeResults
from cluster.http_client import RouterClient


@dataclass(frozen=True, slots=True)
class ServePlan:
    """What is to be measured."""

    concurrencies: tuple[int, ...]
    input_tokens: int
    output_tokens: int
    rounds: int
    gpus: int
    seed: int = 0
    json_file: Path | None = None
    limit_s: float | None = None
    """Longest time of a level."""


def run_levels(url: str, api_key: str | None, plan: ServePlan, console: Console, *, warms: bool = True) -> ServeResults:
    """Measures every level. Raises `ApiFailure`, `CannotMeasure`; what was measured before that is in the file.

    `warms`: one short round first, which does not count.
    """

    def connect() -> RouterClient:
        return RouterClient(url, api_key)

    with connect() as client:
        load = Load(client.model(), plan.input_tokens, plan.output_tokens, plan.rounds, plan.seed, plan.limit_s)
        prompts = Prompts.measured(client, load)
        setup = {"input": load.input_tokens, "output": load.output_tokens, "GPUs": plan.gpus, "rounds": load.rounds}
        results = ServeResults(load.model, setup)
        if warms:
            spent_s = warm_up(prompts, load, min(max(plan.concurrencies), 2), connect)
            console.print(f"first round (not counted) took {spent_s:.1f} s", style="dim")
        for concurrency in plan.concurrencies:
            with _bar(console, concurrency, concurrency * load.rounds) as advance:
                level = measure_level(client, prompts, load, Machine(plan.gpus), concurrency, connect, advance)
            results.levels.append(level)
            if plan.json_file is not None:
                results.write(plan.json_file)
            console.print(line_of(level), style="dim", soft_wrap=True)
            if level.errors == level.requests:
                raise CannotMeasure(f"every request of {concurrency} clients failed: {level.first_error}")
    return results


def line_of(level: Level) -> str:
    """One level in a line."""
    full = "" if level.full_output_per_s is None else f", {level.full_output_per_s:,.0f} out with all decoding"
    failed = f", {level.errors} failed ({level.first_error})" if level.errors else ""
    return (
        f"{level.concurrency} clients: {level.tokens_per_s:,.0f} tokens/s in + out{full}, first token "
        f"{level.first_token_ms[0]:,.0f} ms, per token {level.token_ms[0]:.1f} ms, {level.wall_s:.1f} s{failed}"
    )


class _bar:
    """Context manager that yields what to call with each finished request."""

    def __init__(self, console: Console, concurrency: int, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(f"{concurrency} clients", total=total)

    def __enter__(self) -> Callable[[Served], None]:
        self._progress.start()
        return lambda served: self._progress.advance(self._task)

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


def numbers_of(text: str) -> Sequence[int]:
    """`1,8,32`. Raises `ValueError`."""
    found = [int(part) for part in text.split(",") if part]
    if not found or min(found) < 1:
        raise ValueError(f"{text!r} is not a list of positive numbers")
    return found
