"""Exact top-k against the reference: ties, chunks, padding, all visible counts; bits do not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.triton_interpreter import allow_loaded_bounds
from workers.kernels import topk as module
from workers.kernels.topk import TopkWork, select_topk
from workers.reference.indexer import select_topk as reference


def expected(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The reference's choice as ascending rows, -1 after the last."""
    mask = torch.arange(scores.shape[1], device=scores.device) < visible.unsqueeze(1)
    indices, valid = reference(scores.masked_fill(~mask, 0.0), mask, k)
    ascending = indices.masked_fill(~valid, 1 << 30).sort(-1).values
    ascending = torch.where(ascending == 1 << 30, -1, ascending)
    return torch.nn.functional.pad(ascending, (0, k - ascending.shape[1]), value=-1).to(torch.int32)


def choose(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """The kernel's choice in ascending order; buffer and the scores behind the visible ones are poisoned."""
    scores = scores.clone()
    for row, count in enumerate(visible.tolist()):
        scores[row, count:] = float("nan")
    out = torch.full((scores.shape[0], k), 0x7EADBEEF, dtype=torch.int32, device=scores.device)
    work = TopkWork.allocate(scores.shape[0], scores.shape[1], k, scores.device)
    positions = torch.where(visible == 0, -1, visible * 4 + visible % 4 - 1).to(torch.int32)
    select_topk(scores, positions, out, work)
    assert not work.arrived.any()
    counts = visible.clamp(max=k).unsqueeze(1)
    assert torch.equal(out < 0, torch.arange(k, device=out.device) >= counts)  # -1 after the last only
    ascending = torch.where(out < 0, 1 << 30, out).sort(-1).values
    return torch.where(ascending == 1 << 30, -1, ascending)


def normal(seed: int, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


allow_loaded_bounds()

KINDS = {
    "spread": lambda x: x,
    "many ties": lambda x: (2 * x).round(),
    "all equal": lambda x: x * 0.0,  # of both signs of zero
    "outliers": lambda x: torch.where(x > 2, x * 1e30, torch.where(x < 0, x * 1e-30, x)),
    "two values": lambda x: (x > 0.3).float(),
    "mostly zero": lambda x: x.relu() * (x > 1),
    "wide": lambda x: (20 * x).exp(),
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 entries, so that short rows have many of them."""
    monkeypatch.setattr(module, "CHUNKS", (128,))


@pytest.mark.parametrize("kind", KINDS)
def test_one_chunk_chooses_as_the_reference(kind: str, device: torch.device, seed: int) -> None:
    scores = KINDS[kind](normal(seed, device, 12, 4096))
    visible = torch.tensor([0, 1, 63, 64, 65, 100, 1000, 1024, 1025, 2049, 4000, 4096], device=device)  # all tiles
    assert torch.equal(choose(scores, visible, 64), expected(scores, visible, 64))


def test_a_row_of_64k_tokens_of_context(device: torch.device, seed: int) -> None:
    scores = normal(seed, device, 5, 16384)
    visible = torch.tensor([500, 1000, 4000, 5000, 16000], device=device)
    assert torch.equal(choose(scores, visible, 64), expected(scores, visible, 64))


@pytest.mark.parametrize("kind", KINDS)
def test_many_chunks_choose_as_the_reference(kind: str, small_chunks: None, device: torch.device, seed: int) -> None:
    scores = KINDS[kind](normal(seed, device, 10, 1280))
    visible = torch.tensor([0, 5, 32, 33, 128, 129, 160, 256, 700, 1280], device=device)
    assert torch.equal(choose(scores, visible, 32), expected(scores, visible, 32))


@pytest.mark.parametrize("k", [1, 3, 24])
def test_any_k(k: int, small_chunks: None, device: torch.device, seed: int) -> None:
    scores = normal(seed, device, 5, 300).round()
    visible = torch.tensor([k, k + 1, 128, 130, 300], device=device)
    assert torch.equal(choose(scores, visible, k), expected(scores, visible, k))


def test_infinities_are_scores_like_others(device: torch.device, seed: int) -> None:
    scores = normal(seed, device, 2, 64)
    scores[0, ::3], scores[0, 1::3], scores[1, ::5] = float("inf"), float("-inf"), float("inf")
    visible = torch.tensor([64, 64], device=device)
    assert torch.equal(choose(scores, visible, 16), expected(scores, visible, 16))


def test_nan_ranks_last(device: torch.device, seed: int) -> None:
    scores = normal(seed, device, 1, 100)
    scores[0, 10:40] = float("nan")
    visible = torch.tensor([100], device=device)
    least_first = torch.where(scores.isnan(), float("-inf"), scores)
    assert torch.equal(choose(scores, visible, 80), expected(least_first, visible, 80))


def in_two_groups(x: Tensor) -> Tensor:
    """The best are 1,024 entries apart, as the scores are whose largest the walk through a long row looks at."""
    at = torch.arange(x.shape[-1], device=x.device)
    return x + 100 * (at % 1024 < 8)


@pytest.mark.parametrize("kind", [*KINDS, "in few groups"])
def test_long_rows_are_chosen_in_one_order(kind: str, device: torch.device, seed: int) -> None:
    """By a program that keeps the scores, and by one that walks through them; lists that do not hold them all, too."""
    make = KINDS.get(kind, in_two_groups)
    scores, visible = make(normal(seed, device, 4, 16384)), torch.tensor([3000, 4097, 9000, 16384], device=device)
    out = torch.full((4, 64), -7, dtype=torch.int32, device=device)
    select_topk(scores, (visible * 4 - 1).int(), out, TopkWork.allocate(4, 16384, 64, device))
    assert torch.equal(out.sort(-1).values, expected(scores, visible, 64))
    columns = module.COLUMNS[-1]
    assert ((out % columns * 16384 + out // columns).diff(dim=-1) > 0).all()


def test_long_rows_of_few_numbers(device: torch.device, seed: int) -> None:
    scores = torch.full((2, 9000), float("-inf"), device=device)
    scores[:, 100:8000:200] = normal(seed, device, 2, 40)
    visible = torch.tensor([9000, 8999], device=device)
    assert torch.equal(choose(scores, visible, 64), expected(scores, visible, 64))


def test_nan_ranks_last_in_long_rows(device: torch.device, seed: int) -> None:
    scores = normal(seed, device, 1, 6000)
    scores[0, ::7] = float("nan")
    visible = torch.tensor([6000], device=device)
    least_first = torch.where(scores.isnan(), float("-inf"), scores)
    assert torch.equal(choose(scores, visible, 64), expected(least_first, visible, 64))


def test_a_row_does_not_depend_on_its_batch(device: torch.device, seed: int) -> None:
    scores = normal(seed, device, 40, 512)
    visible = torch.full((40,), 500, device=device)
    alone = choose(scores[:1], visible[:1], 64)
    for count in (2, 7, 40):
        assert torch.equal(choose(scores[:count], visible[:count], 64)[:1], alone)


@pytest.mark.parametrize("kind", ["many ties", "all equal", "outliers"])
def test_few_and_many_tokens_choose_in_the_order_of_scores(kind: str, device: torch.device, seed: int) -> None:
    """By programs that count together, and by one that searches; ties go to the lower entry."""
    k, visible = 16, torch.tensor([2048, 17, 1024, 1025, 100, 16, 600, 16, 31], device=device)
    scores = KINDS[kind](normal(seed, device, len(visible), 2048))

    def run(rows: slice) -> Tensor:
        out = torch.full((len(visible[rows]), k), -7, dtype=torch.int32, device=device)
        positions = (visible[rows] * 4 - 1).int()
        select_topk(scores[rows], positions, out, TopkWork.allocate(len(out), 2048, k, device))
        return out

    many = run(slice(None))
    for row, (count, chosen) in enumerate(zip(visible.tolist(), many, strict=True)):
        if count > k:
            order = scores[row, :count].sort(descending=True, stable=True).indices[:k]
            assert torch.equal(chosen.long(), order)
    assert torch.equal(torch.cat((run(slice(0, 5)), run(slice(5, 9)))), many)


def test_an_order_in_prefill_does_not_depend_on_the_longest_context(device: torch.device, seed: int) -> None:
    """Tables are as wide as the step's longest context, and programs differ with them."""
    visible = torch.tensor([100, 700, 1025, 2000], device=device)
    scores, found = normal(seed, device, 4, 16384).round(decimals=1), []
    for columns in (2048, 4096, 16384):
        out = torch.full((4, 64), -7, dtype=torch.int32, device=device)
        work = TopkWork.allocate(4, columns, 64, device)
        select_topk(scores[:, :columns].contiguous(), (visible * 4 - 1).int(), out, work, ranked=False)
        found.append(out)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(found[0].sort(-1).values, expected(scores, visible, 64))


def test_no_tokens(device: torch.device) -> None:
    scores, positions = torch.zeros(2, 128, device=device), torch.full((2,), 99, dtype=torch.int32, device=device)
    selected = torch.full((2, 16), 7, dtype=torch.int32, device=device)
    select_topk(scores[:0], positions[:0], selected[:0], TopkWork.allocate(2, 128, 16, device))
    assert (selected == 7).all()


def test_sizes_without_a_kernel_are_refused(device: torch.device) -> None:
    with pytest.raises(ValueError, match="no top-k kernel"):
        TopkWork.allocate(1, 4096, 2048, device)
    assert TopkWork.allocate(1, 1 << 18, 1024, device).capacity(1 << 18) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("k", [512, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_a_million_tokens_of_context(kind: str, k: int, device: torch.device, seed: int) -> None:
    scores = KINDS[kind](normal(seed, device, 5, 1 << 18))
    visible = torch.tensor([1 << 18, 200_001, 4097, 16_384, 5000], device=device)
    assert torch.equal(choose(scores, visible, k), expected(scores, visible, k))


@pytest.mark.gpu
def test_scores_beyond_two_gib(device: torch.device, seed: int) -> None:
    tokens, columns = 2200, 1 << 18
    scores = torch.zeros(tokens, columns, device=device)
    scores[-1] = normal(seed, device, columns)
    positions = torch.full((tokens,), -1, dtype=torch.int32, device=device)
    positions[-1] = 4 * columns - 1
    out = torch.empty(tokens, 512, dtype=torch.int32, device=device)
    select_topk(scores, positions, out, TopkWork.allocate(tokens, columns, 512, device))
    visible = torch.tensor([columns], device=device)
    assert torch.equal(out[-1:].sort(-1).values, expected(scores[-1:], visible, 512))
