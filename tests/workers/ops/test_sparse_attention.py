"""Attention over entry lists: spec traps 11, 18, 32, and the banded form against this definition."""

from __future__ import annotations

import pytest
import torch

from tests.support.tolerances import OP_FP32, relative_error
from workers.model.full_sequence import windowed_attention
from workers.reference.sparse_attention import sparse_attention


def test_sink_takes_probability_but_has_no_value() -> None:
    q, kv = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 2.0]]])
    out = sparse_attention(q, kv, torch.ones(1, 1, dtype=torch.bool), torch.tensor([0.0]), 1.0)
    torch.testing.assert_close(out, torch.tensor([[[0.5, 1.0]]]))
    large_sink = sparse_attention(q, kv, torch.ones(1, 1, dtype=torch.bool), torch.tensor([500.0]), 1.0)
    assert large_sink.abs().max() < 1e-30


def test_masked_entries_may_hold_nan() -> None:
    generator = torch.Generator().manual_seed(1)
    q, kv = torch.randn(3, 2, 8, generator=generator), torch.randn(3, 5, 8, generator=generator)
    mask = torch.tensor([True, True, False, True, False]).expand(3, 5)
    clean = sparse_attention(q, kv[:, [0, 1, 3]], torch.ones(3, 3, dtype=torch.bool), torch.zeros(2), 0.3)
    poisoned = kv.clone()
    poisoned[:, [2, 4]] = float("nan")
    torch.testing.assert_close(sparse_attention(q, poisoned, mask, torch.zeros(2), 0.3), clean)


@pytest.mark.parametrize("num_entries", [0, 4])
def test_query_without_entries_yields_zeros(num_entries: int) -> None:
    q, kv = torch.ones(2, 3, 8), torch.full((2, num_entries, 8), float("nan"))
    out = sparse_attention(q, kv, torch.zeros(2, num_entries, dtype=torch.bool), torch.zeros(3), 1.0)
    assert torch.equal(out, torch.zeros(2, 3, 8))


def test_equals_softmax_with_one_extra_logit_in_double_precision() -> None:
    generator = torch.Generator().manual_seed(2)
    q, kv = torch.randn(4, 3, 16, generator=generator), torch.randn(4, 9, 16, generator=generator)
    mask, sink = torch.rand(4, 9, generator=generator) < 0.6, torch.randn(3, generator=generator)
    scores = torch.einsum("thd,tkd->thk", q.double(), kv.double()) * 0.25
    weights = scores.exp() * mask.unsqueeze(1)
    expected = torch.einsum("thk,tkd->thd", weights, kv.double())
    expected = expected / (weights.sum(-1) + sink.double().exp()).unsqueeze(-1)
    torch.testing.assert_close(sparse_attention(q, kv, mask, sink, 0.25), expected.float())
    alone = sparse_attention(q[2:3], kv[2:3], mask[2:3], sink, 0.25)
    torch.testing.assert_close(alone[0], expected[2].float())


def entry_lists(
    kv: torch.Tensor, entries: torch.Tensor, entry_mask: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-query lists: all tokens (masked to the window, self included), then all entries."""
    num_tokens = kv.shape[0]
    distance = torch.arange(num_tokens).unsqueeze(-1) - torch.arange(num_tokens)
    in_window = (distance >= 0) & (distance < window)
    lists = torch.cat((kv, entries)).expand(num_tokens, -1, -1)
    return lists, torch.cat((in_window, entry_mask), dim=-1)


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9, 16, 31])
@pytest.mark.parametrize("num_entries", [0, 1, 5])
def test_banded_form_equals_the_definition(num_tokens: int, num_entries: int) -> None:
    window, generator = 8, torch.Generator().manual_seed(num_tokens)
    q, kv = torch.randn(2, num_tokens, 3, 16, generator=generator), torch.randn(2, num_tokens, 16, generator=generator)
    entries = torch.randn(2, num_entries, 16, generator=generator)
    mask = torch.rand(2, num_tokens, num_entries, generator=generator) < 0.5
    sink = torch.randn(3, generator=generator)
    heads, mass = windowed_attention(
        q, kv, entries if num_entries else None, mask if num_entries else None, sink, window
    )
    for row in range(2):
        lists, allowed = entry_lists(kv[row], entries[row], mask[row], window)
        expected = sparse_attention(q[row], lists, allowed, sink, 0.25)
        assert relative_error(heads[row], expected) < OP_FP32
    assert mass.shape == (2, num_tokens, num_entries)
    assert ((mass > 0) == mask).all()
