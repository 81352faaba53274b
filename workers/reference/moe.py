"""Mixture of experts: routing by learned scores or by token id, clamped SwiGLU experts, one shared expert.

Router scores are `sqrt(softplus(gate @ x))` in fp32. The learned router picks by score + bias but weighs by score
alone; the hash router reads its experts from a table of token ids and weighs by the same scores. A routing weight
multiplies the activation before w2. Source: official `Gate` and `MoE`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.reference.linear import ACTIVATION_GROUP, linear
from workers.reference.quant import fp8_fake_quant


class ExpertWeights(NamedTuple):
    """SwiGLU weights: routed experts stacked `[E, ...]`, the shared expert without that axis."""

    w1: Tensor
    """Gate projection `[E, I, D]` or `[I, D]`."""
    w2: Tensor
    """Down projection `[E, D, I]` or `[D, I]`."""
    w3: Tensor
    """Up projection `[E, I, D]` or `[I, D]`."""


def router_scores(x: Tensor, gate_weight: Tensor) -> Tensor:
    """fp32 scores `[..., E]`, positive."""
    return F.softplus(F.linear(x.float(), gate_weight.float())).sqrt()


def _normalised(scores: Tensor, ids: Tensor, scaling: float) -> Tensor:
    chosen = scores.gather(-1, ids)
    return chosen / chosen.sum(-1, keepdim=True) * scaling


def route_learned(
    x: Tensor, gate_weight: Tensor, bias: Tensor, num_chosen: int, scaling: float
) -> tuple[Tensor, Tensor]:
    """Expert ids int64 `[..., k]` and weights fp32 `[..., k]` (sum `scaling`); `bias [E]` only steers the choice."""
    scores = router_scores(x, gate_weight)
    ids = (scores.detach() + bias).topk(num_chosen, dim=-1).indices
    return ids, _normalised(scores, ids, scaling)


def route_hash(
    x: Tensor, gate_weight: Tensor, tid2eid: Tensor, token_ids: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """As `route_learned`, but the experts come from `tid2eid [V, k]`; padding ids outside the table are clamped."""
    ids = tid2eid[token_ids.clamp(0, tid2eid.shape[0] - 1)].long()
    return ids, _normalised(router_scores(x, gate_weight), ids, scaling)


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """`silu(min(gate, limit)) * clamp(up, -limit, limit)`: clamped before the activation, gate only above."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def shared_expert(x: Tensor, shared: ExpertWeights, limit: float, *, act_fp8: bool) -> Tensor:
    """`x [..., D]` through the always-on expert (same clamps, no routing weight)."""
    hidden = swiglu(linear(x, shared.w1, act_fp8=act_fp8), linear(x, shared.w3, act_fp8=act_fp8), limit)
    return linear(hidden, shared.w2, act_fp8=act_fp8)


def moe(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    shared: ExpertWeights,
    limit: float,
    act_fp8: bool,
) -> Tensor:
    """Routed plus shared output `[T, D]` of `x [T, D]` with `ids`, `weights [T, k]`. Visits only the chosen experts."""
    out = shared_expert(x, shared, limit, act_fp8=act_fp8)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        rows = x[token]
        gate = linear(rows, experts.w1[expert], act_fp8=act_fp8)
        up = linear(rows, experts.w3[expert], act_fp8=act_fp8)
        hidden = swiglu(gate, up, limit) * weights[token, choice].unsqueeze(-1)
        out = out.index_add(0, token, linear(hidden, experts.w2[expert], act_fp8=act_fp8).to(out.dtype))
    return out


def moe_dense(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: ExpertWeights,
    shared: ExpertWeights,
    limit: float,
    act_fp8: bool,
) -> Tensor:
    """The same function of the same arguments with static shapes: every expert runs on every token, weight 0 if not
    chosen.

    For training with few experts, where data-dependent shapes would break the compiled graph. `x [..., D]`.
    """
    num_experts = experts.w1.shape[0]
    per_expert = torch.zeros(*ids.shape[:-1], num_experts, device=x.device, dtype=weights.dtype)
    per_expert = per_expert.scatter(-1, ids, weights)  # [..., E]
    inputs = fp8_fake_quant(x, ACTIVATION_GROUP) if act_fp8 else x
    gate = F.linear(inputs, experts.w1.flatten(0, 1)).unflatten(-1, (num_experts, -1))  # [..., E, I]
    up = F.linear(inputs, experts.w3.flatten(0, 1)).unflatten(-1, (num_experts, -1))
    hidden = swiglu(gate, up, limit) * per_expert.unsqueeze(-1)
    hidden = fp8_fake_quant(hidden, ACTIVATION_GROUP) if act_fp8 else hidden
    down = experts.w2.transpose(0, 1).flatten(1)  # [D, E*I]
    return F.linear(hidden.flatten(-2), down) + shared_expert(x, shared, limit, act_fp8=act_fp8)
