"""Prefill's routed experts of V4-Flash. `python -m tests.bench.kernels.experts_prefill [--tokens 8192] [--sweep]`

Floor: 6 experts x 3 x 2 D I operations per token at the bf16 rate of the tensor cores (about 790 TFLOP/s on an H200);
the form of sm_90 multiplies e4m3 codes, for which they are twice as fast, so it may end sooner. With 256 experts 8,192
tokens are 192 pairs an expert: whole tiles of 128 and half ones of 64 compute about 1.17 times the pairs.
Prediction: 446 instructions of a warp and 512 cycles of tensor cores for 128 rows, columns and pairs; two programs a
multiprocessor that overlap would take 1.2 ms for the first product, the FP8 linears' 940 TFLOP/s 2.0 ms.

Result (H200, 2026-11-21, 8,192 tokens): first product 2,645 us (624 TFLOP/s of real pairs), second 1,366 (604), inputs
to their places 80, rounding between 77; skewed routing 2,599 and 1,341; 1,024 tokens 935 and 484. The plain form takes
3,625 and 1,702, at 1,024 tokens 1,523 and 764. Rows of the two differ by at most 2.4e-3 and 1.0e-3 of their size (bf16
outputs of FP8 sums). What the rest of the time is: without unpacking 2,329 of 2,619, without the copies in the loop
2,326. Slower: activations by asynchronous copies of 16 bytes from the tokens' rows 2,894 and 1,453; the product of
64 rows in two halves of 64 pairs, so that one is added while the other runs, 2,982 and 1,583 (it spills); 64 rows and
168 registers a program, three a multiprocessor, 2,903 and 1,582 (by ncu L2 69 % busy, tensor cores 37 %, issue slots
47 %), with two stages 2,877 and 1,560. One box of 128 inputs instead of two of 64: no difference.

The plain form (TFLOP/s of real pairs): 397 / 435 / 472 at 4,096 / 8,192 / 16,384 tokens, 426 with skewed routing. Four
products of 32 columns each with a wait between them instead of one of 128: 428; copies of the activations by TMA:
slower (1,743 to 1,942 us for the second product, 1,687 as it is); blocks of 256 weight rows and 8 warps: 413; 256
tokens: 348; tiles of 64 tokens alone: 357. By ncu neither memory nor tensor cores are full (L2 51 %, issue slots 38
%): a sixth of the time waits for the addresses of the copies of activations, one for each 16 bytes of a thread. FP8
products whose weights go through shared memory: first product 4.65 ms, second 2.3 to 3.4.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tests.bench.kernels.linear_prefill import _describe, _ms, _tried, use
from tests.bench.kernels.timing import Row, copy_bandwidth, report
from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels import experts_prefill, experts_prefill_sm90
from workers.kernels.quantise_rows import quantise_in_place, quantise_pairs, round_in_place
from workers.kernels.tiles import Tile, tile

WIDE, INNER, EXPERTS, CHOICES = 4096, 2048, 256, 6

TILES = (
    Tile(m=128, n=128, k=128, warps=4, stages=3),
    Tile(m=128, n=128, k=128, warps=4, stages=2),
    Tile(m=64, n=128, k=128, warps=4, stages=3),
    Tile(m=128, n=256, k=128, warps=8, stages=3),
    Tile(m=128, n=256, k=128, warps=8, stages=4),
    Tile(m=256, n=128, k=128, warps=8, stages=2),
    Tile(m=128, n=128, k=128, warps=8, stages=3),
)


@dataclass
class Groups:
    num_active: Tensor
    active_experts: Tensor
    active_begin: Tensor
    pair_order: Tensor


def routing(tokens: int, skew: float) -> Tensor:
    """Expert ids `[T, k]`: uniform, or with `skew` some experts many times as popular as others."""
    popularity = -skew * torch.arange(1, EXPERTS + 1, device="cuda").float().log()
    gumbel = -torch.empty(tokens, EXPERTS, device="cuda").exponential_().log()
    return (popularity[torch.randperm(EXPERTS, device="cuda")] + gumbel).topk(CHOICES).indices


def group(ids: Tensor) -> Groups:
    """Pairs by expert, as `routing.route` writes them."""
    active, counts = ids.flatten().unique(return_counts=True)
    experts = torch.zeros(EXPERTS, dtype=torch.int32, device="cuda")
    experts[: len(active)] = active
    begin = torch.zeros(EXPERTS + 1, dtype=torch.int32, device="cuda")
    begin[1 : len(active) + 1] = counts.cumsum(0)
    order = ids.flatten().argsort(stable=True).int()
    return Groups(torch.tensor([len(active)], dtype=torch.int32, device="cuda"), experts, begin, order)


def random_slab() -> ExpertSlab:
    """A layer's experts: random codes, scales around 2**-8."""
    layout = ExpertShape(WIDE, INNER)
    base = torch.randint(0, 256, (EXPERTS, layout.expert_bytes), dtype=torch.uint8, device="cuda")
    base[:, 3 * layout.codes_bytes :] = 116 + (base[:, 3 * layout.codes_bytes :] & 3)
    return ExpertSlab(base.flatten(), torch.arange(EXPERTS, dtype=torch.int32, device="cuda"))


