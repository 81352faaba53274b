"""`dsv4 stress`: prove that requests which are taken out and brought back answer as if nothing had happened.

Owns: options, output, signals and exit codes. `cluster/cli.py` mounts `app`. Exit status: 0 proven, 1 a difference, a
leak, a surviving mutation or a failure, 2 wrong arguments, 130 or 143 interrupted; what was seen until then is printed.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.config import BUNDLED_MODEL, ClusterConfig, load_config
from cluster.errors import ClusterError
from cluster.stress import table
from cluster.stress.options import StressOptions
from cluster.stress.proof import Proof
from cluster.stress.target import far_tokens
from cluster.synthetic import model_folder, vocabulary_of
from cluster.user_errors import user_errors

app = typer.Typer(
    help="Prove retract and resume under stress.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
err = Console(stderr=True, highlight=False)

MUTATE_SAMPLES = 48
"""Samples of `--mutate` unless told otherwise: a mutation that survives costs all of them."""

MUTATE_OPTIONS: dict[str, Any] = {
    "only_far": True,
    "sampled_every": 2,
    "penalised_every": 2,
    "temperature": 2.0,
    "repetition_penalty": 2.0,
}
"""The indexer must matter, and so must the sampler: a sure model hides what was drawn."""


class Victim(enum.StrEnum):
    """Who is taken out."""

    POLICY = "policy"
    RANDOM = "random"
    ALL = "all"
    NAMED = "named"


class Prompts(enum.StrEnum):
    """What is asked."""

    AUTO = "auto"
    QUESTIONS = "questions"
    WORDS = "words"


class Tier(enum.StrEnum):
    """Where images wait."""

    AUTO = "auto"
    PINNED = "pinned"
    DISK = "disk"
    PEER = "peer"
    RECOMPUTE = "recompute"


@app.callback()
def stress() -> None:
    """Prove retract and resume under stress."""


@app.command()
def retract(
    samples: Annotated[int | None, typer.Option(min=1, help="Questions; 500, or 48 with --mutate.")] = None,
    interval: Annotated[int, typer.Option(min=1, help="Retract each request after each so many of its tokens.")] = 40,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight in the retracted run.")] = 8,
    victim: Annotated[Victim, typer.Option(help="Who is taken out.")] = Victim.ALL,
    names: Annotated[str, typer.Option(help="Beginnings of request ids for --victim named, by commas.")] = "",
    seed: Annotated[int, typer.Option(help="Which questions, and where their retracts fall.")] = 0,
    tier: Annotated[Tier, typer.Option(help="Where the images wait; peer starts two decode workers.")] = Tier.AUTO,
    poison_freed: Annotated[bool, typer.Option(help="Overwrite freed pages and slots.")] = True,
    other_pages: Annotated[bool, typer.Option(help="Resume in other pages and another slot.")] = True,
    max_context: Annotated[int | None, typer.Option(min=512, help="Longest prompt plus output, in tokens.")] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Output budget of one request.")] = 512,
    fail_copy: Annotated[int | None, typer.Option(min=1, help="The copy with this number fails.")] = None,
    prompts: Annotated[
        Prompts, typer.Option(help="words: random ones, for models that cannot answer; auto: if synthetic.")
    ] = Prompts.AUTO,
    pressure: Annotated[
        bool, typer.Option("--pressure", help="Force nothing; make each pool too small in turn.")
    ] = False,
    mutate: Annotated[str | None, typer.Option(help="Damage restores on purpose: one name, or all.")] = None,
    batched: Annotated[bool, typer.Option(help="Also a plain run at the same concurrency, to compare times.")] = False,
    url: Annotated[str | None, typer.Option(help="A running deployment that allows it; else one is started.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DSV4_API_KEY", help="Bearer token, when there is one.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Settings of the deployment to start.")] = None,
    model: Annotated[
        Path | None, typer.Option(help="Checkpoint folder or synthetic:PRESET; the bundled dsv4-nano if unset.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
) -> None:
    """Ask questions plain and again under retracts; fails unless every token and log-probability is the same."""
    _check_combination(pressure=pressure, forces=bool(url or mutate), victim=victim, names=names)
    with user_errors():
        base = _base(config, model)
        options = StressOptions(
            samples=samples or (MUTATE_SAMPLES if mutate else StressOptions().samples),
            interval=interval,
            concurrency=concurrency,
            victim=victim.value,
            names=tuple(name for name in names.split(",") if name),
            seed=seed,
            tier=tier.value,
            poison_freed=poison_freed,
            other_pages=other_pages,
            max_context=max_context,
            fail_copy=fail_copy,
            max_tokens=max_tokens,
            far_tokens=far_tokens(base.model),
            vocabulary=_vocabulary(base, prompts, pressure=pressure),
            **MUTATE_OPTIONS if mutate else {},
        )
        proof = Proof(options, base, url=url, api_key=api_key, console=err)
        status = _carry_out(proof, pressure=pressure, mutate=mutate, batched=batched)
    _show(proof)
    if json_file is not None:
        figures = table.as_json(proof.options, proof.rows, proof.caught, passed=status == 0)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
    raise typer.Exit(status)


def _check_combination(*, pressure: bool, forces: bool, victim: Victim, names: str) -> None:
    """Raises `typer.BadParameter` for options that exclude or need each other."""
    if pressure and forces:
        raise typer.BadParameter(
            "sizes pools, so it starts its own deployment and forces nothing", param_hint="--pressure"
        )
    if (victim is Victim.NAMED) != bool(names):
        raise typer.BadParameter("--victim named and --names need each other", param_hint="--names")


def _carry_out(proof: Proof, *, pressure: bool, mutate: str | None, batched: bool) -> int:
    """Exit status. After a signal the control is taken back and the cluster stopped before this returns."""
    signals = StopSignals()
    signals.install()
    try:
        if mutate is not None:
            proof.mutate(mutate, signals.install)
        elif pressure:
            proof.starve(signals.install)
        else:
            proof.prove(signals.install, batched=batched)
    except KeyboardInterrupt:
        err.print("interrupted; nothing is forced any more", style="yellow")
        return 128 + signals.number
    return 0 if proof.passed else 1


def _show(proof: Proof) -> None:
    if proof.rows:
        out.print(table.run_table(proof.rows))
    if (phases := table.phase_table(proof.rows)) is not None:
        out.print(phases)
    if proof.caught:
        out.print(table.mutation_table(proof.caught))
    for line in table.problem_lines(proof.rows):
        err.print(f"[red]{line}[/red]", soft_wrap=True)


class StopSignals:
    """SIGINT and SIGTERM as one `KeyboardInterrupt`; later ones are ignored, so that the clean-up runs to its end."""

    def __init__(self) -> None:
        self.number = 0

    def install(self) -> None:
        """Main thread. Again after Ray has started, which sets handlers of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number == 0:
            self.number = number
            raise KeyboardInterrupt


def _vocabulary(base: ClusterConfig, prompts: Prompts, *, pressure: bool) -> int | None:
    """Words are of the model's vocabulary. Raises `ClusterError` when it has none that we know."""
    found = None if prompts is Prompts.QUESTIONS else vocabulary_of(base.model)
    if prompts is Prompts.WORDS and found is None:
        raise ClusterError(f"--prompts words: {base.model.name} is not a synthetic model")
    if pressure and found is not None:
        raise ClusterError("--pressure asks questions, which a synthetic model cannot answer")
    return found


def _base(path: Path | None, model: Path | None) -> ClusterConfig:
    config = load_config(path) if path else ClusterConfig(model=BUNDLED_MODEL)
    return dataclasses.replace(config, model=model_folder(model, Path.cwd())) if model else config
