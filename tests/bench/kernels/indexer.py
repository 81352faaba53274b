"""Indexer of a C4 layer at V4-Flash shapes: scores and top-k. `python -m tests.bench.kernels.indexer`

Floor of decode scores: every visible key is read once, 132 bytes each, at copy bandwidth. At batch 1 that is 0.03 us
at 4K tokens of context and 0.5 us at 64K: a launch takes longer, so the share means something from many sequences or a
very long context on. Floor of prefill scores: 2 * 64 * 128 FLOP for each (token, visible entry) at the dense f16 rate.
Top-k has no floor but its launch: it reads 4 bytes an entry.

Result (H200, 2026-11-22, PDL, us): batch 1 scores 3.7 / 4.9 at 4K / 64K, both 7.0 in the model at 4K, 17.5 at 64K.
Batch 64 scores 8.4 at 4K, 16.7 at 16K, 42.3 to 45.0 at 64K (73 to 78 % of the floor; 78.5 in plain Triton), both 16.9,
25.6 and 61.6. Behind the scores the choice of 512 among 16,384 takes 16.6, on 64 of 132 multiprocessors. Four programs
of 4,096 scores a token, the last of which chooses from what the others leave, take 27. Scores that signal first of all,
so that the choice may come early: 68 to 81 together; with 3 programs a multiprocessor, which leave it room, 72 to 79.
Choosing by bins that the scores' launch counts takes 17 us and makes that launch 22 slower.
Prefill of 8,192 tokens: queries and scores 240 (scores alone 183, half of what FP8 products could do; 425 with f16 in
plain Triton, 288 with f16 in this form), top-k 74 (171 with 8 warps). A second product on its way while the first is
summed up is slower (218), as are more slots (222) and programs of 8 warps (236).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, num_copies, report
from workers.kernels import indexer
from workers.kernels.indexer import IndexWork, decode_scores, select_entries
from workers.kernels.topk import select_topk

HEADS, DI, RD, K = 64, 128, 64, 512
PAGE_BYTES, ENTRY_BYTES = 8448, 132
MAX_COPIES = 400
"""Layers of one graph: with short contexts their keys fit L2 all the same, as a model's would not."""


