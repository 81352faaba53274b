"""Routing kernels against `workers/reference/moe.py`: choices, ties, weights, groups, padding and batch invariance."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

routing = pytest.importorskip("workers.kernels.routing")

SCALING = 1.5


class Case:
    """Inputs of one call and its outputs, which begin as poison."""

    def __init__(self, logits: Tensor, chooser: Tensor, token_ids: Tensor, k: int) -> None:
        num_tokens, num_experts = logits.shape
        device, pairs, active = logits.device, num_tokens * k, min(num_tokens * k, num_experts)

        def poison(count: int) -> Tensor:
            return torch.full((count,), -77, dtype=torch.int32, device=device)

        self.logits, self.chooser, self.token_ids, self.k = logits, chooser, token_ids, k
        self.ids = poison(pairs).view(num_tokens, k)
        self.weights = torch.full((num_tokens, k), torch.nan, device=device)
        self.groups = SimpleNamespace(
            num_active=poison(1),
            active_experts=poison(active),
            active_begin=poison(active + 1),
            pair_order=poison(pairs),
        )

    def run(self, heat: Tensor | None = None, per_token: bool = False) -> Case:
        operands = (self.logits, self.chooser, self.token_ids, SCALING, self.ids, self.weights, self.groups)
        routing.route(*operands, heat=heat, per_token=per_token)
        return self


def scores_of(logits: Tensor) -> Tensor:
    return torch.nn.functional.softplus(logits.double()).sqrt()


def learned(num_tokens: int, device: torch.device, *, experts: int = 12, k: int = 3, seed: int = 1) -> Case:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_tokens, experts, generator=generator)
    bias = 0.3 * torch.randn(experts, generator=generator)
    token_ids = torch.randint(0, 50, (num_tokens,), generator=generator, dtype=torch.int32)
    return Case(logits.to(device), bias.to(device), token_ids.to(device), k)


def hashed(num_tokens: int, device: torch.device, *, experts: int = 12, k: int = 3, vocab: int = 50) -> Case:
    case = learned(num_tokens, device, experts=experts, k=k)
    generator = torch.Generator().manual_seed(2)
    table = torch.stack([torch.randperm(experts, generator=generator)[:k] for _ in range(vocab)])
    case.chooser = table.to(torch.int32).to(device)
    return case


def check_groups(case: Case) -> None:
    """The groups hold exactly the pairs of tokens that are not padding, by expert, ascending."""
    ids, padding = case.ids.tolist(), (case.token_ids < 0).tolist()
    expected: dict[int, list[int]] = {}
    for token, experts in enumerate(ids):
        for choice, expert in enumerate(experts):
            if not padding[token]:
                expected.setdefault(expert, []).append(token * case.k + choice)
    groups = case.groups
    active = int(groups.num_active)
    assert groups.active_experts[:active].tolist() == sorted(expected)
    begin = groups.active_begin[: active + 1].tolist()
    order = groups.pair_order.tolist()
    assert begin[0] == 0 and begin[-1] == sum(map(len, expected.values()))
    for index, expert in enumerate(sorted(expected)):
        assert order[begin[index] : begin[index + 1]] == expected[expert]


def check_choice(case: Case) -> None:
    """Best scores plus bias, equal ones by id; weights from the scores alone."""
    scores = scores_of(case.logits)
    chosen = scores.gather(1, case.ids.long())
    torch.testing.assert_close(case.weights.double(), chosen / chosen.sum(1, keepdim=True) * SCALING, rtol=3e-6, atol=0)
    if case.chooser.dtype is torch.int32:
        rows = case.token_ids.long().clamp(0, case.chooser.shape[0] - 1)
        assert torch.equal(case.ids, case.chooser[rows])
        return
    biased = scores + case.chooser.double()
    picked = biased.gather(1, case.ids.long())
    assert (picked.diff(dim=1) <= 1e-6).all()
    assert all(len(set(row)) == case.k for row in case.ids.tolist())
    torch.testing.assert_close(picked, biased.topk(case.k, dim=1).values, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 9, 64, 65, 100])
@pytest.mark.parametrize("make", [learned, hashed])
def test_choices_weights_and_groups(device: torch.device, make: object, num_tokens: int) -> None:
    case = make(num_tokens, device)  # type: ignore[operator]
    case.token_ids[num_tokens // 2 :: 7] = -1
    case.run()
    check_choice(case)
    check_groups(case)


@pytest.mark.parametrize(("experts", "k"), [(256, 6), (384, 6)])
def test_shapes_of_the_releases(device: torch.device, experts: int, k: int) -> None:
    case = learned(3, device, experts=experts, k=k).run()
    check_choice(case)
    check_groups(case)


@pytest.mark.parametrize("num_tokens", [2, 70])
def test_equal_scores_go_to_the_lower_expert(device: torch.device, num_tokens: int) -> None:
    case = learned(num_tokens, device)
    case.logits.fill_(0.5)
    case.chooser.zero_()
    case.logits[1, 4] = case.logits[1, 9] = 2.0
    case.run()
    assert case.ids[0].tolist() == [0, 1, 2]
    assert case.ids[1].tolist() == [4, 9, 0]


def test_scores_follow_softplus_from_tiny_to_large(device: torch.device) -> None:
    case = hashed(8, device, experts=4, k=2, vocab=8)
    case.logits[:] = torch.tensor([-80.0, -15.0, -1.0, 0.0]).to(device)
    case.logits[4:] = torch.tensor([19.9, 20.0, 20.1, 60.0]).to(device)
    case.run()
    check_choice(case)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_logits_that_are_not_numbers_still_give_real_experts(device: torch.device) -> None:
    case = learned(3, device)
    case.logits[0] = torch.nan
    case.logits[1] = torch.inf
    case.logits[2, 3:] = torch.nan
    case.run()
    assert all(len(set(row)) == 3 and min(row) >= 0 and max(row) < 12 for row in case.ids.tolist())
    check_groups(case)


def test_ids_outside_the_table_are_clamped(device: torch.device) -> None:
    case = hashed(3, device)
    case.token_ids[:] = torch.tensor([50, 2_000_000_000, -1], dtype=torch.int32)
    case.run()
    check_choice(case)
    check_groups(case)


def test_a_table_row_that_repeats_an_expert_keeps_all_its_pairs(device: torch.device) -> None:
    case = hashed(4, device)
    case.chooser[:] = torch.tensor([5, 5, 2], dtype=torch.int32)
    case.run()
    check_groups(case)


@pytest.mark.parametrize("num_tokens", [3, 70])
def test_padding_alone_gives_no_group(device: torch.device, num_tokens: int) -> None:
    case = learned(num_tokens, device)
    case.token_ids.fill_(-1)
    case.run()
    assert int(case.groups.num_active) == 0 and int(case.groups.active_begin[0]) == 0


def test_no_tokens_give_no_group(device: torch.device) -> None:
    case = learned(0, device).run()
    assert int(case.groups.num_active) == 0


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("num_tokens", [5, 70])
def test_heat_counts_steps_or_tokens(device: torch.device, num_tokens: int, per_token: bool) -> None:
    case = learned(num_tokens, device)
    case.token_ids[1] = -1
    heat = torch.full((12,), 100, dtype=torch.int32, device=device)
    for _ in range(3):
        case.run(heat, per_token=per_token)
    uses = torch.bincount(case.ids[case.token_ids >= 0].flatten().long().cpu(), minlength=12)
    assert torch.equal(heat.cpu().long() - 100, 3 * (uses if per_token else uses.clamp(max=1)))


@pytest.mark.parametrize("num_tokens", [2, 30, 70])
def test_row_of_a_batch_equals_the_batch_of_one(device: torch.device, num_tokens: int) -> None:
    batch = learned(num_tokens, device).run()
    for row in (0, num_tokens - 1):
        rows = slice(row, row + 1)
        alone = Case(batch.logits[rows], batch.chooser, batch.token_ids[rows], batch.k).run()
        assert torch.equal(alone.ids[0], batch.ids[row]) and torch.equal(alone.weights[0], batch.weights[row])


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 8, 63, 64, 65, 1000, 8192, 16384])
@pytest.mark.parametrize("make", [learned, hashed])
def test_real_shapes(device: torch.device, make: object, num_tokens: int) -> None:
    case = make(num_tokens, device, experts=256, k=6)  # type: ignore[operator]
    case.token_ids[::5] = -1
    case.run()
    check_choice(case)
    check_groups(case)
    rows = slice(num_tokens - 1, num_tokens)
    alone = Case(case.logits[rows], case.chooser, case.token_ids[rows], case.k).run()
    assert torch.equal(alone.ids[0], case.ids[-1]) and torch.equal(alone.weights[0], case.weights[-1])
