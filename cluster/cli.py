"""The `dsv4` command: options, output and exit codes; the work is done elsewhere.

Owns: what users type and read. Does not own: anything that outlives a command. Heavy packages are imported inside the
commands that need them, so that `--help` and `status` answer at once. Expected failures print one line and exit with 1,
wrong usage exits with 2; a traceback is our bug.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.config import BUNDLED_MODEL, ClusterConfig, Device, PrecisionMode, load_config
from cluster.errors import ClusterError
from cluster.http_client import RouterClient
from cluster.state import ClusterState, read_state
from cluster.synthetic import model_folder
from cluster.user_errors import fail, user_errors

BEGAN = time.time()
"""When the process was young enough to count: the time to ready includes the imports."""

app = typer.Typer(
    name="dsv4",
    help="Serve DeepSeek-V4 with separate prefill and decode workers behind one OpenAI-compatible address.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file; deploy/ has examples.")]
AddressOption = Annotated[str | None, typer.Option(help="Address of a running Ray cluster instead of a local one.")]
HostOption = Annotated[str | None, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")]
ModelOption = Annotated[
    Path | None, typer.Option(help="Checkpoint folder or synthetic:PRESET; the bundled dsv4-nano if unset.")
]
DeviceOption = Annotated[Device | None, typer.Option(help="Where to compute; auto takes GPUs when Ray sees any.")]
NameOption = Annotated[str, typer.Option(help="Name of the deployment, when several run at once.")]
UrlOption = Annotated[str | None, typer.Option(help="Router address; the running deployment's when not given.")]
KeyOption = Annotated[str | None, typer.Option(envvar="DSV4_API_KEY", help="Bearer token, when the router wants one.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def up(
    config: ConfigOption = None,
    address: AddressOption = None,
    host: HostOption = None,
    port: PortOption = None,
    model: ModelOption = None,
    device: DeviceOption = None,
    name: NameOption = "default",
) -> None:
    """Start router, prefill and decode workers here in the foreground; Ctrl-C stops every process."""
    from cluster.foreground import run_foreground

    settings = _settings(config, address=address, host=host, port=port, model=model, device=device)
    shown = os.path.relpath(settings.model) if settings.model.is_relative_to(Path.cwd()) else settings.model
    out.print(f"[bold]{settings.served_name}[/bold]  {shown}  {settings.precision.value}", soft_wrap=True)
    with user_errors():
        status = run_foreground(settings, name, _print_line, began=BEGAN)
    raise typer.Exit(status)


@app.command()
def down(
    name: NameOption = "default",
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an orderly end.")] = 30.0,
) -> None:
    """Stop a deployment that `dsv4 up` started on this machine, and check that no process is left."""
    from cluster.processes import end_all, wait_gone
    from cluster.state import end_leftovers

    if left := end_leftovers(name):
        out.print(f"{name} was killed before; ended {left} processes that it left behind")
        return
    state = _running(name)
    state.owner.terminate()
    late = wait_gone((state.owner,), timeout)
    survivors = end_all((*late, *state.processes), grace_s=5.0)
    if survivors:
        fail(f"still running: {', '.join(str(process.pid) for process in survivors)}")
    out.print(f"{name} stopped")


@app.command()
def status(
    name: NameOption = "default", url: UrlOption = None, api_key: KeyOption = None, as_json: JsonOption = False
) -> None:
    """Show workers, load, memory and counters of a running deployment."""
    from cluster.status import read_status, status_tables

    target = None if url else _running(name)
    with user_errors(), _client(target, url, api_key) as client:
        found = read_status(client)
    if as_json:
        _print_json(found.as_dict())
        return
    for table in status_tables(found):
        out.print(table)


@app.command()
def chat(
    name: NameOption = "default",
    url: UrlOption = None,
    api_key: KeyOption = None,
    think: Annotated[bool, typer.Option(help="Reason before answering.")] = True,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="The model's default when not given.")] = None,
) -> None:
    """Talk to a running deployment; /help lists the commands of the conversation."""
    from cluster.chat import ChatLoop

    target = None if url else _running(name)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())
    with user_errors(), _client(target, url, api_key) as client:
        loop = ChatLoop(
            client, client.model(), out, input, thinking=think, max_tokens=max_tokens, temperature=temperature
        )
        loop.run()


@app.command()
def logits(
    model: Annotated[Path, typer.Argument(help="Checkpoint folder.")],
    ids: Annotated[Path, typer.Option(help="File with a JSON list of token ids.")],
    output: Annotated[Path, typer.Option("--out", help="File to write: float32 \\[positions, vocabulary] as .npy.")],
    precision: Annotated[PrecisionMode, typer.Option(help="native, or fp32 without any cast.")] = PrecisionMode.NATIVE,
    prefill_chunk: Annotated[
        int | None, typer.Option(min=1, help="Prompt tokens per step; all when not given.")
    ] = None,
    decode_from: Annotated[int | None, typer.Option(min=1, help="First position fed one token at a time.")] = None,
) -> None:
    """Write the logits of every position, computed by the real engine over paged KV."""
    from cluster.engine_logits import token_ids_from, write_logits

    with user_errors():
        token_ids = token_ids_from(ids)
        shape = write_logits(model, token_ids, output, precision.value, prefill_chunk, decode_from)
    out.print(f"{output}: float32 {list(shape)}")


@app.command("eval")
def evaluate(
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples of each task.")] = 100,
    task: Annotated[str, typer.Option(help="arithmetic, recall or all.")] = "all",
    context: Annotated[
        int | None, typer.Option(min=64, help="Context tokens of recall; up to 2K mixed if unset.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8,
    seed: Annotated[int, typer.Option(help="Which samples.")] = 0,
    show_wrong: Annotated[int, typer.Option(min=0, help="Print this many wrong answers.")] = 0,
    config: ConfigOption = None,
    model: ModelOption = None,
    name: NameOption = "default",
    url: UrlOption = None,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score held-out questions through the HTTP endpoint; starts a deployment for it when none runs."""
    from cluster.evaluation_run import run_tasks, tasks_named

    try:
        tasks = tasks_named(task)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--task") from exc
    running = None if url or config or model else read_state(name)
    with user_errors():
        if url or running:
            target = url or (running.url if running else "")
            key = api_key or (running.api_key if running else None)
            reports = run_tasks(target, key, tasks, samples, context, concurrency, seed, show_wrong, err)
        else:
            from cluster.foreground import check_model
            from cluster.launch import start_cluster

            settings = _settings(config, model=model, port=0)
            check_model(settings)
            key = settings.router.api_keys[0] if settings.router.api_keys else None
            with start_cluster(settings, lambda line: err.print(line, style="dim", soft_wrap=True)) as cluster:
                reports = run_tasks(cluster.url, key, tasks, samples, context, concurrency, seed, show_wrong, err)
    if as_json:
        _print_json([report.as_dict() for report in reports])
        return
    from cluster.evaluation_run import report_table

    out.print(report_table(reports))


