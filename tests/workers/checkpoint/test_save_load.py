"""What is written is read back exactly, in every accepted form, each byte once."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.workers.checkpoint.conftest import TINY, random_tensors
from tests.workers.checkpoint.editing import edit_json, replace_tensor
from workers.checkpoint.check import check_directory
from workers.checkpoint.index import INDEX_NAME
from workers.checkpoint.load import iter_tensors, load_named
from workers.checkpoint.names import Encoding, tensor_table, total_by_block
from workers.checkpoint.progress import Progress
from workers.checkpoint.save import plan_shards, save_official
from workers.model.config import ModelConfig
from workers.model.presets import NANO, V4_FLASH
from workers.reference.quant import e8m0_decode, fp4_weight_fake_quant, fp8_weight_fake_quant


def _stored_value(config: ModelConfig, name: str, values: Tensor) -> Tensor:
    """What a tensor's official form can hold of `values`."""
    match tensor_table(config)[name].encoding:
        case Encoding.FP4:
            return fp4_weight_fake_quant(values)
        case Encoding.FP8:
            return fp8_weight_fake_quant(values)
        case Encoding.BF16:
            return values.to(torch.bfloat16).float()
        case _:
            return values


@pytest.mark.parametrize("shard_bytes", [None, 30_000, 1 << 30])
def test_load_returns_the_fake_quantised_values(
    tmp_path: Path, tiny_tensors: dict[str, Tensor], shard_bytes: int | None
) -> None:
    save_official(tmp_path, TINY, tiny_tensors, shard_bytes)
    config, loaded = load_named(tmp_path)
    assert config == TINY
    assert set(loaded) == set(tiny_tensors)
    for name, values in tiny_tensors.items():
        assert torch.equal(loaded[name], _stored_value(TINY, name, values)), name


def test_saving_what_was_loaded_repeats_every_byte(
    tmp_path: Path, tiny_dir: Path, file_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    config, loaded = load_named(tiny_dir)
    save_official(tmp_path / "again", config, loaded)
    assert file_bytes(tmp_path / "again") == file_bytes(tiny_dir)


def test_files_are_those_of_the_safetensors_library(tiny_dir: Path) -> None:
    _, loaded = load_named(tiny_dir)
    foreign: dict[str, Tensor] = {}
    for shard in tiny_dir.glob("*.safetensors"):
        foreign |= load_file(shard)
    assert set(foreign) == {entry[0] for spec in tensor_table(TINY).values() for entry in spec.stored()}
    assert foreign["layers.0.ffn.experts.0.w1.weight"].dtype == torch.int8
    assert foreign["layers.0.ffn.experts.0.w1.scale"].dtype == torch.float8_e8m0fnu
    for name, spec in tensor_table(TINY).items():
        if spec.encoding in (Encoding.BF16, Encoding.F32):
            assert torch.equal(foreign[name].float(), loaded[name]), name


def test_raw_tensors_are_the_stored_bytes(tiny_dir: Path) -> None:
    raw = {item.spec.name: item for item in iter_tensors(tiny_dir)}
    foreign: dict[str, Tensor] = {}
    for shard in tiny_dir.glob("*.safetensors"):
        foreign |= load_file(shard)
    assert set(raw) == set(tensor_table(TINY))
    for name, item in raw.items():
        assert item.weight.dtype == foreign[name].dtype
        assert torch.equal(item.weight.view(torch.uint8), foreign[name].view(torch.uint8)), name
        if item.scale is not None:
            assert torch.equal(item.scale, foreign[item.spec.scale_name].view(torch.uint8)), name


@pytest.mark.parametrize("reader", ["load", "iterate"])
def test_every_payload_byte_is_read_once_and_reported(tiny_dir: Path, reader: str) -> None:
    seen: list[Progress] = []
    if reader == "load":
        load_named(tiny_dir, on_progress=seen.append)
    else:
        for _ in iter_tensors(tiny_dir, on_progress=seen.append):
            pass
    total = sum(total.bytes for total in total_by_block(TINY).values())
    assert seen[-1].done_bytes == seen[-1].total_bytes == total
    assert [p.tensor for p in seen] == list(dict.fromkeys(p.tensor for p in seen))
    assert all(a.done_bytes < b.done_bytes for a, b in zip(seen, seen[1:], strict=False))


def test_no_byte_is_read_twice(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[int, int]] = []
    real = os.preadv

    def recording(fd: int, buffers: list[memoryview], offset: int) -> int:
        got = real(fd, buffers, offset)
        ranges.append((os.fstat(fd).st_ino * 2**40 + offset, got))
        return got

    monkeypatch.setattr(os, "preadv", recording)
    load_named(tiny_dir)
    payload = sum(tensor.nbytes for tensor in check_directory(tiny_dir).index.tensors.values())
    assert sum(size for _, size in ranges) == payload
    ordered = sorted(ranges)
    assert all(a + size <= b for (a, size), (b, _) in zip(ordered, ordered[1:], strict=False))


def test_draft_blocks_can_be_left_out(tiny_dir: Path) -> None:
    _, loaded = load_named(tiny_dir, draft_blocks=False)
    assert set(loaded) == {name for name in tensor_table(TINY) if not name.startswith("mtp.")}


def test_absent_draft_block_is_noted_and_loads(tiny_dir: Path) -> None:
    index = json.loads((tiny_dir / INDEX_NAME).read_text())["weight_map"]
    for shard in {file for name, file in index.items() if name.startswith("mtp.")}:
        (tiny_dir / shard).unlink()
    edit_json(tiny_dir / INDEX_NAME, lambda d: [d["weight_map"].pop(n) for n in index if n.startswith("mtp.")])
    checked = check_directory(tiny_dir)
    assert not checked.problems and any("mtp.0" in note for note in checked.notes)
    assert len(load_named(tiny_dir)[1]) == sum(not n.startswith("mtp.") for n in tensor_table(TINY))


def test_base_checkpoint_with_fp8_experts_and_fp32_scales_loads(tmp_path: Path, seed: int) -> None:
    config = dataclasses.replace(TINY, expert_dtype="fp8")
    save_official(tmp_path, config, random_tensors(config, seed))
    _, expected = load_named(tmp_path)
    for item in list(iter_tensors(tmp_path)):
        if item.scale is not None:
            data = e8m0_decode(item.scale).view(torch.uint8).numpy().tobytes()
            replace_tensor(tmp_path, item.spec.scale_name, ("F32", list(item.scale.shape), data))
    edit_json(tmp_path / "config.json", lambda d: d.pop("expert_dtype"))
    loaded_config, loaded = load_named(tmp_path)
    assert loaded_config.expert_dtype == "fp8"
    assert all(torch.equal(loaded[name], values) for name, values in expected.items())


def test_missing_expert_dtype_is_inferred_as_fp4(tiny_dir: Path) -> None:
    edit_json(tiny_dir / "config.json", lambda d: d.pop("expert_dtype"))
    assert load_named(tiny_dir)[0].expert_dtype == "fp4"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["layers.1.ffn.experts.3.w2", "layers.2.attn.wo_b"])
