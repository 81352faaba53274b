"""Random checkpoints are sound, repeatable, and cut to layers without changing their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.workers.checkpoint.conftest import TINY
from workers.checkpoint.inspect import inspect_directory
from workers.checkpoint.load import load_named
from workers.checkpoint.names import Encoding, tensor_table, total_by_block
from workers.checkpoint.synth import cut_layers, planned_config, synthesise
from workers.errors import BadConfig
from workers.model.config import DraftConfig, LayerKind
from workers.model.presets import NANO, V4_FLASH, V4_PRO


@pytest.fixture
def synth_dir(tmp_path: Path) -> Path:
    synthesise(tmp_path / "synth", TINY, seed=3)
    return tmp_path / "synth"


def test_result_is_sound_and_complete(synth_dir: Path) -> None:
    report = inspect_directory(synth_dir, values=True)
    assert not report.problems
    assert {t["name"] for t in report.tensors} == {e[0] for s in tensor_table(TINY).values() for e in s.stored()}


def test_nano_weights_have_sane_sizes(tmp_path: Path) -> None:
    synthesise(tmp_path, NANO)
    _, tensors = load_named(tmp_path)
    for name, spec in tensor_table(NANO).items():
        values = tensors[name].float()
        if spec.encoding in (Encoding.FP4, Encoding.FP8):
            assert 0.5 < values.std() * spec.shape[-1] ** 0.5 < 2.5, name
            assert values.mean().abs() < 0.2 * values.std(), name
    assert tensors["layers.3.attn_norm.weight"].mean() == pytest.approx(1.0, abs=0.1)
    assert tensors["embed.weight"].std() == pytest.approx(1.0, abs=0.02)
    assert tensors["layers.5.attn.compressor.wkv.weight"].std() == pytest.approx(1 / 16, rel=0.02)
    table = tensors["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == NANO.num_experts_per_tok for row in table.tolist())
    assert torch.bincount(table.flatten(), minlength=12).min() > 0


def test_same_seed_same_bytes(tmp_path: Path, synth_dir: Path, file_bytes: Callable[[Path], dict[str, bytes]]) -> None:
    synthesise(tmp_path / "again", TINY, seed=3)
    synthesise(tmp_path / "other", TINY, seed=4)
    assert file_bytes(tmp_path / "again") == file_bytes(synth_dir) != file_bytes(tmp_path / "other")


def test_cut_keeps_the_values_of_its_layers(tmp_path: Path, synth_dir: Path) -> None:
    config = synthesise(tmp_path / "cut", TINY, layer_ids=(0, 2), seed=3)
    _, whole = load_named(synth_dir)
    loaded_config, cut = load_named(tmp_path / "cut")
    assert loaded_config == config
    assert config.layer_kinds == (LayerKind.SLIDING, LayerKind.C128)
    for name, values in cut.items():
        assert torch.equal(values, whole[name.replace("layers.1.", "layers.2.")]), name


def test_tensors_differ_from_each_other(synth_dir: Path) -> None:
    _, tensors = load_named(synth_dir)
    first, second = (tensors[f"layers.0.ffn.experts.{i}.w1.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


def test_cut_counts_its_hash_layers_and_drops_mtp() -> None:
    config = cut_layers(V4_FLASH, (1, 2, 3, 4))
    assert config.compress_ratios == (0, 4, 128, 4)
    assert (config.num_hidden_layers, config.num_hash_layers, config.num_nextn_predict_layers) == (4, 2, 0)
    assert cut_layers(V4_FLASH, (3,), keep_draft=True).compress_ratios == (128, 0)


def test_cut_of_flash_2_3_has_the_published_layer_bytes() -> None:
    blocks = total_by_block(planned_config(V4_FLASH, (2, 3)))
    assert {name: total.bytes for name, total in blocks.items()} == {
        "embed": 1_059_061_760,
        "layers.0": 3_596_055_640,
        "layers.1": 3_568_596_312,
        "head": 2_118_393_876 - 1_059_061_760,
    }


@pytest.mark.parametrize(("config", "expected"), [(V4_FLASH, 156_015_698_140), (V4_PRO, 850_748_205_004)])
def test_plan_without_mtp(config: object, expected: int) -> None:
    assert isinstance(config, type(V4_FLASH))
    planned = planned_config(config, None, keep_draft=False)
    assert sum(total.bytes for total in total_by_block(planned).values()) == expected


@pytest.mark.parametrize("ids", [(), (1, 0), (0, 0), (-1,), (3,)])
def test_layer_ids_must_be_ascending_and_inside(ids: tuple[int, ...]) -> None:
    with pytest.raises(BadConfig, match="layer_ids"):
        cut_layers(TINY, ids)


def test_draft_stages_do_not_survive_a_cut() -> None:
    draft = DraftConfig(block_size=5, noise_token_id=7, target_layer_ids=(0, 1), markov_rank=32)
    config = dataclasses.replace(TINY, draft=draft)
    assert cut_layers(config, (0,)).draft is None
    with pytest.raises(BadConfig, match="draft"):
        cut_layers(config, (0,), keep_draft=True)


def test_0731_checkpoint_is_recognised_with_both_markov_spellings(tmp_path: Path) -> None:
    draft = DraftConfig(block_size=5, noise_token_id=7, target_layer_ids=(0, 1, 2), markov_rank=32)
    config = dataclasses.replace(TINY, compress_ratios=(0, 4, 128, 0, 0), draft=draft)
    synthesise(tmp_path, config)
    report = inspect_directory(tmp_path, values=True)
    assert not report.problems and report.unused == ("mtp.0", "mtp.1")
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"markov_head.embed.weight", b"markov_head.markov_w1   "[:24]))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b'markov_head.markov_w1   "', b'markov_head.markov_w1"   '))
    assert not inspect_directory(tmp_path, values=True).problems
    assert load_named(tmp_path)[1]["mtp.1.markov_head.embed.weight"].shape == (96, 32)
