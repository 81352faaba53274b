"""Attention of each query over its own list of KV entries, with a sink logit per head.

One vector per entry serves as key and value (multi-query attention with H query heads). The sink adds `exp(sink)` to
the softmax denominator and has no value vector.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_attention(q: Tensor, kv: Tensor, mask: Tensor, sink: Tensor, scale: float) -> Tensor:
    """`q [..., T, H, D]`, `kv [..., T, K, D]`, `mask [..., T, K]` (True = attend), `sink [H]` to fp32 `[..., T, H, D]`.

    Entries that are masked out may hold anything, NaN included; a query with no entry at all yields zeros.
    """
    kv = kv.float().masked_fill(~mask.unsqueeze(-1), 0.0)
    scores = (q.float() @ kv.transpose(-1, -2)) * scale  # [..., T, H, K]
    scores = scores.masked_fill(~mask.unsqueeze(-2), float("-inf"))
    sink = sink.float().unsqueeze(-1).expand(*scores.shape[:-1], 1)
    probabilities = torch.cat((scores, sink), dim=-1).softmax(-1)[..., :-1]
    return probabilities @ kv
