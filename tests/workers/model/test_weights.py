"""`ModelWeights`: names, shapes, classes, and refusals. Spec trap 24."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import tiny_config, tiny_weights
from workers.errors import BadCheckpoint
from workers.model.config import LayerKind
from workers.model.weights import ModelWeights, WeightClass, random_named_weights, tensor_infos

CONFIG = tiny_config((0, 4, 128), num_hash_layers=1)


def test_names_survive_a_round_trip() -> None:
    named = random_named_weights(CONFIG, seed=1)
    again = ModelWeights.from_named(CONFIG, named).to_named(CONFIG)
    assert again.keys() == named.keys()
    assert all(torch.equal(again[name], named[name]) for name in named)


def test_same_seed_gives_the_same_weights() -> None:
    first, second, other = (random_named_weights(CONFIG, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_each_layer_kind_has_its_own_tensors() -> None:
    names = set(random_named_weights(CONFIG, seed=1))
    assert "layers.0.ffn.gate.tid2eid" in names
    assert "layers.0.ffn.gate.bias" not in names
    assert "layers.1.ffn.gate.bias" in names
    assert "layers.1.ffn.gate.tid2eid" not in names
    assert not any(name.startswith("layers.0.attn.compressor") for name in names)
    assert "layers.1.attn.indexer.compressor.ape" in names
    assert not any(name.startswith("layers.2.attn.indexer") for name in names)
    assert {name.split(".")[2] for name in names if name.startswith("mtp.0.")} >= {"e_proj", "h_proj", "enorm", "hnorm"}


def test_compressor_widths_follow_the_ratio() -> None:
    weights = tiny_weights(CONFIG)
    c4, c128 = weights.layers[1].attn.compressor, weights.layers[2].attn.compressor
    assert c4 is not None
    assert c128 is not None
    assert c4.ape.shape == (LayerKind.C4.value, 2 * CONFIG.head_dim)
    assert c128.ape.shape == (LayerKind.C128.value, CONFIG.head_dim)


def test_mtp_is_optional() -> None:
    named = random_named_weights(CONFIG, seed=1, mtp=False)
    assert ModelWeights.from_named(CONFIG, named).mtp == ()
    assert len(tiny_weights(CONFIG).mtp) == 1


@pytest.mark.parametrize("name", ["layers.1.attn.wq_a.weight", "layers.2.ffn.experts.3.w2.weight", "hc_head_base"])
def test_missing_tensor_is_named(name: str) -> None:
    named = random_named_weights(CONFIG, seed=1)
    del named[name]
    with pytest.raises(BadCheckpoint, match=name):
        ModelWeights.from_named(CONFIG, named)


def test_unknown_tensor_is_named() -> None:
    named = random_named_weights(CONFIG, seed=1) | {"layers.0.ffn.gate.bias": torch.zeros(8)}
    with pytest.raises(BadCheckpoint, match=r"layers\.0\.ffn\.gate\.bias"):
        ModelWeights.from_named(CONFIG, named)


def test_wrong_shape_is_named_with_both_shapes() -> None:
    named = random_named_weights(CONFIG, seed=1)
    named["layers.0.attn.wkv.weight"] = torch.zeros(3, 4)
    with pytest.raises(BadCheckpoint, match=r"wkv.*\[80, 64\].*\[3, 4\]"):
        ModelWeights.from_named(CONFIG, named)


def test_transform_sees_every_tensor_once_with_its_class() -> None:
    seen: list[str] = []

    def double_linears(info, tensor):  # type: ignore[no-untyped-def]
        seen.append(info.name)
        assert tuple(tensor.shape) == info.shape
        return tensor * 2 if info.weight_class is WeightClass.LINEAR else tensor

    weights = tiny_weights(CONFIG)
    doubled = weights.map(CONFIG, double_linears)
    assert seen == [info.name for info in tensor_infos(CONFIG)]
    assert torch.equal(doubled.layers[0].attn.wq_a, 2 * weights.layers[0].attn.wq_a)
    assert doubled.layers[0].ffn.experts.w1 is weights.layers[0].ffn.experts.w1


def test_classes_follow_the_official_storage() -> None:
    classes = {info.name: info.weight_class for info in tensor_infos(CONFIG)}
    assert classes["layers.1.ffn.experts.*.w1.weight"] is WeightClass.EXPERT
    assert classes["layers.1.ffn.shared_experts.w1.weight"] is WeightClass.LINEAR
    assert classes["layers.1.attn.indexer.wq_b.weight"] is WeightClass.LINEAR
    assert classes["layers.1.attn.indexer.weights_proj.weight"] is WeightClass.BF16
    assert classes["layers.1.attn.compressor.wkv.weight"] is WeightClass.BF16
    assert classes["layers.1.attn.compressor.ape"] is WeightClass.FP32
    assert classes["layers.0.ffn.gate.tid2eid"] is WeightClass.TABLE
    assert classes["mtp.0.e_proj.weight"] is WeightClass.LINEAR
