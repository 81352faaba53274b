"""Norm and rope: spec traps 4, 5, 7, 37 and the YaRN table."""

from __future__ import annotations

import pytest
import torch

from tests.support.tiny import tiny_config
from workers.model.config import LayerKind, ModelConfig, RopeScaling
from workers.reference.norm_rope import apply_rope, rms_norm, rope_cos_sin, rope_frequencies

YARN_TABLE = """1.0 .687656 .4728708 .3251725 .2236068 .1537646 .1057371 .07271077 .05 .03438280 .02364354 .01625862
 .01118034 7.688228e-3 5.286856e-3 3.635539e-3 2.265625e-3 1.396801e-3 8.496897e-4 5.080820e-4 2.969778e-4 1.681800e-4
 9.086784e-5 4.544423e-5 1.953125e-5 5.372313e-6 3.694303e-6 2.540410e-6 1.746928e-6 1.201286e-6 8.260713e-7
 5.680529e-7"""


def flash_rope_config() -> ModelConfig:
    scaling = RopeScaling(factor=16.0, beta_fast=32.0, beta_slow=1.0, original_max_position_embeddings=65536)
    return tiny_config(head_dim=512, qk_rope_head_dim=64, index_head_dim=128, rope_scaling=scaling)


@pytest.mark.parametrize("kind", [LayerKind.C4, LayerKind.C128])
def test_compressed_layers_use_the_flash_yarn_table(kind: LayerKind) -> None:
    expected = torch.tensor([float(word) for word in YARN_TABLE.split()])
    torch.testing.assert_close(rope_frequencies(flash_rope_config(), kind), expected, rtol=1e-5, atol=0)


def test_sliding_layers_use_plain_theta() -> None:
    expected = torch.tensor([10000.0 ** (-2 * i / 64) for i in range(32)])
    actual = rope_frequencies(flash_rope_config(), LayerKind.SLIDING)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", list(LayerKind))
def test_rotation_has_no_magnitude_scaling(kind: LayerKind) -> None:
    cos, sin = rope_cos_sin(flash_rope_config(), kind, torch.tensor([0, 1, 77, 65536, 1_000_000]))
    torch.testing.assert_close(cos**2 + sin**2, torch.ones_like(cos))


def test_angle_is_an_fp32_product_of_position_and_frequency() -> None:
    config = flash_rope_config()
    position = torch.tensor([999_983])
    cos, _ = rope_cos_sin(config, LayerKind.C4, position)
    angle = (position.float().unsqueeze(-1) * rope_frequencies(config, LayerKind.C4)).cos()
    assert torch.equal(cos, angle)


def test_rope_rotates_interleaved_pairs_of_the_last_dimensions() -> None:
    x = torch.tensor([9.0, 8.0, 1.0, 0.0, 0.0, 1.0])
    cos, sin = torch.tensor([0.0, 0.6]), torch.tensor([1.0, 0.8])
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.tensor([9.0, 8.0, 0.0, 1.0, -0.8, 0.6]))


def test_negated_sine_undoes_the_rotation() -> None:
    config = tiny_config()
    x = torch.randn(5, 3, 80, generator=torch.Generator().manual_seed(1))
    cos, sin = (table.unsqueeze(1) for table in rope_cos_sin(config, LayerKind.C4, torch.arange(5) * 100))
    rotated = apply_rope(x, cos, sin)
    assert not torch.allclose(rotated[..., 64:], x[..., 64:])
    torch.testing.assert_close(apply_rope(rotated, cos, -sin), x)


def test_rotated_dot_products_depend_on_distance_only() -> None:
    config = tiny_config()
    q, k = torch.randn(2, 80, generator=torch.Generator().manual_seed(2))

    def dot(query_position: int, key_position: int) -> torch.Tensor:
        tables = [rope_cos_sin(config, LayerKind.C128, torch.tensor(p)) for p in (query_position, key_position)]
        return apply_rope(q, *tables[0]) @ apply_rope(k, *tables[1])

    torch.testing.assert_close(dot(700, 650), dot(50, 0), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(dot(700, 650), dot(700, 600), rtol=1e-3)


def test_rms_norm_rounds_once_after_the_weight() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 128, generator=generator).bfloat16()
    weight = 1 + 0.1 * torch.randn(128, generator=generator)
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(rms_norm(x, weight, 1e-6), (exact * weight).float().bfloat16())
    twice = (exact.float().bfloat16() * weight.bfloat16()).bfloat16()
    assert not torch.equal(twice, rms_norm(x, weight, 1e-6))


def test_rms_norm_of_zeros_is_zero() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), None, 1e-6), torch.zeros(2, 8))
    assert rms_norm(torch.zeros(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
