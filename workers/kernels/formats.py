"""Number formats inside Triton kernels: e4m3 and e8m0 to and from f16 and fp32, elementwise on blocks.

Owns: the bit patterns and roundings of `workers/reference/quant.py`, as device functions, bit for bit. Does not own:
which tensor has which format, and e2m1, which every kernel of FP4 weights unpacks as its products want it.

`HW: tl.constexpr` chooses the conversion instructions of sm_89 and later; False is integer arithmetic alone, for older
devices and for Triton's interpreter. Both give the same bits (NaN payloads aside). Ask `hardware_formats` once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


def hardware_formats(device: torch.device | str) -> bool:
    """Whether kernels on `device` may use the e4m3 conversion instructions (`HW`)."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


@triton.jit
def e4m3_to_f16(codes, HW: tl.constexpr):
    """f16 values (exact) of uint8 e4m3 codes."""
    if HW:
        value = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    else:
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        # The exponent bias of f16 is 8 larger; subnormal codes become subnormal halves, so the product is exact.
        value = bits.to(tl.float16, bitcast=True) * 256.0
        value = tl.where((wide & 0x7F) == 0x7F, float("nan"), value).to(tl.float16)
    return value


@triton.jit
def e4m3_to_f32(codes, HW: tl.constexpr):
    """fp32 values of uint8 e4m3 codes."""
    return e4m3_to_f16(codes, HW).to(tl.float32)


@triton.jit
def f32_to_e4m3(x, HW: tl.constexpr):
    """uint8 e4m3 codes nearest to fp32 `x`: ties to even, saturating at 448; NaN stays NaN."""
    if HW:
        codes = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = x.to(tl.uint32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        # Normal codes: round the 20 dropped mantissa bits to even, then move the exponent bias from 127 to 7.
        rounded = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
        normal = tl.minimum(tl.maximum(rounded, 120 << 3) - (120 << 3), 0x7E)
        # Subnormal codes are multiples of 2**-9, the spacing of floats from 2**14: the addition rounds to even.
        small = tl.minimum(magnitude.to(tl.float32, bitcast=True), 0.03125) + 16384.0
        subnormal = small.to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, subnormal, normal)
        code = tl.where(magnitude > 0x7F800000, 0x7F, code)
        codes = (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return codes


@triton.jit
def pow2_scale_ceil(amax, MAX: tl.constexpr, FLOOR: tl.constexpr):
    """fp32 `2 ** ceil(log2(max(amax, FLOOR) / MAX))` and its e8m0 byte (uint8), for fp32 `amax >= 0`.

    Exact without a division: the scale's exponent is the difference of exponents, one more if the mantissa of `amax` is
    above that of `MAX`. Dividing and rounding in fp32 first gives the same answer for 448 and 6.
    """
    bits = tl.maximum(amax, FLOOR).to(tl.uint32, bitcast=True)
    limit = tl.full(bits.shape, MAX, tl.float32).to(tl.uint32, bitcast=True)
    above = ((bits & 0x7FFFFF) > (limit & 0x7FFFFF)).to(tl.uint32)
    byte = (bits >> 23) + 127 - (limit >> 23) + above
    return (byte << 23).to(tl.float32, bitcast=True), byte.to(tl.uint8)


@triton.jit
def pow2_reciprocal(scale):
    """`1 / scale`, exact, of fp32 powers of two between 2**-126 and 2**126."""
    return (0x7F000000 - scale.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def e8m0_to_f32(byte):
    """fp32 values of uint8 scale bytes: `2 ** (b - 127)`; byte 0 is 2**-127, byte 255 is NaN."""
    wide = byte.to(tl.uint32)
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    bits = tl.where(wide == 255, 0x7FC00000, bits)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def round_fp8_groups(x, GROUP: tl.constexpr, HW: tl.constexpr):
    """e4m3 codes (uint8 `[M, K]`) of fp32 `x [M, K]` and their power-of-two scales, fp32 `[M, K / GROUP]`.

    Source: official `act_quant` with ue8m0 scales; the value is `code * scale`.
    """
    M: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    grouped = tl.reshape(x, (M, K // GROUP, GROUP))
    scale, _ = pow2_scale_ceil(tl.max(tl.abs(grouped), 2), 448.0, 1e-4)
    codes = f32_to_e4m3(grouped * pow2_reciprocal(scale)[:, :, None], HW)
    return tl.reshape(codes, (M, K)), scale
