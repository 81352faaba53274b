"""Compressor: spec traps 13, 14, 15, 16, 28 and the pooling oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from workers.model.full_sequence import pool_sequence
from workers.reference.compressor import compress_finish, compress_pool, compress_project, visible_entries


def spec_rows() -> Tensor:
    """8 tokens, one channel: A = 1..8, B = 10..80, score A 0, score B 0, 0, 0, ln 3 repeating."""
    kv_a, kv_b = torch.arange(1.0, 9.0), torch.arange(10.0, 90.0, 10.0)
    score_b = torch.tensor([0.0, 0.0, 0.0, math.log(3)] * 2)
    return torch.stack((kv_a, kv_b, torch.zeros(8), score_b), dim=-1).unsqueeze(0)  # [1, 8, 4]


def test_pooling_equals_the_published_entries() -> None:
    entries = pool_sequence(spec_rows(), torch.zeros(4, 2), 4)
    torch.testing.assert_close(entries, torch.tensor([[[30.0], [43.0]]]))


def test_first_entry_ignores_absent_rows_whatever_they_hold() -> None:
    rows = torch.cat((torch.full((4, 4), float("nan")), spec_rows()[0, :4]))
    present = torch.tensor([False] * 4 + [True] * 4)
    torch.testing.assert_close(compress_pool(rows, present, torch.zeros(4, 2), ratio=4), torch.tensor([30.0]))


def test_absent_rows_are_excluded_rather_than_scored_zero() -> None:
    rows = torch.cat((torch.zeros(4, 4), spec_rows()[0, :4]))
    scored_zero = compress_pool(rows, torch.ones(8, dtype=torch.bool), torch.zeros(4, 2), ratio=4)
    assert scored_zero.item() == pytest.approx(180 / 10)


def test_a_part_feeds_the_next_entry_and_b_part_its_own() -> None:
    rows = spec_rows()
    changed = rows.clone()
    changed[0, 0, 0] += 100.0  # A part of token 0
    before, after = (pool_sequence(r, torch.zeros(4, 2), 4)[0, :, 0] for r in (rows, changed))
    assert after[0] == before[0]
    assert after[1] > before[1]
    changed = rows.clone()
    changed[0, 0, 1] += 100.0  # B part of token 0
    after = pool_sequence(changed, torch.zeros(4, 2), 4)[0, :, 0]
    assert after[0] > before[0]
    assert after[1] == before[1]


@pytest.mark.parametrize("ratio", [4, 128])
def test_positional_bias_follows_the_token_phase(ratio: int) -> None:
    """A bias that singles out phase p makes the entry token p's value (both parts use the token's own phase)."""
    parts = 2 if ratio == 4 else 1
    rows = torch.randn(1, 2 * ratio, 2 * parts, generator=torch.Generator().manual_seed(1))
    ape = torch.full((ratio, parts), -1e4)
    ape[1] = 0.0
    entries = pool_sequence(rows, ape, ratio)[0, :, 0]
    if ratio == 128:
        torch.testing.assert_close(entries, rows[0, [1, 129], 0])
        return
    torch.testing.assert_close(entries[0], rows[0, 1, 1])
    weight = torch.softmax(torch.stack((rows[0, 1, 2], rows[0, 5, 3])), 0)
    torch.testing.assert_close(entries[1], weight[0] * rows[0, 1, 0] + weight[1] * rows[0, 5, 1])


@pytest.mark.parametrize("ratio", [4, 128])
def test_pooling_equals_a_softmax_written_out_per_token(ratio: int) -> None:
    head_dim, generator = 6, torch.Generator().manual_seed(2)
    parts = 2 if ratio == 4 else 1
    num_tokens = 3 * ratio + ratio // 2
    kv = torch.randn(num_tokens, parts * head_dim, generator=generator).double()
    score = torch.randn(num_tokens, parts * head_dim, generator=generator).double()
    ape = torch.randn(ratio, parts * head_dim, generator=generator).double()
    expected = []
    for entry in range(num_tokens // ratio):
        total, weights = torch.zeros(head_dim).double(), torch.zeros(head_dim).double()
        for token in range(ratio * (entry + 1 - parts), ratio * (entry + 1)):
            if token < 0:
                continue
            own = parts == 1 or token < ratio * entry
            columns = slice(0, head_dim) if own else slice(head_dim, None)
            weight = (score[token, columns] + ape[token % ratio, columns]).exp()
            total, weights = total + weight * kv[token, columns], weights + weight
        expected.append(total / weights)
    rows = torch.cat((kv, score), dim=-1).float().unsqueeze(0)
    actual = pool_sequence(rows, ape.float(), ratio)[0]
    torch.testing.assert_close(actual, torch.stack(expected).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ratio", [4, 128])
def test_incomplete_windows_yield_no_entry(ratio: int) -> None:
    width = 8 if ratio == 4 else 4
    ape = torch.zeros(ratio, width // 2)
    for num_tokens, num_entries in ((0, 0), (ratio - 1, 0), (ratio, 1), (2 * ratio - 1, 1)):
        assert pool_sequence(torch.zeros(1, num_tokens, width), ape, ratio).shape[1] == num_entries


def test_half_precision_rows_would_drift() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(1, 128, 64, generator=generator)
    exact = pool_sequence(rows, torch.zeros(128, 32), 128)
    assert pool_sequence(rows.bfloat16(), torch.zeros(128, 32), 128).dtype is torch.float32
    drift = (pool_sequence(rows.bfloat16().float(), torch.zeros(128, 32), 128) - exact).abs().max()
    assert drift > 1e-4


def test_projected_rows_carry_no_positional_bias() -> None:
    x, wkv, wgate = torch.ones(2, 3), torch.ones(4, 3), 2 * torch.ones(4, 3)
    rows = compress_project(x, wkv, wgate)
    assert rows.tolist() == [[3.0] * 4 + [6.0] * 4] * 2


def test_finish_normalises_before_rotating() -> None:
    pooled = torch.tensor([[3.0, 0.0, 4.0, 0.0]])
    entry = compress_finish(pooled, torch.full((4,), 2.0), torch.tensor([[0.0]]), torch.tensor([[1.0]]), 0.0)
    torch.testing.assert_close(entry, torch.tensor([[2.4, 0.0, 0.0, 3.2]]))


@pytest.mark.parametrize(
    ("ratio", "position", "count"),
    [(4, 0, 0), (4, 2, 0), (4, 3, 1), (4, 6, 1), (4, 7, 2), (128, 126, 0), (128, 127, 1), (128, 255, 2)],
)
def test_entry_is_visible_from_its_last_token_on(ratio: int, position: int, count: int) -> None:
    assert visible_entries(torch.tensor(position), ratio).item() == count
