"""`dsv4 bench experts` without a GPU: budgets, derived figures, tables, the plot of a finished run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cluster.bench.expert_plot import draw_experts, holds_experts
from cluster.bench.expert_results import ExpertResults, ExpertRow, PrefillCell, tables
from cluster.bench.experts import budgets_of, routed_by_token
from cluster.bench.results import BadResults
from workers.model.config import RouterKind
from workers.model.presets import V4_FLASH


def row(**changes: object) -> ExpertRow:
    values: dict[str, object] = {
        "routing": "v4-like", "budget": "64 GB", "slots": 4787, "share": 0.435, "batch": 4, "steps": 10, "ms": 20.0,
        "resident_ms": 5.0, "needed": 258.0, "hit_rate": 0.9, "misses": 25.8, "read_bytes": 3e8, "moved_bytes": 1e8,
        "identical": True,
    }  # fmt: skip
    return ExpertRow(**{**values, **changes})  # type: ignore[arg-type]


def test_a_budget_buys_whole_experts_and_never_less_than_one_token_needs() -> None:
    size = 13_369_344
    small, total, large = budgets_of(["0.01", "24t", "1000"], V4_FLASH, 9_000_000_000)
    assert small.slots == V4_FLASH.num_experts_per_tok
    assert total.slots == 15_000_000_000 // size and total.name == "24 GB total"
    assert large.slots == 43 * 256


def test_every_layer_of_the_benchmark_takes_its_experts_from_a_table() -> None:
    config = routed_by_token(V4_FLASH, 43)
    assert {config.router_kind(layer) for layer in range(43)} == {RouterKind.HASH}


def test_figures_of_a_row_follow_from_its_measurements() -> None:
    found = row()
    assert found.tokens_s == 200.0 and found.stall == 0.75 and found.link_gb_token == pytest.approx(0.1)


def test_a_difference_in_bits_is_seen_in_the_table() -> None:
    results = ExpertResults({"gpu": "x", "date": "d"}, {"layers": 43}, rows=[row(identical=False)])
    results.prefill.append(PrefillCell("64 GB", 4787, 8192, 1000.0, 2e9))
    screen = Console(file=io.StringIO(), width=160)
    for table in tables(results):
        screen.print(table)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "NO" in text and "8,192" in text and "4,787" in text


def test_a_finished_run_is_drawn_and_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    results = ExpertResults({"gpu": "x", "date": "d"}, {"layers": 43}, rows=[row(), row(slots=0, share=0.0)])
    results.write(file)
    assert holds_experts(file) and not holds_experts(tmp_path / "missing.json")
    pytest.importorskip("matplotlib")
    draw_experts(file, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    file.write_text(json.dumps({"rows": 3}))
    with pytest.raises(BadResults, match="run.json"):
        draw_experts(file, tmp_path / "run.png")
