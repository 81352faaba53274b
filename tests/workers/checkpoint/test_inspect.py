"""The report adds up and lists all problems at once."""

from __future__ import annotations

import json
from pathlib import Path

from tests.workers.checkpoint.conftest import TINY
from tests.workers.checkpoint.editing import poke, replace_tensor
from workers.checkpoint.inspect import UNKNOWN, inspect_directory
from workers.checkpoint.names import total_by_block, total_by_dtype, total_by_organ


def test_groups_equal_the_plan(tiny_dir: Path) -> None:
    report = inspect_directory(tiny_dir)
    organs = {organ.value: (total.tensors, total.bytes) for organ, total in total_by_organ(TINY).items()}
    dtypes = {dtype: (total.tensors, total.bytes) for dtype, total in total_by_dtype(TINY).items()}
    blocks = [(total.tensors, total.bytes) for total in total_by_block(TINY).values()]
    assert {g.name: (g.tensors, g.bytes) for g in report.organs} == organs
    assert {g.name: (g.tensors, g.bytes) for g in report.dtypes} == dtypes
    assert [(g.tensors, g.bytes) for g in report.shards] == blocks
    assert report.total.bytes == sum(size for _, size in blocks)
    assert report.unused == ("mtp.0",)


def test_report_is_complete_json(tiny_dir: Path) -> None:
    data = json.loads(json.dumps(inspect_directory(tiny_dir).to_json()))
    assert len(data["tensors"]) == data["total"]["tensors"]
    assert data["tensors"][0].keys() == {"name", "organ", "file", "dtype", "shape", "bytes"}
    assert data["config"]["layer_kinds"] == {"SLIDING": 1, "C4": 1, "C128": 1}


def test_all_problems_are_listed(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, "norm.weight", None)
    replace_tensor(tiny_dir, "stranger", ("F32", [1], bytes(4)))
    poke(tiny_dir, "layers.0.attn.wkv.scale", 0, b"\xff")
    poke(tiny_dir, "layers.2.attn.wo_a.weight", 0, b"\x7f")
    expected = {"norm.weight", "stranger"}
    headers_only = inspect_directory(tiny_dir)
    assert {problem.tensor for problem in headers_only.problems} == expected
    assert headers_only.organs[-1].name == UNKNOWN
    expected |= {"layers.0.attn.wkv.scale", "layers.2.attn.wo_a.weight"}
    assert {problem.tensor for problem in inspect_directory(tiny_dir, values=True).problems} == expected


def test_unreadable_shard_does_not_hide_the_others(tiny_dir: Path) -> None:
    shards = sorted(tiny_dir.glob("*.safetensors"))
    shards[0].write_bytes(b"")
    shards[3].unlink()
    report = inspect_directory(tiny_dir)
    assert {problem.file for problem in report.problems[:2]} == {str(shards[0]), str(shards[3])}
    assert len(report.shards) == len(shards) - 2
