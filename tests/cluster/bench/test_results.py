"""Results survive their file, say what was extrapolated, and can be drawn where there is no GPU."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from cluster.bench.floors import Rates
from cluster.bench.results import (
    BadResults,
    DecodeRow,
    KernelRow,
    LongPrompt,
    Machine,
    Memory,
    Peer,
    PrefillRow,
    Results,
    Setup,
    Start,
    read_results,
)
from cluster.bench.tables import all_tables
from cluster.cli_bench import app

runner = CliRunner()


@pytest.fixture
def results() -> Results:
    kernels = [
        KernelRow(phase, op, "c4", tokens, 4096, 21, ms, 1e7, 2e7, 1e7, ms / 2)
        for phase, tokens in (("decode", 1), ("prefill", 8192))
        for op, ms in (("project_x", 0.004), ("expert_gate_up", 0.02))
    ]
    return Results(
        Machine("NVIDIA H200", 141 << 30, "2026-11-21", {"torch": "2.11"}),
        Setup("v4-flash", 24, 43, 256, 256, 64, 8192, 0),
        Rates(4200.0, 790.0, 1400.0),
        memory=Memory(86 << 30, 1 << 30, 2 << 30, 90 << 30, 141 << 30),
        start=Start(12.5, 60, 2, 3.0),
        kernels=kernels,
        decode=[DecodeRow(1, 4096, 2.0, 1.5, 2.7, 6.0), DecodeRow(16, 4096, 9.0, 7.0, 12.6)],
        prefill=[PrefillRow(4096, 1, 0, 150.0, 6e13, 1.1e14, 80.0, 95 << 30)],
        long_prompt=LongPrompt(65536, 8192, 4.0, 256, 0.9, 96 << 30, 95 << 30, 260_000_000, 0.005, 0.006, True),
        peer=Peer("5.17.0", [128, 4], 4096, {"eager": 10.1, "batched_mm": 3.9}, 4096, {"eager": 24.0}, 60 << 30),
    )


def shown(results: Results) -> str:
    text = io.StringIO()
    console = Console(width=200, file=text)
    for table in all_tables(results):
        console.print(table)
    return text.getvalue()


def test_results_survive_their_file(tmp_path: Path, results: Results) -> None:
    results.write(tmp_path / "r.json")
    assert read_results(tmp_path / "r.json") == results


def test_a_cut_model_is_extrapolated_by_its_floor_and_says_so(results: Results) -> None:
    assert results.decode[0].full_ms == pytest.approx(2.0 * 2.7 / 1.5)
    assert results.decode[1].tokens_per_s == pytest.approx(16e3 / (9.0 * 12.6 / 7.0))
    with_head = DecodeRow(1, 4096, 1.58, 0.57, 2.66, 6.0, head_ms=0.27, head_floor_ms=0.25)
    assert with_head.full_ms == pytest.approx(0.27 + 1.31 * 2.41 / 0.32)
    assert "43 layers (extrapolated)" in shown(results) and "24 of 43 layers" in shown(results)


def test_a_whole_model_is_not_extrapolated(results: Results) -> None:
    results.setup = dataclasses.replace(results.setup, layers=43)
    results.decode = [DecodeRow(1, 4096, 3.6, 2.7, 2.7, 6.0)]
    assert results.decode[0].full_ms == pytest.approx(3.6)
    assert "extrapolated" not in shown(results)


def test_shared_expert_bytes_are_stated(results: Results) -> None:
    results.setup = dataclasses.replace(results.setup, experts_held=200)
    assert "200 different experts a layer in memory; the other 56 share" in shown(results)


def test_tables_name_the_peer_and_its_distance(results: Results) -> None:
    text = shown(results)
    assert "transformers 5.17.0" in text and "decode here is 47x as fast (121x as eager)" in text
    results.peer = Peer("5.17.0", failure="OutOfMemoryError: of something")
    assert "OutOfMemoryError" in shown(results)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format": 99}'])
def test_a_foreign_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(BadResults):
        read_results(path)
    assert runner.invoke(app, ["show", str(path)]).exit_code == 1


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    done = runner.invoke(app, ["plot", str(tmp_path / "none.json")])
    assert done.exit_code == 1 and "Traceback" not in done.output


def test_the_plot_is_a_png(tmp_path: Path, results: Results) -> None:
    pytest.importorskip("matplotlib")
    results.write(tmp_path / "r.json")
    done = runner.invoke(app, ["plot", str(tmp_path / "r.json")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_run_without_kernels_still_draws_decode(tmp_path: Path, results: Results) -> None:
    pytest.importorskip("matplotlib")
    results.kernels = []
    results.write(tmp_path / "r.json")
    assert runner.invoke(app, ["plot", str(tmp_path / "r.json"), "--out", str(tmp_path / "x.svg")]).exit_code == 0


@pytest.mark.parametrize(
    "options",
    [
        ["--preset", "v5"],
        ["--layers", "99"],
        ["--batches", "1,x"],
        ["--contexts", "0"],
        ["--parts", "kernels,coffee"],
        ["--kernels-at", "1x4096"],
        ["--experts-held", "12"],
    ],
)
def test_wrong_options_exit_with_2(options: list[str]) -> None:
    assert runner.invoke(app, ["model", *options]).exit_code == 2
