"""`dsv4 checkpoint inspect` and `synth` as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli_checkpoint import app

runner = CliRunner()


@pytest.fixture(scope="module")
def nano_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cli") / "nano"
    result = runner.invoke(app, ["synth", "--preset", "nano", "--layer-ids", "0,2,3", "--out", str(directory)])
    assert result.exit_code == 0, result.output
    return directory


@pytest.mark.parametrize(
    ("preset", "tensors", "num_bytes"),
    [("v4-flash", 69_187, 159_609_485_896), ("v4-pro", 145_116, 864_704_792_696)],
)
def test_plan_prints_the_published_totals_and_writes_nothing(
    tmp_path: Path, preset: str, tensors: int, num_bytes: int
) -> None:
    result = runner.invoke(app, ["synth", "--preset", preset, "--plan", "--json", "--out", str(tmp_path / "x")])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert (data["tensors"], data["bytes"], data["written_to"]) == (tensors, num_bytes, None)
    assert sum(organ["bytes"] for organ in data["organs"].values()) == num_bytes
    assert not (tmp_path / "x").exists()


def test_plan_of_the_table_form() -> None:
    result = runner.invoke(app, ["synth", "--preset", "v4-flash", "--plan"])
    assert "159,609,485,896 bytes planned" in result.stdout and "routed experts" in result.stdout


def test_inspect_of_a_sound_directory(nano_dir: Path) -> None:
    result = runner.invoke(app, ["inspect", str(nano_dir), "--values"])
    assert result.exit_code == 0, result.output
    assert "no problems" in result.stdout and "routed experts" in result.stdout
    assert "model-00005-of-00005.safetensors" in result.stdout


def test_inspect_json(nano_dir: Path) -> None:
    result = runner.invoke(app, ["inspect", str(nano_dir), "--json"])
    data = json.loads(result.stdout)
    assert result.exit_code == 0 and data["problems"] == []
    assert len(data["tensors"]) == data["total"]["tensors"]


def test_inspect_of_a_damaged_directory_exits_with_1(tmp_path: Path, nano_dir: Path) -> None:
    for path in nano_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = runner.invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1
    assert f"problem: {shard}" in result.stdout and "truncated" in result.stdout
    problems = json.loads(runner.invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)["problems"]
    assert problems[0]["file"] == str(shard) and len(problems) > 20


def test_inspect_of_no_directory_exits_with_1(tmp_path: Path) -> None:
    result = runner.invoke(app, ["inspect", str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and "config.json" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "v5"], "v4-flash"),
        (["--preset", "nano"], "--out"),
        (["--preset", "nano", "--plan", "--layer-ids", "a,b"], "0,2,3"),
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str], words: str) -> None:
    result = runner.invoke(app, ["synth", *arguments])
    assert result.exit_code == 2 and words in result.output


def test_layer_beyond_the_model_exits_with_1() -> None:
    result = runner.invoke(app, ["synth", "--preset", "nano", "--plan", "--layer-ids", "0,8"])
    assert result.exit_code == 1 and "0..7" in result.output


def test_existing_checkpoint_is_kept_unless_forced(nano_dir: Path) -> None:
    arguments = ["synth", "--preset", "nano", "--layer-ids", "0,2,3", "--out", str(nano_dir)]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 1 and "--force" in result.output
    assert runner.invoke(app, [*arguments, "--force"]).exit_code == 0


def test_disk_too_small_exits_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
    result = runner.invoke(app, ["synth", "--preset", "v4-flash", "--out", str(tmp_path / "x")])
    assert result.exit_code == 1 and "not enough space" in result.output
    assert not (tmp_path / "x").exists()
