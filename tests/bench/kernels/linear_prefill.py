"""Prefill's linear layers at V4-Flash shapes. `python -m tests.bench.kernels.linear_prefill [--tokens 8192] [--sweep]`

Floor: 2 T N K operations at the rate of the tensor cores. An H200 runs bf16 at about 790 TFLOP/s (cuBLAS, random
data) and FP8 at up to twice that; 15,000 tokens a second of the whole model leave about 456 ms of 8,192 tokens for
linears and experts, 458 TFLOP/s on average.
Prediction: FP8 tiles of 128 x 128 spend 512 cycles of tensor cores per 128 columns and about 200 of fp32 promotion that
do not overlap: about 900 TFLOP/s.
Result (H200, 2026-11-21, 8,192 tokens, TFLOP/s): with 128 x 128 tiles 675 (K = 1024, where 671 MB of output count) to
960; smaller tiles of 64 x 128, of which three share a multiprocessor, overlap promotion and products: 937 and 1,000.
The input's quantisation takes 8 to 60 us more. The same products as bf16 with expanded weights: 680 to 811 (cuBLAS 754
to 824), so FP8 x FP8 stayed. bf16 with fp32 output 657 to 729, wo_a with its expansion (29 us) 767.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.kernels import linear_prefill, tiles
from workers.kernels.linear_decode import Weight
from workers.kernels.linear_prefill import PrefillWork
from workers.kernels.quantise_rows import quantise_rows
from workers.kernels.tiles import Tile

FP8_SHAPES = {
    "x_fp8": (1536, 4096),
    "q_fp8": (40960, 1024),
    "wo_b": (4096, 8192),
    "w13": (4096, 4096),
    "w2": (4096, 2048),
}
BF16_SHAPES = {"x_bf16 C4": (2624, 4096), "x_bf16 C128": (1024, 4096), "gate": (256, 4096)}
COPIES = 3
"""Different weights per graph: a product of 8,192 tokens moves several times the L2 by itself."""

FP8_TILES = (
    Tile(m=64, n=128, warps=4, stages=3, group=16),
    Tile(m=64, n=128, warps=4, stages=3, group=8),
    Tile(m=64, n=128, warps=4, stages=3, group=32),
    Tile(m=64, n=128, warps=4, stages=2, group=16),
    Tile(m=64, n=128, warps=4, stages=4, group=16),
    Tile(m=64, n=64, warps=4, stages=3, group=16),
    Tile(m=128, n=64, warps=4, stages=3, group=16),
    Tile(m=128, n=64, warps=4, stages=2, group=8),
    Tile(m=128, n=128, warps=8, stages=4, group=8),
)
BF16_TILES = (
    Tile(m=128, n=256, k=64, warps=8, stages=4, group=8),
    Tile(m=128, n=256, k=64, warps=8, stages=3, group=8),
    Tile(m=256, n=128, k=64, warps=8, stages=3, group=8),
    Tile(m=128, n=128, k=64, warps=8, stages=4, group=8),
    Tile(m=128, n=128, k=64, warps=4, stages=4, group=8),
    Tile(m=128, n=128, k=64, warps=4, stages=3, group=8),
    Tile(m=128, n=64, k=64, warps=4, stages=4, group=8),
)


def random_weight(rows: int, columns: int) -> Weight:
    """An FP8 weight of random codes (no NaN) and scales around 2**-10."""
    codes = torch.randint(0, 0x70, (rows, columns), dtype=torch.uint8, device="cuda")
    codes |= torch.randint(0, 2, (rows, columns), dtype=torch.uint8, device="cuda") << 7
    exponent = torch.randint(-12, -8, (rows // 128, columns // 128), device="cuda")
    return Weight(codes.view(torch.float8_e4m3fn), 2.0**exponent)


def use(kernel: str, tile: Tile) -> None:
    """Make `tile` the choice for this device."""
    tiles.TILES[kernel][tiles.architecture("cuda")] = tile
    tiles.tile_for.cache_clear()


def fp8_rows(tokens: int, shapes: dict[str, tuple[int, int]], note: str = "", whole: bool = True) -> list[Row]:
    """Products alone and, with `whole`, with the quantisation of their input."""
    found = []
    for name, (rows, columns) in shapes.items():
        weights = [random_weight(rows, columns) for _ in range(COPIES)]
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
        work = PrefillWork.empty(tokens, columns=columns, weight_elements=rows * columns, inner=0, device="cuda")
        codes = quantise_rows(x, work.rows)
        assert codes is not None
        flops, size = 2.0 * tokens * rows * columns, rows * columns + tokens * (2 * rows + columns)
        products = [partial(linear_prefill.fp8_product, codes, w, out) for w in weights]
        found.append(Row(f"{name} product", _ms(products), size, flops, note))
        if whole:
            linears = [partial(linear_prefill.linear, x, w, out, work=work) for w in weights]
            found.append(Row(f"{name} with quantisation", _ms(linears), size + 2 * tokens * columns, flops, note))
    return found


def bf16_rows(tokens: int, shapes: dict[str, tuple[int, int]], note: str = "") -> list[Row]:
    """bf16 products with fp32 output."""
    found = []
    for name, (rows, columns) in shapes.items():
        weights = [torch.randn(rows, columns, device="cuda").bfloat16() for _ in range(COPIES)]
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        out = torch.empty(tokens, rows, device="cuda")
        ms = _ms([partial(linear_prefill.bf16_product, x, w, out) for w in weights])
        size = 2 * rows * columns + tokens * (4 * rows + 2 * columns)
        found.append(Row(name, ms, size, 2.0 * tokens * rows * columns, note))
    return found


def grouped_rows(tokens: int, note: str = "") -> list[Row]:
    """wo_a with its expansion to bf16, and wo_b as the same bf16 product (the alternative to FP8 x FP8)."""
    weights = [random_weight(8192, 4096) for _ in range(COPIES)]
    x = torch.randn(tokens, 8, 4096, device="cuda").bfloat16()
    out = torch.empty(tokens, 8192, dtype=torch.bfloat16, device="cuda")
    work = PrefillWork.empty(tokens, columns=128, weight_elements=8192 * 4096, inner=0, device="cuda")
    size, flops = 8192 * 4096 + tokens * 2 * (8192 + 32768), 2.0 * tokens * 8192 * 4096
    calls = [partial(linear_prefill.grouped_linear, x, w, out, work=work) for w in weights]
    found = [Row("wo_a grouped, with expansion", _ms(calls), size, flops, note)]
    calls = [partial(linear_prefill.expand, w, work) for w in weights]
    found.append(Row("expansion of wo_a", _ms(calls), 3 * 8192 * 4096, 0, note))
    return found


def bf16_alternative(tokens: int) -> list[Row]:
    """The FP8 linears through expanded bf16 weights, product only, and cuBLAS on the same operands."""
    found = []
    for name, (rows, columns) in FP8_SHAPES.items():
        weight = torch.randn(rows, columns, device="cuda").bfloat16()
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        out = torch.empty(tokens, rows, dtype=torch.bfloat16, device="cuda")
        size, flops = 2 * rows * columns + 2 * tokens * (rows + columns), 2.0 * tokens * rows * columns
        calls = [partial(linear_prefill.bf16_product, x, weight, out)] * COPIES
        found.append(Row(f"{name} as bf16", _ms(calls), size, flops))
        calls = [partial(torch.matmul, x, weight.T, out=out)] * COPIES
        found.append(Row(f"{name} as bf16, cuBLAS", _ms(calls), size, flops))
    return found


def _ms(calls: Sequence[Callable[[], object]]) -> float:
    return graph_ms(calls, replays=5)


def _describe(tile: Tile) -> str:
    return f"m{tile.m} n{tile.n} k{tile.k} w{tile.warps} s{tile.stages} g{tile.group} r{tile.registers}"


def sweep(tokens: int) -> list[Row]:
    """Every tile of the lists above on two shapes each; a tile that does not fit is skipped."""
    found: list[Row] = []
    shapes = {name: FP8_SHAPES[name] for name in ("q_fp8", "wo_b")}
    for tile in FP8_TILES:
        use("linear_prefill.fp8_product", tile)
        found += _tried(partial(fp8_rows, tokens, shapes, _describe(tile), whole=False), tile)
    for tile in BF16_TILES:
        use("linear_prefill.bf16_wide", tile)
        found += _tried(partial(bf16_rows, tokens, {"x_bf16 C4": BF16_SHAPES["x_bf16 C4"]}, _describe(tile)), tile)
        found += _tried(partial(grouped_rows, tokens, _describe(tile)), tile)[:1]
        use("linear_prefill.bf16_narrow", tile)
        found += _tried(partial(bf16_rows, tokens, {"gate": BF16_SHAPES["gate"]}, _describe(tile)), tile)
    return found


def _tried(measure: Callable[[], list[Row]], tile: Tile) -> list[Row]:
    try:
        return measure()
    except Exception as error:  # out of registers or shared memory: several kinds
        print(f"{_describe(tile)}: {type(error).__name__}: {str(error)[:120]}")
        return []


def passes(tokens: int) -> list[Row]:
    """The memory-bound passes."""
    x = torch.randn(tokens, 4096, device="cuda").bfloat16()
    rounded: Tensor = torch.empty_like(x)
    work = PrefillWork.empty(tokens, columns=4096, weight_elements=0, inner=0, device="cuda")
    size = x.numel()
    return [
        Row("quantise_rows D", _ms([lambda: quantise_rows(x, work.rows)] * 4), 3 * size),
        Row("quantise_rows D, both", _ms([lambda: quantise_rows(x, work.rows, rounded, reorder=True)] * 4), 5 * size),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--sweep", action="store_true", help="other tiles instead of the table's")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.sweep:
        report(sweep(options.tokens), copy_bandwidth())
        return
    rows = fp8_rows(options.tokens, FP8_SHAPES) + bf16_rows(options.tokens, BF16_SHAPES)
    rows += grouped_rows(options.tokens) + passes(options.tokens) + bf16_alternative(options.tokens)
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
