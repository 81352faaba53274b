"""Number formats of the checkpoint and of the fake quantisers: e8m0 scales, e4m3 and e2m1 values.

Owns: every rounding rule (DeepSeek-V4 official `kernel.py` semantics): power-of-two scales rounded UP from
`amax / max`, saturating e4m3, round-to-nearest-even e2m1, low nibble = even column. Does not own: which tensor gets
which format.

A scale byte `b` means `2 ** (b - 127)`. `*_fake_quant` return `dequant(quant(x))` in the dtype of `x` with the gradient
of the identity (straight-through), so the same functions serve inference and training.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
E4M3_AMAX_FLOOR = 1e-4
"""Smallest block maximum an fp8 scale is derived from (official `act_quant`): zero blocks get scale 2**-22."""

E2M1_AMAX_FLOOR = 6.0 * 2.0**-126
"""Smallest block maximum an fp4 scale is derived from: keeps the scale byte at 1 or above."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0..7; bit 3 of a code is the sign (code 8 is -0)."""


def e8m0_encode_ceil(ratio: Tensor) -> Tensor:
    """Scale byte of `2 ** ceil(log2(ratio))` for positive normal fp32 `ratio`, exact by exponent bits; uint8."""
    bits = ratio.float().view(torch.int32)
    round_up = ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return ((bits >> 23) + round_up).to(torch.uint8)


def e8m0_decode(scale_bytes: Tensor) -> Tensor:
    """fp32 value of scale bytes (uint8 or float8_e8m0fnu). Byte 0 is 2**-127, byte 255 is NaN."""
    raw = scale_bytes.view(torch.uint8).to(torch.int32)
    value = (raw << 23).view(torch.float32)
    value = torch.where(raw == 0, torch.full_like(value, 2.0**-127), value)
    return torch.where(raw == 255, torch.full_like(value, float("nan")), value)


def e4m3_encode(x: Tensor) -> Tensor:
    """Saturating cast to float8_e4m3fn. The bare cast turns |x| > 448 into NaN, so the clamp comes first."""
    return x.float().clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def e4m3_decode(codes: Tensor) -> Tensor:
    """fp32 value of float8_e4m3fn (or raw uint8) codes."""
    return (codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes).float()


def e2m1_round(x: Tensor) -> Tensor:
    """Nearest e2m1 value of each element (ties to the even code), saturating at 6; fp32."""
    magnitude = x.float().abs().clamp(max=E2M1_MAX)
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x.float())


def e2m1_encode(x: Tensor) -> Tensor:
    """4-bit codes (uint8 0..15) of the nearest e2m1 values."""
    rounded = e2m1_round(x)
    levels = torch.tensor(E2M1_VALUES, device=x.device)
    magnitude_code = torch.searchsorted(levels, rounded.abs()).to(torch.uint8)
    return magnitude_code | (torch.signbit(rounded).to(torch.uint8) << 3)


def e2m1_decode(codes: Tensor) -> Tensor:
    """fp32 value of 4-bit codes 0..15."""
    levels = torch.tensor((*E2M1_VALUES, *(-v for v in E2M1_VALUES)), device=codes.device)
    return levels[codes.long()]


def e2m1_pack(codes: Tensor) -> Tensor:
    """`[..., K]` codes to `[..., K/2]` int8 bytes: column 2c in the low nibble, 2c+1 in the high one."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous().view(torch.int8)


def e2m1_unpack(packed: Tensor) -> Tensor:
    """`[..., K/2]` int8 bytes to `[..., K]` codes (uint8)."""
    raw = packed.view(torch.uint8)
    return torch.stack((raw & 0xF, raw >> 4), dim=-1).flatten(-2)


def straight_through(x: Tensor, quantised: Tensor) -> Tensor:
    """Exactly the value of `quantised` with the gradient of `x`."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        return quantised.to(x.dtype)
    return quantised.detach().to(x.dtype) + (x - x.detach())


def _grouped(x: Tensor, group: int) -> Tensor:
    """`[..., K]` to `[..., ceil(K / group), group]`, fp32, zero padded."""
    padding = -x.shape[-1] % group
    return F.pad(x.float(), (0, padding)).unflatten(-1, (-1, group))


def fp8_group_scale_bytes(x: Tensor, group: int) -> Tensor:
    """e8m0 byte per `group` elements of the last axis: `2 ** ceil(log2(max(amax, 1e-4) / 448))`; `[..., K/group]`."""
    amax = _grouped(x.detach(), group).abs().amax(-1).clamp(min=E4M3_AMAX_FLOOR)
    return e8m0_encode_ceil(amax / E4M3_MAX)


def fp8_fake_quant(x: Tensor, group: int) -> Tensor:
    """`x` through e4m3 with one power-of-two scale per `group` elements of the last axis; straight-through gradient.

    Source: official `act_quant` with ue8m0 scales. KV entries use group 64, linear inputs group 128.
    """
    values = _grouped(x.detach(), group)
    scale = e8m0_decode(fp8_group_scale_bytes(x, group)).unsqueeze(-1)
    quantised = e4m3_decode(e4m3_encode(values / scale)) * scale
    return straight_through(x, quantised.flatten(-2)[..., : x.shape[-1]])


