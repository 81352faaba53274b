"""Stored KV rows: sizes, exact bytes of known values, and round trips."""

from __future__ import annotations

import pytest
import torch

from workers.reference import kv_format
from workers.reference.quant import fp8_fake_quant, indexer_fp8_fake_quant


@pytest.mark.parametrize(("head_dim", "row_bytes"), [(512, 584), (128, 200)])
def test_entry_row_has_the_layout_size(head_dim: int, row_bytes: int) -> None:
    assert kv_format.pack_kv_fp8(torch.randn(3, head_dim), 64).shape == (3, row_bytes)


def test_entry_bytes_of_known_values() -> None:
    entry = torch.zeros(128)
    entry[0], entry[1], entry[64] = 448.0, -1.0, 1.5
    row = kv_format.pack_kv_fp8(entry, 64)
    assert row[0] == 0x7E  # 448 at scale 1
    assert row[1] == 0xB8  # -1: sign, exponent 7, mantissa 0
    assert row[64:66].tolist() == [0xC0, 0x3F]  # bf16 1.5, little endian
    assert row[192:].tolist() == [127, 0, 0, 0, 0, 0, 0, 0]


def test_scale_rounds_up_just_above_448() -> None:
    entry = torch.zeros(128)
    entry[0] = 448.1
    assert kv_format.pack_kv_fp8(entry, 64)[192] == 128


def test_entry_round_trip_is_the_fake_quantisation() -> None:
    entry = torch.randn(5, 7, 512, generator=torch.Generator().manual_seed(1)) * 3
    back = kv_format.unpack_kv_fp8(kv_format.pack_kv_fp8(entry, 64), 512, 64)
    assert torch.equal(back[..., :448], fp8_fake_quant(entry[..., :448], 64))
    assert torch.equal(back[..., 448:], entry[..., 448:].to(torch.bfloat16).float())


def test_indexer_round_trip_is_the_fake_quantisation() -> None:
    key = torch.randn(9, 128, generator=torch.Generator().manual_seed(2))
    row = kv_format.pack_indexer_fp8(key)
    assert row.shape == (9, 132)
    assert torch.equal(kv_format.unpack_indexer_fp8(row, 128), indexer_fp8_fake_quant(key))


def test_fp32_rows_are_exact() -> None:
    values = torch.tensor([[1.0, float("-inf"), -0.0]])
    assert torch.equal(kv_format.unpack_fp32(kv_format.pack_fp32(values)), values)


def test_partial_scale_group_is_refused() -> None:
    with pytest.raises(ValueError, match="scale group"):
        kv_format.pack_kv_fp8(torch.zeros(96), 64)
