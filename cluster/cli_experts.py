"""`dsv4 experts`: what an expert cache would hit, what a run's routing was, what running workers hold now.

Owns: options, output and exit codes. `cluster/cli.py` mounts `app`. Exit status: 0 done, 1 an expected failure, 2 wrong
arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from cluster.errors import ClusterError
from workers.errors import WorkerError

if TYPE_CHECKING:
    from workers.experts.policy import Policy

app = typer.Typer(
    help="Expert caches: simulate, record, watch.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 170)
err = Console(stderr=True, highlight=False)

SHARES = "5.5,11,22,44,88"
"""Percent of all experts: the points of the published measurements."""

POLICY_NAMES = "lru,lfu,heat,lfru,static"


@app.callback()
def experts() -> None:
    """Expert caches: simulate, record, watch."""


@app.command()
def simulate(
    trace: Annotated[Path | None, typer.Argument(help="What `record` wrote; V4-like and uniform if not given.")] = None,
    policies: Annotated[str, typer.Option(help="Any of these, by commas.")] = POLICY_NAMES,
    shares: Annotated[str, typer.Option(help="Percent of all experts that fit, by commas.")] = SHARES,
    steps: Annotated[int, typer.Option(min=8, help="Generated decode steps.")] = 1600,
    layers: Annotated[int, typer.Option(min=1, help="Generated layers; the calibration was made with 6.")] = 6,
    batch: Annotated[int, typer.Option(min=1, help="Generated sequences of a step.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same routing.")] = 11,
    recorded: Annotated[
        float, typer.Option(min=0, max=0.9, help="First part of the steps: profile of `static`.")
    ] = 0.25,
    moves: Annotated[
        int | None, typer.Option(min=0, help="Most experts that come in a step; no bound if unset.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Write hit rate over budget to this PNG or SVG.")
    ] = None,
) -> None:
    """Replay routing against caches of several sizes: every policy beside Belady's optimum and the best fixed set."""
    from cluster.experts import simulation
    from workers.experts.trace import BadTrace, RoutingTrace

    chosen, parts = _policies(policies), _shares(shares)
    with _user_errors():
        if trace is not None:
            try:
                routings = {trace.stem: RoutingTrace.load(trace)}
            except (BadTrace, OSError) as exc:
                raise ClusterError(str(exc)) from exc
        else:
            routings = {
                name: simulation.generated(name, steps=steps, layers=layers, batch=batch, seed=seed)
                for name in simulation.GENERATED
            }
        found = []
        with err.status("") as line:
            for name, routing in routings.items():
                made = simulation.run(
                    name, routing, shares=parts, policies=chosen, recorded=recorded, moves=moves, tell=line.update
                )
                found.append(made)
        for made in found:
            out.print(simulation.table(made))
            out.print()
        if json_file is not None:
            with _files():
                simulation.write_json(found, json_file)
            out.print(f"written to {json_file}", soft_wrap=True)
        if plot_file is not None:
            from cluster.experts.plot import draw

            draw(found, plot_file)
            out.print(f"drawn to {plot_file}", soft_wrap=True)


def _policies(text: str) -> list[Policy]:
    from workers.experts.policy import POLICIES

    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in POLICIES]:
        raise typer.BadParameter(f"{unknown[0]!r}; there are {', '.join(POLICIES)}", param_hint="--policies")
    return [POLICIES[name] for name in names]


def _shares(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) / 100 for part in text.split(",") if part)
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a list like 5.5,11", param_hint="--shares") from exc
    if not found or min(found) <= 0 or max(found) > 1:
        raise typer.BadParameter("needs percentages above 0, at most 100", param_hint="--shares")
    return found


@contextmanager
def _user_errors() -> Iterator[None]:
    """Expected failures become one line on stderr and exit status 1."""
    try:
        yield
    except (ClusterError, WorkerError) as exc:
        err.print(f"[red]error:[/red] {exc}", soft_wrap=True)
        raise typer.Exit(1) from exc


@contextmanager
def _files() -> Iterator[None]:
    """A file that cannot be written is the user's."""
    try:
        yield
    except OSError as exc:
        raise ClusterError(f"{exc.filename}: {exc.strerror}") from exc
