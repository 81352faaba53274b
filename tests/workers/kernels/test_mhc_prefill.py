"""mHC kernels of prefill against `workers/reference/mhc.py`, with the operands and bounds of the decode test."""

from __future__ import annotations

import pytest
import torch

from tests.workers.kernels.test_mhc import HIDDEN, NORM_EPS, Step, assert_close, check_rounded
from workers.reference import mhc as reference
from workers.reference.norm_rope import rms_norm

prefill = pytest.importorskip("workers.kernels.mhc_prefill")


def make(num_tokens: int, device: torch.device, *, hidden: int = HIDDEN, parts: int = 1) -> Step:
    step = Step(num_tokens, device, hidden=hidden, parts=parts)
    step.work = torch.full((prefill.work_floats(num_tokens, hidden) + 8,), torch.nan, device=device)
    return step


def post_pre(step: Step) -> None:
    operands = (step.sub_out, step.streams, step.post, step.comb, step.hc, step.norm_weight, step.x, step.work)
    prefill.hc_post_pre(*operands, x_quantised=step.x_quantised, x_experts=step.x_experts)


def check(step: Step) -> None:
    """Runs the step and compares all it writes."""
    streams = step.expected_streams()
    post_pre(step)
    assert_close(step.streams, streams)
    x, post, comb = step.expected_input(step.streams)
    assert_close(step.x, x)
    assert_close(step.post, post)
    assert_close(step.comb, comb)
    check_rounded(step)


@pytest.mark.parametrize(("num_tokens", "parts"), [(0, 1), (1, 4), (66, 1)])
def test_write_back_and_next_input_equal_the_reference(device: torch.device, num_tokens: int, parts: int) -> None:
    check(make(num_tokens, device, parts=parts))


def test_first_input_reads_the_streams_as_they_are(device: torch.device) -> None:
    step = make(5, device)
    before = step.streams.clone()
    x, post, comb = step.expected_input(step.streams)
    prefill.hc_pre(step.streams, step.hc, step.norm_weight, step.x, step.post, step.comb, step.work)
    assert torch.equal(step.streams, before)
    assert_close(step.x, x)
    assert_close(step.post, post)
    assert_close(step.comb, comb)


@pytest.mark.parametrize("rows", [None, [4, 1]])
def test_head_collapses_the_wanted_rows(device: torch.device, rows: list[int] | None) -> None:
    step = make(5, device, parts=4)
    wanted = list(range(5)) if rows is None else rows
    streams = step.expected_streams()[wanted]
    chosen = None if rows is None else torch.tensor(rows, dtype=torch.int32, device=device)
    x, hc = step.x[: len(wanted)], step.head
    operands = (step.sub_out, step.streams, step.post, step.comb, hc, step.norm_weight, chosen, x, step.work)
    prefill.hc_post_head(*operands)
    assert_close(step.streams[wanted], streams)
    mixed = reference.hc_head(step.streams[wanted], hc.fn, hc.base, hc.scale, eps=hc.eps, norm_eps=hc.norm_eps)
    assert_close(x, rms_norm(mixed, step.norm_weight, NORM_EPS))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_row_of_a_batch_equals_the_batch_of_one(device: torch.device) -> None:
    """Also when every other row is poisoned."""
    batch = make(66, device, parts=4)
    alone, poisoned = batch.take(slice(64, 65)), batch.take(slice(None))
    others = torch.arange(66, device=device) != 64
    poisoned.sub_out[others], poisoned.streams[others] = torch.nan, torch.inf
    post_pre(alone)
    post_pre(poisoned)
    for name in ("streams", "x", "x_quantised", "x_experts", "post", "comb"):
        assert torch.equal(getattr(poisoned, name)[64], getattr(alone, name)[0]), name


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [256, 4096, 7168])
@pytest.mark.parametrize("num_tokens", [1, 65, 1000, 4096])
def test_real_shapes(device: torch.device, hidden: int, num_tokens: int) -> None:
    step = make(num_tokens, device, hidden=hidden, parts=7)
    alone = step.take(slice(num_tokens - 1, num_tokens))
    check(step)
    post_pre(alone)
    for name in ("streams", "x", "x_quantised", "x_experts", "post", "comb"):
        assert torch.equal(getattr(step, name)[-1], getattr(alone, name)[0]), name
