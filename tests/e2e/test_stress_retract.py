"""`dsv4 stress retract` as a user runs it: a deployment of its own, real workers, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.processes import descendants, wait_gone
from tests.architecture.source_tree import ROOT
from tests.e2e.deployment import LIMIT_S, environment

pytestmark = pytest.mark.timeout(LIMIT_S)


def command(model: Path, *arguments: str) -> list[str]:
    sizes = ("--samples", "6", "--interval", "8", "--max-tokens", "140", "--seed", "5")
    return [sys.executable, "-m", "cluster", "stress", "retract", "--model", str(model), *sizes, *arguments]


@pytest.mark.slow
def test_retracted_answers_are_the_plain_ones_and_damaged_ones_are_not(model: Path, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = subprocess.run(
        command(model, "--mutate", "skip:c4_indexer", "--json", str(figures)),
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(figures.read_text())
    plain, retracted = found["runs"]
    assert plain["errors"] == retracted["errors"] == 0
    assert (retracted["identical"], retracted["leaked"]) == (6, 0)
    assert retracted["score"] == plain["score"]
    assert retracted["report"]["events"] >= 6 * 5
    assert found["mutations"][0]["caught"]["kind"] in ("logits", "token")


@pytest.mark.slow
def test_sigterm_ends_the_command_with_its_table_and_every_process(model: Path, tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("wb") as out:
        process = subprocess.Popen(
            [*command(model), "--samples", "500"], cwd=ROOT, env=environment(tmp_path), stdout=out, stderr=out
        )
        deadline = time.monotonic() + 200
        while b"/v1" not in (tmp_path / "out.txt").read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out.txt").read_text()
            time.sleep(0.05)
        started = descendants(process.pid)
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        status = process.wait(timeout=60)
    text = (tmp_path / "out.txt").read_text()
    assert status == 128 + signal.SIGTERM, text
    assert "plain x1" in text and "interrupted" in text and "Traceback" not in text
    assert list(wait_gone(started, timeout_s=5.0)) == []
