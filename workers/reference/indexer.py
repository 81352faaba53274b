"""The C4 indexer: cheap scores that pick which compressed entries a query attends to.

Score of entry w for query t: `sum_h relu(q[t, h] . k[w]) * weight[t, h]`; weights come from the hidden state and
already carry `head_dim ** -0.5 * num_heads ** -0.5`. Source: official `Indexer.forward`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform (Sylvester order) of the last axis, a power of two long.

    Applied to both sides of the score product it changes nothing but spreads outliers before quantisation.
    """
    size = x.shape[-1]
    half = 1
    while half < size:
        low, high = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x * size**-0.5


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """Scores `[..., T, N]` of `q [..., T, Hi, Di]`, `weights [..., T, Hi]`, and `keys` either shared by all queries
    `[..., N, Di]` or one set per query `[..., T, N, Di]` (told apart by rank). Not masked."""
    q, keys = q.float(), keys.float().transpose(-1, -2)  # keys [..., Di, N]
    # Shared keys meet all T * Hi queries in one product: a broadcast one would copy the keys once per query.
    dots = (q.flatten(-3, -2) @ keys).unflatten(-2, q.shape[-3:-1]) if keys.ndim < q.ndim else q @ keys
    dots = torch.relu(dots)  # [..., T, Hi, N]
    return (dots * weights.float().unsqueeze(-1)).sum(-2)


def select_topk(scores: Tensor, visible: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `min(k, N)` best visible entries of each row: `(indices int64 [..., T, K], valid bool [..., T, K])`.

    Best first; equal scores go to the lower entry, so the choice does not depend on batch, chunking or device.
    Where fewer than K entries are visible the surplus is not valid and its index is 0.
    """
    num_entries = scores.shape[-1]
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0: they tie
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)  # integer order = float order
    ordered = ordered.masked_fill(~visible, -(2**31))
    rank_from_end = torch.arange(num_entries - 1, -1, -1, device=scores.device)
    best = torch.topk(ordered * 2**32 + rank_from_end, min(k, num_entries), dim=-1).indices
    valid = torch.gather(visible.expand_as(scores), -1, best)
    return best.masked_fill(~valid, 0), valid
