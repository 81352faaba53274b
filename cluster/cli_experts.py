"""`dsv4 experts`: what an expert cache would hit, what a run's routing was, what running workers hold now.

Owns: options, output and exit codes. `cluster/cli.py` mounts `app`. Exit status: 0 done, 1 an expected failure, 2 wrong
arguments.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group
from rich.live import Live

from cluster.errors import ClusterError
from cluster.user_errors import user_errors

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
    from workers.experts.generator import ROUTINGS
    from workers.experts.trace import BadTrace, RoutingTrace

    chosen, parts = _policies(policies), _shares(shares)
    with user_errors():
        if trace is not None:
            try:
                routings = {trace.stem: RoutingTrace.load(trace)}
            except (BadTrace, OSError) as exc:
                raise ClusterError(str(exc)) from exc
        else:
            routings = {
                name: simulation.generated(name, steps=steps, layers=layers, batch=batch, seed=seed)
                for name in ROUTINGS
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


@app.command()
def record(
    output: Annotated[Path, typer.Argument(help="Trace file to write (.npz).")],
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder; the bundled dsv4-nano when not given.")] = None,
    task: Annotated[str, typer.Option(help="Held-out questions: arithmetic, recall or all.")] = "all",
    samples: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 32,
    prompts: Annotated[
        Path | None, typer.Option(help="Instead: a file with one prompt a line, text or a JSON list of token ids.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer to a prompt of --prompts.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that generate together in every step.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Most steps to record.")] = 4096,
    seed: Annotated[int, typer.Option(help="Which questions.")] = 0,
) -> None:
    """Answer prompts greedily on the CPU, in this process, and write down which experts each token chose."""
    from cluster.config import BUNDLED_MODEL
    from cluster.experts import record as recording
    from workers.model_bundle import ModelBundle

    folder = model or BUNDLED_MODEL
    with user_errors():
        if not output.resolve().parent.is_dir():
            raise ClusterError(f"{output}: its folder does not exist")
        bundle = ModelBundle.load(folder)
        if prompts is not None:
            known, what = recording.file_prompts(folder, prompts, max_tokens), prompts.name
        else:
            try:
                known, what = recording.task_prompts(folder, task, samples, seed), f"{task}, seed {seed}"
            except ValueError as exc:
                raise typer.BadParameter(str(exc), param_hint="--task") from exc
        source = f"{bundle.name}, {what}, greedy answers"
        with err.status("") as line:

            def tell(done: int, left: int) -> None:
                if done % 16 == 0:
                    line.update(f"{done} steps, {left} prompts waiting")

            trace = recording.record(bundle, known, batch=batch, max_steps=steps, source=source, tell=tell)
        with _files():
            trace.save(output)
    used = int((trace.histogram() > 0).sum())
    shape = f"{trace.num_steps} steps x {trace.num_layers} layers x batch {batch} x top {trace.experts.shape[-1]}"
    out.print(f"{output}: {shape}; {used} of {trace.num_pairs} experts used", soft_wrap=True)


@app.command()
def repack(
    output: Annotated[Path, typer.Argument(help="File to write, about the size of all experts.")],
    model: Annotated[Path | None, typer.Option(help="Checkpoint folder; the bundled dsv4-nano when not given.")] = None,
) -> None:
    """Write all experts of a checkpoint back to back, each at a page of its own with a checksum (`experts.packed`)."""
    from cluster.cli_checkpoint import tensor_progress
    from cluster.config import BUNDLED_MODEL
    from workers.checkpoint.check import check_directory
    from workers.checkpoint.progress import ProgressCounter
    from workers.experts.records import ExpertRecords
    from workers.experts.repack import write_packed

    with user_errors(), _files():
        records = ExpertRecords.of_checkpoint(check_directory(model or BUNDLED_MODEL).require_sound())
        with tensor_progress("repacking", err) as on_progress:
            counter = ProgressCounter(records.total_bytes, on_progress)
            size = write_packed(records, output, lambda done, total: counter.add(records.record_bytes, "expert"))
    out.print(f"{output}: {records.num_pairs:,} experts, {size / 1e9:.2f} GB", soft_wrap=True)


@app.command()
def top(
    name: Annotated[str, typer.Option(help="Name of the deployment, when several run at once.")] = "default",
    url: Annotated[str | None, typer.Option(help="Router address; the running deployment's if not given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DSV4_API_KEY", help="Bearer token.")] = None,
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two readings.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print what happened since the start, and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON once.")] = False,
) -> None:
    """Show live, for each worker and layer, how many experts are in fast memory and how often they were there."""
    from cluster.experts.top import read_experts, tables
    from cluster.http_client import RouterClient
    from cluster.state import read_state

    state = None if url else read_state(name)
    with user_errors():
        if url is None and state is None:
            raise ClusterError("no deployment runs here; start one with `dsv4 up`, or name one with --url")
        address = url or (state.url if state else "")
        with RouterClient(address, api_key or (state.api_key if state else None)) as client:
            found = read_experts(client)
            if as_json:
                print(json.dumps([worker.as_dict() for worker in found], indent=2))
                return
            if once:
                for made in tables(found):
                    out.print(made)
                return
            before = None
            with Live(Group(*tables(found)), console=out, auto_refresh=False, screen=out.is_terminal) as live:
                while True:
                    time.sleep(interval)
                    before, found = found, read_experts(client)
                    live.update(Group(*tables(found, before)), refresh=True)


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
def _files() -> Iterator[None]:
    """A file that cannot be written is the user's."""
    try:
        yield
    except OSError as exc:
        raise ClusterError(f"{exc.filename}: {exc.strerror}") from exc
