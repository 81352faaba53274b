"""The kernels' number formats against `workers/reference/quant.py`, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels import formats
from workers.reference import quant

ALL_BYTES = torch.arange(256, dtype=torch.int32).to(torch.uint8)


@triton.jit
def _decode(codes, halves, floats, N: tl.constexpr, HW: tl.constexpr):
    at = tl.arange(0, N)
    code = tl.load(codes + at)
    tl.store(halves + at, formats.e4m3_to_f16(code, HW))
    tl.store(floats + at, formats.e4m3_to_f32(code, HW))


@triton.jit
def _encode(x, codes, N: tl.constexpr, HW: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(codes + at, formats.f32_to_e4m3(tl.load(x + at), HW))


@triton.jit
def _scales(amax, scale, byte, N: tl.constexpr, MAX: tl.constexpr, FLOOR: tl.constexpr):
    at = tl.arange(0, N)
    value, raw = formats.pow2_scale_ceil(tl.load(amax + at), MAX, FLOOR)
    tl.store(scale + at, value)
    tl.store(byte + at, raw)


@triton.jit
def _e8m0(raw, value, reciprocal, N: tl.constexpr):
    at = tl.arange(0, N)
    decoded = formats.e8m0_to_f32(tl.load(raw + at))
    tl.store(value + at, decoded)
    tl.store(reciprocal + at, formats.pow2_reciprocal(decoded))


@triton.jit
def _round(x, codes, scales, M: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, HW: tl.constexpr):
    rows, columns, groups = tl.arange(0, M)[:, None], tl.arange(0, K)[None, :], tl.arange(0, K // GROUP)[None, :]
    code, scale = formats.round_fp8_groups(tl.load(x + rows * K + columns), GROUP, HW)
    tl.store(codes + rows * K + columns, code)
    tl.store(scales + rows * (K // GROUP) + groups, scale)


def _hardware(device: torch.device) -> list[bool]:
    return [False, True] if formats.hardware_formats(device) else [False]


def _e4m3_inputs() -> Tensor:
    """Every code's value, every midpoint of neighbours, their fp32 neighbours, and values around the ends."""
    values = quant.e4m3_decode(ALL_BYTES[:127])
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat((values, middle, torch.tensor([448.1, 464.0, 480.0, 1e9, float("inf"), 1e-30, 1e-42])))
    up, down = points.nextafter(torch.tensor(float("inf"))), points.nextafter(torch.tensor(0.0))
    points = torch.cat((points, up, down, torch.randn(500).exp() * 3))
    points = torch.cat((points, -points))
    return torch.nn.functional.pad(points, (0, -points.shape[0] % 256))


def test_hardware_formats_is_false_on_the_cpu() -> None:
    assert not formats.hardware_formats("cpu")


def test_every_e4m3_code_decodes(device: torch.device) -> None:
    expected = quant.e4m3_decode(ALL_BYTES)
    for hardware in _hardware(device):
        halves = torch.empty(256, dtype=torch.float16, device=device)
        floats = torch.empty(256, device=device)
        _decode[(1,)](ALL_BYTES.to(device), halves, floats, 256, hardware)
        torch.testing.assert_close(floats.cpu(), expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(halves.cpu().float(), expected, rtol=0, atol=0, equal_nan=True)


def test_e4m3_rounds_to_even_and_saturates(device: torch.device) -> None:
    x = _e4m3_inputs()
    expected = quant.e4m3_encode(x).view(torch.uint8)
    for hardware in _hardware(device):
        codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
        _encode[(x.numel() // 256,)](x.to(device), codes, 256, hardware)
        assert torch.equal(codes.cpu(), expected), x[codes.cpu() != expected]


@pytest.mark.parametrize(
    ("limit", "floor"), [(448.0, quant.E4M3_AMAX_FLOOR), (6.0, quant.E2M1_AMAX_FLOOR)], ids=["e4m3", "e2m1"]
)
def test_scales_round_up_to_powers_of_two(device: torch.device, limit: float, floor: float) -> None:
    exact = limit * 2.0 ** torch.arange(-30, 32).float()
    amax = torch.cat(
        (exact, exact.nextafter(torch.tensor(1e30)), exact.nextafter(torch.zeros(())), torch.randn(70).exp())
    )
    amax[-3:] = torch.tensor([0.0, 1e-4, 1e-30])
    expected = quant.e8m0_encode_ceil(amax.clamp(min=floor) / limit)
    scale = torch.empty(256, device=device)
    raw = torch.empty(256, dtype=torch.uint8, device=device)
    _scales[(1,)](amax.to(device), scale, raw, 256, limit, floor)
    assert torch.equal(raw.cpu(), expected)
    assert torch.equal(scale.cpu(), quant.e8m0_decode(expected))


def test_every_scale_byte_decodes(device: torch.device) -> None:
    value, reciprocal = torch.empty(256, device=device), torch.empty(256, device=device)
    _e8m0[(1,)](ALL_BYTES.to(device), value, reciprocal, 256)
    expected = quant.e8m0_decode(ALL_BYTES)
    torch.testing.assert_close(value.cpu(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(reciprocal.cpu()[1:254], 1 / expected[1:254])


@pytest.mark.parametrize("group", [64, 128])
def test_groups_round_like_the_reference(device: torch.device, group: int, seed: int) -> None:
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(seed)) * torch.tensor(
        [[1e-6], [1.0], [70.0], [0.0]]
    )
    raw = quant.fp8_group_scale_bytes(x, group)
    for hardware in _hardware(device):
        codes = torch.empty(x.shape, dtype=torch.uint8, device=device)
        scales = torch.empty(4, 256 // group, device=device)
        _round[(1,)](x.to(device), codes, scales, 4, 256, group, hardware)
        assert torch.equal(scales.cpu(), quant.e8m0_decode(raw))
        value = quant.e4m3_decode(codes.cpu()) * scales.cpu().repeat_interleave(group, 1)
        assert torch.equal(value, quant.fp8_fake_quant(x, group))
