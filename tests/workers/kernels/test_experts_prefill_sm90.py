"""Prefill's FP8 products of sm_90 against the reference, at V4-Flash's sizes and at the smallest served."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.expert_bytes import matrix_of, parts_of
from tests.workers.kernels.test_experts_prefill import Groups, group
from workers.experts.layout import ExpertShape, ExpertSlab, Tier, code_of
from workers.kernels import experts_prefill, experts_prefill_sm90
from workers.reference import moe, quant

pytestmark = pytest.mark.gpu

EXPERTS, CHOICES, LIMIT = 8, 6, 10.0
ROW_ERROR = 6e-3
"""Of a row of one product: its result is rounded to bf16, and the tensor cores' FP8 sums carry few bits."""


VALUE_ERROR = 3e-2
"""Of a value before the second product, in parts of its row's root mean square: a gate's error times a large `up`."""


def make_slab(wide: int, inner: int, device: torch.device) -> ExpertSlab:
    layout = ExpertShape(wide, inner)
    base = torch.randint(0, 256, (EXPERTS, layout.expert_bytes), dtype=torch.uint8, device=device)
    base[:, 3 * layout.codes_bytes :] = 112 + base[:, 3 * layout.codes_bytes :] % 12
    return ExpertSlab(base.flatten(), torch.randperm(EXPERTS, device=device).int())


def matrices(slab: ExpertSlab, wide: int, inner: int, expert: int) -> list[Tensor]:
    """fp32 w1, w3 and w2."""
    layout = ExpertShape(wide, inner)
    slot = slab.base.view(EXPERTS, -1)[int(slab.table[expert])]
    return [matrix_of(layout, slot, name) for name in ("w1", "w3", "w2")]


