"""Index scores and the selection, decode and prefill, against `workers/reference` over shuffled, poisoned pages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvstore.pools.pool import Pool
from kvstore.spec import PoolName, build_kv_spec
from tests.support.triton_interpreter import allow_loaded_bounds
from workers.kernels import indexer as module
from workers.kernels.indexer import IndexWork, index_scores, select_entries
from workers.reference import kv_format
from workers.reference.indexer import hadamard
from workers.reference.indexer import index_scores as reference_scores
from workers.reference.indexer import select_topk as reference_topk
from workers.reference.norm_rope import apply_rope
from workers.reference.quant import indexer_fp8_fake_quant

allow_loaded_bounds()

ROPE, DI = 64, 128
BOUND = 2e-3
"""Of the largest score: fp32 sums in another order, and now and then a query code on the other side of a tie."""


@dataclass
class Meta:
    """Step metadata of the kernels."""

    positions: Tensor
    sequence_of_token: Tensor
    full_pages: Tensor
    slots: Tensor
    start: Tensor
    cu_starts: Tensor

    def rows(self, rows: slice) -> Meta:
        """A part of the tokens, as a step walks a chunk in blocks; of decode, where token b is sequence b's, too."""
        pages = self.full_pages[rows] if len(self.full_pages) == len(self.positions) else self.full_pages
        other = (self.slots, self.start, self.cu_starts)
        return Meta(self.positions[rows], self.sequence_of_token[rows], pages, *other)


