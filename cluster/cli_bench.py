"""`dsv4 bench`: how fast the model runs on this GPU, with synthetic weights of real shapes, and what the floor is.

Owns: options, output and exit codes. `cluster/cli.py` mounts `app`. Exit status: 0 done, 1 an expected failure (no GPU,
no room, a bad file), 2 wrong arguments. What was measured before a failure is still written to `--json`.
"""

from __future__ import annotations

import enum
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.cli_serve import serve
from cluster.user_errors import user_errors
from workers.experts.generator import ROUTINGS
from workers.experts.policy import POLICIES
from workers.model.config import PAGE_TOKENS, ModelConfig
from workers.model.presets import PRESETS

app = typer.Typer(
    help="Measure the model on this GPU, or a whole deployment.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, highlight=False)

BATCHES, CONTEXTS, CHUNKS = "1,2,4,8,16,32,64", "1024,4096,8192,65536", "1024,4096,8192,16384"
START_LAYERS, START_EXPERTS = 5, 16
"""Enough for every kernel: sliding, C4 and C128 layers, hash and learned routing; few experts, since none is timed."""


class Experts(enum.StrEnum):
    """What of the experts is in memory."""

    RESIDENT = "resident"
    FOLDED = "folded"


class Part(enum.StrEnum):
    """What can be measured."""

    KERNELS = "kernels"
    DECODE = "decode"
    PREFILL = "prefill"
    LONG = "long"
    PEER = "peer"
    START = "start"
    INVARIANCE = "invariance"


app.command("serve")(serve)


@app.callback()
def bench() -> None:
    """Measure the model on this GPU, or a whole deployment."""


@app.command()
def model(
    preset: Annotated[str, typer.Option(help=f"Shape: {', '.join(PRESETS)}.")] = "v4-flash",
    layers: Annotated[int | None, typer.Option(min=1, help="Measure the first N layers; all when not given.")] = None,
    experts: Annotated[
        Experts,
        typer.Option(help="resident: every expert in memory; folded: as many as fit, the others share their bytes."),
    ] = Experts.RESIDENT,
    batches: Annotated[str, typer.Option(help="Sequences of a decode step, by commas.")] = BATCHES,
    contexts: Annotated[str, typer.Option(help="Tokens of each sequence, by commas.")] = CONTEXTS,
    chunks: Annotated[str, typer.Option(help="Tokens of a prefill step, by commas.")] = CHUNKS,
    kernels_at: Annotated[
        str, typer.Option(help="BATCH:CONTEXT of decode kernel tables, by commas; empty: none.")
    ] = "1:4096",
    kernel_chunk: Annotated[int, typer.Option(min=16, help="Tokens of the prefill kernel table.")] = 8192,
    long_prompt: Annotated[int, typer.Option(min=256, help="Tokens of the prompt of the part `long`.")] = 65536,
    parts: Annotated[str, typer.Option(help=f"Any of {', '.join(Part)}.")] = ",".join(Part),
    seed: Annotated[int, typer.Option(help="Same seed, same weights and tokens.")] = 0,
    experts_held: Annotated[int | None, typer.Option(min=2, help="Different experts a layer, with folded.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="Write the roofline to this PNG or SVG.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No line for each measurement.")] = False,
) -> None:
    """Time kernels, decode and prefill against the copy bandwidth and matrix rate of the same run."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}", param_hint="--preset")
    config = PRESETS[preset]
    if layers is not None and layers > config.num_hidden_layers:
        raise typer.BadParameter(f"{preset} has {config.num_hidden_layers} layers", param_hint="--layers")
    if experts_held is not None and experts is not Experts.FOLDED:
        raise typer.BadParameter("is for --experts folded", param_hint="--experts-held")
    if long_prompt % PAGE_TOKENS:
        raise typer.BadParameter(f"takes a multiple of {PAGE_TOKENS}", param_hint="--long-prompt")
    chosen = _parts(parts)
    with user_errors():
        from cluster.bench.run import Plan, run
        from cluster.bench.scene import Wanted

        wanted = Wanted(
            preset=preset,
            config=config,
            layers=layers or config.num_hidden_layers,
            folded=experts is Experts.FOLDED,
            batches=_numbers(batches, "--batches"),
            contexts=_numbers(contexts, "--contexts"),
            chunks=_numbers(chunks, "--chunks"),
            long_prompt=long_prompt if Part.LONG in chosen else 0,
            seed=seed,
        )
        plan = Plan(
            parts=frozenset(part.value for part in chosen),
            kernels_at=_pairs(kernels_at),
            kernel_chunk=kernel_chunk,
            experts_held=experts_held,
            json_file=json_file,
        )
        results = run(wanted, plan, (lambda line: None) if quiet else (lambda line: err.print(line, style="dim")))
        _show(json_file, results, plot_file)


@app.command()
def start(
    preset: Annotated[str, typer.Option(help=f"Shape: {', '.join(PRESETS)}.")] = "v4-flash",
    max_batch: Annotated[int, typer.Option(min=1, help="Largest decode batch.")] = 64,
) -> None:
    """Time the first start of a model on this GPU, with an empty kernel cache, and the second one."""
    command = [sys.executable, "-m", "cluster", "bench", "model", "--preset", preset, "--experts", "folded"]
    command += ["--layers", str(min(START_LAYERS, PRESETS[preset].num_hidden_layers)), "--parts", "start", "--quiet"]
    held = min(START_EXPERTS, PRESETS[preset].n_routed_experts)
    command += ["--experts-held", str(held), "--batches", str(max_batch), "--contexts", "4096", "--chunks", "4096"]
    with tempfile.TemporaryDirectory(prefix="dsv4-triton-cache-") as cache:
        for name in ("first", "second"):
            out.print(f"[bold]{name} start[/bold]")
            if code := subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache}).returncode:
                raise typer.Exit(code)


@app.command("experts")
def expert_cache(
    preset: Annotated[str, typer.Option(help=f"Shape: {', '.join(PRESETS)}.")] = "v4-flash",
    layers: Annotated[int | None, typer.Option(min=1, help="The first N layers; all when not given.")] = None,
    budgets: Annotated[
        str,
        typer.Option(help="GB of expert slots, by commas; 118gib: GiB; 24t: what a GPU of 24 GB has left for them."),
    ] = "8,16,24t,32,64,80,100,120,118gib,122gib",
    few: Annotated[str, typer.Option(help="Budgets of the other batches and routings.")] = "64,118gib",
    compared: Annotated[str, typer.Option(help="Budgets of the other policies and of a text that is known.")] = "24t",
    prefill: Annotated[str, typer.Option(help="Budgets at which a chunk is prefilled.")] = "64,100,120",
    batches: Annotated[str, typer.Option(help="Sequences of a decode step, by commas.")] = "1,8,4,32",
    routings: Annotated[
        str, typer.Option(help="v4-like, uniform, by commas; any but the first at two batches only.")
    ] = "v4-like,uniform",
    policies: Annotated[
        str, typer.Option(help=f"Who stays, by commas, the usual one first: {', '.join(POLICIES)}.")
    ] = "lfru,static,lru,lfu,heat",
    scratch: Annotated[
        bool,
        typer.Option("--scratch/--in-place", help="Bring absent experts to scratch (before sm_90), or read in place."),
    ] = True,
    bank_experts: Annotated[
        int | None, typer.Option(min=1, help="Different experts of a layer in host memory; the others share bytes.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
) -> None:
    """Decode and prefill at every budget of expert slots, the other experts coming from pinned host memory.

    Takes host memory for every expert of the chosen layers (147 GB for the whole V4-Flash) and locks it.
    """
    _known((preset,), tuple(PRESETS), "--preset")
    _known(_texts(policies), tuple(POLICIES), "--policies")
    _known(_texts(routings), tuple(ROUTINGS), "--routings")
    config = PRESETS[preset]
    _budgets({"--budgets": budgets, "--few": few, "--compared": compared, "--prefill": prefill}, config)
    with user_errors():
        from cluster.bench.expert_results import tables
        from cluster.bench.experts import ExpertPlan, run_experts

        plan = ExpertPlan(
            budgets=_texts(budgets),
            few=_texts(few),
            compared=_texts(compared),
            prefill=_texts(prefill),
            batches=_numbers(batches, "--batches"),
            routings=_texts(routings),
            policies=_texts(policies),
            json_file=json_file,
        )
        results = run_experts(
            config,
            plan,
            layers=layers or config.num_hidden_layers,
            say=lambda line: err.print(line, style="dim", soft_wrap=True),
            scratch=scratch,
            bank_experts=bank_experts,
        )
        for table in tables(results):
            out.print(table)


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="What --json of model or experts wrote, perhaps elsewhere.")],
    image: Annotated[Path | None, typer.Option("--out", help="PNG or SVG; beside FILE when not given.")] = None,
) -> None:
    """Draw a finished run: the roofline of `model`, or speed over budget of `experts`."""
    with user_errors():
        from cluster.bench.expert_plot import draw_experts
        from cluster.bench.expert_results import holds_experts
        from cluster.bench.plot import draw
        from cluster.bench.results import read_results

        target = image or file.with_suffix(".png")
        if holds_experts(file):
            draw_experts(file, target)
        else:
            draw(read_results(file), target)
    out.print(str(target), soft_wrap=True)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="What --json wrote.")]) -> None:
    """Print the tables of a finished run."""
    with user_errors():
        from cluster.bench.expert_results import holds_experts, read_experts, tables
        from cluster.bench.results import read_results

        if not holds_experts(file):
            _show(None, read_results(file), None)
            return
        for table in tables(read_experts(file)):
            out.print(table)


def _show(written: Path | None, results: object, image: Path | None) -> None:
    from cluster.bench.plot import draw
    from cluster.bench.results import Results
    from cluster.bench.tables import all_tables

    assert isinstance(results, Results)
    for table in all_tables(results):
        out.print(table)
        out.print()
    if written is not None:
        out.print(f"written to {written}", soft_wrap=True)
    if image is not None:
        draw(results, image)
        out.print(f"drawn to {image}", soft_wrap=True)


def _parts(text: str) -> set[Part]:
    try:
        return {Part(name) for name in text.split(",") if name}
    except ValueError as exc:
        raise typer.BadParameter(f"{exc}; there are {', '.join(Part)}", param_hint="--parts") from exc


def _known(given: tuple[str, ...], known: tuple[str, ...], option: str) -> None:
    if not given or set(given) - set(known):
        raise typer.BadParameter(f"any of {', '.join(known)}, not {','.join(given)!r}", param_hint=option)


def _budgets(texts: dict[str, str], config: ModelConfig) -> None:
    """Refuses what does not read as a budget, by option, and a run in which none sizes the slab."""
    from cluster.bench.expert_sweep import budgets_of

    for option, text in texts.items():
        try:
            budgets_of(_texts(text), config, 0)
        except ValueError as exc:
            raise typer.BadParameter(str(exc), param_hint=option) from exc
    if all(text.endswith("t") for given in texts.values() for text in _texts(given)):
        raise typer.BadParameter("needs one budget without t, which the slab is made for", param_hint="--budgets")


def _texts(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part)
    except ValueError as exc:
        raise typer.BadParameter(f"{text!r} is not a list like 1,2,4", param_hint=option) from exc
    if not found or min(found) < 1:
        raise typer.BadParameter("needs positive numbers", param_hint=option)
    return found


def _pairs(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in filter(None, text.split(",")):
        batch, _, context = part.partition(":")
        if not (batch.isdigit() and context.isdigit()):
            raise typer.BadParameter(f"{part!r} is not BATCH:CONTEXT", param_hint="--kernels-at")
        found.append((int(batch), int(context)))
    return tuple(found)
