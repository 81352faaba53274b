"""The whole mission in one run: load test and forced retracts on two GPUs. `python -m tests.bench.mission`.

One deployment (by default V4-Flash's shape on two H200s, experts partly absent from either GPU) is started once and
asked over HTTP: one request, which ends the time to the first token; the first level of clients, who send long prompts
and want long answers; the stress run, whose retracted answers must be the plain ones, token by token and
log-probability by log-probability; the other levels. What no longer fits the time limit is cut or left out, and named.

Physics at 8,192 tokens in and 1,024 out: prefill is bound by matrix rate, about 15,000 tokens/s a GPU, so that 128
requests take 70 s to arrive; decode at 128 requests touches nearly every expert of every layer in each step (147 GB: 35
ms from HBM, and what is absent over the link). The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster.bench.serve_results import ServeResults, expert_table, level_table
from cluster.bench.serve_run import ServePlan, run_levels
from cluster.config import AdminSettings, ClusterConfig, load_config
from cluster.errors import ClusterError
from cluster.foreground import check_model
from cluster.http_client import RouterClient
from cluster.launch import Cluster, context_limit, start_cluster
from cluster.stress import table
from cluster.stress.options import StressOptions
from cluster.stress.proof import Proof
from cluster.stress.target import far_tokens
from cluster.synthetic import vocabulary_of
from tests.architecture.source_tree import ROOT
from workers.experts.peer_link import APART

LEVELS = "128:8192:1024x2,128:512:64,64:512:64,32:512:64,8:512:64,1:512:64,128:512:24:apart,8:512:24:apart"
"""CLIENTS:INPUT:OUTPUT[xROUNDS][:apart], by commas. One round lets all clients decode at the same time for a while.
`apart`: the workers do not read each other's experts meanwhile, but host memory's."""

SETTLE_S = 2.0
"""Until every worker has noticed the mark: they look about once a second."""

out = Console(highlight=False, width=None if sys.stdout.isatty() else 180)


@dataclass(slots=True)
class Mission:
    """What has been measured so far; written after every part."""

    config: str
    gpus: int
    ready_s: float = 0.0
    first_token_s: float = 0.0
    """From the command's first moment to the first token of the first answer."""
    levels: list[ServeResults] = field(default_factory=list)
    stress: dict[str, Any] | None = None
    left_out: list[str] = field(default_factory=list)
    """Parts for which there was no time."""
    failed: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        flat = dataclasses.asdict(self)
        flat["levels"] = [{**results["setup"], **results["levels"][0]} for results in flat["levels"]]
        return {"bench": "mission", **flat}

    def write(self, path: Path | None) -> None:
        if path is not None:
            path.write_text(json.dumps(self.as_dict(), indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class Wanted:
    """One level."""

    clients: int
    num_in: int
    num_out: int
    rounds: int
    apart: bool

    def __str__(self) -> str:
        rounds = f" x {self.rounds}" if self.rounds > 1 else ""
        return f"{self.clients} clients, {self.num_in} in, {self.num_out} out{rounds}{', apart' if self.apart else ''}"


def levels_of(text: str) -> list[Wanted]:
    """`8:1024:64x2` is 8 clients, 1,024 tokens in, 64 out, two requests each. Raises `ValueError`."""
    found = []
    for item in text.split(","):
        match = re.fullmatch(r"(\d+):(\d+):(\d+)(?:x(\d+))?(:apart)?", item)
        if match is None:
            raise ValueError(f"{item!r} is not like 8:1024:64 or 8:1024:64x2:apart")
        clients, num_in, num_out, rounds = (int(part or 1) for part in match.groups()[:4])
        found.append(Wanted(clients, num_in, num_out, rounds, bool(match[5])))
    return found


@contextlib.contextmanager
def peers_apart(cluster: Cluster, *, apart: bool) -> Iterator[None]:
    """For the length of the block no worker reads experts from another's GPU."""
    if not apart or cluster.share is None:
        yield
        return
    mark = cluster.share / APART
    mark.touch()
    try:
        time.sleep(SETTLE_S)
        yield
    finally:
        mark.unlink(missing_ok=True)
        time.sleep(SETTLE_S)


def for_the_mission(config: ClusterConfig) -> ClusterConfig:
    """A free port, and operators may force retracts."""
    router = dataclasses.replace(config.router, port=0)
    return dataclasses.replace(config, router=router, admin=AdminSettings(allow_retract_control=True))


class Clock:
    """Seconds since the command began, and whether more fits."""

    def __init__(self, limit_s: float) -> None:
        self._began, self._limit_s = time.monotonic(), limit_s

    @property
    def now_s(self) -> float:
        return time.monotonic() - self._began

    @property
    def left_s(self) -> float:
        return self._limit_s - self.now_s


def first_token_s(url: str) -> float:
    """Seconds to the first token of the first answer."""
    with RouterClient(url) as client:
        body = {"messages": [{"role": "user", "content": "abc"}], "max_tokens": 2, "temperature": 0, "ignore_eos": True}
        return client.chat({"model": client.model(), **body}).first_token_s


def load_test(cluster: Cluster, mission: Mission, levels: list[Wanted], clock: Clock, reserve_s: float) -> None:
    """Every level in the given order, as far as time goes; `reserve_s` of it is left."""
    for wanted in levels:
        limit_s = clock.left_s - reserve_s
        if limit_s <= 0:
            mission.left_out.append(str(wanted))
            continue
        plan = ServePlan(
            (wanted.clients,), wanted.num_in, wanted.num_out, wanted.rounds, mission.gpus, seed=len(mission.levels),
            limit_s=limit_s,
        )  # fmt: skip
        try:
            with peers_apart(cluster, apart=wanted.apart):
                results = run_levels(cluster.url, None, plan, out, warms=False)
        except ClusterError as exc:
            mission.failed.append(f"{wanted}: {exc}")
            out.print(mission.failed[-1], style="red")
            continue
        results.setup["peer"] = "on" if cluster.reads_peers and not wanted.apart else "off"
        mission.levels.append(results)
        out.print(f"[{clock.now_s:.0f} s] {wanted} done", style="dim")


def run_stress(
    cluster: Cluster, config: ClusterConfig, mission: Mission, options: argparse.Namespace, clock: Clock
) -> bool:
    """Forced retracts on the running deployment; whether everything was identical."""
    if options.stress_samples == 0 or clock.left_s <= 0:
        mission.left_out.append("stress")
        return True
    stress = StressOptions(
        samples=options.stress_samples,
        interval=options.stress_interval,
        seed=1,
        max_tokens=options.stress_tokens,
        max_context=min(options.stress_context, context_limit(config)),
        far_tokens=far_tokens(config.model),
        vocabulary=vocabulary_of(config.model),
    )
    proof = Proof(stress, config, url=cluster.url, api_key=None, console=out)
    proof.prove(lambda: None, batched=False)
    out.print(table.run_table(proof.rows))
    for line in table.problem_lines(proof.rows):
        out.print(line, style="red")
    mission.stress = table.as_json(stress, proof.rows, (), passed=proof.passed)
    return proof.passed


def joined(mission: Mission) -> ServeResults:
    """All levels as one table; what differs between them is in each line's name."""
    model = mission.levels[0].model if mission.levels else ""
    whole = ServeResults(model, {"GPUs": mission.gpus, "levels": "CLIENTS:INPUT:OUTPUT, peer"})
    for results in mission.levels:
        setup, level = results.setup, results.levels[0]
        name = f"{level.concurrency}:{setup['input']}:{setup['output']}, {setup['peer']}"
        whole.levels.append(dataclasses.replace(level, name=name))
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "deploy" / "h200-x2-v4-flash.yaml")
    parser.add_argument("--gpus", type=int, default=2, help="GPUs of the deployment, for figures per GPU")
    parser.add_argument("--levels", type=levels_of, default=levels_of(LEVELS), help="CLIENTS:INPUT:OUTPUT, by commas")
    parser.add_argument("--stress-samples", type=int, default=16)
    parser.add_argument("--stress-interval", type=int, default=40)
    parser.add_argument("--stress-tokens", type=int, default=128, help="output tokens of each stress request")
    parser.add_argument("--stress-context", type=int, default=8192)
    parser.add_argument("--limit", type=float, default=570.0, help="seconds after which levels are cut")
    parser.add_argument("--reserve", type=float, default=60.0, help="of them, seconds that the first level leaves")
    parser.add_argument("--json", type=Path, dest="json_file")
    options = parser.parse_args()
    clock = Clock(options.limit)
    config = for_the_mission(load_config(options.config))
    check_model(config)
    mission = Mission(str(options.config), options.gpus)
    with start_cluster(config, lambda line: out.print(f"[{clock.now_s:.0f} s] {line}", style="dim")) as cluster:
        mission.ready_s = clock.now_s
        first = first_token_s(cluster.url)
        mission.first_token_s = mission.ready_s + first
        out.print(f"ready after {mission.ready_s:.1f} s, first token {first:.2f} s later")
        mission.write(options.json_file)
        try:
            load_test(cluster, mission, options.levels[:1], clock, options.reserve)
            mission.write(options.json_file)
            passed = run_stress(cluster, config, mission, options, clock)
            mission.write(options.json_file)
            load_test(cluster, mission, options.levels[1:], clock, 0.0)
        finally:
            mission.write(options.json_file)
            whole = joined(mission)
            out.print(level_table(whole))
            if (flows := expert_table(whole)) is not None:
                out.print(flows)
    for part in mission.left_out:
        out.print(f"no time for {part}", style="yellow")
    print(json.dumps(mission.as_dict()))
    failed = any(level.errors for results in mission.levels for level in results.levels) or mission.failed
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main())
