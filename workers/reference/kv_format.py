"""Stored bytes of one KV row: fp32 vectors to and from the rows that the pools of `kvstore` hold.

Owns: the FP8 entry (SGLang's V4 layout, 584 bytes at Flash's head size, generalised to any head), the FP8 indexer key,
the fp32 rows of exactness tests and of compressor states. A row here is the planes of one unit concatenated, data first
and scales second; the pools place the planes apart. Does not own: addresses, or which vectors are stored. Rounding
rules live in `quant`.
"""

from __future__ import annotations

import torch

from workers.reference.quant import (
    e4m3_decode,
    e4m3_encode,
    e8m0_decode,
    fp8_group_scale_bytes,
    indexer_fp8_scale,
)

KV_SCALE_GROUP = 64
"""Nope dimensions that share one e8m0 scale."""

SCALE_PLANE_ALIGN = 8
"""Scale bytes of an entry are padded to this multiple (Flash: 7 scales, 8 bytes)."""

INDEXER_SCALE_BYTES = 4


def kv_data_bytes(head_dim: int, rope_dim: int) -> int:
    """Bytes of an FP8 entry's data plane: e4m3 nope, then bf16 rope."""
    return (head_dim - rope_dim) + 2 * rope_dim


def pack_kv_fp8(entry: torch.Tensor, rope_dim: int) -> torch.Tensor:
    """fp32 entries [..., D] to stored rows [..., data + scale bytes] uint8; pad scale bytes are zero.

    Raises ValueError when the nope part is not whole scale groups.
    """
    head_dim = entry.shape[-1]
    nope = head_dim - rope_dim
    if nope % KV_SCALE_GROUP:
        raise ValueError(f"nope size {nope} is not a multiple of the scale group {KV_SCALE_GROUP}")
    lead = entry.shape[:-1]
    scales = fp8_group_scale_bytes(entry[..., :nope], KV_SCALE_GROUP)  # [..., nope/64]
    groups = entry[..., :nope].float().unflatten(-1, (-1, KV_SCALE_GROUP))
    codes = e4m3_encode(groups / e8m0_decode(scales).unsqueeze(-1)).view(torch.uint8).flatten(-2)
    rope = entry[..., nope:].to(torch.bfloat16).contiguous().view(torch.uint8)
    pad = scales.new_zeros(*lead, -scales.shape[-1] % SCALE_PLANE_ALIGN)
    return torch.cat([codes, rope, scales, pad], dim=-1)


def unpack_kv_fp8(rows: torch.Tensor, head_dim: int, rope_dim: int) -> torch.Tensor:
    """Inverse of `pack_kv_fp8`: rows uint8 to fp32 entries [..., D]. Unused rows may decode to NaN: mask before use."""
    nope = head_dim - rope_dim
    data_bytes = kv_data_bytes(head_dim, rope_dim)
    scales = e8m0_decode(rows[..., data_bytes : data_bytes + nope // KV_SCALE_GROUP].contiguous())
    groups = e4m3_decode(rows[..., :nope].contiguous()).unflatten(-1, (-1, KV_SCALE_GROUP))
    rope = rows[..., nope:data_bytes].contiguous().view(torch.bfloat16).float()
    return torch.cat([(groups * scales.unsqueeze(-1)).flatten(-2), rope], dim=-1)


def pack_indexer_fp8(key: torch.Tensor) -> torch.Tensor:
    """fp32 indexer keys [..., Di] to rows [..., Di + 4]: e4m3 codes, then one fp32 scale."""
    scale = indexer_fp8_scale(key)
    codes = e4m3_encode(key.float() / scale).view(torch.uint8)
    # A clone, not contiguous(): a one-element axis may keep stride 0, which view() refuses.
    return torch.cat([codes, scale.clone(memory_format=torch.contiguous_format).view(torch.uint8)], dim=-1)


def unpack_indexer_fp8(rows: torch.Tensor, index_head_dim: int) -> torch.Tensor:
    """Inverse of `pack_indexer_fp8`: fp32 keys [..., Di]."""
    scale = rows[..., index_head_dim : index_head_dim + INDEXER_SCALE_BYTES].contiguous().view(torch.float32)
    return e4m3_decode(rows[..., :index_head_dim].contiguous()) * scale


def pack_fp32(values: torch.Tensor) -> torch.Tensor:
    """fp32 rows [..., N] to their bytes [..., 4N] uint8 (exactness mode and compressor states)."""
    return values.float().contiguous().view(torch.uint8)


def unpack_fp32(rows: torch.Tensor) -> torch.Tensor:
    """Bytes [..., 4N] uint8 to fp32 rows [..., N]."""
    return rows.contiguous().view(torch.float32)
