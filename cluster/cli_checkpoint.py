"""`dsv4 checkpoint`: look into a checkpoint directory, or write a random one.

Owns: argument parsing and drawing of the two commands. `cluster/cli.py` mounts `app`. Exit status: 0 fine, 1 problems
found or refused, 2 wrong arguments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from workers.checkpoint.inspect import Group, Report, inspect_directory
from workers.checkpoint.names import Total, total_by_block, total_by_dtype, total_by_organ
from workers.checkpoint.progress import OnProgress
from workers.checkpoint.progress import Progress as TensorProgress
from workers.checkpoint.synth import planned_config, synthesise
from workers.errors import WorkerError
from workers.model.config import ModelConfig
from workers.model.presets import PRESETS

app = typer.Typer(help="Inspect checkpoints, or write random ones of a known shape.", no_args_is_help=True)

SHOWN_PROBLEMS = 20
"""Problems drawn in the table form; `--json` always lists all."""


@contextmanager
def tensor_progress(label: str, console: Console) -> Iterator[OnProgress]:
    """A bar with bytes, rate and time left on `console`; pass the yielded function as `on_progress`."""
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label)

        def on_progress(state: TensorProgress) -> None:
            bar.update(task, completed=state.done_bytes, total=state.total_bytes)

        yield on_progress


@app.command("inspect")
def inspect_command(
    directory: Annotated[Path, typer.Argument(help="Directory with config.json and *.safetensors.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    values: Annotated[
        bool, typer.Option("--values", help="Also read all bytes: NaN codes, scales, expert ids.")
    ] = False,
) -> None:
    """Show tensors by organ, dtypes and shards, and every problem found; exits with 1 if there is one."""
    if values:
        with tensor_progress("reading", Console(stderr=True)) as on_progress:
            report = inspect_directory(directory, values=True, on_progress=on_progress)
    else:
        report = inspect_directory(directory)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        _draw_report(report, Console())
    if report.problems:
        raise typer.Exit(1)


@app.command("synth")
def synth_command(
    preset: Annotated[str, typer.Option("--preset", help=f"Shape: {', '.join(PRESETS)}.")],
    out: Annotated[Path | None, typer.Option("--out", help="Directory to write; not needed with --plan.")] = None,
    layer_ids: Annotated[str | None, typer.Option("--layer-ids", help="Keep only these layers, as 0,2,3,4.")] = None,
    mtp: Annotated[
        bool | None, typer.Option("--mtp/--no-mtp", help="Write MTP blocks (default: unless --layer-ids is given).")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 0,
    plan: Annotated[bool, typer.Option("--plan", help="Print the byte totals and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is already in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the totals as one JSON object.")] = False,
) -> None:
    """Write random weights in the official layout, byte-exact in names, shapes and dtypes."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}", param_hint="--preset")
    if out is None and not plan:
        raise typer.BadParameter("needed unless --plan is given", param_hint="--out")
    ids = _parse_ids(layer_ids)
    try:
        config = planned_config(PRESETS[preset], ids, keep_draft=mtp)
        start_s = time.monotonic()
        if out is not None and not plan:
            _refuse_existing(out, force=force)
            with tensor_progress("writing", Console(stderr=True)) as on_progress:
                synthesise(out, PRESETS[preset], layer_ids=ids, keep_draft=mtp, seed=seed, on_progress=on_progress)
    except (WorkerError, OSError) as exc:
        typer.echo(f"error: {exc}", err=True)
        raise typer.Exit(1) from exc
    elapsed_s = None if plan else time.monotonic() - start_s
    _print_totals(config, out, elapsed_s, as_json=as_json)


def _parse_ids(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a list like 0,2,3", param_hint="--layer-ids") from exc


def _refuse_existing(out: Path, *, force: bool) -> None:
    if not force and out.is_dir() and any(out.glob("*.safetensors*")):
        raise FileExistsError(f"{out} already holds a checkpoint; --force replaces it")


def _print_totals(config: ModelConfig, out: Path | None, elapsed_s: float | None, *, as_json: bool) -> None:
    """What was planned (`elapsed_s` None) or written."""
    organs = {organ.value: total for organ, total in total_by_organ(config).items()}
    blocks, dtypes = total_by_block(config), total_by_dtype(config)
    total = sum(blocks.values(), Total())
    rate = total.bytes / elapsed_s if elapsed_s else None
    if as_json:
        data: dict[str, object] = {
            "model_name": config.model_name,
            "written_to": str(out) if elapsed_s is not None else None,
            "tensors": total.tensors,
            "bytes": total.bytes,
            "elapsed_s": elapsed_s,
            "bytes_per_s": rate,
        }
        for key, totals in (("organs", organs), ("dtypes", dtypes), ("blocks", blocks)):
            data[key] = {name: {"tensors": t.tensors, "bytes": t.bytes} for name, t in totals.items()}
        typer.echo(json.dumps(data))
        return
    console = Console()
    for title, totals in (("organ", organs), ("dtype", dtypes)):
        console.print(_table(title, [Group(name, t.tensors, t.bytes, {}) for name, t in totals.items()]))
    verb = "planned" if elapsed_s is None else f"written to {out}"
    speed = f" in {elapsed_s:.1f} s, {rate / 1e9:.2f} GB/s" if elapsed_s and rate else ""
    line = f"{config.model_name}: {total.tensors:,} tensors, {total.bytes:,} bytes {verb}{speed}"
    console.print(line, highlight=False, soft_wrap=True)


def _draw_report(report: Report, console: Console) -> None:
    if report.config is not None:
        summary = ", ".join(f"{key} {value}" for key, value in report.config.items())
        console.print(summary, highlight=False, markup=False, soft_wrap=True)
        console.print(_table("organ", list(report.organs)))
        console.print(_table("shard", [Group(s.name, s.tensors, s.bytes, {}) for s in report.shards]))
    for name in report.unused:
        console.print(f"not used yet: {name}", highlight=False)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    for problem in report.problems[:SHOWN_PROBLEMS]:
        where = f"{problem.file}: {problem.tensor}" if problem.tensor else problem.file
        console.print(
            f"problem: {where}: expected {problem.expected}, found {problem.found}", markup=False, soft_wrap=True
        )
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(report.problems) - SHOWN_PROBLEMS} more problems (--json lists all)")
    count = len(report.problems)
    verdict = f"{count} problem{'s' if count > 1 else ''}" if count else "no problems"
    console.print(f"{report.total.tensors:,} tensors, {report.total.bytes:,} bytes, {verdict}", highlight=False)


def _table(title: str, groups: list[Group]) -> Table:
    table = Table(show_edge=False)
    table.add_column(title, overflow="fold")
    table.add_column("tensors", justify="right")
    table.add_column("bytes", justify="right")
    with_dtypes = any(group.dtypes for group in groups)
    if with_dtypes:
        table.add_column("dtypes")
    for group in groups:
        row = [group.name, f"{group.tensors:,}", f"{group.bytes:,}"]
        dtypes = " ".join(f"{dtype}:{count}" for dtype, count in group.dtypes.items())
        table.add_row(*row, *([dtypes] if with_dtypes else []))
    return table
