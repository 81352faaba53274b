"""Coded rows: the values of the official rounding, at the places where the tensor cores want them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.reference.quant import fp8_fake_quant

expert_codes = pytest.importorskip("workers.kernels.expert_codes")


def decoded(rows: Tensor) -> Tensor:
    """fp32 `[T, D]` of coded rows."""
    columns = rows.shape[1] * 32 // 33
    scales = rows[:, columns:].contiguous().view(torch.float32)
    codes = rows[:, :columns].view(torch.float8_e4m3fn).float()
    codes = codes.unflatten(1, (-1, 2, 16)).transpose(2, 3).flatten(1)
    return codes * scales.repeat_interleave(128, 1)


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_coded_rows_hold_the_rounded_values(device: torch.device, num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    x = (3 * torch.randn(num_tokens, 384, generator=generator)).to(device, torch.bfloat16)
    rows = torch.full((num_tokens, expert_codes.coded_bytes(384)), 255, dtype=torch.uint8, device=device)
    expert_codes.code_rows(x, rows)
    assert torch.equal(decoded(rows), fp8_fake_quant(x.float(), 128))


def test_even_columns_come_first(device: torch.device) -> None:
    """Codes of columns whose values say where they are: e4m3 holds the numbers to 16."""
    x = torch.zeros(1, 128, dtype=torch.bfloat16, device=device)
    x[0, :32] = torch.arange(32, device=device) % 16
    x[0, 127] = 448  # scale 1
    rows = torch.zeros(1, expert_codes.coded_bytes(128), dtype=torch.uint8, device=device)
    expert_codes.code_rows(x, rows)
    assert rows[:, 128:].contiguous().view(torch.float32).tolist() == [[1.0]]
    found = rows[0, :32].view(torch.float8_e4m3fn).float().tolist()
    assert found == [0, 2, 4, 6, 8, 10, 12, 14] * 2 + [1, 3, 5, 7, 9, 11, 13, 15] * 2
