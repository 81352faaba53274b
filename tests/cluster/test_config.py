"""The YAML file is read strictly, and every error names the key that is wrong."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from cluster import config as config_module
from cluster.config import (
    ClusterConfig,
    ConfigError,
    Device,
    PrecisionMode,
    config_from_mapping,
    load_config,
    parse_bytes,
    parse_seconds,
)
from tests.architecture.source_tree import ROOT

EXAMPLES = sorted((ROOT / "deploy").glob("*.yaml"))


def build(document: object) -> ClusterConfig:
    return config_from_mapping(document, source="test.yaml", base=Path("/srv"))


def test_empty_file_is_the_laptop_default(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("")
    loaded = load_config(path)
    assert (loaded.prefill.count, loaded.decode.count, loaded.device) == (1, 1, Device.AUTO)
    assert loaded.served_name == "dsv4-nano"


def test_values_with_units_and_nested_keys_are_read() -> None:
    loaded = build(
        {
            "model": "weights/flash",
            "precision": "fp32",
            "decode": {"count": 2, "gpus": 1, "kv_budget": "24GiB", "lease": "10s"},
            "router": {"port": 9000, "api_keys": ["a", "b"]},
        }
    )
    assert loaded.model == Path("/srv/weights/flash")
    assert loaded.precision is PrecisionMode.FP32
    assert loaded.decode.kv_budget == 24 * 2**30
    assert (loaded.decode.gpus, loaded.decode.lease) == (1.0, 10.0)
    assert loaded.router.api_keys == ("a", "b")


@pytest.mark.parametrize(
    ("document", "key", "needle"),
    [
        ({"decode": {"kv_budgett": 1}}, "decode.kv_budgett", "did you mean decode.kv_budget?"),
        ({"prefil": {}}, "prefil", "did you mean prefill?"),
        ({"zzz": 1}, "zzz", "known keys: model"),
        ({"source": "x"}, "source", "unknown key"),
        ({"decode": {"count": "two"}}, "decode.count", "expected an integer"),
        ({"decode": {"count": True}}, "decode.count", "expected an integer"),
        ({"decode": {"gpus": "one"}}, "decode.gpus", "expected a number"),
        ({"decode": {"kv_budget": "lots"}}, "decode.kv_budget", "a size such as 512MiB"),
        ({"decode": {"kv_budget": "5 parsecs"}}, "decode.kv_budget", "a size such as 512MiB"),
        ({"decode": {"lease": [1]}}, "decode.lease", "expected a number with a unit"),
        ({"decode": {"lease": "0s"}}, "decode.lease", "more than 0 s"),
        ({"device": "tpu"}, "device", "expected one of auto, cpu, cuda"),
        ({"model": 7}, "model", "expected a path"),
        ({"router": {"api_keys": "secret"}}, "router.api_keys", "expected a list of strings"),
        ({"router": []}, "router", "expected a mapping"),
        ({"decode": {"count": 0}}, "decode.count", "at least 1"),
        ({"device": "cpu", "decode": {"gpus": 1}}, "decode.gpus", "with device: cpu"),
        ({"device": "cuda", "decode": {"gpus": 0}}, "decode.gpus", "with device: cuda"),
        ({"prefill": {"port": 8000}}, "prefill.port", "also taken by router.port"),
        ({"prefill": {"port": 7999, "count": 2}}, "prefill.port", "also taken by router.port"),
        ({"router": {"port": 70000}}, "router.port", "expected a port"),
    ],
)
def test_wrong_settings_name_their_key(document: object, key: str, needle: str) -> None:
    with pytest.raises(ConfigError) as failure:
        build(document)
    assert failure.value.key == key
    assert needle in str(failure.value)
    assert str(failure.value).startswith("test.yaml: ")


def test_broken_yaml_and_missing_file_are_config_errors(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(broken)
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), (5, 5), ("1KiB", 1024), ("1.5 GB", 1_500_000_000), ("2gib", 2**31)]
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(("text", "seconds"), [(3, 3.0), ("250ms", 0.25), ("2m", 120.0), ("1.5 s", 1.5)])
def test_durations(text: float | str, seconds: float) -> None:
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_loads(path: Path) -> None:
    assert load_config(path).source == str(path)


def test_there_is_an_example_for_each_documented_host() -> None:
    assert {path.name for path in EXAMPLES} >= {"local.yaml", "h200-x1.yaml", "h200-x2.yaml"}


def test_every_setting_has_a_docstring() -> None:
    tree = ast.parse(Path(config_module.__file__).read_text())
    silent = []
    for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        for item, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign) or "Settings" in ast.unparse(item.annotation):
                continue
            if not (isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)):
                silent.append(f"{node.name}.{ast.unparse(item.target)}")
    assert not silent


def test_experts_of_a_file_reach_the_worker(tmp_path: Path) -> None:
    experts = {"hbm": "510KiB", "host": "2MiB", "source": "residency", "preload": "hot.npz", "policy": "static"}
    found = build({"device": "cpu", "experts": experts}).experts
    assert (found.hbm, found.host, found.preload) == (510 * 1024, 2 * 2**20, "/srv/hot.npz")
    assert build({"experts": {"slots": 9, "preload": "prefix"}}).experts.preload == "prefix"
    assert build({}).experts.hbm is None


@pytest.mark.parametrize(
    ("experts", "key"),
    [
        ({"hbm": "1MiB", "slots": 9}, "experts.slots"),
        ({"slots": 9, "source": "residency"}, "experts.host"),
        ({"slots": 9, "policy": "static"}, "experts.policy"),
        ({"host": "1MiB"}, "experts.host"),
        ({"slots": 0}, "experts.slots"),
        ({"slots": 9, "preload": 3}, "experts.preload"),
        ({"slotz": 9}, "experts.slotz"),
        ({"slots": 9, "policy": "best"}, "experts.policy"),
    ],
)
def test_experts_that_contradict_each_other_are_refused(experts: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError) as failure:
        build({"experts": experts})
    assert failure.value.key == key
