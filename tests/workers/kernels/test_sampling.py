"""Greedy sampling on the device: ties, values that are not numbers, padding rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

sampling = pytest.importorskip("workers.kernels.sampling")


def greedy(logits: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    token_ids = torch.full((logits.shape[0],), -1, dtype=torch.int32, device=logits.device)
    results = torch.full((logits.shape[0], 2), -77, dtype=torch.int32, device=logits.device)
    work = sampling.SampleWork.allocate(*logits.shape, logits.device)
    sampling.sample_greedy(logits, token_ids, results, positions=positions, work=work)
    assert not work.arrived.any()
    running = slice(None) if positions is None else positions > 0
    assert torch.equal(token_ids[running], results[running, 0])
    return token_ids, results[:, 1]


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("vocab", [1024, 40_000])
def test_best_token_of_every_row(device: torch.device, num_rows: int, vocab: int) -> None:
    logits = torch.randn(num_rows, vocab, generator=torch.Generator().manual_seed(num_rows)).to(device)
    token_ids, finite = greedy(logits)
    assert token_ids.tolist() == (logits.argmax(-1).tolist() if num_rows else [])
    assert finite.tolist() == [1] * num_rows


def test_equal_logits_give_the_lowest_id(device: torch.device) -> None:
    logits = torch.zeros(3, 40_000, device=device)
    logits[1, 39_999] = logits[1, 20_000] = 1.0
    logits[2] = -torch.inf
    logits[2, 17_000] = -3.0
    assert greedy(logits)[0].tolist() == [0, 20_000, 17_000]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rows_without_a_usable_logit_are_reported(device: torch.device) -> None:
    logits = torch.zeros(5, 1000, device=device)
    logits[0, 700] = torch.nan
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[3, 3] = torch.inf
    token_ids, finite = greedy(logits)
    assert finite.tolist() == [0, 0, 0, 0, 1]
    assert all(0 <= i < 1000 for i in token_ids.tolist())


def test_positions_move_on_except_those_of_padding(device: torch.device) -> None:
    logits = torch.zeros(3, 1000, device=device)
    logits[:, 5] = 1.0
    positions = torch.tensor([7, -1, 0], dtype=torch.int32, device=device)
    token_ids, _ = greedy(logits, positions)
    assert token_ids.tolist() == [5, -1, 5]
    assert positions.tolist() == [8, -1, 1]


def test_row_of_a_batch_equals_the_batch_of_one(device: torch.device) -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(3)).to(device)
    batch = greedy(logits)[0]
    assert [greedy(logits[i : i + 1])[0].item() for i in range(4)] == batch.tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64])
def test_real_vocabulary(device: torch.device, num_rows: int) -> None:
    logits = torch.randn(num_rows, 129_280, device=device)
    assert torch.equal(greedy(logits)[0].long(), logits.argmax(-1))
