"""Recorded routing is that of the batch: every place generates in every step, and nothing else is in the trace."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cluster.cli_experts import app
from cluster.config import BUNDLED_MODEL
from cluster.errors import ClusterError
from cluster.experts.record import Prompt, file_prompts, record, task_prompts
from workers.experts.trace import RoutingTrace
from workers.model_bundle import ModelBundle


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle.load(BUNDLED_MODEL)


def prompts(count: int) -> list[Prompt]:
    return [Prompt(tuple(range(20 + n, 40 + 2 * n)), 6) for n in range(count)]


def test_a_batch_is_recorded_as_its_sequences_alone(bundle: ModelBundle) -> None:
    """Until the first place changes hands, place b of the batch is prompt b by itself."""
    both = record(bundle, prompts(2), batch=2, max_steps=4, source="two")
    assert both.experts.shape == (4, 8, 2, 3) and both.num_hash_layers == 2
    for n in range(2):
        alone = record(bundle, prompts(2)[n : n + 1], batch=1, max_steps=4, source="one")
        assert np.array_equal(alone.experts[:, :, 0], both.experts[:, :, n])


def test_a_place_goes_to_the_next_prompt(bundle: ModelBundle) -> None:
    trace = record(bundle, prompts(4), batch=2, max_steps=100, source="four")
    assert trace.num_steps >= 2 and not [n for n in trace.all_needed() if len(n) > 8 * 6]


def test_too_few_prompts_are_named(bundle: ModelBundle) -> None:
    with pytest.raises(ClusterError, match="1 usable prompts, a batch of 2"):
        record(bundle, prompts(1), batch=2, max_steps=4, source="")


def test_prompts_come_from_tasks_or_lines(tmp_path: Path) -> None:
    assert len(task_prompts(BUNDLED_MODEL, "arithmetic", 3, 0)) == 3
    (tmp_path / "p.txt").write_text("How many apples?\n\n" + json.dumps([5, 6, 7]) + "\n")
    text, ids = file_prompts(BUNDLED_MODEL, tmp_path / "p.txt", 9)
    assert len(text.token_ids) > 3 and ids == Prompt((5, 6, 7), 9)


def test_the_command_writes_a_trace(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(json.dumps([5, 6, 7]) + "\n")
    arguments = ["--prompts", str(tmp_path / "p.txt"), "--steps", "3", "--max-tokens", "8"]
    result = CliRunner().invoke(app, ["record", str(tmp_path / "t.npz"), *arguments])
    assert result.exit_code == 0, result.output
    trace = RoutingTrace.load(tmp_path / "t.npz")
    assert trace.num_steps <= 3 and trace.source == "dsv4-nano, p.txt, greedy answers"
    result = CliRunner().invoke(app, ["record", str(tmp_path / "no" / "t.npz")])
    assert result.exit_code == 1 and "folder" in result.output


def test_repack_writes_a_file_for_experts_packed(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["repack", str(tmp_path / "e.bin")])
    assert result.exit_code == 0 and "96 experts" in result.output
