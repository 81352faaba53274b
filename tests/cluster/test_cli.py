"""Commands print what users need, exit with the right status, and show no traceback for expected failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster.cli import app
from cluster.processes import ProcessRef
from cluster.state import ClusterState, read_state, state_path, write_state
from tests.cluster.fake_router import FakeRouter

COMMANDS = ("up", "down", "status", "chat", "logits", "eval")


def run(*arguments: str, text: str | None = None) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, list(arguments), input=text)


def publish(router: FakeRouter) -> None:
    own = ProcessRef.of(os.getpid())
    write_state(ClusterState("default", router.url, "fake-model", own.pid, own.created, "k1", (), 1.0))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.output


@pytest.mark.parametrize(
    "arguments",
    [("--pressure", "--mutate", "all"), ("--pressure", "--url", "http://x"), ("--victim", "named"), ("--names", "a")],
)
def test_a_stress_run_refuses_options_that_do_not_go_together(arguments: tuple[str, ...]) -> None:
    result = run("stress", "retract", *arguments)
    assert result.exit_code == 2
    assert "Invalid value for" in result.output


def test_checkpoint_commands_are_reachable() -> None:
    assert "inspect" in run("checkpoint", "--help").output


@pytest.mark.parametrize("command", ["status", "down", "chat"])
def test_without_a_deployment_commands_say_how_to_start_one(command: str) -> None:
    result = run(command)
    assert result.exit_code == 1
    assert "dsv4 up" in result.output
    assert "Traceback" not in result.output


def test_status_shows_every_worker(router: FakeRouter) -> None:
    publish(router)
    result = run("status")
    assert result.exit_code == 0
    for needle in ("fake-model", "prefill-0", "decode-0", "4.0 KiB", "ready"):
        assert needle in result.output


def test_status_as_json_has_the_leak_count(router: FakeRouter) -> None:
    result = run("status", "--url", router.url, "--json")
    found = json.loads(result.output)
    assert found["leaked_pages"] == 0
    assert {worker["role"] for worker in found["workers"]} == {"prefill", "decode"}


def test_status_says_when_nothing_is_ready(router: FakeRouter) -> None:
    router.ready = False
    assert "not ready" in run("status", "--url", router.url).output


def test_status_shows_a_worker_that_is_down(router: FakeRouter) -> None:
    router.workers.pop()
    assert "down" in run("status", "--url", router.url).output


def test_status_of_a_dead_address_is_one_line() -> None:
    result = run("status", "--url", "http://127.0.0.1:9")
    assert result.exit_code == 1
    assert "does not answer" in result.output


def test_chat_reads_questions_from_standard_input(router: FakeRouter) -> None:
    publish(router)
    router.required_key = "k1"
    result = run("chat", "--no-think", "--temperature", "0", text="2 + 2?\n/quit\n")
    assert "The answer is 4." in result.output
    assert router.bodies[0]["temperature"] == 0
    assert router.bodies[0]["thinking"] == {"type": "disabled"}


def test_eval_scores_the_running_deployment(router: FakeRouter) -> None:
    publish(router)
    router.required_key = "k1"
    result = run("eval", "--samples", "3", "--task", "arithmetic", "--json", "--concurrency", "2")
    report = json.loads(result.stdout)[0]
    assert (report["task"], report["samples"], report["errors"]) == ("arithmetic", 3, 0)
    assert len(router.bodies) == 3
    assert router.bodies[0]["temperature"] == 0


def test_eval_counts_failed_requests_as_wrong(router: FakeRouter) -> None:
    router.truncate = True
    report = json.loads(run("eval", "--samples", "2", "--task", "recall", "--json", "--url", router.url).stdout)[0]
    assert (report["errors"], report["correct"]) == (2, 0)


def test_eval_refuses_an_unknown_task() -> None:
    result = run("eval", "--task", "poetry")
    assert result.exit_code == 2
    assert "arithmetic, recall, all" in result.output


def test_up_names_the_wrong_key(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("decode: {kv_budgett: 1GiB}")
    result = run("up", "--config", str(path))
    assert result.exit_code == 1
    assert "did you mean decode.kv_budget?" in result.output.replace("\n", " ")


def test_up_refuses_a_folder_without_checkpoint(tmp_path: Path) -> None:
    result = run("up", "--model", str(tmp_path), "--port", "0")
    assert result.exit_code == 1
    assert "config.json is missing" in result.output


def test_up_refuses_a_port_that_is_taken(router: FakeRouter, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    port = router.url.rpartition(":")[2]
    result = run("up", "--model", str(tmp_path), "--port", port)
    assert result.exit_code == 1
    assert "--port" in result.output


def test_up_refuses_a_second_deployment_of_the_name(router: FakeRouter) -> None:
    publish(router)
    result = run("up")
    assert result.exit_code == 1
    assert "already runs" in result.output


def test_logits_refuses_what_is_not_a_list_of_ids(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    for text in ("[]", "{}", '["a"]', "[true]", "nonsense"):
        path.write_text(text)
        result = run("logits", str(tmp_path), "--ids", str(path), "--out", str(tmp_path / "o.npy"))
        assert result.exit_code == 1
        assert str(path) in result.output.replace("\n", "")


def test_logits_names_an_output_folder_that_is_missing(tmp_path: Path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text("[1]")
    result = run("logits", str(tmp_path), "--ids", str(ids), "--out", str(tmp_path / "absent" / "o.npy"))
    assert result.exit_code == 1
    assert "its folder does not exist" in result.output.replace("\n", "")


def test_down_ends_what_a_killed_deployment_left_behind() -> None:
    orphan = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    ref = ProcessRef.of(orphan.pid)
    write_state(ClusterState("default", "http://x", "m", os.getpid(), 1.0, None, ((ref.pid, ref.created),), 1.0))
    assert read_state("default") is None
    result = run("down")
    orphan.wait(timeout=10)
    assert result.exit_code == 0
    assert "ended 1 processes" in result.output
    assert not state_path("default").exists()


def test_a_damaged_state_file_counts_as_absent() -> None:
    state_path("default").parent.mkdir(parents=True)
    state_path("default").write_text('{"pid": 1')
    assert read_state("default") is None
