"""Grouped FP4 experts of prefill against the reference mixture with the same quantisation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.expert_bytes import matrix_of, write_expert
from tests.workers.kernels.test_linear_prefill import fp8_weight
from tests.workers.kernels.test_quantise_rows import in_expert_order
from workers.experts.layout import ExpertShape, ExpertSlab, Tier, code_of
from workers.kernels import experts_prefill, experts_prefill_sm90, linear_prefill
from workers.kernels.linear_decode import Weight
from workers.kernels.linear_prefill import PrefillWork
from workers.kernels.quantise_rows import quantise_rows, round_in_place
from workers.kernels.tiles import tile
from workers.reference import moe, quant

WIDE, INNER, EXPERTS, CHOICES, LIMIT = 256, 128, 5, 2, 10.0
BF16_ERROR = 6e-3
"""Of one product: its output is rounded to bf16 (the interpreter cuts instead)."""

MIXTURE_ERROR = 4e-2
"""Of the mixture: an activation that differs in its last bf16 bit may round to the next e4m3 value, 1/16 away."""


@dataclass
class Groups:
    num_active: Tensor
    active_experts: Tensor
    active_begin: Tensor
    pair_order: Tensor


@dataclass
class Layer:
    slab: ExpertSlab
    experts: moe.ExpertWeights
    w13: Weight
    w2: Weight
    shared: moe.ExpertWeights


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def group(ids: Tensor, num_experts: int, device: torch.device, skip: int = 0) -> Groups:
    """What `routing.route` writes, for the tokens before the last `skip`."""
    most = min(ids.numel(), num_experts)
    pairs = torch.arange((ids.shape[0] - skip) * ids.shape[1])
    used = ids.flatten()[: len(pairs)]
    active, counts = used.unique(return_counts=True)
    experts, begin = torch.full((most,), -99), torch.full((most + 1,), 10**6)
    experts[: len(active)] = active
    begin[: len(active) + 1] = torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))
    order = torch.full((ids.numel(),), 10**6)
    order[: len(pairs)] = pairs[used.argsort(stable=True)]
    parts = (torch.tensor([len(active)]), experts, begin, order)
    return Groups(*(part.int().to(device) for part in parts))


def make_layer(device: torch.device, seed: int) -> Layer:
    """Experts of very different size, in slots of another order than their ids."""
    layout = ExpertShape(WIDE, INNER)
    base = torch.zeros((EXPERTS + 2) * layout.expert_bytes, dtype=torch.uint8)
    table = torch.randperm(EXPERTS + 2, generator=torch.Generator().manual_seed(seed))[:EXPERTS]
    values: dict[str, list[Tensor]] = {"w1": [], "w2": [], "w3": []}
    for expert in range(EXPERTS):
        tensors = {}
        for n, (name, shape) in enumerate((("w1", (INNER, WIDE)), ("w3", (INNER, WIDE)), ("w2", (WIDE, INNER)))):
            weight = _randn(*shape, seed=seed + 10 * expert + n) * 2.0 ** (expert - 3) / shape[1] ** 0.5
            packed, scales = quant.fp4_quant(weight)
            tensors |= {f"{name}.weight": packed, f"{name}.scale": scales}
            values[name].append(quant.fp4_dequant(packed, scales))
        slot = int(table[expert]) * layout.expert_bytes
        write_expert(layout, tensors, base[slot : slot + layout.expert_bytes])
    w13, value13 = fp8_weight(2 * INNER, WIDE, device, seed + 3)
    w2, value2 = fp8_weight(WIDE, INNER, device, seed + 4)
    return Layer(
        ExpertSlab(base.to(device), table.int().to(device)),
        moe.ExpertWeights(*(torch.stack(values[name]) for name in ("w1", "w2", "w3"))),
        w13,
        w2,
        moe.ExpertWeights(value13[:INNER], value2, value13[INNER:]),
    )


def run(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor, device: torch.device, skip: int = 0) -> Tensor:
    """Parts `[T, k + 1, D]` of the mixture on the device, NaN where nothing was written."""
    tokens = x.shape[0]
    work = PrefillWork.empty(tokens, columns=WIDE, weight_elements=2 * WIDE * INNER, inner=INNER, device=device)
    rounded = torch.empty_like(x, device=device)
    shared_hidden = torch.empty(tokens, INNER, dtype=torch.bfloat16, device=device)
    hidden = torch.full((tokens, CHOICES, INNER), float("nan"), dtype=torch.bfloat16, device=device)
    if skip:
        hidden.zero_()  # rows without a pair are rounded too, and the interpreter warns of NaN there
    out = torch.full((tokens, CHOICES + 1, WIDE), float("nan"), dtype=torch.bfloat16, device=device)
    words = experts_prefill.tile_words(ids.numel(), EXPERTS, device)
    tiles = torch.full((words,), 10**6, dtype=torch.int32, device=device)
    x = x.to(device)
    quantise_rows(x, None, rounded, reorder=True)
    linear_prefill.shared_gate_up(x, layer.w13, LIMIT, shared_hidden, work=work)
    groups = group(ids, EXPERTS, device, skip)
    operands = (weights.to(device), groups, layer.slab, hidden, LIMIT)
    experts_prefill.expert_gate_up(rounded, *operands, tiles=tiles, room=out)
    out.fill_(float("nan"))
    experts_prefill.expert_down(
        hidden, shared_hidden, layer.w2, groups, layer.slab, out, tiles=tiles, work=work
    )  # fmt: skip
    return out


def _case(tokens: int, seed: int, used: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    x = (_randn(tokens, WIDE, seed=seed + 5) * 2).bfloat16()
    ids = torch.stack(
        [torch.randperm(used, generator=torch.Generator().manual_seed(t))[:CHOICES] for t in range(tokens)]
    )
    return x, ids, _randn(tokens, CHOICES, seed=seed + 6).abs()


@pytest.mark.parametrize(("tokens", "used"), [(1, EXPERTS), (30, EXPERTS), (150, 2)])
def test_the_mixture_is_the_references(device: torch.device, tokens: int, used: int, seed: int) -> None:
    layer = make_layer(device, seed)
    x, ids, weights = _case(tokens, seed, used)
    out = run(layer, x, ids, weights, device).float().cpu()
    assert out.isfinite().all()
    expected = moe.moe(x.float(), ids, weights, layer.experts, layer.shared, LIMIT, act_fp8=True)
    assert (out.sum(1) - expected).norm() / expected.norm() < MIXTURE_ERROR


@pytest.mark.parametrize(("tokens", "used"), [(1, EXPERTS), (30, EXPERTS), (150, 2)])
def test_each_product_is_the_references(device: torch.device, tokens: int, used: int, seed: int) -> None:
    layer = make_layer(device, seed)
    x, ids, weights = _case(tokens, seed, used)
    groups = group(ids, EXPERTS, device)
    order = groups.pair_order.long().cpu()
    rounded = torch.empty_like(x, device=device)
    quantise_rows(x.to(device), None, rounded, reorder=True)
    hidden = torch.full((tokens, CHOICES, INNER), float("nan"), dtype=torch.bfloat16, device=device)
    out = torch.full((tokens, CHOICES + 1, WIDE), float("nan"), dtype=torch.bfloat16, device=device)
    words = experts_prefill.tile_words(ids.numel(), EXPERTS, device)
    tiles = torch.full((words,), 10**6, dtype=torch.int32, device=device)
    experts_prefill.list_tiles(groups, hidden, tiles, layer.slab)
    experts_prefill.gate_up(rounded, weights.to(device), groups, layer.slab, hidden, tiles, LIMIT)
    token, expert = order // CHOICES, ids.flatten()[order]
    inputs = quant.fp8_fake_quant(x.float(), 128)[token, :, None]
    gate, up = (layer.experts.w1[expert] @ inputs).squeeze(-1), (layer.experts.w3[expert] @ inputs).squeeze(-1)
    expected = moe.swiglu(gate, up, LIMIT) * weights.flatten()[order, None]
    _every_row_close(hidden.flatten(0, 1), in_expert_order(expected))

    round_in_place(hidden.flatten(0, 1), tiles[1:2])
    experts_prefill.down(hidden, groups, layer.slab, out, tiles)
    activation = hidden.flatten(0, 1).cpu().float().unflatten(-1, (-1, 4, 32)).transpose(-1, -2).flatten(-3)
    expected = (layer.experts.w2[expert] @ activation[:, :, None]).squeeze(-1)
    _every_row_close(out[:, :CHOICES].flatten(0, 1)[order.to(device)], expected)
    assert out[:, CHOICES].isnan().all()


def _every_row_close(actual: Tensor, expected: Tensor) -> None:
    """Row by row, so that large experts do not hide small ones."""
    error = (actual.cpu().float() - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() < BF16_ERROR, error


def test_padding_tokens_are_not_written(device: torch.device, seed: int) -> None:
    layer = make_layer(device, seed)
    x, ids, weights = _case(9, seed)
    out = run(layer, x, ids, weights, device, skip=2)
    assert out[:7].isfinite().all()
    assert out[7:, :CHOICES].isnan().all()


def test_a_token_has_the_same_bits_in_any_batch(device: torch.device, seed: int) -> None:
    layer = make_layer(device, seed)
    x, ids, weights = _case(200, seed, 3)
    whole = run(layer, x, ids, weights, device)
    for tokens in (1, 40, 131):
        some = run(layer, x[:tokens].contiguous(), ids[:tokens], weights[:tokens].contiguous(), device)
        assert torch.equal(some, whole[:tokens])


def test_one_expert_takes_everything(device: torch.device, seed: int) -> None:
    layer = make_layer(device, seed)
    x, ids, weights = _case(140, seed)
    ids[:, 0], ids[:, 1] = 3, torch.arange(140) % 3
    out = run(layer, x, ids, weights, device).float().cpu()
    expected = moe.moe(x.float(), ids, weights, layer.experts, layer.shared, LIMIT, act_fp8=True)
    assert (out.sum(1) - expected).norm() / expected.norm() < MIXTURE_ERROR


def test_other_tiers_give_the_same_bits(device: torch.device, seed: int) -> None:
    layer = make_layer(device, seed)
    x, ids, weights = _case(20, seed)
    resident = run(layer, x, ids, weights, device)
    host = layer.slab.base.cpu().pin_memory() if device.type == "cuda" else layer.slab.base.clone()
    table = layer.slab.table.clone()
    table[1::2] |= code_of(Tier.HOST, 0)
    base = layer.slab.base.clone().view(-1, ExpertShape(WIDE, INNER).expert_bytes)
    base[layer.slab.table[1::2].long()] = 0xFF
    layer.slab = ExpertSlab(base.flatten(), table, host=host)
    assert torch.equal(run(layer, x, ids, weights, device), resident)


def test_the_tile_list_covers_every_pair_once(device: torch.device) -> None:
    ids = torch.tensor([[0, 1]] * 128 + [[0, 3]] * 64 + [[4, 0]] * 3)
    hidden = torch.empty(len(ids), CHOICES, INNER, dtype=torch.bfloat16, device=device)
    slab = ExpertSlab(torch.empty(0, dtype=torch.uint8), torch.zeros(EXPERTS, dtype=torch.int32, device=device))
    tiles = torch.zeros(experts_prefill.tile_words(ids.numel(), EXPERTS, device), dtype=torch.int32, device=device)
    experts_prefill.list_tiles(group(ids, EXPERTS, device), hidden, tiles, slab)
    number, pairs = tiles[:2].tolist()
    assert pairs == ids.numel()
    assert tiles[6 : 6 + 3 * number].view(-1, 3).tolist() == [
        [0, 0, 128], [0, 128, 67], [1, 195, 128], [3, 323, 64], [4, 387, 3],
    ]  # fmt: skip


def test_tiles_of_sm_90_are_as_long_as_its_kernels_take() -> None:
    assert tile("experts_prefill.experts", 90).m == experts_prefill_sm90.MOST_TOKENS


@pytest.mark.gpu
def test_flash_shapes_are_the_references_every_time(device: torch.device, seed: int) -> None:
    wide, inner, experts, choices, tokens = 4096, 2048, 8, 6, 700
    torch.manual_seed(seed)
    layout = ExpertShape(wide, inner)
    base = torch.randint(0, 256, (experts, layout.expert_bytes), dtype=torch.uint8, device=device)
    base[:, 3 * layout.codes_bytes :] = 116 + (base[:, 3 * layout.codes_bytes :] & 3)
    slab = ExpertSlab(base.flatten(), torch.arange(experts, dtype=torch.int32, device=device))
    ids = torch.rand(tokens, experts).topk(choices).indices
    groups = group(ids, experts, device)
    order = groups.pair_order.long()
    expert = ids.flatten().to(device)[order]
    x = torch.randn(tokens, wide, device=device).bfloat16()
    weights = torch.rand(tokens, choices, device=device)
    rounded = torch.empty_like(x)
    quantise_rows(x, None, rounded, reorder=True)
    tiles = torch.zeros(experts_prefill.tile_words(ids.numel(), experts, device), dtype=torch.int32, device=device)
    experts_prefill.list_tiles(groups, torch.empty(tokens, choices, inner, device=device), tiles, slab)
    inputs = quant.fp8_fake_quant(x.float(), 128)[order // choices]
    first: list[Tensor] = []
    for turn in range(10):
        hidden = torch.full((tokens, choices, inner), float("nan"), dtype=torch.bfloat16, device=device)
        out = torch.full((tokens, choices + 1, wide), float("nan"), dtype=torch.bfloat16, device=device)
        experts_prefill.gate_up(rounded, weights, groups, slab, hidden, tiles, LIMIT)
        raw = hidden.clone()
        round_in_place(hidden.flatten(0, 1), tiles[1:2])
        experts_prefill.down(hidden, groups, slab, out, tiles)
        if turn:
            assert torch.equal(raw, first[0])
            assert torch.equal(out[:, :choices], first[1])
            continue
        first += [raw, out[:, :choices]]
        for number in range(experts):
            rows = expert == number
            w1, w3, w2 = (matrix_of(layout, base[number], name) for name in ("w1", "w3", "w2"))
            value = moe.swiglu(inputs[rows] @ w1.T, inputs[rows] @ w3.T, LIMIT) * weights.flatten()[order][rows, None]
            _every_row_close(raw.flatten(0, 1)[rows], in_expert_order(value).cpu())
            activation = hidden.flatten(0, 1)[rows].float().unflatten(-1, (-1, 4, 32)).transpose(-1, -2).flatten(-3)
            _every_row_close(out[:, :choices].flatten(0, 1)[order[rows]], (activation @ w2.T).cpu())
