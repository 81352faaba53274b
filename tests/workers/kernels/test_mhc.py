"""mHC kernels against `workers/reference/mhc.py`: values, padding rows, chosen rows and batch invariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.workers.kernels.test_routing_gate import gate_case
from workers.kernels.expert_codes import code_rows, coded_bytes
from workers.reference import mhc as reference
from workers.reference.norm_rope import rms_norm
from workers.reference.quant import fp8_fake_quant

mhc = pytest.importorskip("workers.kernels.mhc")

HIDDEN = 256
NORM_EPS = 1e-6


class Step:
    """Random operands of one step of `num_tokens` tokens; the `work` and output buffers begin as NaN."""

    def __init__(self, num_tokens: int, device: torch.device, *, hidden: int = HIDDEN, parts: int = 1, seed: int = 1):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        def layer(outputs: int, gates: int) -> mhc.HyperConnection:
            return mhc.HyperConnection(normal(outputs, 4 * hidden) * 0.05, normal(outputs), 0.5 * normal(gates))

        self.hc, self.head = layer(24, 3), layer(4, 1)
        self.norm_weight = 1 + 0.1 * normal(hidden)
        self.streams = (3 * normal(num_tokens, 4, hidden)).bfloat16()
        self.sub_out = normal(num_tokens, parts, hidden).bfloat16()
        self.post = 2 * torch.sigmoid(normal(num_tokens, 4))
        comb = reference.sinkhorn(normal(num_tokens, 4, 4), iters=20, eps=1e-6)
        self.comb = comb.flatten(1).contiguous()
        self.x = torch.full((num_tokens, hidden), torch.nan, dtype=torch.bfloat16, device=device)
        self.x_quantised, self.x_experts = torch.full_like(self.x, torch.nan), torch.full_like(self.x, torch.nan)
        self.work = torch.full((mhc.work_floats(num_tokens, hidden) + 8,), torch.nan, device=device)

    def expected_streams(self) -> Tensor:
        """bf16 streams after the write-back; parts are added in order."""
        total = self.sub_out[:, 0].float()
        for part in range(1, self.sub_out.shape[1]):
            total = total + self.sub_out[:, part].float()
        return reference.hc_post(total, self.streams, self.post, self.comb.unflatten(-1, (4, 4))).bfloat16()

    def expected_input(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x`, `post`, `comb` read from `streams`."""
        hc = self.hc
        mixed, post, comb = reference.hc_pre(
            streams, hc.fn, hc.base, hc.scale, iters=hc.iters, eps=hc.eps, norm_eps=hc.norm_eps
        )
        return rms_norm(mixed, self.norm_weight, NORM_EPS), post, comb.flatten(1)

    def post_pre(self, *, finish: bool = True) -> None:
        operands = (self.sub_out, self.streams, self.post, self.comb, self.hc, self.norm_weight, self.x, self.work)
        mhc.hc_post_pre(*operands, x_quantised=self.x_quantised, x_experts=self.x_experts, finish=finish)

    def take(self, rows: slice) -> Step:
        """The same step with a part of its tokens."""
        part = object.__new__(Step)
        part.__dict__.update(self.__dict__)
        for name in ("streams", "sub_out", "post", "comb", "x", "x_quantised", "x_experts"):
            setattr(part, name, getattr(self, name)[rows].clone())
        part.work = torch.full_like(self.work, torch.nan)
        return part


def assert_close(actual: Tensor, expected: Tensor, *, ulps: float = 1.0) -> None:
    """bf16 results may differ by one rounding; fp32 gates by the error of a sum of 4D terms, up to 28,672, on either
    side (4e-5 was seen on an H200 among 16,384 gates)."""
    if actual.dtype is torch.bfloat16:
        torch.testing.assert_close(actual.float(), expected.float(), rtol=ulps * 2**-7, atol=2e-5)
    else:
        torch.testing.assert_close(actual, expected, rtol=8e-5, atol=2e-6)


def check_rounded(step: Step) -> None:
    """Both fp8 outputs, bit for bit; expert order: inside each 128 channels, place 32 j + h holds channel 4 h + j."""
    assert torch.equal(step.x_quantised.float(), fp8_fake_quant(step.x.float(), 128))
    ordered = step.x_quantised.unflatten(-1, (-1, 32, 4)).transpose(-1, -2).flatten(-3)
    assert torch.equal(step.x_experts, ordered)


@pytest.mark.parametrize("num_tokens", [1, 3, 9])
def test_coded_rows_are_those_of_the_input(device: torch.device, num_tokens: int) -> None:
    step = Step(num_tokens, device)
    coded = torch.full((num_tokens, coded_bytes(step.x.shape[1])), 255, dtype=torch.uint8, device=device)
    step.x_experts = coded
    step.post_pre()
    expected = torch.zeros_like(coded)
    code_rows(step.x, expected)
    assert torch.equal(coded, expected)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
@pytest.mark.parametrize("parts", [1, 4])
def test_write_back_and_next_input_equal_the_reference(device: torch.device, num_tokens: int, parts: int) -> None:
    step = Step(num_tokens, device, parts=parts)
    streams = step.expected_streams()
    step.post_pre()
    assert_close(step.streams, streams)
    x, post, comb = step.expected_input(step.streams)
    assert_close(step.x, x)
    assert_close(step.post, post)
    assert_close(step.comb, comb)
    check_rounded(step)


