"""A model without a checkpoint, served with a budget of experts: load test and forced retracts, as the mission runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT
from tests.bench.mission import Wanted, levels_of
from tests.e2e.deployment import LIMIT_S, environment

CONFIG = """
model: synthetic:nano:layers=5:seed=2
device: cpu
router: {port: 0}
prefill: {threads: 1, chunk_tokens: 512}
decode: {threads: 1, max_running: 16, kv_budget: 256MiB}
experts: {slots: 20, host: 2MiB, verify: true}
"""


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S)
def test_mission_in_small(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    sizes = ("--levels", "3:96:8x2,1:64:8:apart", "--stress-samples", "4", "--stress-interval", "8")
    more = ("--stress-tokens", "24", "--stress-context", "1024", "--gpus", "0", "--json", str(tmp_path / "found.json"))
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.mission", "--config", str(tmp_path / "config.yaml"), *sizes, *more],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert json.loads(done.stdout.splitlines()[-1]) == found
    assert 0 < found["ready_s"] < found["first_token_s"]
    first, second = found["levels"]
    assert (first["requests"], first["errors"], first["completion_tokens"]) == (6, 0, 48)
    assert (second["requests"], second["errors"], second["completion_tokens"]) == (1, 0, 8)
    assert abs(first["prompt_tokens"] / 6 - 96) < 24
    assert first["workers"]["decode-0"]["expert_lookups"] > first["workers"]["decode-0"]["expert_hits"] > 0
    assert first["peer"] == second["peer"] == "off", "CPU workers have none"
    assert not found["left_out"] and not found["failed"]
    plain, retracted = found["stress"]["runs"]
    assert (retracted["identical"], retracted["leaked"]) == (4, 0)
    assert retracted["report"]["events"] >= 4
    assert plain["completion_tokens"] == 4 * 24


def test_levels_are_read_from_text() -> None:
    assert levels_of("8:1024:64,128:8192:1024x2:apart") == [
        Wanted(8, 1024, 64, 1, False),
        Wanted(128, 8192, 1024, 2, True),
    ]
    for text in ("", "8:1024", "8:1024:64:on", "a:1:1"):
        with pytest.raises(ValueError, match="is not like"):
            levels_of(text)