@app.command(
    "checkpoint",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def checkpoint(context: typer.Context) -> None:
    """Inspect a checkpoint, or write one with random weights; `dsv4 checkpoint --help` lists the commands."""
    # Mounted by hand: as a sub-application its module, and torch with it, would load for every other command too.
    from cluster.cli_checkpoint import app as checkpoint_app

    checkpoint_app(args=context.args, prog_name="dsv4 checkpoint")


@app.command(
    "stress",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def stress(context: typer.Context) -> None:
    """Prove that retracted requests answer as if nothing had happened; `dsv4 stress retract --help` says how."""
    from cluster.cli_stress import app as stress_app

    stress_app(args=context.args, prog_name="dsv4 stress")


@app.command(
    "bench",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure the model on this GPU against its floor; `dsv4 bench --help` lists the commands."""
    from cluster.cli_bench import app as bench_app

    bench_app(args=context.args, prog_name="dsv4 bench")


@app.command(
    "experts",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def experts(context: typer.Context) -> None:
    """Simulate expert caches, record routing, watch what workers hold; `dsv4 experts --help` lists the commands."""
    from cluster.cli_experts import app as experts_app

    experts_app(args=context.args, prog_name="dsv4 experts")


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _settings(
    path: Path | None,
    *,
    address: str | None = None,
    host: str | None = None,
    port: int | None = None,
    model: Path | None = None,
    device: Device | None = None,
) -> ClusterConfig:
    """The file's settings, or the defaults, with the command's options over them."""
    try:
        config = load_config(path) if path else ClusterConfig(model=BUNDLED_MODEL)
        router = _over(config.router, host=host, port=port)
        ray = _over(config.ray, address=address)
        changed: ClusterConfig = _over(
            config, router=router, ray=ray, model=model_folder(model, Path.cwd()) if model else None, device=device
        )
        return changed
    except ClusterError as exc:
        fail(str(exc))


def _over(settings: Any, **values: Any) -> Any:
    """A copy with the given values; None leaves a field as it is."""
    return dataclasses.replace(settings, **{key: value for key, value in values.items() if value is not None})


def _running(name: str) -> ClusterState:
    state = read_state(name)
    if state is None:
        fail("no deployment runs here; start one with `dsv4 up`, or name one with --url")
    return state


def _client(state: ClusterState | None, url: str | None, api_key: str | None) -> RouterClient:
    key = api_key or (state.api_key if state else None)
    return RouterClient(url or (state.url if state else ""), key)


def _print_line(text: str) -> None:
    out.print(f"  {text}", soft_wrap=True)


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    main()