def test_first_input_reads_the_streams_as_they_are(device: torch.device) -> None:
    step = Step(3, device)
    before = step.streams.clone()
    x, post, comb = step.expected_input(step.streams)
    mhc.hc_pre(step.streams, step.hc, step.norm_weight, step.x, step.post, step.comb, step.work)
    assert torch.equal(step.streams, before)
    assert_close(step.x, x)
    assert_close(step.post, post)
    assert_close(step.comb, comb)


@pytest.mark.parametrize("rows", [None, [2, 0], [4]])
def test_head_collapses_the_wanted_rows(device: torch.device, rows: list[int] | None) -> None:
    step = Step(5, device, parts=4)
    wanted = list(range(5)) if rows is None else rows
    streams = step.expected_streams()[wanted]
    chosen = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    x = step.x[: len(wanted)]
    mhc.hc_post_head(
        step.sub_out, step.streams, step.post, step.comb, step.head, step.norm_weight, chosen, x, step.work
    )
    assert_close(step.streams[wanted], streams)
    hc = step.head
    mixed = reference.hc_head(step.streams[wanted], hc.fn, hc.base, hc.scale, eps=hc.eps, norm_eps=hc.norm_eps)
    assert_close(x, rms_norm(mixed, step.norm_weight, NORM_EPS))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("num_tokens", [2, 9])
def test_row_of_a_batch_equals_the_batch_of_one(device: torch.device, num_tokens: int) -> None:
    """Also when every other row is poisoned."""
    batch = Step(num_tokens, device, parts=4)
    for row in (0, num_tokens - 1):
        alone, poisoned = batch.take(slice(row, row + 1)), batch.take(slice(None))
        others = torch.arange(num_tokens, device=device) != row
        poisoned.sub_out[others], poisoned.streams[others] = torch.nan, torch.inf
        alone.post_pre()
        poisoned.post_pre()
        for name in ("streams", "x", "x_quantised", "x_experts", "post", "comb"):
            assert torch.equal(getattr(poisoned, name)[row], getattr(alone, name)[0]), name


def test_streams_that_cancel_give_a_finite_input(device: torch.device) -> None:
    step = Step(2, device)
    step.hc.fn.zero_()
    step.hc.base.zero_()
    step.streams[:, 1], step.streams[:, 3] = -step.streams[:, 0], -step.streams[:, 2]
    mhc.hc_pre(step.streams, step.hc, step.norm_weight, step.x, step.post, step.comb, step.work)
    assert torch.isfinite(step.x.float()).all()


def test_zero_streams_of_padding_rows_stay_finite(device: torch.device) -> None:
    step = Step(2, device, parts=4)
    token_ids = torch.tensor([-1, 7], dtype=torch.int32, device=device)
    embed = torch.randn(9, HIDDEN, device=device).bfloat16()
    mhc.embed_streams(token_ids, embed, step.streams)
    assert torch.equal(step.streams[1], embed[7].expand(4, -1))
    assert not step.streams[0].any()
    step.sub_out.zero_()
    step.post_pre()
    assert all(torch.isfinite(t.float()).all() for t in (step.x, step.post, step.comb, step.streams))


@pytest.mark.parametrize("num_tokens", [1, 10])
def test_routing_finishes_the_matrices_that_were_left_open(device: torch.device, num_tokens: int) -> None:
    open_, closed = Step(num_tokens, device), Step(num_tokens, device)
    closed.post_pre()
    open_.post_pre(finish=False)
    case = gate_case(num_tokens, device)
    case.run(comb=(open_.comb, open_.hc))
    assert torch.equal(open_.comb, closed.comb)
    assert torch.equal(open_.x, closed.x) and torch.equal(open_.post, closed.post)


@pytest.mark.parametrize("num_tokens", [3, 40, 65])
def test_routing_finishes_any_number_of_matrices(device: torch.device, num_tokens: int) -> None:
    step = Step(1, device)
    comb = torch.randn(num_tokens, 16, device=device)
    expected = reference.sinkhorn(comb.unflatten(1, (4, 4)), iters=step.hc.iters, eps=step.hc.eps)
    gate_case(num_tokens, device).run(comb=(comb, step.hc))
    assert torch.allclose(comb, expected.flatten(1), rtol=1e-4, atol=1e-6)


def test_repeated_steps_give_the_same_bits(device: torch.device) -> None:
    first, second = Step(4, device), Step(4, device)
    first.post_pre()
    second.work = first.work
    second.post_pre()
    assert torch.equal(first.x, second.x) and torch.equal(first.comb, second.comb)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [256, 4096, 7168])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 16, 40, 64, 300])
def test_real_shapes(device: torch.device, hidden: int, num_tokens: int) -> None:
    step = Step(num_tokens, device, hidden=hidden, parts=7)
    alone = step.take(slice(num_tokens - 1, num_tokens))
    streams = step.expected_streams()
    step.post_pre()
    alone.post_pre()
    assert_close(step.streams, streams)
    x, post, comb = step.expected_input(step.streams)
    assert_close(step.x, x)
    assert_close(step.post, post)
    assert_close(step.comb, comb)
    for name in ("streams", "x", "x_quantised", "x_experts", "post", "comb"):
        assert torch.equal(getattr(step, name)[-1], getattr(alone, name)[0]), name
