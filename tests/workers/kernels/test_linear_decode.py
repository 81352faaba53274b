"""Decode linears against the fp32 reference, and their promise: a token's bits do not depend on its batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from workers.kernels import linear_decode as kernels
from workers.reference import linear as reference
from workers.reference.moe import swiglu
from workers.reference.quant import fp8_block_dequant, fp8_block_quant, fp8_fake_quant

TOLERANCE = 2e-5
"""Relative to the output's norm, before the output's rounding to bf16: fp32 sums in another order."""

BF16_TOLERANCE = 4e-3
"""After the rounding to bf16, which the interpreter does by truncation."""

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""Of numpy inside the interpreter: NaN among poisoned rows, overflow in a sigmoid."""


def fp8_weight(rows: int, columns: int, device: torch.device, seed: int = 0) -> kernels.Weight:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    codes, scale_bytes = fp8_block_quant(dense)
    scales = torch.exp2(scale_bytes.float() - 127)
    return kernels.Weight(codes.to(device), scales.to(device))


def dense(weight: kernels.Weight) -> torch.Tensor:
    return fp8_block_dequant(weight.codes.cpu(), weight.scales.cpu()).double()


def tokens(num: int, *shape: int, device: torch.device, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    magnitude = torch.exp(2 * torch.randn(num, *([1] * len(shape)), generator=generator))
    return (torch.randn(num, *shape, generator=generator) * magnitude).bfloat16().to(device)


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def assert_close(out: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = (out.cpu().double() - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}"


def rounded_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return reference.linear(x.cpu().float(), weight.float(), act_fp8=True).double()


SIZES = [(256, 128), (256, 256), (384, 512), (128, 1536), (128, 2048)]

NANO_SIZES = [(256, 256), (1536, 128), (256, 512), (256, 256), (256, 256)]
"""x_fp8, q_fp8, wo_a, wo_b, w13 of dsv4-nano."""


@pytest.mark.parametrize("T", [1, 3, 8, 21])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_linear_is_the_rounded_product(rows: int, columns: int, T: int, device: torch.device) -> None:
    weight, x = fp8_weight(rows, columns, device), tokens(T, columns, device=device)
    out = poisoned(T, rows, dtype=torch.bfloat16, device=device)
    kernels.linear(x, weight, out)
    assert_close(out, rounded_product(x, dense(weight)), BF16_TOLERANCE)


@pytest.mark.parametrize("columns", [512, 2048])
def test_linear_without_rounding_takes_the_input_as_it_is(columns: int, device: torch.device) -> None:
    weight, x = fp8_weight(128, columns, device), tokens(5, columns, device=device)
    out = poisoned(5, 128, dtype=torch.bfloat16, device=device)
    kernels.linear(x, weight, out, act_fp8=False)
    assert_close(out, x.cpu().double() @ dense(weight).T, BF16_TOLERANCE)


@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("rows_bf16", [0, 52, 64])
def test_projection_of_the_hidden_state(rows_bf16: int, T: int, device: torch.device) -> None:
    K, x = 512, tokens(T, 512, device=device)
    weight = fp8_weight(256, K, device)
    plain = torch.randn(rows_bf16, K, generator=torch.Generator().manual_seed(2)).bfloat16().to(device)
    out_fp8 = poisoned(T, 256, dtype=torch.bfloat16, device=device)
    out_bf16 = poisoned(T, rows_bf16, dtype=torch.float32, device=device)
    kernels.project_x(x, weight, plain if rows_bf16 else None, out_fp8, out_bf16 if rows_bf16 else None)
    assert_close(out_fp8, rounded_product(x, dense(weight)), BF16_TOLERANCE)
    if rows_bf16:
        assert_close(out_bf16, x.cpu().double() @ plain.cpu().double().T, TOLERANCE)


@pytest.mark.parametrize("T", [1, 6])
def test_grouped_linear_keeps_groups_apart(T: int, device: torch.device) -> None:
    G, rows, K = 2, 128, 512
    weight, x = fp8_weight(G * rows, K, device), tokens(T, G, K, device=device)
    out = poisoned(T, G * rows, dtype=torch.bfloat16, device=device)
    kernels.grouped_linear(x, weight, out)
    expected = reference.grouped_linear(x.cpu().double(), dense(weight).view(G, rows, K))
    assert_close(out, expected.reshape(T, -1), BF16_TOLERANCE)


@pytest.mark.parametrize("T", [1, 7])
def test_first_half_of_the_shared_expert(T: int, device: torch.device) -> None:
    K, inner, limit = 512, 128, 2.0
    x, w13 = tokens(T, K, device=device), fp8_weight(2 * inner, K, device)
    hidden = poisoned(T, inner, dtype=torch.bfloat16, device=device)
    kernels.shared_gate_up(x, w13, limit, hidden)
    product = rounded_product(x, dense(w13))
    assert_close(hidden, swiglu(product[:, :inner], product[:, inner:], limit), BF16_TOLERANCE)


@pytest.mark.parametrize("B", [1, 5])
def test_head_has_fp32_logits_for_any_vocabulary(B: int, device: torch.device) -> None:
    x = tokens(B, 256, device=device)
    weight = torch.randn(205, 256, generator=torch.Generator().manual_seed(4)).bfloat16().to(device)
    out = poisoned(B, 205, dtype=torch.float32, device=device)
    kernels.head(x, weight, out)
    assert_close(out, F.linear(x.cpu().double(), weight.cpu().double()), TOLERANCE)


@pytest.mark.parametrize("T", [4, 8, 9, 40])
@pytest.mark.parametrize("columns", [128, 256, 512, 2048])
def test_a_tokens_bits_do_not_depend_on_its_batch(columns: int, T: int, device: torch.device) -> None:
    weight = fp8_weight(128, columns, device)
    x = tokens(T, columns, device=device)
    alone = poisoned(1, 128, dtype=torch.bfloat16, device=device)
    kernels.linear(x[:1], weight, alone)
    x[1:] = float("nan")
    x[-1] = float("inf")
    batch = poisoned(T, 128, dtype=torch.bfloat16, device=device)
    kernels.linear(x, weight, batch)
    assert torch.equal(batch[0], alone[0])


@pytest.mark.parametrize("T", [2, 9, 24, pytest.param(64, marks=pytest.mark.gpu)])
def test_grouped_bits_do_not_depend_on_the_batch(T: int, device: torch.device) -> None:
    G, rows, K = 2, 128, 2048
    weight, x = fp8_weight(G * rows, K, device), tokens(T, G, K, device=device)
    alone = poisoned(1, G * rows, dtype=torch.bfloat16, device=device)
    kernels.grouped_linear(x[-1:], weight, alone)
    x[:-1] = float("nan")
    batch = poisoned(T, G * rows, dtype=torch.bfloat16, device=device)
    kernels.grouped_linear(x, weight, batch)
    assert torch.equal(batch[-1], alone[0])


@pytest.mark.parametrize("T", [2, 9, pytest.param(40, marks=pytest.mark.gpu)])  # numpy sums 64 columns otherwise
@pytest.mark.parametrize("K", [256, 512, 2048])
def test_projection_and_shared_bits_do_not_depend_on_the_batch(K: int, T: int, device: torch.device) -> None:
    inner = 128
    weight, w13 = fp8_weight(128, K, device), fp8_weight(2 * inner, K, device)
    plain = torch.randn(48, K, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        num = x.shape[0]
        widths = {48: torch.float32, 128: torch.bfloat16}
        raw, latent = (poisoned(num, width, dtype=dtype, device=device) for width, dtype in widths.items())
        hidden, words = (torch.empty_like(out) for out in (latent, raw))
        kernels.project_x(x, weight, plain, latent, raw)
        kernels.shared_gate_up(x, w13, 10.0, hidden)
        kernels.head(x, plain, words)
        return [raw, latent, hidden, words]

    x = tokens(T, K, device=device)
    alone = run(x[:1])
    x[1:] = float("nan")
    for batch, single in zip(run(x), alone, strict=True):
        assert torch.equal(batch[0], single[0])


@pytest.mark.gpu
@pytest.mark.parametrize("T", [1, 4, 16])
def test_every_row_of_a_step_repeats_bit_for_bit(T: int, device: torch.device) -> None:
    """The shapes of dsv4-nano, each launch against itself, with and without dependent launches."""
    x, latent = tokens(T, 256, device=device), tokens(T, 128, device=device)
    groups = tokens(T, 2, 512, device=device)
    x_fp8, q, wo_a, wo_b, w13 = (fp8_weight(*size, device) for size in NANO_SIZES)
    generator = torch.Generator().manual_seed(6)
    x_bf16 = torch.randn(1028, 256, generator=generator).bfloat16().to(device)

    def run(pdl: bool) -> list[torch.Tensor]:
        outs = [poisoned(T, n, dtype=torch.bfloat16, device=device) for n in (256, 1536, 256, 256, 128)]
        raw = poisoned(T, 1028, dtype=torch.float32, device=device)
        for _ in range(3):
            kernels.project_x(x, x_fp8, x_bf16, outs[0], raw, pdl=pdl)
            kernels.linear(latent, q, outs[1], pdl=pdl)
            kernels.grouped_linear(groups, wo_a, outs[2], pdl=pdl)
            kernels.linear(outs[2], wo_b, outs[3], pdl=pdl)
            kernels.shared_gate_up(outs[3], w13, 10.0, outs[4], pdl=pdl)
        return [*outs, raw]

    first = run(pdl=False)
    assert all(out.isfinite().all() for out in first)
    for _ in range(20):
        for mine, again in zip(first, run(pdl=True), strict=True):
            assert torch.equal(mine, again)


@pytest.mark.parametrize("T", [9, 16])
def test_rounding_beforehand_gives_the_same_bits(T: int, device: torch.device) -> None:
    K, inner = 2048, 128
    weight, x = fp8_weight(2 * inner, K, device), tokens(T, K, device=device)
    rounded = fp8_fake_quant(x.cpu(), 128).to(device)

    def run(**options: object) -> tuple[torch.Tensor, ...]:
        out, hidden = (poisoned(T, n, dtype=torch.bfloat16, device=device) for n in (2 * inner, inner))
        kernels.project_x(x, weight, None, out, None, **options)
        kernels.shared_gate_up(x, weight, 10.0, hidden, **options)
        return out, hidden

    for mine, theirs in zip(run(x_quantised=rounded), run(), strict=True):
        assert torch.equal(mine, theirs)
    out, again = (poisoned(T, 2 * inner, dtype=torch.bfloat16, device=device) for _ in range(2))
    kernels.linear(x, weight, out, rounded=torch.empty(T * K + 5, dtype=torch.bfloat16, device=device))
    kernels.linear(x, weight, again)
    assert torch.equal(out, again)


def test_no_tokens_is_no_work(device: torch.device) -> None:
    weight = fp8_weight(128, 256, device)
    behind = torch.full((4, 128), 7.0, dtype=torch.bfloat16, device=device)
    kernels.linear(tokens(0, 256, device=device), weight, behind[:0])
    assert (behind == 7.0).all(), "what lies behind an output of no rows was written"
