"""Kernel operands hold exactly the checkpoint's values, whichever way they were filled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.expert_bytes import matrix_of
from workers.checkpoint.load import load_named
from workers.checkpoint.synth import synthesise
from workers.errors import InexactWeights
from workers.experts.layout import ExpertShape
from workers.gpu.loading import convert, load_checkpoint
from workers.gpu.weights import Fp8Weight, GpuWeights, unsupported_shape, x_bf16_columns
from workers.model.config import LayerKind, ModelConfig
from workers.model.presets import NANO, PRESETS
from workers.model.weights import ModelWeights, random_named_weights
from workers.model_bundle import ModelBundle, identity_of_heads
from workers.reference.quant import fp8_block_dequant

BUNDLED = Path(__file__).resolve().parents[3] / "deploy" / "demo" / "dsv4-nano"


def _fp8(weight: Fp8Weight) -> Tensor:
    return fp8_block_dequant(weight.codes, weight.scales)


def _expert(weights: GpuWeights, config: ModelConfig, layer: int, expert: int, name: str) -> Tensor:
    shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
    slab = weights.layers[layer].experts
    return matrix_of(shape, slab.base.view(-1, shape.expert_bytes)[int(slab.table[expert])], name)


def _check_against(weights: GpuWeights, config: ModelConfig, named: dict[str, Tensor]) -> None:
    """Every operand of every layer equals the fp32 tensors it was made of."""
    assert torch.equal(weights.embed.float(), named["embed.weight"])
    assert torch.equal(weights.head.float(), named["head.weight"])
    for i, layer in enumerate(weights.layers):
        p = f"layers.{i}."
        parts = ["attn.wq_a.weight", "attn.wkv.weight"]
        assert torch.equal(_fp8(layer.x_fp8), torch.cat([named[p + name] for name in parts]))
        parts = ["attn.wq_b.weight"] + ["attn.indexer.wq_b.weight"] * (layer.kind is LayerKind.C4)
        assert torch.equal(_fp8(layer.q_fp8), torch.cat([named[p + name] for name in parts]))
        assert torch.equal(_fp8(layer.wo_a), named[p + "attn.wo_a.weight"])
        parts = [f"{p}ffn.shared_experts.{name}.weight" for name in ("w1", "w3")]
        assert torch.equal(_fp8(layer.shared_w13), torch.cat([named[name] for name in parts]))
        for name, (start, end) in x_bf16_columns(config, layer.kind).items():
            assert torch.equal(layer.x_bf16[start:end].float(), named[f"{p}attn.{name}.weight"])
        if layer.tid2eid is not None:
            assert torch.equal(layer.tid2eid.long(), named[p + "ffn.gate.tid2eid"])
        assert torch.equal(layer.hc_ffn.fn, named[p + "hc_ffn_fn"])
        for expert in (0, config.n_routed_experts - 1):
            for name in ("w1", "w2", "w3"):
                expected = named[f"{p}ffn.experts.{expert}.{name}.weight"]
                assert torch.equal(_expert(weights, config, i, expert, name), expected)


def test_both_ways_of_loading_hold_the_checkpoints_values() -> None:
    config, named = load_named(BUNDLED, draft_blocks=False)
    _, stored, heads = load_checkpoint(BUNDLED, "cpu")
    _check_against(stored, config, named)
    converted = convert(config, ModelWeights.from_named(config, named), "cpu")
    _check_against(converted, config, named)
    for name, tensor in named.items():
        wanted = 4096 // tensor.element_size()
        assert heads[name].shape == tuple(tensor.shape)
        assert torch.equal(heads[name].values, tensor.reshape(-1)[:wanted])


def test_the_model_hash_does_not_depend_on_how_weights_are_held() -> None:
    _, _, heads = load_checkpoint(BUNDLED, "cpu")
    assert identity_of_heads(heads) == ModelBundle.load(BUNDLED).model_hash


def test_a_random_checkpoint_of_every_layer_kind_is_loaded(tmp_path: Path) -> None:
    config = synthesise(tmp_path, NANO, layer_ids=(0, 2, 3), seed=4)
    _, named = load_named(tmp_path, draft_blocks=False)
    _check_against(load_checkpoint(tmp_path, "cpu")[1], config, named)


def test_values_that_were_never_quantised_are_refused() -> None:
    weights = ModelWeights.from_named(NANO, random_named_weights(NANO, seed=1))
    with pytest.raises(InexactWeights, match="exactly"):
        convert(NANO, weights, "cpu")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_have_kernels_and_account_for_their_bytes(name: str) -> None:
    config = PRESETS[name]
    assert unsupported_shape(config) is None
    weights = GpuWeights.allocate(config, "meta")
    experts = ExpertShape(config.hidden_size, config.moe_intermediate_size).expert_bytes
    assert weights.layers[0].experts.base.numel() == config.num_hidden_layers * config.n_routed_experts * experts
