"""Routing and experts: spec traps 23, 25, 26, 27 and the two forms of the layer."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.reference import moe as ops
from workers.reference.linear import grouped_linear, linear
from workers.reference.moe import ExpertWeights, moe, moe_dense, route_hash, route_learned, router_scores, swiglu
from workers.reference.quant import fp8_fake_quant


def random_experts(seed: int, count: int = 6, hidden: int = 16, inner: int = 8) -> tuple[ExpertWeights, ExpertWeights]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((count, inner, hidden), (count, hidden, inner), (count, inner, hidden))
    routed = ExpertWeights(*(torch.randn(shape, generator=generator) for shape in shapes))
    return routed, ExpertWeights(*(torch.randn(shape[1:], generator=generator) for shape in shapes))


def test_bias_steers_the_choice_but_not_the_weight() -> None:
    x, gate = torch.ones(1, 1), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    bias = torch.tensor([100.0, 100.0, 0.0, 0.0])
    ids, weights = route_learned(x, gate, bias, 2, 1.5)
    assert sorted(ids[0].tolist()) == [0, 1]
    raw = router_scores(x, gate)[0, ids[0]]
    torch.testing.assert_close(weights[0], raw / raw.sum() * 1.5)


def test_scores_are_the_root_of_softplus() -> None:
    torch.testing.assert_close(
        router_scores(torch.ones(1, 1), torch.tensor([[0.0], [30.0]])),
        torch.tensor([[0.6931472**0.5, 30.0**0.5]]),
    )


def test_hash_router_takes_experts_from_the_table_and_weights_from_the_gate() -> None:
    generator = torch.Generator().manual_seed(1)
    x, gate = torch.randn(3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    table = torch.tensor([[0, 1], [2, 3], [3, 0]], dtype=torch.int32)
    ids, weights = route_hash(x, gate, table, torch.tensor([2, 0, 1]), 2.5)
    assert ids.tolist() == [[3, 0], [0, 1], [2, 3]]
    raw = router_scores(x, gate).gather(1, ids)
    torch.testing.assert_close(weights, raw / raw.sum(-1, keepdim=True) * 2.5)


def test_padding_ids_outside_the_table_still_route() -> None:
    table = torch.tensor([[0, 1], [2, 3]])
    ids, _ = route_hash(torch.ones(2, 4), torch.ones(4, 4), table, torch.tensor([129_280, -1]), 1.0)
    assert ids.tolist() == [[2, 3], [0, 1]]


def test_router_computes_in_fp32_for_half_precision_input() -> None:
    generator = torch.Generator().manual_seed(2)
    x, gate = torch.randn(200, 64, generator=generator).bfloat16(), torch.randn(16, 64, generator=generator)
    scores = router_scores(x, gate)
    assert scores.dtype is torch.float32
    coarse = F.softplus(F.linear(x, gate.bfloat16())).sqrt().float()
    assert (scores.topk(3).indices != coarse.topk(3).indices).any()


def test_clamps_act_before_the_activation() -> None:
    gate, up = torch.tensor([20.0, -20.0, 1.0]), torch.tensor([30.0, -30.0, 1.0])
    expected = F.silu(torch.tensor([10.0, -20.0, 1.0])) * torch.tensor([10.0, -10.0, 1.0])
    torch.testing.assert_close(swiglu(gate, up, 10.0), expected)


def test_shared_expert_is_clamped_too() -> None:
    _, shared = random_experts(3)
    x = 10 * torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    clamped = ops.shared_expert(x, shared, 1.0, act_fp8=False)
    hidden = F.silu((x @ shared.w1.T).clamp(max=1.0)) * (x @ shared.w3.T).clamp(-1.0, 1.0)
    torch.testing.assert_close(clamped, hidden @ shared.w2.T)
    assert not torch.allclose(clamped, ops.shared_expert(x, shared, 1e9, act_fp8=False))


@pytest.mark.parametrize("act_fp8", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 9])
def test_dense_and_visiting_forms_agree(num_tokens: int, act_fp8: bool) -> None:
    experts, shared = random_experts(5)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(num_tokens, 16, generator=generator)
    ids, weights = route_learned(x, torch.randn(6, 16, generator=generator), torch.zeros(6), 3, 1.5)
    visited = moe(x, ids, weights, experts, shared, 2.0, act_fp8)
    torch.testing.assert_close(moe_dense(x, ids, weights, experts, shared, 2.0, act_fp8), visited, rtol=1e-4, atol=1e-4)
    for row in range(num_tokens):
        alone = moe(x[row : row + 1], ids[row : row + 1], weights[row : row + 1], experts, shared, 2.0, act_fp8)
        torch.testing.assert_close(alone[0], visited[row], rtol=1e-4, atol=1e-4)


def test_routing_weight_enters_before_the_down_projection_is_quantised() -> None:
    experts, shared = random_experts(7, count=1, hidden=128, inner=128)
    x = torch.randn(2, 128, generator=torch.Generator().manual_seed(8))
    weights = torch.full((2, 1), 0.7)
    routed = moe(x, torch.zeros(2, 1, dtype=torch.long), weights, experts, shared, 10.0, True)
    inputs = fp8_fake_quant(x, 128)
    hidden = swiglu(inputs @ experts.w1[0].T, inputs @ experts.w3[0].T, 10.0)
    before = fp8_fake_quant(hidden * 0.7, 128) @ experts.w2[0].T
    after = fp8_fake_quant(hidden, 128) @ experts.w2[0].T * 0.7
    base = ops.shared_expert(x, shared, 10.0, act_fp8=True)
    torch.testing.assert_close(routed - base, before, rtol=1e-3, atol=1e-2)
    assert (before - after).abs().max() > 0.1


def test_linear_quantises_its_input_only_on_request() -> None:
    generator = torch.Generator().manual_seed(9)
    x, weight = torch.randn(3, 256, generator=generator), torch.randn(5, 256, generator=generator)
    torch.testing.assert_close(linear(x, weight, act_fp8=False), x @ weight.T)
    torch.testing.assert_close(linear(x, weight, act_fp8=True), fp8_fake_quant(x, 128) @ weight.T)


def test_grouped_linear_keeps_groups_apart() -> None:
    generator = torch.Generator().manual_seed(10)
    x, weight = torch.randn(2, 5, 3, 8, generator=generator), torch.randn(3, 4, 8, generator=generator)
    out = grouped_linear(x, weight)
    for group in range(3):
        torch.testing.assert_close(out[..., group, :], x[..., group, :] @ weight[group].T)
    torch.testing.assert_close(grouped_linear(x[0, 0], weight), out[0, 0])
