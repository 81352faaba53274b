"""The KV compressor: one entry per 4 tokens (overlapping, C4) or per 128 tokens (C128). Also builds indexer keys.

Each token leaves one raw row: `kv | score`, score WITHOUT the positional bias `ape`. In C4 both halves have two parts,
A and B (row layout `kvA | kvB | scA | scB`). Entry `w` is a per-channel softmax-weighted sum over

    C128: the rows of tokens 128w .. 128w+127
    C4:   the A parts of tokens 4w-4 .. 4w-1  and  the B parts of tokens 4w .. 4w+3

so a token's A part belongs to the NEXT entry, and entry 0 has no A parts (absent rows have score -inf).
`ape` is indexed by the token's absolute position mod ratio, for both parts. All fp32; see spec of the official release
(`Compressor.forward` in model.py).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.reference.norm_rope import apply_rope, rms_norm


def compress_project(x: Tensor, wkv: Tensor, wgate: Tensor) -> Tensor:
    """Raw rows `[..., 2*c*hd]` (`kv | score`, no ape) of normed hidden states `[..., D]`; c = 2 for C4, 1 for C128."""
    return torch.cat((F.linear(x, wkv), F.linear(x, wgate)), dim=-1).float()


def compress_pool(rows: Tensor, present: Tensor, ape: Tensor, *, ratio: int) -> Tensor:
    """Pool the rows of one entry: `rows [..., R, 2*c*hd]`, `present [..., R]` bool, `ape [ratio, c*hd]` to `[..., hd]`.

    C4: R = 8, the rows of tokens 4w-4 .. 4w+3 in order. C128: R = 128. Absent rows may hold anything. At least one row
    of each entry must be present.
    """
    parts = rows.shape[-2] // ratio  # 2 for C4 (A then B), 1 for C128
    kv, score = rows.float().chunk(2, dim=-1)  # [..., R, c*hd]
    score = score + ape.repeat(parts, 1)
    if parts == 2:
        head_dim = kv.shape[-1] // 2
        kv = torch.cat((kv[..., :ratio, :head_dim], kv[..., ratio:, head_dim:]), dim=-2)  # [..., 2r, hd]
        score = torch.cat((score[..., :ratio, :head_dim], score[..., ratio:, head_dim:]), dim=-2)
    mask = present.unsqueeze(-1)
    weights = score.masked_fill(~mask, float("-inf")).softmax(-2)
    return (weights * kv.masked_fill(~mask, 0.0)).sum(-2)


def compress_finish(pooled: Tensor, norm_weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Entry `[..., hd]`: RMSNorm, then rope at the entry's FIRST own token (`ratio * w`, also for C4's overlap)."""
    return apply_rope(rms_norm(pooled, norm_weight, eps), cos, sin)


def visible_entries(positions: Tensor, ratio: int) -> Tensor:
    """Number of entries a query at each position may see: an entry counts once its last token is not in the future."""
    return (positions + 1) // ratio
