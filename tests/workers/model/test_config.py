"""What `ModelConfig.from_json` accepts and refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from workers.errors import BadConfig
from workers.model.config import LayerKind, ModelConfig, RouterKind
from workers.model.presets import NANO, PRESETS, V4_FLASH, V4_PRO


@pytest.mark.parametrize("name", PRESETS)
def test_preset_survives_json(name: str) -> None:
    text = json.dumps(PRESETS[name].to_json())
    assert ModelConfig.from_json(json.loads(text)) == PRESETS[name]


def test_flash_layer_kinds_match_the_release() -> None:
    assert V4_FLASH.layers_of(LayerKind.SLIDING) == (0, 1)
    assert V4_FLASH.layers_of(LayerKind.C4) == tuple(range(2, 43, 2))
    assert V4_FLASH.layers_of(LayerKind.C128) == tuple(range(3, 42, 2))
    assert [V4_FLASH.router_kind(i) for i in (2, 3)] == [RouterKind.HASH, RouterKind.LEARNED]


def test_pro_layer_kinds_match_the_release() -> None:
    assert V4_PRO.layers_of(LayerKind.SLIDING) == ()
    assert V4_PRO.layers_of(LayerKind.C4) == tuple(range(2, 61, 2))
    assert V4_PRO.layers_of(LayerKind.C128) == (0, *range(1, 60, 2))


def test_directory_and_file_are_read_and_named_after_the_directory(tmp_path: Path) -> None:
    data = NANO.to_json()
    del data["_name_or_path"]
    home = tmp_path / "my-model"
    home.mkdir()
    (home / "config.json").write_text(json.dumps(data))
    assert ModelConfig.from_json(home) == dataclasses.replace(NANO, model_name="my-model")
    assert ModelConfig.from_json(str(home / "config.json")) == ModelConfig.from_json(home)


def test_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(BadConfig, match="'sliding_windw'.*nearest: 'sliding_window'"):
        ModelConfig.from_json(NANO.to_json() | {"sliding_windw": 128})


def test_keys_without_influence_are_dropped() -> None:
    data = NANO.to_json() | {"initializer_range": 0.5, "use_cache": False, "transformers_version": "9"}
    assert ModelConfig.from_json(data) == NANO


def test_missing_required_key_is_named() -> None:
    data = NANO.to_json()
    del data["o_lora_rank"]
    with pytest.raises(BadConfig, match="o_lora_rank"):
        ModelConfig.from_json(data)


def test_missing_expert_dtype_is_left_open() -> None:
    data = NANO.to_json()
    del data["expert_dtype"]
    assert ModelConfig.from_json(data).expert_dtype is None


def _bad_rope(**changes: Any) -> dict[str, Any]:
    return {"rope_scaling": NANO.to_json()["rope_scaling"] | changes}


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("num_key_value_heads", {"num_key_value_heads": 2}),
        ("scoring_func", {"scoring_func": "sigmoid"}),
        ("topk_method", {"topk_method": "greedy"}),
        ("norm_topk_prob", {"norm_topk_prob": False}),
        ("norm_topk_prob", {"norm_topk_prob": 1}),
        ("hidden_act", {"hidden_act": "gelu"}),
        ("attention_bias", {"attention_bias": True}),
        ("tie_word_embeddings", {"tie_word_embeddings": True}),
        ("model_type", {"model_type": "deepseek_v3"}),
        ("hidden_size", {"hidden_size": "256"}),
        ("hidden_size", {"hidden_size": True}),
        ("hidden_size", {"hidden_size": 0}),
        ("hidden_size", {"hidden_size": 256.0}),
        ("swiglu_limit", {"swiglu_limit": float("inf")}),
        ("hc_eps", {"hc_eps": float("nan")}),
        ("n_routed_experts", {"n_routed_experts": 10**9}),
        ("routed_scaling_factor", {"routed_scaling_factor": None}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4, 128, 4, 4, 128, 2, 0]}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4, 128, 4, 4, 128, 4, 4]}),
        ("compress_ratios", {"compress_ratios": [0, 0, 4, 128, 4, 4, 128, 4]}),
        ("compress_ratios", {"compress_ratios": [0, 0]}),
        ("compress_ratios", {"compress_ratios": "4"}),
        ("num_experts_per_tok", {"num_experts_per_tok": 13}),
        ("n_shared_experts", {"n_shared_experts": 2}),
        ("num_hash_layers", {"num_hash_layers": 9}),
        ("o_groups", {"o_groups": 3}),
        ("head_dim", {"head_dim": 64}),
        ("index_head_dim", {"index_head_dim": 96}),
        ("eos_token_id", {"eos_token_id": 1024}),
        ("expert_dtype", {"expert_dtype": "int4"}),
        ("partial_rotary_factor", {"partial_rotary_factor": 0.25}),
        ("quantization_config.weight_block_size", {"quantization_config": {"weight_block_size": [64, 64]}}),
        ("quantization_config.bits", {"quantization_config": {"bits": 4}}),
        ("quantization_config", {"quantization_config": "fp8"}),
        ("rope_scaling.type", _bad_rope(type="linear")),
        ("rope_scaling.factor", _bad_rope(factor=0)),
        ("rope_scaling.mscale", _bad_rope(mscale=1.0)),
        ("rope_scaling", {"rope_scaling": None}),
        ("dspark_markov_rank", {"dspark_block_size": 5, "dspark_noise_token_id": 9, "dspark_target_layer_ids": [1]}),
    ],
)
def test_wrong_value_is_refused_by_key(key: str, change: dict[str, Any]) -> None:
    with pytest.raises(BadConfig) as caught:
        ModelConfig.from_json(NANO.to_json() | change)
    assert caught.value.key == key


def test_draft_stages_of_the_0731_release_are_recognised() -> None:
    data = V4_FLASH.to_json() | {
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
        "dspark_block_size": 5,
        "dspark_noise_token_id": 128799,
        "dspark_target_layer_ids": [40, 41, 42],
        "dspark_markov_rank": 256,
    }
    config = ModelConfig.from_json(data)
    assert config.num_draft_blocks == 3
    assert config.draft is not None and config.draft.target_layer_ids == (40, 41, 42)
    assert ModelConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "[" * 100_000])
def test_garbage_file_is_refused_by_path(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BadConfig, match=str(path)):
        ModelConfig.from_json(path)


def test_absent_file_is_refused_by_path(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="nowhere"):
        ModelConfig.from_json(tmp_path / "nowhere.json")
