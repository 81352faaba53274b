"""The quantisation passes against `workers/reference`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.kernels.quantise_rows import (
    QuantisedRows,
    quantise_in_place,
    quantise_pairs,
    quantise_rows,
    round_in_place,
    swiglu_rows,
)
from workers.reference import moe, quant


def _inputs(tokens: int, columns: int, seed: int) -> Tensor:
    """Rows of very different size, one of zeros."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    x *= (torch.arange(tokens)[:, None] - tokens // 2).clamp(-30, 30).float().exp()
    x[tokens // 2] = 0
    return x.bfloat16()


def in_expert_order(x: Tensor) -> Tensor:
    """`[T, K]` as the experts' kernel reads it: inside each 128 columns, place 32 j + h holds column 4 h + j."""
    return x.unflatten(-1, (-1, 32, 4)).transpose(-1, -2).flatten(-3)


def in_fragment_order(x: Tensor) -> Tensor:
    """`[T, K]` as sm_90's products read it: inside each 128 columns, place 32 b + 16 h + 4 t + i holds column
    32 t + 8 b + 2 i + h."""
    return x.unflatten(-1, (-1, 4, 4, 4, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1)


@pytest.mark.parametrize(("tokens", "columns"), [(1, 128), (19, 256), (40, 1024)])
def test_codes_and_scales_are_the_references(device: torch.device, tokens: int, columns: int, seed: int) -> None:
    x = _inputs(tokens, columns, seed)
    room = QuantisedRows.empty(tokens + 3, columns, device)
    room.codes.view(torch.uint8).fill_(0x7F)
    rows = quantise_rows(x.to(device), room)
    assert rows is not None
    scales = quant.e8m0_decode(quant.fp8_group_scale_bytes(x, 128))
    codes = quant.e4m3_encode(x.float() / scales.repeat_interleave(128, 1))
    assert torch.equal(rows.scales.cpu(), scales.T)
    assert torch.equal(rows.codes.cpu().view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("reorder", [False, True])
def test_rounded_values_are_the_references(device: torch.device, reorder: bool, seed: int) -> None:
    x = _inputs(21, 512, seed)
    rounded = torch.full_like(x, float("nan")).to(device)
    quantise_rows(x.to(device), None, rounded, reorder=reorder)
    expected = quant.fp8_fake_quant(x, 128)
    assert torch.equal(rounded.cpu(), in_expert_order(expected) if reorder else expected)


def test_rounding_in_place_leaves_rows_after_the_last(device: torch.device, seed: int) -> None:
    x = _inputs(70, 256, seed).to(device)
    before = x.clone()
    round_in_place(x, torch.tensor([20], dtype=torch.int32, device=device))
    assert torch.equal(x[:20].cpu(), quant.fp8_fake_quant(before[:20].cpu(), 128))
    assert torch.equal(x[40:], before[40:])


@pytest.mark.parametrize("rows", [0, 5, 9])
def test_codes_replace_their_rows(device: torch.device, rows: int, seed: int) -> None:
    x = _inputs(9, 512, seed).to(device)
    before = x.clone()
    quantise_in_place(x, torch.tensor([rows], dtype=torch.int32, device=device))
    codes = x.view(torch.float8_e4m3fn)[:rows, :512].float()
    scales = x.view(torch.float32)[:rows, 128 : 128 + 4]
    expected = quant.fp8_fake_quant(before[:rows].cpu().float(), 128)
    assert torch.equal((codes * scales.repeat_interleave(128, 1)).cpu(), in_fragment_order(expected))
    assert torch.equal(x[rows:], before[rows:])


def test_codes_stand_where_their_pairs_do(device: torch.device, seed: int) -> None:
    tokens, choices, columns, used = 7, 3, 256, 15  # the last two tokens have no pairs
    x = _inputs(tokens, columns, seed)
    order = torch.full((tokens * choices,), 10**6)
    order[:used] = torch.randperm(used, generator=torch.Generator().manual_seed(seed))
    room = torch.full((tokens * choices * (columns + columns // 32 + 4) + 100,), 0x55, dtype=torch.uint8, device=device)
    count = torch.tensor([used], dtype=torch.int32, device=device)
    codes, scales = quantise_pairs(x.to(device), order.int().to(device), count, choices, room)
    expected = in_fragment_order(quant.fp8_fake_quant(x.float(), 128))[order[:used] // choices]
    assert torch.equal((codes.float() * scales.repeat_interleave(128, 1)).cpu()[:used], expected)
    assert (codes.view(torch.uint8)[used:] == 0x55).all()
    assert (room[-100:] == 0x55).all()


def test_swiglu_clamps_like_the_reference(device: torch.device, seed: int) -> None:
    gate_up = (torch.randn(23, 512, generator=torch.Generator().manual_seed(seed)) * 8).bfloat16()
    hidden = torch.full((23, 256), float("nan"), dtype=torch.bfloat16, device=device)
    swiglu_rows(gate_up.to(device), hidden, 10.0)
    gate, up = gate_up.float().chunk(2, -1)
    torch.testing.assert_close(hidden.cpu().float(), moe.swiglu(gate, up, 10.0), rtol=2**-7, atol=1e-6)


def test_no_rows(device: torch.device) -> None:
    empty = torch.empty(0, 128, dtype=torch.bfloat16, device=device)
    quantise_rows(empty, QuantisedRows.empty(1, 128, device), empty)
    round_in_place(empty, torch.zeros(1, dtype=torch.int32, device=device))
    swiglu_rows(empty, empty[:, :64], 10.0)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    quantise_in_place(empty, none)
    codes, scales = quantise_pairs(empty, none, none, 2, torch.empty(0, dtype=torch.uint8, device=device))
    assert codes.shape == (0, 128) and scales.shape == (0, 1)
