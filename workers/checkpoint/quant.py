"""Stored tensors <-> fp32: decides by stored form which number format applies, and refuses NaN codes.

Owns: decoding of row ranges for bounded memory, encoding into the official form, the content checks (scale byte 255,
e4m3 NaN codes, non-finite plain values, expert ids out of range). The formats' arithmetic lives in
`workers/reference/quant.py`.

Encoding is canonical: `encode(decode(encode(x)))` gives the same bytes as `encode(x)`. One pass would not be, because a
block whose maximum was rounded down onto half the top of the range would get a smaller scale the second time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.checkpoint.names import FP4_GROUP, Encoding, StoredForm, TensorSpec
from workers.model.config import WEIGHT_BLOCK
from workers.reference.quant import fp4_dequant, fp4_quant, fp8_block_dequant, fp8_block_quant

TORCH_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    # Scales stay raw bytes: most operators lack float8_e8m0fnu.
    "F8_E8M0": torch.uint8,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I32": torch.int32,
    "I64": torch.int64,
}
"""torch dtype in which a stored tensor of each safetensors tag is held."""


@dataclass(frozen=True, slots=True)
class StoredPair:
    """A tensor in a stored form: `weight` and, for quantised forms, `scale`."""

    form: StoredForm
    weight: Tensor
    scale: Tensor | None = None


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as writable bytes."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def row_granularity(form: StoredForm) -> int:
    """Rows that must be decoded together: a block row of FP8, else one."""
    return WEIGHT_BLOCK if form.dtype == "F8_E4M3" else 1


def decode(form: StoredForm, weight: Tensor, scale: Tensor | None) -> Tensor:
    """fp32 values (int64 for tables) of stored rows; `scale` holds exactly those rows' scales (block rows for FP8)."""
    match form.dtype:
        case "F8_E4M3":
            assert scale is not None
            return fp8_block_dequant(weight, scale, WEIGHT_BLOCK)
        case "I8" | "U8":
            assert scale is not None
            return fp4_dequant(weight.view(torch.int8), scale, FP4_GROUP)
        case "I32" | "I64":
            return weight.to(torch.int64)
        case _:
            return weight.to(torch.float32)


def encode(spec: TensorSpec, values: Tensor) -> StoredPair:
    """Official stored form of fp32 `values` (logical shape); e8m0 scales are uint8."""
    form = spec.official
    values = values.detach()
    match spec.encoding:
        case Encoding.FP4:
            packed, scale = fp4_quant(values, FP4_GROUP)
            packed, scale = fp4_quant(fp4_dequant(packed, scale, FP4_GROUP), FP4_GROUP)
            return StoredPair(form, packed, scale)
        case Encoding.FP8:
            codes, scale = fp8_block_quant(values, WEIGHT_BLOCK)
            codes, scale = fp8_block_quant(fp8_block_dequant(codes, scale, WEIGHT_BLOCK), WEIGHT_BLOCK)
            return StoredPair(form, codes, scale)
        case _:
            return StoredPair(form, values.to(TORCH_DTYPES[form.dtype]))


def find_bad_weight(form: StoredForm, weight: Tensor) -> str | None:
    """What makes stored weight values unusable, or None."""
    match form.dtype:
        case "F8_E4M3":
            nan = (weight.view(torch.uint8) & 0x7F) == 0x7F
            return f"{int(nan.sum())} e4m3 NaN codes (0x7f, 0xff)" if bool(nan.any()) else None
        case "BF16" | "F32":
            bad = ~torch.isfinite(weight)
            return f"{int(bad.sum())} NaN or infinite values" if bool(bad.any()) else None
        case _:
            return None


def find_bad_scale(scale: Tensor) -> str | None:
    """What makes stored scales unusable, or None."""
    if scale.dtype == torch.float32:
        bad = ~(torch.isfinite(scale) & (scale >= 0))
        return f"{int(bad.sum())} NaN, infinite or negative scales" if bool(bad.any()) else None
    nan = scale == 255
    return f"{int(nan.sum())} NaN scale bytes (255)" if bool(nan.any()) else None


def find_bad_table(table: Tensor, num_experts: int) -> str | None:
    """What makes a `tid2eid` table unusable, or None."""
    if table.numel() == 0:
        return None
    low, high = int(table.min()), int(table.max())
    return f"expert ids {low}..{high}" if low < 0 or high >= num_experts else None
