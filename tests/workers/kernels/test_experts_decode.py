"""Routed experts at decode against `workers/reference/moe.py`: sums, formats, tiers, batches, poison."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.support.expert_bytes import write_expert
from tests.support.tolerances import relative_error
from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels import expert_codes, experts_decode, experts_sm90, linear_decode
from workers.reference import moe, quant

BF16_SUM = 4e-3
"""Largest relative error: inputs are the same bits, outputs are rounded to bf16 (2**-9) twice."""

PLAIN = (256, 128)
"""Hidden and inner size that only the plain form serves."""

SM90 = (2048, 2048)
"""The smallest that the form for sm_90 serves."""


@pytest.fixture(params=[PLAIN, pytest.param(SM90, marks=pytest.mark.gpu)], ids=["plain", "sm90"])
def sizes(request: pytest.FixtureRequest) -> tuple[int, int]:
    return request.param


def expert_order(x: Tensor) -> Tensor:
    """Place 32j + h of every 128 columns is column 4h + j."""
    return x.unflatten(-1, (-1, 32, 4)).transpose(-1, -2).flatten(-3).contiguous()


def natural_order(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 4, 32)).transpose(-1, -2).flatten(-3).contiguous()


class Case:
    """One layer's experts, their slab in shuffled slots, and a step of `tokens` tokens."""

    def __init__(self, seed: int, device: torch.device, *, tokens: int, sizes: tuple[int, int] = PLAIN) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.choices, self.limit, self.device = 3, 10.0, device
        self.tokens, self.experts, (self.hidden, self.inner) = tokens, 5, sizes
        hidden, experts = self.hidden, self.experts
        self.layout = ExpertShape(hidden, self.inner)
        self.order = torch.randperm(experts, generator=self.generator)
        slots = torch.zeros(experts, self.layout.expert_bytes, dtype=torch.uint8)
        w1, w2, w3 = [], [], []
        for expert in range(experts):
            parts = {}
            for name, keep, shape in (
                ("w1", w1, (self.inner, hidden)),
                ("w2", w2, (hidden, self.inner)),
                ("w3", w3, (self.inner, hidden)),
            ):
                codes, scales = quant.fp4_quant(self.randn(*shape) * 0.05)
                parts[f"{name}.weight"], parts[f"{name}.scale"] = codes, scales
                keep.append(quant.fp4_dequant(codes, scales))
            write_expert(self.layout, parts, slots[self.order[expert]])
        self.slots = slots
        self.routed = moe.ExpertWeights(torch.stack(w1), torch.stack(w2), torch.stack(w3))
        shared = [
            self.randn(*shape) * 0.05 for shape in ((self.inner, hidden), (hidden, self.inner), (self.inner, hidden))
        ]
        self.shared_codes, raw = quant.fp8_block_quant(shared[1])
        self.shared_scales = quant.e8m0_decode(raw)
        self.shared_w2 = quant.fp8_block_dequant(self.shared_codes, raw)
        self.x = quant.fp8_fake_quant((self.randn(tokens, hidden) * 2).bfloat16(), 128)
        self.w13_codes, raw = quant.fp8_block_quant(torch.cat((shared[0], shared[2])))
        self.w13_scales = quant.e8m0_decode(raw)
        self.w13 = quant.fp8_block_dequant(self.w13_codes, raw)
        self.shared_hidden = torch.empty(tokens, self.inner, dtype=torch.bfloat16)
        self.ids = torch.rand(tokens, experts, generator=self.generator).argsort(-1)[:, : self.choices].int()
        self.weights = torch.rand(tokens, self.choices, generator=self.generator)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def slab(self) -> ExpertSlab:
        return ExpertSlab(base=self.slots.flatten().to(self.device), table=self.order.int().to(self.device))

    def groups(self, live: Tensor | None = None) -> SimpleNamespace:
        """Pairs grouped by expert as `route` gives them; tokens outside `live` belong to no group."""
        pairs = [
            (int(expert), pair)
            for pair, expert in enumerate(self.ids.flatten())
            if live is None or live[pair // self.choices]
        ]
        pairs.sort()
        active = sorted({expert for expert, _ in pairs})
        most = min(self.ids.numel(), self.experts)
        begin = [0]
        for expert in active:
            begin.append(begin[-1] + sum(e == expert for e, _ in pairs))

        def filled(values: list[int], size: int) -> Tensor:
            return torch.tensor(values + [2**30] * (size - len(values)), dtype=torch.int32, device=self.device)

        return SimpleNamespace(
            num_active=filled([len(active)], 1),
            active_experts=filled(active, most),
            active_begin=filled(begin, most + 1),
            pair_order=filled([pair for _, pair in pairs], self.ids.numel()),
        )

    def counters(self) -> Tensor:
        count = experts_decode.num_counters(self.tokens, self.choices, self.experts, self.inner)
        return torch.zeros(count, dtype=torch.int32, device=self.device)

    def run(
        self,
        *,
        slab: ExpertSlab | None = None,
        groups: SimpleNamespace | None = None,
        counters: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`hidden`, fake-quantised, and `out` on the CPU; both start as NaN. Keeps the shared expert's hidden state."""
        nan, device, slab = float("nan"), self.device, slab or self.slab()
        groups = groups or self.groups()
        hidden = torch.full((self.tokens, self.choices, self.inner), nan, dtype=torch.bfloat16, device=device)
        out = torch.full((self.tokens, self.choices + 1, self.hidden), nan, dtype=torch.bfloat16, device=device)
        counters = self.counters() if counters is None else counters
        ids = self.ids.to(device)
        shared_hidden = torch.full((self.tokens, self.inner), nan, dtype=torch.bfloat16, device=device)
        w13 = SimpleNamespace(codes=self.w13_codes.to(device), scales=self.w13_scales.to(device))
        inputs = expert_order(self.x).to(device)
        if self.tokens == 1 and experts_sm90.serves(device, self.hidden, self.inner):
            inputs = torch.empty(1, expert_codes.coded_bytes(self.hidden), dtype=torch.uint8, device=device)
            expert_codes.code_rows(self.x.to(device), inputs)
        experts_decode.expert_gate_up(
            self.x.to(device), inputs, w13, ids, self.weights.to(device), groups, slab, hidden,
            self.limit, shared_hidden=shared_hidden, counters=counters,
        )  # fmt: skip
        shared = SimpleNamespace(codes=self.shared_codes.to(device), scales=self.shared_scales.to(device))
        experts_decode.expert_down(hidden, shared_hidden, shared, ids, groups, slab, out, counters=counters)
        if experts_sm90.serves(device, self.hidden, self.inner):
            natural = quant.fp8_fake_quant(hidden.cpu(), 128)
        else:
            assert not counters.any()
            natural = natural_order(hidden.cpu())
            linear_decode.shared_gate_up(self.x.to(device), w13, self.limit, shared_hidden)
        self.shared_hidden = shared_hidden.cpu()
        return natural, out.cpu()

    def expected_hidden(self) -> Tensor:
        gate = torch.einsum("td,tkid->tki", self.x.float(), self.routed.w1[self.ids.long()])
        up = torch.einsum("td,tkid->tki", self.x.float(), self.routed.w3[self.ids.long()])
        return moe.swiglu(gate, up, self.limit) * self.weights.unsqueeze(-1)

    def expected_out(self, hidden: Tensor) -> Tensor:
        """The second half from the kernel's own `hidden`, so that one rounding is not counted twice."""
        routed = torch.einsum("tki,tkdi->tkd", hidden.float(), self.routed.w2[self.ids.long()])
        shared = quant.fp8_fake_quant(self.shared_hidden, 128).float() @ self.shared_w2.T
        return torch.cat((routed, shared.unsqueeze(1)), dim=1)


@pytest.mark.parametrize("tokens", [1, 9])
def test_both_halves_match_the_reference(device: torch.device, seed: int, sizes: tuple[int, int], tokens: int) -> None:
    case = Case(seed, device, tokens=tokens, sizes=sizes)
    hidden, out = case.run()
    expected = case.expected_hidden()
    # A value next to a rounding boundary of e4m3 may fall on the other side: compare before and after rounding.
    assert relative_error(hidden.float(), quant.fp8_fake_quant(expected.bfloat16(), 128).float()) < 2e-2
    assert relative_error(hidden.float(), expected) < 4e-2
    assert torch.equal(quant.fp8_fake_quant(hidden, 128), hidden)
    assert relative_error(out.float(), case.expected_out(hidden)) < BF16_SUM
    shared = moe.swiglu(*(case.x.float() @ case.w13.T).chunk(2, dim=-1), case.limit)
    assert relative_error(case.shared_hidden.float(), shared) < BF16_SUM


def test_more_pairs_than_a_tile_for_one_expert(device: torch.device, seed: int, sizes: tuple[int, int]) -> None:
    case = Case(seed, device, tokens=18, sizes=sizes)
    case.ids = torch.tensor([[3, 4, 1]], dtype=torch.int32).repeat(18, 1)
    hidden, out = case.run()
    assert relative_error(out.float(), case.expected_out(hidden)) < BF16_SUM
    assert relative_error(hidden.float(), case.expected_hidden()) < 4e-2


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_row_does_not_depend_on_its_batch(device: torch.device, seed: int, sizes: tuple[int, int]) -> None:
    case = Case(seed, device, tokens=10, sizes=sizes)
    hidden, out = case.run()
    for row in (0, 9):
        alone = Case(seed, device, tokens=10, sizes=sizes)
        alone.x[:row], alone.x[row + 1 :] = float("nan"), float("inf")
        live = torch.arange(10) == row
        one_hidden, one_out = alone.run(groups=alone.groups(live))
        assert torch.equal(one_hidden[row], hidden[row])
        assert torch.equal(one_out[row], out[row])
        assert one_hidden[~live].isnan().all()
        assert one_out[~live, :-1].isnan().all()
    alone = Case(seed, device, tokens=10, sizes=sizes)
    for name in ("x", "ids", "weights", "shared_hidden"):
        setattr(alone, name, getattr(alone, name)[:1])
    alone.tokens = 1
    one_hidden, one_out = alone.run()
    assert torch.equal(one_hidden[0], hidden[0])
    assert torch.equal(one_out[0], out[0])


def test_bits_do_not_depend_on_where_an_expert_is(device: torch.device, seed: int, sizes: tuple[int, int]) -> None:
    case = Case(seed, device, tokens=4, sizes=sizes)
    expected = case.run()
    tier = torch.arange(case.experts) % 3
    slab = ExpertSlab(
        base=torch.where((tier == 0)[case.order.argsort(), None], case.slots, 0x77).flatten().to(device),
        host=case.slots.flatten().pin_memory() if device.type == "cuda" else case.slots.flatten(),
        peer=case.slots.flatten().to(device),
        table=((tier.int() << 24) | case.order.int()).to(device),
    )
    for actual, wanted in zip(case.run(slab=slab), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("num_scratch", [0, 2, 5])
def test_absent_experts_pass_through_scratch(device: torch.device, seed: int, num_scratch: int) -> None:
    case = Case(seed, device, tokens=4)
    expected, first = case.run(), case.experts + 1
    tier = torch.arange(case.experts) % 3
    places = torch.full((first + num_scratch, case.layout.expert_bytes), 0x77, dtype=torch.uint8)
    places[: case.experts] = torch.where((tier == 0)[case.order.argsort(), None], case.slots, 0x77)
    slab = ExpertSlab(
        base=places.flatten().to(device),
        host=case.slots.flatten().pin_memory() if device.type == "cuda" else case.slots.flatten(),
        peer=case.slots.flatten().to(device),
        table=((tier.int() << 24) | case.order.int()).to(device),
        first_scratch=first,
        num_scratch=num_scratch,
    )
    groups = case.groups()
    for actual, wanted in zip(case.run(slab=slab, groups=groups), expected, strict=True):
        assert torch.equal(actual, wanted)
    after = slab.base.cpu().view(first + num_scratch, -1)
    assert torch.equal(after[:first], places[:first])
    absent = [e for e in groups.active_experts[: int(groups.num_active)].tolist() if tier[e] != 0]
    for place in range(num_scratch):
        came = case.slots[case.order[absent[place]]] if place < len(absent) else places[first + place]
        assert torch.equal(after[first + place], came)


def test_no_token_and_no_live_token(device: torch.device, seed: int, sizes: tuple[int, int]) -> None:
    hidden, out = Case(seed, device, tokens=0, sizes=sizes).run()
    assert hidden.shape[0] == out.shape[0] == 0
    case = Case(seed, device, tokens=2, sizes=sizes)
    hidden, out = case.run(groups=case.groups(torch.zeros(2, dtype=torch.bool)))
    assert hidden.isnan().all()
    assert out[:, :-1].isnan().all()
    assert relative_error(out[:, -1].float(), case.expected_out(hidden)[:, -1]) < BF16_SUM


@pytest.mark.gpu
def test_steps_of_all_kinds_take_turns(seed: int) -> None:
    """One token's hidden rows stay between the launches of a step: the next step of whatever kind must not take them
    for its own."""
    case = Case(seed, torch.device("cuda"), tokens=3, sizes=SM90)
    x, ids, weights = case.x, case.ids, case.weights
    twice = torch.tensor([[2, 0, 2]], dtype=torch.int32)
    steps = {
        "first": (x[:1], ids[:1], weights[:1], True),
        "second": (x[1:2], ids[1:2], weights[1:2], True),
        "padding": (x[2:], ids[2:], weights[2:], False),
        "twice": (x[2:], twice, weights[2:], True),
        "three": (x, ids, weights, True),
    }
    counters = case.counters()
    expected: dict[str, list[Tensor]] = {}

    def run(name: str, counters: Tensor | None) -> list[Tensor]:
        case.x, case.ids, case.weights, live = steps[name]
        case.tokens = len(case.x)
        groups = case.groups(torch.full((case.tokens,), live))
        return [part.view(torch.int16) for part in (*case.run(groups=groups, counters=counters), case.shared_hidden)]

    for name in steps:
        expected[name] = run(name, None)
    order = "first second first padding second twice first three first padding padding first three three second second"
    for name in order.split():
        for actual, wanted in zip(run(name, counters), expected[name], strict=True):
            assert torch.equal(actual, wanted), name


def test_rows_are_fake_quantised_like_the_reference(device: torch.device, seed: int) -> None:
    x = (torch.randn(5, 384, generator=torch.Generator().manual_seed(seed)) * 30).bfloat16()
    out = torch.empty_like(x).to(device)
    experts_decode.quantise_rows(x.to(device), out)
    assert torch.equal(natural_order(out.cpu()), quant.fp8_fake_quant(x, 128))


@pytest.mark.gpu
def test_slots_beyond_two_gigabytes(seed: int) -> None:
    case = Case(seed, torch.device("cuda"), tokens=4)
    expected = case.run()
    shift = 2**31 // case.layout.expert_bytes + 1
    base = torch.zeros((shift + case.experts) * case.layout.expert_bytes, dtype=torch.uint8, device="cuda")
    base[shift * case.layout.expert_bytes :] = case.slots.flatten().cuda()
    slab = ExpertSlab(base=base, table=(case.order.int() + shift).cuda())
    for actual, wanted in zip(case.run(slab=slab), expected, strict=True):
        assert torch.equal(actual, wanted)