def fp4_fake_quant(x: Tensor, group: int = 32) -> Tensor:
    """`x` through e2m1 with one power-of-two scale per `group` elements of the last axis; straight-through gradient."""
    values = _grouped(x.detach(), group)
    amax = values.abs().amax(-1, keepdim=True).clamp(min=E2M1_AMAX_FLOOR)
    scale = e8m0_decode(e8m0_encode_ceil(amax / E2M1_MAX))
    quantised = e2m1_round(values / scale) * scale
    return straight_through(x, quantised.flatten(-2)[..., : x.shape[-1]])


def kv_entry_fake_quant(entry: Tensor, rope_dim: int, group: int = 64) -> Tensor:
    """A KV entry as the fp8 cache returns it: e4m3 with a power-of-two scale per `group` nope dims, bf16 rope."""
    nope, rope = entry[..., :-rope_dim], entry[..., -rope_dim:]
    rounded = straight_through(rope, rope.detach().bfloat16().float())
    return torch.cat((fp8_fake_quant(nope, group), rounded), dim=-1)


def indexer_fp8_scale(x: Tensor) -> Tensor:
    """fp32 scale `[..., 1]` of one indexer vector: `max(amax, 1e-4) / 448`, not rounded to a power of two."""
    return x.detach().float().abs().amax(-1, keepdim=True).clamp(min=E4M3_AMAX_FLOOR) / E4M3_MAX


def indexer_fp8_fake_quant(x: Tensor) -> Tensor:
    """Indexer query or key through e4m3 with one fp32 scale per vector (SGLang's fp8 indexer cache)."""
    scale = indexer_fp8_scale(x)
    return straight_through(x, e4m3_decode(e4m3_encode(x.detach().float() / scale)) * scale)


def _expand_blocks(scale: Tensor, rows: int, columns: int, block: int) -> Tensor:
    """`[..., R, C]` block values to `[..., rows, columns]`."""
    wide = scale.repeat_interleave(block, dim=-2).repeat_interleave(block, dim=-1)
    return wide[..., :rows, :columns]


def fp8_block_quant(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """`[..., N, K]` to (float8_e4m3fn `[..., N, K]`, e8m0 uint8 `[..., ceil(N/block), ceil(K/block)]`)."""
    rows, columns = weight.shape[-2:]
    padded = F.pad(weight.detach().float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(-2, (-1, block)).unflatten(-1, (-1, block))  # [..., R, block, C, block]
    amax = blocks.abs().amax(dim=(-3, -1)).clamp(min=E4M3_AMAX_FLOOR)
    scales = e8m0_encode_ceil(amax / E4M3_MAX)
    return e4m3_encode(weight.detach().float() / _expand_blocks(e8m0_decode(scales), rows, columns, block)), scales


def fp8_block_dequant(codes: Tensor, scales: Tensor, block: int = 128) -> Tensor:
    """fp32 `[..., N, K]` from e4m3 codes and block scales (e8m0 bytes, or fp32 as in the Base checkpoints)."""
    factors = scales if scales.dtype == torch.float32 else e8m0_decode(scales)
    return e4m3_decode(codes) * _expand_blocks(factors, codes.shape[-2], codes.shape[-1], block)


def fp4_quant(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """`[..., N, K]` to (packed int8 `[..., N, K/2]`, e8m0 uint8 `[..., N, K/group]`); K is a multiple of `group`."""
    values = weight.detach().float().unflatten(-1, (-1, group))
    amax = values.abs().amax(-1).clamp(min=E2M1_AMAX_FLOOR)
    scales = e8m0_encode_ceil(amax / E2M1_MAX)
    codes = e2m1_encode(values / e8m0_decode(scales).unsqueeze(-1)).flatten(-2)
    return e2m1_pack(codes), scales


def fp4_dequant(packed: Tensor, scales: Tensor, group: int = 32) -> Tensor:
    """fp32 `[..., N, K]` from packed e2m1 bytes and e8m0 scales."""
    values = e2m1_decode(e2m1_unpack(packed)).unflatten(-1, (-1, group))
    return (values * e8m0_decode(scales).unsqueeze(-1)).flatten(-2)


def fp8_weight_fake_quant(weight: Tensor, block: int = 128) -> Tensor:
    """`[..., N, K]` weight as its FP8 checkpoint form would be read back; straight-through gradient."""
    return straight_through(weight, fp8_block_dequant(*fp8_block_quant(weight, block), block))


def fp4_weight_fake_quant(weight: Tensor, group: int = 32) -> Tensor:
    """`[..., N, K]` weight as its FP4 checkpoint form would be read back; straight-through gradient."""
    return fp4_fake_quant(weight, group)