def test_plain_tensor_without_scale_takes_a_quantised_one_s_place(
    tiny_dir: Path, tiny_tensors: dict[str, Tensor], name: str, dtype: torch.dtype
) -> None:
    plain = tiny_tensors[f"{name}.weight"].to(dtype)
    tag = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    data = plain.view(torch.uint8).numpy().tobytes()
    replace_tensor(tiny_dir, f"{name}.weight", (tag, list(plain.shape), data))
    replace_tensor(tiny_dir, f"{name}.scale", None)
    assert torch.equal(load_named(tiny_dir)[1][f"{name}.weight"], plain.float())


def test_single_file_checkpoint_loads(tmp_path: Path, tiny_tensors: dict[str, Tensor]) -> None:
    save_official(tmp_path, TINY, tiny_tensors, shard_bytes=1 << 30)
    _, expected = load_named(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    _, loaded = load_named(tmp_path)
    assert all(torch.equal(loaded[name], values) for name, values in expected.items())


def test_release_shards_are_one_per_block_and_pairs_stay_together() -> None:
    shards = plan_shards(V4_FLASH)
    assert len(shards) == 46
    assert all(len({spec.block for spec in shard}) == 1 for shard in shards)


def test_shards_respect_the_size_limit() -> None:
    limit = 2_000_000
    shards = plan_shards(NANO, limit)
    assert sum(len(shard) for shard in shards) == len(tensor_table(NANO))
    assert all(sum(spec.stored_bytes for spec in shard) <= limit for shard in shards)
    assert len(plan_shards(NANO, 1 << 30)) == 1


def test_save_refuses_tensors_that_are_not_the_config_s(tmp_path: Path, tiny_tensors: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="not part of the config.*extra"):
        save_official(tmp_path / "a", TINY, tiny_tensors | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing.*norm\.weight"):
        save_official(tmp_path / "a", TINY, {n: t for n, t in tiny_tensors.items() if n != "norm.weight"})
    with pytest.raises(ValueError, match=r"norm\.weight: shape"):
        save_official(tmp_path / "a", TINY, tiny_tensors | {"norm.weight": torch.zeros(3)})
    assert not (tmp_path / "a").exists()


def test_a_failed_save_leaves_the_old_checkpoint(
    tiny_dir: Path, tiny_tensors: dict[str, Tensor], file_bytes: Callable[[Path], dict[str, bytes]]
) -> None:
    before = file_bytes(tiny_dir)

    def fail(progress: Progress) -> None:
        if progress.done_bytes > progress.total_bytes // 2:
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        save_official(tiny_dir, TINY, {n: t * 2 for n, t in tiny_tensors.items()}, on_progress=fail)
    assert file_bytes(tiny_dir) == before


def test_saving_over_a_checkpoint_removes_its_other_shards(tiny_dir: Path, tiny_tensors: dict[str, Tensor]) -> None:
    (tiny_dir / "tokenizer.json").write_text("{}")
    save_official(tiny_dir, TINY, tiny_tensors, shard_bytes=1 << 30)
    assert sorted(path.name for path in tiny_dir.iterdir()) == [
        "config.json",
        "model-00001-of-00001.safetensors",
        INDEX_NAME,
        "tokenizer.json",
    ]


def test_too_small_a_disk_is_refused_before_writing(
    tmp_path: Path, tiny_tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="not enough space.*1,000 free"):
        save_official(tmp_path / "new", TINY, tiny_tensors)
    assert not (tmp_path / "new").exists()
