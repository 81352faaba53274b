"""Number formats: spec traps 20, 21, 22 and the FP4, E8M0 and scale oracles."""

from __future__ import annotations

import pytest
import torch

from workers.reference import quant


def test_fp4_bytes_decode_low_nibble_first() -> None:
    packed = torch.tensor([0x2A, 0x7F, 0x80], dtype=torch.uint8).view(torch.int8)
    values = quant.e2m1_decode(quant.e2m1_unpack(packed))
    assert values.tolist() == [-1.0, 1.0, -6.0, 6.0, 0.0, -0.0]
    assert torch.signbit(values).tolist() == [True, False, True, False, False, True]


def test_every_fp4_byte_survives_unpack_and_pack() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    assert torch.equal(quant.e2m1_pack(quant.e2m1_unpack(every_byte)), every_byte)
    values = quant.e2m1_decode(quant.e2m1_unpack(every_byte))
    assert torch.equal(quant.e2m1_pack(quant.e2m1_encode(values)), every_byte)


def test_e2m1_rounds_ties_to_the_even_code_and_saturates() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.0])
    assert quant.e2m1_round(ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -4.0]
    between = torch.tensor([0.26, 0.74, 1.26, 1.74, 2.6, 3.4, 5.1])
    assert quant.e2m1_round(between).tolist() == [0.5, 0.5, 1.5, 1.5, 3.0, 3.0, 6.0]


@pytest.mark.parametrize(("byte", "value"), [(127, 1.0), (120, 2.0**-7), (130, 8.0), (0, 2.0**-127), (254, 2.0**127)])
def test_e8m0_bytes_are_powers_of_two(byte: int, value: float) -> None:
    codes = torch.tensor([byte], dtype=torch.uint8)
    assert quant.e8m0_decode(codes).item() == value
    assert quant.e8m0_decode(codes.view(torch.float8_e8m0fnu)).item() == value


def test_e8m0_byte_255_is_nan() -> None:
    assert quant.e8m0_decode(torch.tensor([255], dtype=torch.uint8)).isnan().all()


@pytest.mark.parametrize(("amax", "scale"), [(448.0, 1.0), (448.1, 2.0), (0.0, 2.0**-22), (300.0, 1.0), (224.0, 0.5)])
def test_fp8_scale_is_rounded_up(amax: float, scale: float) -> None:
    block = torch.zeros(1, 64)
    block[0, 3] = -amax
    assert quant.e8m0_decode(quant.fp8_group_scale_bytes(block, 64)).tolist() == [[scale]]


@pytest.mark.parametrize(("amax", "scale"), [(6.0, 1.0), (6.1, 2.0), (3.0, 0.5)])
def test_fp4_scale_is_rounded_up(amax: float, scale: float) -> None:
    block = torch.zeros(1, 32)
    block[0, 31] = amax
    _, scales = quant.fp4_quant(block)
    assert quant.e8m0_decode(scales).tolist() == [[scale]]


def test_scaled_values_never_exceed_the_e4m3_range() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(1)) * 1000
    scale = quant.e8m0_decode(quant.fp8_group_scale_bytes(x, 128))
    assert (x.abs().amax(-1, keepdim=True) / scale).max() <= quant.E4M3_MAX


def test_e4m3_cast_saturates_where_the_bare_cast_gives_nan() -> None:
    x = torch.tensor([449.0, -1e6, 448.0])
    assert quant.e4m3_decode(quant.e4m3_encode(x)).tolist() == [448.0, -448.0, 448.0]


def test_fp8_fake_quant_is_exact_on_representable_values_and_bounded_elsewhere() -> None:
    x = torch.randn(7, 200, generator=torch.Generator().manual_seed(2))
    once = quant.fp8_fake_quant(x, 128)
    assert torch.equal(quant.fp8_fake_quant(once, 128), once)
    assert not torch.equal(once, x)
    assert ((once - x).abs() <= x.abs() * 2**-4 + 1e-4).all()


@pytest.mark.parametrize("shape", [(0, 128), (1, 128), (3, 130), (2, 5, 64)])
def test_fake_quants_keep_shape_and_group_boundaries(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for quantised in (quant.fp8_fake_quant(x, 64), quant.fp4_fake_quant(x), quant.indexer_fp8_fake_quant(x)):
        assert quantised.shape == x.shape
    assert torch.equal(quant.fp8_fake_quant(x, 64)[..., :64], quant.fp8_fake_quant(x[..., :64], 64))


def test_weight_fake_quant_equals_the_stored_form_read_back() -> None:
    weight = torch.randn(2, 200, 256, generator=torch.Generator().manual_seed(4))
    codes, scales = quant.fp8_block_quant(weight)
    assert codes.dtype is torch.float8_e4m3fn
    assert scales.shape == (2, 2, 2)
    assert torch.equal(quant.fp8_block_dequant(codes, scales), quant.fp8_weight_fake_quant(weight))
    packed, scales = quant.fp4_quant(weight)
    assert packed.dtype is torch.int8
    assert packed.shape == (2, 200, 128)
    assert scales.shape == (2, 200, 8)
    assert torch.equal(quant.fp4_dequant(packed, scales), quant.fp4_weight_fake_quant(weight))


def test_each_fp8_block_uses_its_own_scale() -> None:
    weight = torch.ones(256, 128)
    weight[128:] *= 2.0**-10
    _, scales = quant.fp8_block_quant(weight)
    assert (scales[0] - scales[1]).tolist() == [10]


def test_base_checkpoint_scales_in_fp32_decode_alike() -> None:
    codes, scales = quant.fp8_block_quant(torch.randn(128, 256, generator=torch.Generator().manual_seed(5)))
    as_float = quant.fp8_block_dequant(codes, quant.e8m0_decode(scales))
    assert torch.equal(as_float, quant.fp8_block_dequant(codes, scales))


@pytest.mark.parametrize("name", ["fp8_weight_fake_quant", "fp4_weight_fake_quant", "indexer_fp8_fake_quant"])
def test_gradient_passes_straight_through(name: str) -> None:
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(6), requires_grad=True)
    y = getattr(quant, name)(x)
    assert torch.equal(y.detach(), getattr(quant, name)(x.detach()))
    y.backward(torch.full_like(x, 3.0))
    assert x.grad is not None
    assert (x.grad == 3.0).all()


def test_indexer_scale_is_not_a_power_of_two_and_has_a_floor() -> None:
    assert quant.indexer_fp8_scale(torch.tensor([[300.0, 1.0]])).item() == pytest.approx(300 / 448)
    assert quant.indexer_fp8_scale(torch.zeros(1, 4)).item() == pytest.approx(1e-4 / 448)


def test_kv_entry_quantises_nope_only_and_rounds_rope_to_bf16() -> None:
    entry = torch.randn(3, 80, generator=torch.Generator().manual_seed(7))
    stored = quant.kv_entry_fake_quant(entry, rope_dim=16)
    assert torch.equal(stored[:, :64], quant.fp8_fake_quant(entry[:, :64], 64))
    assert torch.equal(stored[:, 64:], entry[:, 64:].bfloat16().float())
