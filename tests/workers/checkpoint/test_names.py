"""The name table reproduces the published inventories to the byte."""

from __future__ import annotations

import dataclasses

import pytest

from workers.checkpoint.names import (
    Encoding,
    Organ,
    Total,
    aliases,
    tensor_table,
    total_by_block,
    total_by_dtype,
    total_by_organ,
)
from workers.model.config import DraftConfig, ModelConfig
from workers.model.presets import NANO, PRESETS, V4_FLASH, V4_PRO

FLASH_0731 = dataclasses.replace(
    V4_FLASH,
    compress_ratios=(*V4_FLASH.compress_ratios, 0, 0),
    draft=DraftConfig(block_size=5, noise_token_id=128799, target_layer_ids=(40, 41, 42), markov_rank=256),
)


def _total(config: ModelConfig) -> Total:
    return sum(total_by_block(config).values(), Total())


def test_published_totals() -> None:
    assert _total(V4_FLASH) == Total(69_187, 159_609_485_896)
    assert _total(V4_PRO) == Total(145_116, 864_704_792_696)
    assert _total(FLASH_0731) == Total(72_317, 166_878_536_440)


def test_totals_without_mtp() -> None:
    without = {"num_nextn_predict_layers": 0}
    flash = dataclasses.replace(V4_FLASH, compress_ratios=V4_FLASH.compress_ratios[:-1], **without)
    pro = dataclasses.replace(V4_PRO, compress_ratios=V4_PRO.compress_ratios[:-1], **without)
    assert _total(flash).bytes == 156_015_698_140
    assert _total(pro).bytes == 850_748_205_004


def test_flash_totals_by_dtype() -> None:
    assert total_by_dtype(V4_FLASH) == {
        "BF16": Total(433, 2_830_518_528),
        "F32": Total(417, 144_672_072),
        "F8_E4M3": Total(375, 6_023_020_544),
        "F8_E8M0": Total(34_167, 8_858_737_664),
        "I64": Total(3, 18_616_320),
        "I8": Total(33_792, 141_733_920_768),
    }


def test_flash_bytes_by_organ() -> None:
    assert {organ: total.bytes for organ, total in total_by_organ(V4_FLASH).items()} == {
        Organ.ROUTED_EXPERTS: 150_592_290_816,
        Organ.SHARED_EXPERTS: 1_107_363_840,
        Organ.ATTENTION: 4_706_307_584,
        Organ.MHC: 138_945_864,
        Organ.COMPRESSOR: 801_075_968,
        Organ.HASH_TABLE: 18_616_320,
        Organ.EMBED: 1_059_061_760,
        Organ.HEAD: 1_059_061_760,
        Organ.NORM: 888_832,
        Organ.ROUTER: 92_316_672,
        Organ.MTP: 33_556_480,
    }


def test_flash_bytes_by_block() -> None:
    blocks = total_by_block(V4_FLASH)
    assert blocks["layers.0"] == blocks["layers.1"] == Total(1565, 3_566_148_952)
    assert blocks["layers.2"] == Total(1576, 3_596_055_640)
    assert {blocks[f"layers.{i}"] for i in range(4, 43, 2)} == {Total(1576, 3_589_851_224)}
    assert {blocks[f"layers.{i}"] for i in range(3, 42, 2)} == {Total(1569, 3_568_596_312)}
    assert blocks["mtp.0"] == Total(1575, 3_593_787_756)
    assert blocks["embed"].bytes + blocks["head"].bytes == 2_118_393_876
    assert blocks["head"].tensors == 5
    assert len(blocks) == 46  # the number of shards of the release


def test_stages_of_the_0731_release() -> None:
    blocks = total_by_block(FLASH_0731)
    assert blocks["mtp.1"] == Total(1565, 3_559_944_536)
    assert (blocks["mtp.0"].tensors, blocks["mtp.2"].tensors) == (1568, 1572)
    assert len(blocks) == 48


def _bytes_of(config: ModelConfig, prefix: str) -> int:
    return sum(spec.stored_bytes for spec in tensor_table(config).values() if spec.name.startswith(prefix))


@pytest.mark.parametrize(
    ("prefix", "flash", "pro"),
    [
        ("layers.4.ffn.experts.7.", 13_369_344, 35_094_528),
        ("layers.4.ffn.experts.", 3_422_552_064, 13_476_298_752),
        ("layers.4.ffn.shared_experts.", 25_167_360, 66_064_320),
        ("layers.4.hc_", 3_145_944, 5_505_240),
        ("layers.5.attn.compressor.", 8_651_776, 14_943_232),
    ],
)
def test_bytes_of_one_part(prefix: str, flash: int, pro: int) -> None:
    assert (_bytes_of(V4_FLASH, prefix), _bytes_of(V4_PRO, prefix)) == (flash, pro)


def test_bytes_of_compression_and_attention() -> None:
    assert _bytes_of(V4_FLASH, "layers.4.attn.compressor.") == 16_794_624
    assert _bytes_of(V4_FLASH, "layers.4.attn.indexer.") == 13_112_064
    assert _bytes_of(V4_PRO, "layers.4.attn.compressor.") + _bytes_of(V4_PRO, "layers.4.attn.indexer.") == 50_223_104
    for config, layer, expected in ((V4_FLASH, 0, 106_964_608), (V4_PRO, 3, 299_915_648)):
        compressor = _bytes_of(config, f"layers.{layer}.attn.compressor.")
        assert _bytes_of(config, f"layers.{layer}.attn.") - compressor == expected


def test_hash_layers_have_a_table_and_others_a_bias() -> None:
    names = set(tensor_table(V4_FLASH))
    for layer in range(43):
        hashed = layer < 3
        assert (f"layers.{layer}.ffn.gate.tid2eid" in names) is hashed
        assert (f"layers.{layer}.ffn.gate.bias" in names) is not hashed
    assert "mtp.0.ffn.gate.bias" in names


def test_only_draft_blocks_are_unused() -> None:
    for config in (V4_FLASH, FLASH_0731):
        assert {spec.block.split(".")[0] for spec in tensor_table(config).values() if not spec.used} == {"mtp"}


@pytest.mark.parametrize("name", PRESETS)
def test_scale_names_are_unique_and_follow_the_weight(name: str) -> None:
    stored = [entry[0] for spec in tensor_table(PRESETS[name]).values() for entry in spec.stored()]
    assert len(stored) == len(set(stored))
    assert "layers.0.attn.wq_a.scale" in stored


def test_dimension_beside_a_block_multiple_rounds_the_scale_up() -> None:
    config = dataclasses.replace(NANO, q_lora_rank=130)
    assert tensor_table(config)["layers.0.attn.wq_a.weight"].official.scale_shape == (2, 2)


def test_fp8_experts_follow_the_config() -> None:
    config = dataclasses.replace(NANO, expert_dtype="fp8")
    assert tensor_table(config)["layers.0.ffn.experts.0.w1.weight"].encoding is Encoding.FP8


def test_markov_spellings_map_into_the_table() -> None:
    assert set(aliases(FLASH_0731).values()) <= set(tensor_table(FLASH_0731))
    assert aliases(V4_FLASH) == {}
