"""Prefill's products against fp32 references with the same quantisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.kernels import linear_prefill
from workers.kernels.linear_decode import Weight
from workers.kernels.linear_prefill import PrefillWork
from workers.reference import linear as reference
from workers.reference import moe, quant

RELATIVE_ERROR = 6e-3
"""bf16 outputs: half a unit in the last place is 2**-9 of each value."""


def _randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8_weight(rows: int, columns: int, device: torch.device, seed: int) -> tuple[Weight, Tensor]:
    """A weight in the kernels' layout and its fp32 values, with scales that differ from block to block."""
    spread = (_randn(-(-rows // 128), -(-columns // 128), seed=seed + 1) * 2).exp()
    value = _randn(rows, columns, seed=seed) * quant._expand_blocks(spread, rows, columns, 128) / columns**0.5
    codes, scales = quant.fp8_block_quant(value)
    weight = Weight(codes.to(device), quant.e8m0_decode(scales).to(device))
    return weight, quant.fp8_block_dequant(codes, scales)


def _work(tokens: int, device: torch.device, columns: int = 512, inner: int = 128) -> PrefillWork:
    return PrefillWork.empty(tokens, columns=columns, weight_elements=512 * 512, inner=inner, device=device)


def _close(actual: Tensor, expected: Tensor, bound: float = RELATIVE_ERROR) -> None:
    assert actual.isfinite().all()
    error = (actual.cpu().float() - expected).norm() / expected.norm()
    assert error < bound, error


@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 128, 128), (17, 256, 384), (150, 384, 256)])
def test_linear_matches_the_reference(device: torch.device, tokens: int, rows: int, columns: int, seed: int) -> None:
    weight, value = fp8_weight(rows, columns, device, seed)
    x = (_randn(tokens, columns, seed=seed + 7) * 3).bfloat16()
    out = torch.full((tokens, rows), float("nan"), dtype=torch.bfloat16, device=device)
    linear_prefill.linear(x.to(device), weight, out, work=_work(tokens, device))
    _close(out, reference.linear(x.float(), value, act_fp8=True))


def test_linear_without_rounding_the_input(device: torch.device, seed: int) -> None:
    weight, value = fp8_weight(256, 256, device, seed)
    x = _randn(20, 256, seed=seed + 7).bfloat16()
    out = torch.full((20, 256), float("nan"), dtype=torch.bfloat16, device=device)
    linear_prefill.linear(x.to(device), weight, out, act_fp8=False, work=_work(20, device))
    _close(out, x.float() @ value.T)


@pytest.mark.parametrize("num_bf16", [0, 64, 640])
def test_project_x_gives_both_products(device: torch.device, num_bf16: int, seed: int) -> None:
    weight, value = fp8_weight(256, 256, device, seed)
    x, wide = _randn(33, 256, seed=seed + 7).bfloat16(), _randn(num_bf16, 256, seed=seed + 8).bfloat16()
    out = torch.full((33, 256), float("nan"), dtype=torch.bfloat16, device=device)
    out_wide = torch.full((33, num_bf16), float("nan"), device=device) if num_bf16 else None
    linear_prefill.project_x(
        x.to(device), weight, wide.to(device) if num_bf16 else None, out, out_wide, work=_work(33, device)
    )
    _close(out, reference.linear(x.float(), value, act_fp8=True))
    if out_wide is not None:
        torch.testing.assert_close(out_wide.cpu(), x.float() @ wide.float().T, rtol=1e-5, atol=1e-4)


def test_grouped_linear_is_block_diagonal(device: torch.device, seed: int) -> None:
    weight, value = fp8_weight(2 * 128, 256, device, seed)
    x = _randn(37, 2, 256, seed=seed + 7).bfloat16()
    out = torch.full((37, 2 * 128), float("nan"), dtype=torch.bfloat16, device=device)
    linear_prefill.grouped_linear(x.to(device), weight, out, work=_work(37, device))
    _close(out, reference.grouped_linear(x.float(), value.view(2, 128, 256)).flatten(1))