def rows_for(
    tokens: int, slab: ExpertSlab, skew: float, note: str = "", *, parts: bool = True, plain: bool = False
) -> list[Row]:
    """Both products, and the whole mixture without the shared expert. `plain`: the form of other GPUs than sm_90."""
    groups = group(routing(tokens, skew))
    x = torch.randn(tokens, WIDE, device="cuda").bfloat16()
    weights = torch.rand(tokens, CHOICES, device="cuda")
    hidden = torch.zeros(tokens, CHOICES, INNER, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(tokens, CHOICES + 1, WIDE, dtype=torch.bfloat16, device="cuda")
    words = experts_prefill.tile_words(tokens * CHOICES, EXPERTS, "cuda")
    tiles = torch.zeros(words, dtype=torch.int32, device="cuda")
    flops = 2.0 * tokens * CHOICES * WIDE * INNER
    size = EXPERTS * WIDE * INNER * 17 // 32
    pairs = tokens * CHOICES
    explicit = experts_prefill.rounds_inputs(x.device, WIDE, INNER) and not plain
    most = experts_prefill.max_tiles(pairs, EXPERTS, tile("experts_prefill.experts").m)
    rows, room = hidden.view(pairs, INNER), out.view(-1).view(torch.uint8)
    inputs = quantise_pairs(x, groups.pair_order, tiles[1:2], CHOICES, room)

    def listing() -> None:
        experts_prefill.list_tiles(groups, hidden, tiles, slab)

    def before() -> None:
        if explicit:
            quantise_pairs(x, groups.pair_order, tiles[1:2], CHOICES, room)

    def first() -> None:
        if explicit:
            experts_prefill_sm90.gate_up(*inputs, weights, groups, slab, hidden, tiles, most, 10.0)
        else:
            experts_prefill.gate_up(x, weights, groups, slab, hidden, tiles, 10.0)

    def between() -> None:
        (quantise_in_place if explicit else round_in_place)(rows, tiles[1:2])

    def second() -> None:
        if explicit:
            experts_prefill_sm90.down(hidden, groups, slab, out, tiles, most)
        else:
            experts_prefill.down(hidden, groups, slab, out, tiles)

    def everything() -> None:
        for part in (listing, before, first, between, second):
            part()

    name = f"T={tokens} skew {skew:g}{' plain' * plain}"
    whole = Row(f"{name} experts", _ms([everything] * 2), 3 * size + pairs * 2 * (3 * INNER + WIDE), 3 * flops, note)
    if not parts:
        return [whole]
    return [
        Row(f"{name} tile list", _ms([listing] * 4), 4.0 * words),
        *([Row(f"{name} inputs", _ms([before] * 2), tokens * 2 * WIDE + pairs * WIDE, 0, note)] if explicit else []),
        Row(f"{name} gate_up", _ms([first] * 2), 2 * size + pairs * 2 * INNER, 2 * flops, note),
        Row(f"{name} rounding", _ms([between] * 2), pairs * (3 if explicit else 4) * INNER, 0, note),
        Row(f"{name} down", _ms([second] * 2), size + pairs * 2 * (INNER + WIDE), flops, note),
        whole,
    ]


def sweep(tokens: int, slab: ExpertSlab) -> list[Row]:
    found: list[Row] = []
    for shape in TILES:
        use("experts_prefill.experts", shape)
        found += [
            row
            for row in _tried(partial(rows_for, tokens, slab, 0.0, _describe(shape), plain=True), shape)
            if row.flops
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sweep", action="store_true", help="the plain form with other tiles than the table's")
    options = parser.parse_args()
    torch.manual_seed(0)
    slab = random_slab()
    if options.sweep:
        report(sweep(options.tokens, slab), copy_bandwidth())
        return
    rows = rows_for(options.tokens, slab, 0.0) + rows_for(options.tokens, slab, 1.0)
    rows += rows_for(options.tokens, slab, 0.0, plain=True)
    for tokens in (1024, 4096, 16384):
        rows += rows_for(tokens, slab, 0.0, parts=False)
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
