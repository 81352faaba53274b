"""Indexer: spec traps 12, 39 and the selection rules."""

from __future__ import annotations

import pytest
import torch

from workers.reference.indexer import hadamard, index_scores, select_topk


def sylvester(size: int) -> torch.Tensor:
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix * size**-0.5


@pytest.mark.parametrize("size", [1, 2, 32, 128])
def test_hadamard_is_the_orthonormal_sylvester_matrix(size: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(hadamard(x), x @ sylvester(size))
    torch.testing.assert_close(hadamard(hadamard(x)), x)


def test_hadamard_on_both_sides_leaves_scores_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 5, 128, generator=generator)
    torch.testing.assert_close(hadamard(q) @ hadamard(k).T, q @ k.T, rtol=1e-4, atol=1e-3)


def test_negative_dots_are_dropped_before_weighting() -> None:
    q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one token, two heads
    keys = torch.tensor([[2.0, -3.0], [-1.0, 5.0]])
    weights = torch.tensor([[1.0, -0.5]])
    assert index_scores(q, weights, keys).tolist() == [[2.0, -2.5]]


def test_keys_may_be_shared_or_per_query() -> None:
    generator = torch.Generator().manual_seed(2)
    q, weights = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 3, generator=generator)
    keys = torch.randn(7, 8, generator=generator)
    shared = index_scores(q, weights, keys)
    assert shared.shape == (5, 7)
    torch.testing.assert_close(index_scores(q, weights, keys.expand(5, 7, 8)), shared)
    batched = index_scores(q.expand(2, 5, 3, 8), weights.expand(2, 5, 3), keys.expand(2, 7, 8))
    torch.testing.assert_close(batched[1], shared)
    for row in range(5):
        torch.testing.assert_close(index_scores(q[row : row + 1], weights[row : row + 1], keys)[0], shared[row])


def test_ties_go_to_the_lower_entry() -> None:
    scores = torch.tensor([[0.0, -0.0, 3.0, -1.0, 0.0, float("inf")]])
    visible = torch.tensor([[True] * 5 + [False]])
    indices, valid = select_topk(scores, visible, 4)
    assert indices.tolist() == [[2, 0, 1, 4]]
    assert valid.all()


def test_hidden_entries_are_never_valid() -> None:
    visible = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    indices, valid = select_topk(torch.tensor([5.0, 9.0, -7.0, 8.0]).expand(3, 4), visible, 3)
    assert valid.tolist() == [[True, True, False], [False, False, False], [True, True, True]]
    assert indices.tolist() == [[0, 2, 0], [0, 0, 0], [1, 3, 0]]


def test_order_matches_a_stable_sort_for_any_floats() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(50, 40, generator=generator).mul(3).round()  # many ties, both signs
    indices, valid = select_topk(scores, torch.ones(50, 40, dtype=torch.bool), 12)
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :12]
    assert torch.equal(indices, expected)
    assert valid.all()


@pytest.mark.parametrize("num_entries", [0, 1, 3])
def test_fewer_entries_than_k_are_all_returned(num_entries: int) -> None:
    scores = torch.zeros(2, num_entries)
    indices, valid = select_topk(scores, torch.ones(2, num_entries, dtype=torch.bool), 8)
    assert indices.tolist() == [list(range(num_entries))] * 2
    assert valid.all()