class Case:
    """Keys of some sequences in a poisoned pool, and the queries of tokens of them. counts: tokens per sequence."""

    def __init__(
        self, device: torch.device, seed: int, *, heads: int, lengths: list[int], counts: list[int] | None = None
    ) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.device, self.heads = device, heads
        counts = counts or [1] * len(lengths)
        pages = [-(-n // 256) for n in lengths]
        num_pages = sum(pages) + 3
        order = torch.randperm(num_pages, generator=self.random).tolist()
        spec = build_kv_spec([4], head_dim=128, rope_dim=ROPE, index_head_dim=DI, window=128, fmt="fp8")
        self.pool = Pool(spec.pool(PoolName.C4_INDEXER), num_pages, device)
        self.pool.data.fill_(0xFF)
        tables = torch.full((len(lengths), max(pages) + 1), -1, dtype=torch.int32)
        self.keys = []
        for b, length in enumerate(lengths):
            mine = torch.tensor([order.pop() for _ in range(pages[b])])
            tables[b, : len(mine)] = mine
            stored = kv_format.pack_indexer_fp8(2 * self.normal(length // 4, DI))
            row = torch.arange(length // 4)
            self.pool.write_rows(0, (mine[row // 64] * 64 + row % 64).to(device), stored)
            self.keys.append(kv_format.unpack_indexer_fp8(stored, DI))
        positions = [torch.arange(n - c, n) for n, c in zip(lengths, counts, strict=True)]
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(counts))
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        ints = [torch.cat(positions), sequences, tables]
        self.meta = Meta(*(x.to(torch.int32).to(device) for x in ints), zero, zero, zero)
        tokens = sum(counts)
        self.wide_q = self.normal(tokens, 256 + heads * DI).to(torch.bfloat16)
        self.wide_weights = self.normal(tokens, 32 + heads)
        angles = torch.rand(max(lengths), ROPE // 2, generator=self.random) * 6.28
        self.rope = torch.cat((angles.cos(), angles.sin()), -1).to(device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device)

    @property
    def q(self) -> Tensor:
        return self.wide_q[:, 256:]

    @property
    def weights(self) -> Tensor:
        return self.wide_weights[:, 32:]

    def expected_scores(self, token: int) -> Tensor:
        """fp32 [visible] of one token."""
        position = int(self.meta.positions[token])
        keys = self.keys[int(self.meta.sequence_of_token[token])][: (position + 1) // 4]
        cos, sin = self.rope[position].chunk(2)
        q = apply_rope(self.q[token].float().view(self.heads, DI), cos, sin).bfloat16().float()
        q = indexer_fp8_fake_quant(hadamard(q))
        return reference_scores(q[None], self.weights[token][None] * (DI * self.heads) ** -0.5, keys)[0]

    def scores(self, rows: slice = slice(None)) -> Tensor:
        """The decode kernel's, over a poisoned buffer."""
        meta = self.meta.rows(rows)
        columns = self.meta.full_pages.shape[1] * 64
        scores = torch.full((len(meta.positions), columns), -7e7, device=self.device)
        index_scores(self.q[rows], self.weights[rows], meta, self.rope, self.pool.data[0], scores)
        return scores

    def select(
        self, mode: str, k: int, rows: slice = slice(None), *, score_bytes: int = 1 << 20
    ) -> tuple[Tensor, Tensor]:
        """The selection [T, K], and the scores of the last block of tokens."""
        meta = self.meta.rows(rows) if mode == "decode" else self.meta
        q, weights = self.q[rows], self.weights[rows]
        columns = self.meta.full_pages.shape[1] * 64
        prefill = mode == "prefill"
        work = IndexWork.allocate(len(q), columns, k, self.heads, self.device, prefill=prefill, score_bytes=score_bytes)
        work.scores.fill_(-7e7)
        out = torch.full((len(q), k), 0x7EADBEEF, dtype=torch.int32, device=self.device)
        select_entries(q, weights, meta, self.rope, self.pool.data[0], out, work, mode=mode)
        return out, work.scores

    def check_choice(self, selected: Tensor) -> None:
        """Each token's set is a best one by the reference's scores, up to `BOUND`."""
        for token, row in enumerate(selected):
            scores = self.expected_scores(token)
            chosen = row[row >= 0].long()
            count = min(len(scores), len(row))
            assert len(chosen) == count and torch.equal(row[count:], row.new_full((len(row) - count,), -1))
            assert len(chosen.unique()) == count
            if count == 0:
                continue
            best = reference_topk(scores[None], scores[None] == scores[None], count)[0][0]
            slack = BOUND * scores.abs().max()
            assert scores[chosen].min() >= scores[best].min() - 2 * slack


def assert_scores(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=BOUND * float(expected.abs().max()))


@pytest.mark.parametrize(("heads", "lengths"), [(4, [3, 4, 259, 700, 1030]), (64, [600])])
def test_decode_scores_are_the_reference_of_visible_entries_only(
    heads: int, lengths: list[int], device: torch.device, seed: int
) -> None:
    case = Case(device, seed, heads=heads, lengths=lengths)
    scores = case.scores()
    for token, length in enumerate(lengths):
        if length >= 4:
            assert_scores(scores[token, : length // 4], case.expected_scores(token))
        assert (scores[token, length // 4 :] == -7e7).all()


@pytest.mark.parametrize("count", [2, 5])
def test_a_tokens_scores_do_not_depend_on_its_batch(count: int, device: torch.device, seed: int) -> None:
    """Nor on how many programs share its pages, which differs with the batch; others hold NaN and padding."""
    case = Case(device, seed, heads=4, lengths=[900, 500, 40, 8, 300])
    alone = case.scores(slice(0, 1))
    case.wide_q[1:] = 0 if device.type == "cpu" else float("nan")
    case.meta.positions[-1] = -1
    assert torch.equal(case.scores(slice(0, count))[0], alone[0])


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_scores_do_not_depend_on_the_number_of_programs(
    splits: int, monkeypatch: pytest.MonkeyPatch, device: torch.device, seed: int
) -> None:
    case = Case(device, seed, heads=4, lengths=[1800])
    expected = case.scores()
    monkeypatch.setattr(module, "num_sms", lambda device: splits)
    monkeypatch.setattr(module, "PROGRAMS_PER_SM", ((1 << 30, 1),))
    assert torch.equal(case.scores(), expected)


@pytest.mark.gpu
def test_many_tokens_score_as_few_do(device: torch.device, seed: int) -> None:
    """On sm_90 they have launches of their own: one page, a page begun, more pages than a program has slots."""
    case = Case(device, seed, heads=64, lengths=[3, 4, 256, 257, 1030, 9000, 40_000, 8, 512, 20_001, 700, 65_536])
    case.meta.positions[7] = -1
    few = torch.cat([case.scores(slice(i, i + 4)) for i in range(0, 12, 4)])
    selected, flat = case.select("decode", 64)
    columns = -(-few.shape[1] // module.PREFILL_ENTRIES) * module.PREFILL_ENTRIES
    assert torch.equal(flat.view(12, columns)[:, : few.shape[1]], few)
    parts = [case.select("decode", 64, slice(i, i + 4))[0] for i in range(0, 12, 4)]
    assert torch.equal(selected, torch.cat(parts))


def test_decode_selects_as_the_reference_does(device: torch.device, seed: int) -> None:
    case = Case(device, seed, heads=4, lengths=[1, 60, 259, 700, 1030])
    selected, _ = case.select("decode", 32)
    case.check_choice(selected)


@pytest.mark.parametrize("score_bytes", [1, 1 << 20])
def test_prefill_selects_as_the_reference_does(score_bytes: int, device: torch.device, seed: int) -> None:
    """Several sequences in a chunk, some from the start; blocks of one token and of all."""
    case = Case(device, seed, heads=4, lengths=[7, 300, 2, 700, 33], counts=[5, 6, 2, 3, 4])
    selected, scores = case.select("prefill", 32, score_bytes=score_bytes)
    case.check_choice(selected)
    if score_bytes > 1:
        columns = case.meta.full_pages.shape[1] * 64
        columns = -(-columns // module.PREFILL_ENTRIES) * module.PREFILL_ENTRIES
        rows = scores[: len(selected) * columns].view(len(selected), columns)
        for token, position in enumerate(case.meta.positions.tolist()):
            count = (position + 1) // 4
            if count:
                assert_scores(rows[token, :count], case.expected_scores(token))
            assert (rows[token, count:] == -7e7).all()


def test_prefill_in_blocks_equals_prefill_at_once(device: torch.device, seed: int) -> None:
    case = Case(device, seed, heads=4, lengths=[300, 260], counts=[11, 9])
    assert torch.equal(case.select("prefill", 16, score_bytes=8 << 10)[0], case.select("prefill", 16)[0])


def test_prefill_of_flash_heads(device: torch.device, seed: int) -> None:
    case = Case(device, seed, heads=64, lengths=[300], counts=[5])
    case.check_choice(case.select("prefill", 16)[0])


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_no_tokens_and_padding(mode: str, device: torch.device, seed: int) -> None:
    case = Case(device, seed, heads=4, lengths=[300, 8])
    assert case.select(mode, 16, slice(0, 0))[0].shape == (0, 16)
    case.meta.positions.fill_(-1)
    assert (case.select(mode, 16)[0] == -1).all()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_long_contexts_in_pools_beyond_two_gib(mode: str, device: torch.device, seed: int) -> None:
    counts = [1, 1] if mode == "decode" else [40, 90]
    case = Case(device, seed, heads=64, lengths=[70_001, 9000], counts=counts)
    units = (5 << 30) // case.pool.spec.unit_stride_bytes
    large = Pool(case.pool.spec, units, device)
    far = units - case.pool.num_units
    large.data[0, far:] = case.pool.data[0]
    case.meta.full_pages += far * (case.meta.full_pages >= 0)
    case.pool = large
    case.check_choice(case.select(mode, 512, score_bytes=8 << 20)[0])