def test_router_logits_and_shared_expert(device: torch.device, seed: int) -> None:
    w13, value = fp8_weight(2 * 128, 256, device, seed)
    gate, x = _randn(12, 256, seed=seed + 6).bfloat16(), (_randn(21, 256, seed=seed + 7) * 4).bfloat16()
    logits = torch.full((21, 12), float("nan"), device=device)
    hidden = torch.full((21, 128), float("nan"), dtype=torch.bfloat16, device=device)
    linear_prefill.router_logits(x.to(device), gate.to(device), logits)
    linear_prefill.shared_gate_up(x.to(device), w13, 10.0, hidden, work=_work(21, device))
    torch.testing.assert_close(logits.cpu(), x.float() @ gate.float().T, rtol=1e-5, atol=1e-4)
    gate_up = reference.linear(x.float(), value, act_fp8=True)
    _close(hidden, moe.swiglu(*gate_up.chunk(2, -1), 10.0), 2 * RELATIVE_ERROR)


def test_head_has_fp32_logits(device: torch.device, seed: int) -> None:
    x, weight = _randn(3, 256, seed=seed).bfloat16(), _randn(1000, 256, seed=seed + 1).bfloat16()
    out = torch.full((3, 1000), float("nan"), device=device)
    linear_prefill.head(x.to(device), weight.to(device), out)
    torch.testing.assert_close(out.cpu(), x.float() @ weight.float().T, rtol=1e-5, atol=1e-4)


def test_a_row_has_the_same_bits_in_any_batch(device: torch.device, seed: int) -> None:
    weight, _ = fp8_weight(256, 256, device, seed)
    wide = _randn(640, 256, seed=seed + 8).bfloat16().to(device)
    x = _randn(140, 256, seed=seed + 7).bfloat16().to(device)
    x[70:] = float("nan") if x.is_cuda else 1e15  # the interpreter warns of NaN

    def run(rows: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.empty(len(rows), 256, dtype=torch.bfloat16, device=device)
        out_wide = torch.empty(len(rows), 640, device=device)
        linear_prefill.project_x(rows, weight, wide, out, out_wide, work=_work(140, device))
        return out, out_wide

    whole, alone, some = run(x), run(x[5:6].contiguous()), run(x[:70].contiguous())
    for a, b, c in zip(whole, alone, some, strict=True):
        assert torch.equal(a[5:6], b)
        assert torch.equal(a[:70], c)


def test_no_tokens_are_no_work(device: torch.device, seed: int) -> None:
    weight, _ = fp8_weight(128, 128, device, seed)
    gate = _randn(12, 128, seed=seed).bfloat16().to(device)
    x = _randn(4, 128, seed=seed + 7).bfloat16().to(device)[:0]
    behind = torch.full((4, 128), 7.0, dtype=torch.bfloat16, device=device)
    behind_wide = torch.full((4, 12), 7.0, device=device)
    linear_prefill.linear(x, weight, behind[:0], work=_work(1, device))
    linear_prefill.grouped_linear(x.view(0, 1, 128), weight, behind[:0], work=_work(1, device))
    linear_prefill.project_x(x, weight, gate, behind[:0], behind_wide[:0], work=_work(1, device))
    linear_prefill.head(x, gate, behind_wide[:0])
    assert (behind == 7.0).all() and (behind_wide == 7.0).all(), "what lies behind an output of no rows was written"


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "columns"), [(1536, 4096), (4096, 8192), (8192, 1024)])
def test_flash_shapes_are_the_references_every_time(device: torch.device, rows: int, columns: int, seed: int) -> None:
    weight, value = fp8_weight(rows, columns, device, seed)
    x = (_randn(500, columns, seed=seed + 7) * 3).bfloat16().to(device)
    expected = reference.linear(x.float(), value.to(device), act_fp8=True).cpu()
    work = _work(500, device, columns)
    first = torch.empty(500, rows, dtype=torch.bfloat16, device=device)
    linear_prefill.linear(x, weight, first, work=work)
    _close(first, expected)
    for _ in range(10):
        again = torch.full_like(first, float("nan"))
        linear_prefill.linear(x, weight, again, work=work)
        assert torch.equal(again, first)
