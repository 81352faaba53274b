"""Synthetic weights: every value usable, every expert different, a layer the same alone as among others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from workers.checkpoint.synth import cut_layers
from workers.experts.layout import ExpertShape
from workers.gpu.synthetic import synthetic_weights
from workers.gpu.weights import GpuLayer, _tensors
from workers.model.config import ModelConfig
from workers.model.presets import NANO

LAYERS = (1, 2, 3)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return cut_layers(NANO, LAYERS)


def slots_of(layer: GpuLayer, config: ModelConfig) -> torch.Tensor:
    shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
    return layer.experts.base.view(-1, shape.expert_bytes)[layer.experts.table.long()]


def test_fp8_operands_have_no_nan_and_values_of_unit_gain(config: ModelConfig) -> None:
    weights = synthetic_weights(config, "cpu", layer_ids=LAYERS)
    for layer in weights.layers:
        for operand in (layer.x_fp8, layer.q_fp8, layer.wo_a, layer.wo_b, layer.shared_w13, layer.shared_w2):
            values = operand.codes.view(torch.float8_e4m3fn).float()
            scale = operand.scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
            gain = (values * scale[: len(values)]).std() * operand.codes.shape[1] ** 0.5
            assert values.isfinite().all() and 0.6 < gain < 2.0


def test_plain_operands_are_finite(config: ModelConfig) -> None:
    weights = synthetic_weights(config, "cpu", layer_ids=LAYERS)
    plain = [t for t in _tensors(weights) if t.is_floating_point()]
    assert plain and all(t.isfinite().all() for t in plain)


def test_every_expert_is_different(config: ModelConfig) -> None:
    weights = synthetic_weights(config, "cpu", layer_ids=LAYERS)
    rows = torch.cat([slots_of(layer, config)[:, :4096] for layer in weights.layers])
    assert len(rows.unique(dim=0)) == config.num_hidden_layers * config.n_routed_experts


def test_expert_scales_are_neighbouring_powers_of_two(config: ModelConfig) -> None:
    weights = synthetic_weights(config, "cpu", layer_ids=LAYERS)
    shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
    for _, start in shape.offsets().values():
        scales = slots_of(weights.layers[0], config)[:, start : start + shape.scales_bytes]
        assert scales.max() - scales.min() == 1 and 100 < scales.min() < 127


def test_hash_tables_hold_distinct_experts(config: ModelConfig) -> None:
    table = synthetic_weights(config, "cpu", layer_ids=LAYERS).layers[0].tid2eid
    assert table is not None and table.min() >= 0 and table.max() < config.n_routed_experts
    assert (table.sort(dim=1).values.diff(dim=1) > 0).all()


def test_a_layer_is_the_same_alone_as_among_others(config: ModelConfig) -> None:
    among = synthetic_weights(config, "cpu", seed=5, layer_ids=LAYERS).layers[1]
    alone = synthetic_weights(cut_layers(NANO, LAYERS[1:2]), "cpu", seed=5, layer_ids=LAYERS[1:2]).layers[0]
    for field in dataclasses.fields(GpuLayer):
        if field.name not in ("kind", "experts"):
            left, right = (list(_tensors(getattr(layer, field.name))) for layer in (among, alone))
            assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True)), field.name
    assert torch.equal(slots_of(among, config), slots_of(alone, config))


def test_another_seed_gives_other_weights(config: ModelConfig) -> None:
    first, second = (synthetic_weights(config, "cpu", seed=seed, layer_ids=LAYERS).layers[0] for seed in (1, 2))
    assert not torch.equal(first.wo_b.codes, second.wo_b.codes)
    assert not torch.equal(first.experts.base, second.experts.base)
