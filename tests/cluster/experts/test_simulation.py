"""The simulation's tables: every policy at every budget beside its bounds, in text, JSON and a picture."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.cli_experts import app
from cluster.experts.simulation import SHARES, generated, published_at, run, table
from workers.experts.policy import LFRU, LRU, STATIC
from workers.experts.profile import step_shares

SMALL = ["--steps", "40", "--layers", "2", "--shares", "5.5,50", "--policies", "lru,static"]


def test_every_budget_has_its_bounds_and_every_policy() -> None:
    made = run("v4-like", generated("v4-like", steps=60, layers=2, batch=1, seed=3), policies=[LRU, LFRU, STATIC])
    assert made.shares == SHARES and made.recorded_steps == 15
    for share in SHARES:
        names = [cell.hits.policy for cell in made.cells if cell.share == share]
        assert names == ["belady", "best static", "lru", "lfru", "static"]
    assert {cell.hits.steps for cell in made.cells} == {45}


def test_a_cold_start_never_beats_belady() -> None:
    made = run("uniform", generated("uniform", steps=60, layers=2, batch=2, seed=3), policies=[LRU, LFRU])
    assert all(cell.hits.rate <= cell.belady for cell in made.cells if cell.hits.policy in ("lru", "lfru"))


def test_the_table_names_the_published_points() -> None:
    made = run("v4-like", generated("v4-like", steps=20, layers=1, batch=1, seed=3), policies=[LRU])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(made))
    text = console.export_text()
    assert "published (V4)" in text and "40% at 5.5%" in text
    assert published_at(0.11) == 0.59 and published_at(0.5) is None


def test_the_profile_counts_steps() -> None:
    trace = generated("uniform", steps=30, layers=1, batch=4, seed=0)
    shares = step_shares(trace)
    assert 0 < shares.max() <= 1 and shares.sum() == sum(len(pairs) for pairs in trace.all_needed()) / 30


def test_the_command_writes_json_and_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = ["--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png")]
    result = CliRunner().invoke(app, ["simulate", *SMALL, *files])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "s.json").read_text())
    assert [made["name"] for made in found] == ["v4-like", "uniform"]
    assert found[0]["published"][0] == {"share": 0.055, "rate": 0.4}
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_file_is_replayed_and_a_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "chat.npz"
    generated("v4-like", steps=24, layers=2, batch=1, seed=1).save(path)
    result = CliRunner().invoke(app, ["simulate", str(path), "--policies", "lru", "--shares", "10"])
    assert result.exit_code == 0 and "chat routing" in result.output
    path.write_bytes(b"nothing")
    result = CliRunner().invoke(app, ["simulate", str(path)])
    assert result.exit_code == 1 and "chat.npz" in result.output


@pytest.mark.parametrize("arguments", [["--policies", "best"], ["--shares", "0"], ["--shares", "x"]])
def test_wrong_options_exit_with_two(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["simulate", *SMALL, *arguments]).exit_code == 2