def products(
    x: Tensor, ids: Tensor, weights: Tensor, groups: Groups, slab: ExpertSlab, inner: int
) -> tuple[Tensor, Tensor]:
    """Activations before the second product `[T * k, I]` by place of the pair, and the parts `[T, k, D]`."""
    (tokens, choices), wide = ids.shape, x.shape[1]
    hidden = torch.full((tokens, choices, inner), float("nan"), dtype=torch.bfloat16, device=x.device)
    out = torch.full((tokens, choices + 1, wide), float("nan"), dtype=torch.bfloat16, device=x.device)
    words = experts_prefill.tile_words(ids.numel(), EXPERTS, x.device)
    tiles = torch.full((words,), 10**6, dtype=torch.int32, device=x.device)
    experts_prefill.expert_gate_up(x, weights, groups, slab, hidden, LIMIT, tiles=tiles, room=out)
    codes = hidden.view(torch.float8_e4m3fn).flatten(0, 1)[:, :inner].float()
    scales = hidden.view(torch.float32).flatten(0, 1)[:, inner // 4 : inner // 4 + inner // 128]
    values = (codes * scales.repeat_interleave(128, 1)).unflatten(-1, (-1, 4, 2, 4, 4)).permute(0, 1, 4, 2, 5, 3)
    out.fill_(float("nan"))
    most = experts_prefill.max_tiles(ids.numel(), EXPERTS, experts_prefill_sm90.MOST_TOKENS)
    experts_prefill_sm90.down(hidden, groups, slab, out, tiles, most)
    assert out[:, choices].isnan().all()
    return values.flatten(1), out[:, :choices]


def case(wide: int, tokens: int, device: torch.device, seed: int, used: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(tokens, wide, device=device).bfloat16()
    return x, torch.rand(tokens, used, device=device).topk(CHOICES).indices, torch.rand(tokens, CHOICES, device=device)


@pytest.fixture(autouse=True)
def _served(device: torch.device) -> None:
    if not experts_prefill_sm90.serves(device, 512, 512):
        pytest.skip("needs sm_90")


@pytest.mark.parametrize(
    ("wide", "inner", "tokens", "used"),
    [(4096, 2048, 700, 8), (512, 1024, 1, 8), (1024, 512, 128, 6), (512, 512, 65, 6)],
)
def test_products_are_the_references_every_time(
    device: torch.device, wide: int, inner: int, tokens: int, used: int, seed: int
) -> None:
    x, ids, weights = case(wide, tokens, device, seed, used)
    slab, groups = make_slab(wide, inner, device), group(ids.cpu(), EXPERTS, device)
    hidden, parts = products(x, ids, weights, groups, slab, inner)
    order = groups.pair_order.long()
    expert, token = ids.flatten()[order], order // CHOICES
    inputs, by_place = quant.fp8_fake_quant(x.float(), 128), parts.flatten(0, 1)[order].float()
    for number in expert.unique().tolist():
        rows = expert == number
        w1, w3, w2 = matrices(slab, wide, inner, number)
        value = moe.swiglu(inputs[token[rows]] @ w1.T, inputs[token[rows]] @ w3.T, LIMIT)
        assert_rounded(hidden[rows], value * weights.flatten()[order][rows, None])
        assert_rows_close(by_place[rows], hidden[rows] @ w2.T, ROW_ERROR)
    for _ in range(5):
        again = products(x, ids, weights, groups, slab, inner)
        assert torch.equal(again[0], hidden)
        assert torch.equal(again[1], parts)


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """e4m3 of values close to `exact`: half a step of three bits, beside what a product of the whole row may be off.

    Whole rows of the reference's own rounding would say less: one value next to a boundary falls to its other side.
    """
    allowed = exact.abs() / 16 + VALUE_ERROR * exact.square().mean(1, keepdim=True).sqrt()
    assert ((actual - exact).abs() <= allowed).all(), ((actual - exact).abs() - allowed).max()
    error = (actual - quant.fp8_fake_quant(exact.bfloat16().float(), 128)).norm(dim=1) / exact.norm(dim=1)
    assert error.median() < 2 * ROW_ERROR, error.median()


def assert_rows_close(actual: Tensor, expected: Tensor, bound: float) -> None:
    """Row by row, so that large rows do not hide small ones."""
    error = (actual - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < bound, error.max()


def test_a_token_has_the_same_bits_in_any_batch(device: torch.device, seed: int) -> None:
    x, ids, weights = case(512, 300, device, seed)
    slab = make_slab(512, 1024, device)
    _, whole = products(x, ids, weights, group(ids.cpu(), EXPERTS, device), slab, 1024)
    for tokens in (1, 40, 171):
        some = ids[:tokens]
        _, parts = products(x[:tokens], some, weights[:tokens], group(some.cpu(), EXPERTS, device), slab, 1024)
        assert torch.equal(parts, whole[:tokens])


def test_other_tiers_give_the_same_bits(device: torch.device, seed: int) -> None:
    x, ids, weights = case(1024, 60, device, seed)
    slab, groups = make_slab(1024, 512, device), group(ids.cpu(), EXPERTS, device)
    resident = products(x, ids, weights, groups, slab, 512)
    table, base = slab.table.clone(), slab.base.clone().view(EXPERTS, -1)
    table[1::3] |= code_of(Tier.HOST, 0)
    table[2::3] |= code_of(Tier.PEER, 0)
    base[slab.table[1::3].long()] = base[slab.table[2::3].long()] = 0xFF
    host, peer = slab.base.cpu().pin_memory(), slab.base.clone()
    elsewhere = products(x, ids, weights, groups, ExpertSlab(base.flatten(), table, host=host, peer=peer), 512)
    assert torch.equal(elsewhere[0], resident[0])
    assert torch.equal(elsewhere[1], resident[1])


def test_padding_tokens_are_not_written(device: torch.device, seed: int) -> None:
    x, ids, weights = case(512, 9, device, seed)
    _, parts = products(x, ids, weights, group(ids.cpu(), EXPERTS, device, skip=2), make_slab(512, 512, device), 512)
    assert parts[:7].isfinite().all()
    assert parts[7:].isnan().all()


def test_scales_far_below_the_rows_largest_count_as_zero(device: torch.device, seed: int) -> None:
    wide, inner = 512, 512
    x, ids, weights = case(wide, 20, device, seed)
    slab, groups = make_slab(wide, inner, device), group(ids.cpu(), EXPERTS, device)
    tiny = slab.base.clone().view(EXPERTS, -1)
    layout = ExpertShape(wide, inner)
    for expert in (*slab.base.view(EXPERTS, -1), *tiny):
        for name in ("w1", "w3", "w2"):
            parts_of(layout, expert)[f"{name}.scale"][:, 1::2] = 120 - 12
            parts_of(layout, expert)[f"{name}.scale"][:, 0] = 120
    for expert in tiny:
        for name in ("w1", "w3", "w2"):
            parts_of(layout, expert)[f"{name}.weight"].view(-1, wide // 32, 16)[:, 1::2] = 0
    some = products(x, ids, weights, groups, slab, inner)
    none = products(x, ids, weights, groups, ExpertSlab(tiny.flatten(), slab.table), inner)
    assert torch.equal(some[0], none[0])
    assert torch.equal(some[1], none[1])