class Layer:
    """One layer's keys of `batch` sequences of `context` tokens, and queries of `tokens` of them (all of one chunk)."""

    def __init__(self, seed: int, batch: int, context: int, tokens: int | None = None) -> None:
        random = torch.Generator("cuda").manual_seed(seed)
        pages = -(-context // 256)
        self.pool = torch.randint(
            0, 120, (batch * pages + 1, PAGE_BYTES), dtype=torch.uint8, device="cuda", generator=random
        )
        self.pool.view(torch.float32)[:, 2048:] = torch.rand(
            self.pool.shape[0], 64, device="cuda", generator=random
        ).add_(0.5)
        count = batch if tokens is None else tokens
        self.q = torch.randn(count, HEADS * DI, device="cuda", generator=random).bfloat16()
        self.weights = torch.randn(count, HEADS, device="cuda", generator=random)
        self.selected = torch.empty(count, K, dtype=torch.int32, device="cuda")


def metadata(batch: int, context: int, tokens: int | None = None) -> SimpleNamespace:
    """Decode: the last token of each sequence. Prefill: the last `tokens` of one sequence."""
    pages = -(-context // 256)
    table = torch.randperm(batch * pages).view(batch, pages).int().cuda()
    if tokens is None:
        positions = torch.full((batch,), context - 1, dtype=torch.int32, device="cuda")
        return SimpleNamespace(positions=positions, full_pages=table)
    positions = torch.arange(context - tokens, context, dtype=torch.int32, device="cuda")
    return SimpleNamespace(positions=positions, full_pages=table, sequence_of_token=torch.zeros_like(positions))


def rope_table(context: int) -> Tensor:
    """fp32 [context, RD]: any angles."""
    angles = torch.rand(context, RD // 2, device="cuda")
    return torch.cat((angles.cos(), angles.sin()), -1)


def decode_rows(batch: int, context: int) -> Iterator[Row]:
    """Scores, top-k, and both."""
    num_bytes = batch * (context // 4) * ENTRY_BYTES
    layers = [Layer(i, batch, context) for i in range(min(MAX_COPIES, num_copies(num_bytes)))]
    meta, rope = metadata(batch, context), rope_table(context)
    columns = meta.full_pages.shape[1] * 64
    work = IndexWork.allocate(batch, columns, K, HEADS, "cuda")
    scores = work.scores[: batch * columns].view(batch, columns)

    def score(layer: Layer) -> Callable[[], None]:
        return lambda: decode_scores(layer.q, layer.weights, meta, rope, layer.pool, scores, work)

    def choose(layer: Layer) -> Callable[[], None]:
        return lambda: select_topk(scores, meta.positions, layer.selected, work.topk)

    name = f"batch {batch}, context {context >> 10}K"
    flops = 2 * HEADS * DI * batch * (context // 4)
    yield Row(f"decode scores, {name}", graph_ms([score(layer) for layer in layers]), num_bytes, flops)
    yield Row(f"decode top-k, {name}", graph_ms([choose(layer) for layer in layers]), 4 * batch * (context // 4))
    both = [call(layer) for layer in layers for call in (score, choose)]
    yield Row(f"decode scores + top-k, {name}", 2 * graph_ms(both), num_bytes, flops)


def prefill_rows(tokens: int, context: int) -> Iterator[Row]:
    """A chunk of one sequence that ends at `context`."""
    layers = [Layer(i, 1, context, tokens) for i in range(2)]
    meta, rope = metadata(1, context, tokens), rope_table(context)
    columns = meta.full_pages.shape[1] * 64
    work = IndexWork.allocate(tokens, columns, K, HEADS, "cuda", prefill=True)
    visible = float(((meta.positions + 1) // 4).sum())
    flops = 2 * HEADS * DI * visible

    def whole(layer: Layer) -> Callable[[], None]:
        inputs = (layer.q, layer.weights, meta, rope, layer.pool, layer.selected, work)
        return lambda: select_entries(*inputs, mode="prefill")

    name = f"{tokens} tokens to {context >> 10}K"
    num_bytes = tokens * (HEADS * DI * 2 + K * 4) + context // 4 * ENTRY_BYTES
    yield Row(f"prefill select, {name}", graph_ms([whole(x) for x in layers], replays=5), num_bytes, flops)
    block = min(tokens, work.scores.numel() // columns, work.topk.capacity(columns))
    part = slice(tokens - block, tokens)
    positions, sequences = meta.positions[part], meta.sequence_of_token[part]
    scores = work.scores[: block * columns].view(block, columns)

    def score(layer: Layer) -> Callable[[], None]:
        inputs = (layer.q[part], layer.weights[part], positions, sequences, meta.full_pages, rope, layer.pool)
        return lambda: indexer._prefill_block(*inputs, scores, work)

    def choose(layer: Layer) -> Callable[[], None]:
        return lambda: select_topk(scores, positions, layer.selected[part], work.topk, ranked=False)

    flops = 2 * HEADS * DI * float(((positions + 1) // 4).sum())
    last = f"last {block} of {name}"
    yield Row(f"prefill scores, {last}", graph_ms([score(x) for x in layers], replays=5), 0.0, flops)
    yield Row(f"prefill top-k, {last}", graph_ms([choose(x) for x in layers], replays=5), 4 * block * context // 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="batch 1 at 4K and 64K, prefill of 8K")
    quick = parser.parse_args().quick
    shapes = [(1, 1 << 10), (1, 4 << 10), (1, 16 << 10), (1, 64 << 10), (16, 4 << 10), (16, 64 << 10), (64, 4 << 10)]
    shapes += [(64, 64 << 10), (1, 1 << 20)]
    rows = [row for shape in (shapes[1:4:2] if quick else shapes) for row in decode_rows(*shape)]
    for context in (8 << 10,) if quick else (8 << 10, 64 << 10):
        rows += prefill_rows(8 << 10, context)
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
