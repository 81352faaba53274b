"""The router in one launch: its logits against the product, and all that follows from them against `routing.route`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.test_routing import Case, check_choice, check_groups

routing_gate = pytest.importorskip("workers.kernels.routing_gate")

SCALING = 1.5


class GateCase(Case):
    """Inputs of one call, whose logits are still to be made."""

    def __init__(self, x: Tensor, gate: Tensor, chooser: Tensor, token_ids: Tensor, k: int) -> None:
        logits = torch.full((x.shape[0], gate.shape[0]), torch.nan, device=x.device)
        super().__init__(logits, chooser, token_ids, k)
        self.x, self.gate = x, gate
        self.work = routing_gate.GateWork.allocate(x.shape[0], *gate.shape, x.device)

    def run(self, heat: Tensor | None = None, comb: object = None, per_token: bool = False) -> GateCase:
        operands = (self.x, self.gate, self.logits, self.chooser, self.token_ids, SCALING, self.ids, self.weights)
        routing_gate.gate_route(*operands, self.groups, work=self.work, heat=heat, comb=comb, per_token=per_token)
        assert not self.work.arrived.any() and (self.work.one == -1).all()
        return self

    def row(self, row: int) -> GateCase:
        rows = slice(row, row + 1)
        return GateCase(self.x[rows], self.gate, self.chooser, self.token_ids[rows], self.k)


def gate_case(
    num_tokens: int, device: torch.device, *, hashed: bool = False, experts: int = 12, k: int = 3, hidden: int = 256
) -> GateCase:
    """Rows of `x` are part of a wider buffer, as a model's may be."""
    random = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, hidden + 8, generator=random).to(device, torch.bfloat16)[:, :hidden]
    gate = (3 * hidden**-0.5 * torch.randn(experts, hidden, generator=random)).to(device, torch.bfloat16)
    chooser = 0.3 * torch.randn(experts, generator=random)
    if hashed:
        chooser = torch.stack([torch.randperm(experts, generator=random)[:k] for _ in range(50)]).int()
    token_ids = torch.randint(0, 50, (num_tokens,), generator=random, dtype=torch.int32)
    return GateCase(x, gate, chooser.to(device), token_ids.to(device), k)


def check(case: GateCase) -> None:
    """Logits within rounding of fp32 sums, which tensor cores cut off; choice and groups as they must be."""
    expected = case.x.double() @ case.gate.double().T
    torch.testing.assert_close(case.logits.double(), expected, rtol=0, atol=1e-4)
    check_choice(case)
    check_groups(case)


@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 65])
@pytest.mark.parametrize("hashed", [False, True])
def test_logits_choices_and_groups(device: torch.device, hashed: bool, num_tokens: int) -> None:
    case = gate_case(num_tokens, device, hashed=hashed)
    case.token_ids[num_tokens // 2 :: 7] = -1
    check(case.run())
    check(case.run())  # counters are as they were


def test_columns_are_shared_by_programs_and_experts_by_blocks(device: torch.device) -> None:
    for num_tokens in (1, 3):
        check(gate_case(num_tokens, device, experts=140, k=6, hidden=1024).run())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, about what is asked for here
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_token_of_no_numbers_ends_and_gets_real_experts(device: torch.device, value: float) -> None:
    """A place that nobody has written is a NaN, too: the choosing program would wait for ever if a sum gave it."""
    case = gate_case(1, device)
    case.x.fill_(value)
    case.run()
    assert sorted(set(case.ids[0].tolist())) == sorted(case.ids[0].tolist())
    assert all(0 <= expert < 12 for expert in case.ids[0].tolist())


@pytest.mark.parametrize("num_tokens", [1, 3])
def test_a_table_row_that_repeats_an_expert_keeps_all_its_pairs(device: torch.device, num_tokens: int) -> None:
    case = gate_case(num_tokens, device, hashed=True)
    case.chooser[:] = torch.tensor([5, 2, 5], dtype=torch.int32)
    heat = torch.zeros(12, dtype=torch.int32, device=device)
    check_groups(case.run(heat))
    assert heat.tolist() == [0, 0, 1, 0, 0, 1] + 6 * [0]


@pytest.mark.parametrize("num_tokens", [0, 1, 3, 70])
def test_padding_alone_gives_no_group(device: torch.device, num_tokens: int) -> None:
    case = gate_case(num_tokens, device)
    case.token_ids.fill_(-1)
    heat = torch.zeros(12, dtype=torch.int32, device=device)
    case.run(heat)
    assert int(case.groups.num_active) == 0 and int(case.groups.active_begin[0]) == 0 and not heat.any()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5, 70])
def test_heat_counts_steps_or_tokens(device: torch.device, num_tokens: int, per_token: bool) -> None:
    case = gate_case(num_tokens, device)
    heat = torch.full((12,), 100, dtype=torch.int32, device=device)
    for _ in range(2):
        case.run(heat, per_token=per_token)
    uses = torch.bincount(case.ids.flatten().long().cpu(), minlength=12)
    assert torch.equal(heat.cpu().long() - 100, 2 * (uses if per_token else uses.clamp(max=1)))


@pytest.mark.parametrize("num_tokens", [2, 10, 66])
def test_row_of_a_batch_equals_the_batch_of_one(device: torch.device, num_tokens: int) -> None:
    batch = gate_case(num_tokens, device, hidden=512).run()
    for row in (0, num_tokens - 1):
        alone = batch.row(row).run()
        for name in ("logits", "ids", "weights"):
            assert torch.equal(getattr(alone, name)[0], getattr(batch, name)[row])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_that_are_not_numbers_give_real_experts_and_disturb_nobody(device: torch.device) -> None:
    clean, case = (gate_case(3, device) for _ in range(2))
    case.x[1] = torch.nan
    clean.run(), case.run()
    assert len(set(case.ids[1].tolist())) == 3 and min(case.ids[1].tolist()) >= 0 and max(case.ids[1].tolist()) < 12
    for row in (0, 2):
        assert torch.equal(case.weights[row], clean.weights[row]) and torch.equal(case.ids[row], clean.ids[row])


def test_sizes_without_a_kernel_are_refused(device: torch.device) -> None:
    case = gate_case(2, device)
    case.x = case.x[:, :130]
    with pytest.raises(ValueError, match="130 columns"):
        case.run()


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 63, 64, 65, 300])
@pytest.mark.parametrize(("experts", "hidden"), [(256, 4096), (384, 7168)])
def test_real_shapes(device: torch.device, experts: int, hidden: int, num_tokens: int) -> None:
    case = gate_case(num_tokens, device, experts=experts, k=6, hidden=hidden)
    case.token_ids[::5] = -1
    check(case.run())
    alone = case.row(num_tokens - 1).run()
    for name in ("logits", "ids", "weights"):
        assert torch.equal(getattr(alone, name)[0], getattr(case, name)[-1])


def test_the_choice_is_that_of_route(device: torch.device) -> None:
    """Same bits from the same logits, whoever chooses."""
    case = gate_case(9, device).run()
    same = Case(case.logits, case.chooser, case.token_ids, case.k).run()
    assert torch.equal(same.ids, case.ids) and torch.equal(same.weights, case.weights)
