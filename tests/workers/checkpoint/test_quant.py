"""Number formats by the golden values of the format description, and canonical encoding."""

from __future__ import annotations

import pytest
import torch

from workers.checkpoint.names import Encoding, Organ, TensorSpec
from workers.checkpoint.quant import decode, encode, find_bad_scale, find_bad_table, find_bad_weight


def _spec(encoding: Encoding, *shape: int) -> TensorSpec:
    return TensorSpec("x.weight", Organ.ATTENTION, "layers.0", shape, encoding)


def _fp4(byte: int, scale: int = 127) -> list[float]:
    """The 32 columns of sixteen equal bytes under one scale byte."""
    form = _spec(Encoding.FP4, 1, 32).official
    packed = torch.full((1, 16), byte, dtype=torch.uint8).view(torch.int8)
    return decode(form, packed, torch.tensor([[scale]], dtype=torch.uint8))[0].tolist()


@pytest.mark.parametrize(("byte", "even", "odd"), [(0x2A, -1.0, 1.0), (0x7F, -6.0, 6.0), (0x80, 0.0, -0.0)])
def test_low_nibble_is_the_even_column(byte: int, even: float, odd: float) -> None:
    values = _fp4(byte)
    assert values[0::2] == [even] * 16 and values[1::2] == [odd] * 16
    assert str(values[1]) == str(odd)  # tells -0.0 from 0.0


@pytest.mark.parametrize(("byte", "factor"), [(127, 1.0), (120, 2.0**-7), (130, 8.0), (0, 2.0**-127), (254, 2.0**127)])
def test_scale_byte_is_a_power_of_two(byte: int, factor: float) -> None:
    assert _fp4(0x22, byte)[0] == factor


@pytest.mark.parametrize(("amax", "scale_byte"), [(448.0, 127), (448.1, 128), (0.0, 105), (1.0, 119)])
def test_fp8_scale_is_rounded_up(amax: float, scale_byte: int) -> None:
    # 448.1 asks for scale 2; its codes fit scale 1 again after rounding, so a lone 448.1 is written canonically.
    weight = torch.zeros(4, 4)
    weight[0, 0], weight[1, 1] = amax, -amax * 0.9
    pair = encode(_spec(Encoding.FP8, 4, 4), weight)
    assert pair.scale is not None
    expected = 127 if amax == 448.1 else scale_byte
    assert pair.scale.item() == expected


def test_fp8_maximum_above_the_next_code_keeps_the_larger_scale() -> None:
    pair = encode(_spec(Encoding.FP8, 1, 1), torch.tensor([[480.0]]))
    assert pair.scale is not None and pair.scale.item() == 128
    assert decode(pair.form, pair.weight, pair.scale).item() == 480.0


@pytest.mark.parametrize(("amax", "scale_byte", "value"), [(6.0, 127, 6.0), (8.0, 128, 8.0), (0.0, 1, 0.0)])
def test_fp4_scale_is_rounded_up(amax: float, scale_byte: int, value: float) -> None:
    pair = encode(_spec(Encoding.FP4, 1, 32), torch.full((1, 32), amax))
    assert pair.scale is not None and pair.scale.item() == scale_byte
    assert decode(pair.form, pair.weight, pair.scale)[0, 0].item() == value


def test_fp8_scales_cover_128_by_128_blocks() -> None:
    form = _spec(Encoding.FP8, 130, 257).official
    codes = torch.ones(130, 257).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 128, 129], [130, 131, 132]], dtype=torch.uint8)
    values = decode(form, codes, scale)
    assert [values[0, 127], values[0, 128], values[127, 256], values[128, 0], values[129, 256]] == [1, 2, 4, 8, 32]


def test_fp4_scales_cover_32_columns_of_one_row() -> None:
    form = _spec(Encoding.FP4, 2, 64).official
    scale = torch.tensor([[127, 128], [129, 130]], dtype=torch.uint8)
    values = decode(form, torch.full((2, 32), 0x22, dtype=torch.int8), scale)
    assert [values[0, 31], values[0, 32], values[1, 0], values[1, 63]] == [1, 2, 4, 8]


@pytest.mark.parametrize("encoding", [Encoding.FP4, Encoding.FP8])
def test_encoding_a_decoded_tensor_repeats_every_byte(encoding: Encoding, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(torch.randn(200, 160, generator=generator) * 4)
    weight = torch.randn(200, 160, generator=generator) * magnitude
    weight[:128, :128] *= 448.5 / weight[:128, :128].abs().max()  # just above the top: the case that needs two passes
    spec = _spec(encoding, 200, 160)
    first = encode(spec, weight)
    second = encode(spec, decode(first.form, first.weight, first.scale))
    assert first.scale is not None and second.scale is not None
    assert torch.equal(first.weight.view(torch.uint8), second.weight.view(torch.uint8))
    assert torch.equal(first.scale, second.scale)


def test_fp32_scale_containers_decode_like_scale_bytes() -> None:
    form = _spec(Encoding.FP8, 4, 4).official
    codes = torch.arange(16.0).reshape(4, 4).to(torch.float8_e4m3fn)
    as_bytes = decode(form, codes, torch.tensor([[125]], dtype=torch.uint8))
    assert torch.equal(as_bytes, decode(form, codes, torch.tensor([[0.25]])))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_both_e4m3_nan_codes_are_found(code: int) -> None:
    form = _spec(Encoding.FP8, 1, 2).official
    assert find_bad_weight(form, torch.tensor([[code, 0x7E]], dtype=torch.uint8).view(torch.float8_e4m3fn))
    assert not find_bad_weight(form, torch.tensor([[0x7E, 0xFE]], dtype=torch.uint8).view(torch.float8_e4m3fn))


def test_scale_255_is_found() -> None:
    assert find_bad_scale(torch.tensor([127, 255], dtype=torch.uint8))
    assert not find_bad_scale(torch.tensor([0, 254], dtype=torch.uint8))
    assert find_bad_scale(torch.tensor([1.0, float("nan")])) and find_bad_scale(torch.tensor([-1.0]))


def test_expert_ids_outside_the_model_are_found() -> None:
    assert not find_bad_table(torch.tensor([0, 3]), 4)
    assert find_bad_table(torch.tensor([0, 4]), 4) and find_bad_table(torch.tensor([-1, 0]), 4)
