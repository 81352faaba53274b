"""The command passes only when every answer is the same, nothing leaked, and something was retracted at all."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster.cli_stress import app
from cluster.stress.link import merged
from tests.cluster.stress.fake_cluster import NUM_TOKENS, FakeCluster
from workers.messages import MUTATIONS, RetractControl, RetractReport


def run(fake: FakeCluster, *arguments: str, samples: int = 6) -> Result:
    options = ("--url", fake.url, "--interval", "4", "--concurrency", "3", "--samples", str(samples))
    return CliRunner(env={"COLUMNS": "220"}).invoke(app, ["retract", *options, *arguments])


def figures(fake: FakeCluster, folder: Path, *arguments: str, samples: int = 6) -> tuple[Result, dict[str, Any]]:
    path = folder / "figures.json"
    result = run(fake, *arguments, "--json", str(path), samples=samples)
    return result, json.loads(path.read_text())


def test_identical_runs_pass_and_nothing_stays_forced(fake: FakeCluster, tmp_path: Path) -> None:
    result, found = figures(fake, tmp_path, "--seed", "3", "--tier", "disk")
    assert result.exit_code == 0, result.output
    plain, retracted = found["runs"]
    assert (plain["run"], retracted["run"]) == ("plain x1", "retract disk x3")
    assert (retracted["identical"], retracted["compared"]) == (6, 6)
    assert retracted["report"]["events"] == 6 * (NUM_TOKENS // 4)
    assert (retracted["far_events"], retracted["known_events"]) == (9, 18)
    wanted = RetractControl(interval=4, seed=3, tier="disk", poison_freed=True, other_pages=True)
    assert fake.controls == [RetractControl(), RetractControl(), wanted, RetractControl()]
    assert "6 of 6" in result.output


def test_one_changed_logit_fails_the_command(fake: FakeCluster, tmp_path: Path) -> None:
    fake.damage = lambda control, number, at, value: (
        value - 1e-9 if control.interval and number == 8 and at == 5 else value
    )
    result, found = figures(fake, tmp_path)
    assert result.exit_code == 1
    retracted = found["runs"][1]
    assert retracted["identical"] == 5
    assert (retracted["differences"][0]["token"], retracted["differences"][0]["kind"]) == (5, "logits")
    assert found["passed"] is False


def test_recompute_reports_differences_without_failing(fake: FakeCluster, tmp_path: Path) -> None:
    fake.damage = lambda control, number, at, value: value - 1e-9 if control.interval else value
    result, found = figures(fake, tmp_path, "--tier", "recompute")
    assert result.exit_code == 0, result.output
    assert found["runs"][1]["identical"] == 0


def test_a_leak_fails_the_command(fake: FakeCluster) -> None:
    fake.leaked = 2
    result = run(fake)
    assert result.exit_code == 1
    assert "2 pages or slots leaked" in result.output


def test_a_failed_request_fails_the_command(fake: FakeCluster, tmp_path: Path) -> None:
    fake.fails_at = 9
    result, found = figures(fake, tmp_path)
    assert result.exit_code == 1
    assert found["runs"][1]["errors"] == 1
    assert "boom" in result.output


def test_a_run_without_a_retract_proves_nothing(fake: FakeCluster) -> None:
    result = run(fake, "--interval", "100")
    assert result.exit_code == 1
    assert "nothing was retracted" in result.output


def test_a_batched_plain_run_is_compared_too(fake: FakeCluster, tmp_path: Path) -> None:
    result, found = figures(fake, tmp_path, "--batched")
    assert result.exit_code == 0
    assert [row["run"] for row in found["runs"]] == ["plain x1", "plain x3", "retract auto x3"]
    assert found["runs"][1]["identical"] == 6


def test_a_deployment_without_the_admin_path_is_refused_with_advice(fake: FakeCluster) -> None:
    fake.allows = False
    result = run(fake)
    assert result.exit_code == 1
    assert "allow_retract_control" in result.output


def test_wrong_usage_exits_with_2(fake: FakeCluster) -> None:
    assert run(fake, "--pressure").exit_code == 2
    assert run(fake, "--victim", "named").exit_code == 2
    assert run(fake, "--victim", "oldest").exit_code == 2


def test_every_mutation_that_changes_the_output_is_caught(fake: FakeCluster, tmp_path: Path) -> None:
    fake.damage = lambda control, number, at, value: value - 1e-6 if control.mutate and at == 7 else value
    result, found = figures(fake, tmp_path, "--mutate", "all", samples=4)
    assert result.exit_code == 0, result.output
    assert [item["mutation"] for item in found["mutations"]] == list(MUTATIONS)
    assert all(item["caught"]["token"] == 7 for item in found["mutations"])
    assert fake.controls[-1] == RetractControl()


def test_a_mutation_that_changes_nothing_survives_and_fails_the_command(fake: FakeCluster, tmp_path: Path) -> None:
    fake.damage = lambda control, number, at, value: value - 1e-6 if control.mutate == "skip:window" else value
    result, found = figures(fake, tmp_path, "--mutate", "all", samples=4)
    assert result.exit_code == 1
    survivors = [item["mutation"] for item in found["mutations"] if item["caught"] is None]
    assert "skip:window" not in survivors and len(survivors) == len(MUTATIONS) - 1
    assert "SURVIVED" in result.output


def test_a_fault_of_another_kind_does_not_count_as_caught(fake: FakeCluster, tmp_path: Path) -> None:
    fake.fails_at = 9
    result, found = figures(fake, tmp_path, "--mutate", "skip:window", samples=4)
    assert result.exit_code == 1
    assert found["mutations"][0]["caught"] is None
    assert "boom" in found["mutations"][0]["problem"]


def test_an_unknown_mutation_is_refused_by_name(fake: FakeCluster) -> None:
    result = run(fake, "--mutate", "skip:everything")
    assert result.exit_code == 1
    assert "skip:everything" in result.output and "corrupt:window" in result.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_takes_the_control_back_and_prints_what_there_is(
    fake: FakeCluster, tmp_path: Path, number: signal.Signals
) -> None:
    fake.on_answer = lambda count: os.kill(os.getpid(), number) if count == 9 else None
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        result, found = figures(fake, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert result.exit_code == 128 + number
    assert fake.controls[-1] == RetractControl()
    assert found["passed"] is False
    assert found["runs"][1]["answered"] < 6
    assert "interrupted" in result.output


def test_reports_of_several_workers_add_up_and_keep_the_worst_percentile() -> None:
    first = RetractReport(events=2, by_tier={"disk": 2}, phase_ms={"copy_out": (2, 1.0, 2.0)}, contexts=(1, 2))
    second = RetractReport(
        events=3, by_tier={"disk": 1, "peer": 2}, phase_ms={"copy_out": (3, 0.5, 9.0)}, contexts=(3,)
    )
    both = merged([first, second])
    assert (both.events, both.by_tier, both.contexts) == (5, {"disk": 3, "peer": 2}, (1, 2, 3))
    assert both.phase_ms == {"copy_out": (5, 1.0, 9.0)}
