"""mHC: the residual as S parallel streams, mixed around each sublayer by a doubly stochastic matrix.

`hc_pre` reads the streams `R [..., S, D]` and yields the sublayer input plus two gates; `hc_post` writes the sublayer
output back: `R'[k] = post[k] * out + sum_j comb[j, k] * R[j]`, where `R` is the tensor `hc_pre` saw.

NOTE: the sum runs over the FIRST index of `comb`. The transposed version yields plausible text that degrades with
depth. All arithmetic is fp32. Source: DeepSeek-V4 official `model.py` (`hc_pre`, `hc_post`, `hc_head`) and `kernel.py`
(`hc_split_sinkhorn`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _mixes(streams: Tensor, fn: Tensor, norm_eps: float) -> Tensor:
    """`fn @ x / rms(x)` for `x` = the streams flattened stream-major; the scale is applied after the product."""
    flat = streams.float().flatten(-2)  # [..., S*D]
    rsqrt_mean = torch.rsqrt(flat.square().mean(-1, keepdim=True) + norm_eps)
    return F.linear(flat, fn) * rsqrt_mean


def sinkhorn(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """`[..., S, S]` logits to a nearly doubly stochastic matrix: `iters` column steps, row softmax plus `iters - 1` row
    steps; `eps` is added to the softmax and to every denominator."""
    comb = logits.softmax(-1) + eps
    comb = comb / (comb.sum(-2, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def hc_pre(
    streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, iters: int, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sublayer input `[..., D]`, `post [..., S]` and `comb [..., S, S]` of `streams [..., S, D]`.

    `fn [S*(2+S), S*D]`, `base [S*(2+S)]` (rows: S pre, S post, S*S comb row-major), `scale [3]` (pre, post, comb).
    """
    num_streams = streams.shape[-2]
    mixes = _mixes(streams, fn, norm_eps)
    pre_mix, post_mix, comb_mix = mixes.split((num_streams, num_streams, num_streams**2), dim=-1)
    pre_base, post_base, comb_base = base.split((num_streams, num_streams, num_streams**2))
    pre = torch.sigmoid(pre_mix * scale[0] + pre_base) + eps
    post = 2 * torch.sigmoid(post_mix * scale[1] + post_base)
    logits = (comb_mix * scale[2] + comb_base).unflatten(-1, (num_streams, num_streams))
    mixed = (pre.unsqueeze(-1) * streams.float()).sum(-2)
    return mixed, post, sinkhorn(logits, iters=iters, eps=eps)


def hc_post(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """New streams `[..., S, D]` from the sublayer output `[..., D]` and the streams `hc_pre` saw."""
    return post.unsqueeze(-1) * out.float().unsqueeze(-2) + comb.transpose(-1, -2) @ streams.float()


def hc_head(streams: Tensor, fn: Tensor, base: Tensor, scale: Tensor, *, eps: float, norm_eps: float) -> Tensor:
    """Collapse `[..., S, D]` to `[..., D]` before the final norm. `fn [S, S*D]`, `base [S]`, `scale [1]`."""
    weights = torch.sigmoid(_mixes(streams, fn, norm_eps) * scale + base) + eps
    return (weights.unsqueeze(-1) * streams.float()).sum(-2)
