"""Stored bytes of one KV row: fp32 vectors to and from the rows that the pools of `kvstore` hold.

Owns: the FP8 entry (SGLang's V4 layout, 584 bytes at Flash's head size, generalised to any head), the FP8 indexer key, the
fp32 rows of exactness tests and of compressor states. A row here is the planes of one unit concatenated, data first and
scales second; the pools place the planes apart. Does not own: addresses, or which vectors are stored.

Sources: DeepSeek-V4-Flash `kernel.py` (scale rule), SGLang 0.5.23 V4 pools (layout).
"""

from __future__ import annotations

import torch

KV_SCALE_GROUP = 64
"""Nope dimensions that share one e8m0 scale."""

SCALE_PLANE_ALIGN = 8
"""Scale bytes of an entry are padded to this multiple (Flash: 7 scales, 8 bytes)."""

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
"""Smallest magnitude that a scale is computed from, so that an all-zero group stays finite."""


def kv_data_bytes(head_dim: int, rope_dim: int) -> int:
    """Bytes of an FP8 entry's data plane: e4m3 nope, then bf16 rope."""
    return (head_dim - rope_dim) + 2 * rope_dim


def kv_scale_bytes(head_dim: int, rope_dim: int) -> int:
    """Bytes of an FP8 entry's scale plane. Raises ValueError when the nope part is not whole scale groups."""
    nope = head_dim - rope_dim
    if nope % KV_SCALE_GROUP:
        raise ValueError(f"nope size {nope} is not a multiple of the scale group {KV_SCALE_GROUP}")
    groups = nope // KV_SCALE_GROUP
    return -(-groups // SCALE_PLANE_ALIGN) * SCALE_PLANE_ALIGN


def e8m0_scale_bytes(amax: torch.Tensor) -> torch.Tensor:
    """uint8 bytes b with 2^(b-127) = the power of two at or above max(amax, 1e-4) / 448 (rounded up, never to nearest)."""
    bits = (amax.float().clamp(min=AMAX_FLOOR) / E4M3_MAX).view(torch.int32)
    return ((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)).to(torch.uint8)


def e8m0_values(scale_bytes: torch.Tensor) -> torch.Tensor:
    """fp32 2^(b-127) of uint8 bytes; byte 0 reads as 0, which no scale of this format uses."""
    return (scale_bytes.to(torch.int32) << 23).view(torch.float32)


def pack_kv_fp8(entry: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """fp32 entries [..., D] to stored rows [..., data + scale bytes] uint8. Pad scale bytes are zero."""
    head_dim = entry.shape[-1]
    nope = head_dim - rope_dim
    lead = entry.shape[:-1]
    groups = entry[..., :nope].float().reshape(*lead, nope // KV_SCALE_GROUP, KV_SCALE_GROUP)
    scales = e8m0_scale_bytes(groups.abs().amax(-1))
    scaled = (groups / e8m0_values(scales).unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX)
    codes = scaled.to(torch.float8_e4m3fn).view(torch.uint8).reshape(*lead, nope)
    rope = entry[..., nope:].to(torch.bfloat16).contiguous().view(torch.uint8).reshape(*lead, 2 * rope_dim)
    pad = kv_scale_bytes(head_dim, rope_dim) - scales.shape[-1]
    return torch.cat([codes, rope, scales, scales.new_zeros(*lead, pad)], dim=-1)


def unpack_kv_fp8(rows: torch.Tensor, head_dim: int, rope_dim: int) -> torch.Tensor:
    """Inverse of `pack_kv_fp8`: rows uint8 to fp32 entries [..., D]. Unused rows may decode to NaN: mask before use."""
    nope = head_dim - rope_dim
    lead = rows.shape[:-1]
    data_bytes = kv_data_bytes(head_dim, rope_dim)
    num_groups = nope // KV_SCALE_GROUP
    codes = rows[..., :nope].contiguous().view(torch.float8_e4m3fn).float()
    scales = e8m0_values(rows[..., data_bytes : data_bytes + num_groups])
    values = (codes.reshape(*lead, num_groups, KV_SCALE_GROUP) * scales.unsqueeze(-1)).reshape(*lead, nope)
    rope = rows[..., nope:data_bytes].contiguous().view(torch.bfloat16).float()
    return torch.cat([values, rope], dim=-1)


def pack_indexer_fp8(key: torch.Tensor) -> torch.Tensor:
    """fp32 indexer keys [..., Di] to rows [..., Di + 4]: e4m3 codes, one fp32 scale amax / 448 (not a power of two)."""
    scale = key.float().abs().amax(-1, keepdim=True).clamp(min=AMAX_FLOOR) / E4M3_MAX
    codes = (key.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.cat([codes, scale.contiguous().view(torch.uint8)], dim=-1)


def unpack_indexer_fp8(rows: torch.Tensor, index_head_dim: int) -> torch.Tensor:
    """Inverse of `pack_indexer_fp8`: fp32 keys [..., Di]."""
    codes = rows[..., :index_head_dim].contiguous().view(torch.float8_e4m3fn).float()
    return codes * rows[..., index_head_dim : index_head_dim + 4].contiguous().view(torch.float32)


def pack_fp32(values: torch.Tensor) -> torch.Tensor:
    """fp32 rows [..., N] to their bytes [..., 4N] uint8 (exactness mode and compressor states)."""
    return values.float().contiguous().view(torch.uint8)


def unpack_fp32(rows: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 4N] uint8 to fp32 rows [..., N]."""
    return rows.contiguous().view(torch.float32)
