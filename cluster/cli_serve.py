"""`dsv4 bench serve`: options and output of the load test. `cluster/cli_bench.py` mounts it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.config import ClusterConfig, load_config
from cluster.errors import ClusterError
from cluster.state import read_state
from cluster.user_errors import user_errors

out = Console(highlight=False, width=None if sys.stdout.isatty() else 180)
err = Console(stderr=True, highlight=False)


def serve(
    concurrency: Annotated[str, typer.Option(help="Clients at once, by commas; one level each.")] = "1,8,32",
    input_tokens: Annotated[int, typer.Option("--input", min=16, help="Prompt tokens of a request.")] = 1024,
    output_tokens: Annotated[int, typer.Option("--output", min=2, help="Generated tokens of a request.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each client at a level.")] = 2,
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of the deployment, for figures per GPU; 0: none.")] = 0,
    seed: Annotated[int, typer.Option(help="Which prompts.")] = 0,
    name: Annotated[str, typer.Option(help="Name of the deployment, when several run at once.")] = "default",
    url: Annotated[str | None, typer.Option(help="Router address; the running deployment's when not given.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="DSV4_API_KEY", help="Bearer token, when there is one.")] = None,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Start this deployment for the test.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every figure to this file.")] = None,
) -> None:
    """Load a deployment with chat clients: tokens a second, time to the first token, time per token."""
    from cluster.bench.serve_results import expert_table, level_table
    from cluster.bench.serve_run import ServePlan, numbers_of, run_levels

    if url and config:
        raise typer.BadParameter("starts a deployment, --url names one", param_hint="--config")
    try:
        levels = tuple(numbers_of(concurrency))
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--concurrency") from exc
    plan = ServePlan(levels, input_tokens, output_tokens, rounds, gpus, seed, json_file)
    with user_errors():
        if config is not None:
            from cluster.foreground import check_model
            from cluster.launch import start_cluster

            settings = _on_a_free_port(load_config(config))
            check_model(settings)
            key = settings.router.api_keys[0] if settings.router.api_keys else None
            with start_cluster(settings, lambda line: err.print(line, style="dim", soft_wrap=True)) as cluster:
                results = run_levels(cluster.url, key, plan, err)
        else:
            state = None if url else read_state(name)
            if state is None and not url:
                raise ClusterError("no deployment runs here; start one with `dsv4 up`, or use --url or --config")
            target, key = (url or "", api_key) if state is None else (state.url, api_key or state.api_key)
            results = run_levels(target, key, plan, err)
    out.print(level_table(results))
    if (flows := expert_table(results)) is not None:
        out.print(flows)


def _on_a_free_port(config: ClusterConfig) -> ClusterConfig:
    return dataclasses.replace(config, router=dataclasses.replace(config.router, port=0))
