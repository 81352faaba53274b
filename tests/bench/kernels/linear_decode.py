"""Decode linears of V4-Flash in a CUDA graph, against copy bandwidth. `python -m tests.bench.kernels.linear_decode`.

Floor: every weight byte once at the bandwidth of a device-to-device copy; activations are kilobytes. On an H200 at
4,230 GB/s: x 6.6 us (3.5 where compression is C128, 1.5 without), q 9.9 us, wo_a and wo_b 7.9 us, gate and shared
expert 4.5 us, head 250 us; together 43 layers of C4 would take 1.6 ms. Prediction: a launch costs 1-2 us of idle memory
unless it overlaps its predecessor, so 80 % needs overlap.

Result (H200, 2026-11-21, one token, alone in a graph): project_x 9.5 us (70 %), 7.0 with C128, 4.7 without compressor;
q 13.3 (75 %), wo_a 10.6 (76 %), wo_b 11.1 (72 %), gate and shared 8.6 (52 %), head 244 (103 %): only the head reaches
80 %. What is left is 2 to 3.6 us a launch whatever its size: with the weights in L2, 16.8 MB take 6.4 us and 33.5 MB
10.0. More tokens: wo_b 12.9 at 8, 20.9 at 16, 36.5 at 64; wo_a 11.4, 13.6, 53.1; gate 11.5, 10.2, 33.9: beyond 8 tokens
every program of 16 rows reads all activations, more bytes than its weights at 64. Before, a program had 16 rows and
took four blocks of 128 columns a step (wo_b 12.3 us): half of its loop rounded activations, a maximum over five
shuffles and a way through shared memory. Tried and left out: signalling the successor early
(`workers/kernels/launch.py`), prefetches to L2 by lines (+3 us) and in bulk (-0.5 to +3 us), 8 or 16 warps a program
(13-20 us), walking several tiles of K = 4096 (13.6 us); other walkers of q made no difference in the model.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, num_copies, report
from workers.kernels import linear_decode as kernels
from workers.reference.quant import fp8_fake_quant

D, HEAD_DIM, HEADS, LATENT, GROUPS, RANK, INNER, EXPERTS = 4096, 512, 64, 1024, 8, 1024, 2048, 256
INDEX_ROWS, VOCABULARY = 64 * 128, 129280
ROWS_C4 = 2 * 2 * HEAD_DIM + 2 * 2 * 128 + 64
ROWS_C128 = 2 * HEAD_DIM
LIMIT = 10.0


def fp8_weight(rows: int, columns: int) -> kernels.Weight:
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, device="cuda")
    codes[(codes & 0x7F) == 0x7F] = 0x38
    scales = torch.exp2(torch.randint(-8, -5, (rows // 128, columns // 128), device="cuda").float())
    return kernels.Weight(codes, scales)


def bf16(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda")


def row(name: str, T: int, sizes: Sequence[tuple[int, int, int]], make: Callable[[], Callable[[], None]]) -> Row:
    """Time one operation. `sizes`: (rows, columns, bytes an element) of its weights; `make` builds one copy."""
    weight_bytes = sum(n * k * width for n, k, width in sizes)
    calls = [make() for _ in range(num_copies(weight_bytes))]
    flops = 2.0 * T * sum(n * k for n, k, _ in sizes)
    return Row(f"{name} T={T}", graph_ms(calls), weight_bytes, flops)


def project(T: int, rows_bf16: int) -> Row:
    x = bf16(T, D)
    quantised = fp8_fake_quant(x, 128)

    def make() -> Callable[[], None]:
        weight, plain = fp8_weight(LATENT + HEAD_DIM, D), bf16(rows_bf16, D) if rows_bf16 else None
        out = empty(T, LATENT + HEAD_DIM)
        raw = empty(T, rows_bf16, dtype=torch.float32) if rows_bf16 else None
        return lambda: kernels.project_x(x, weight, plain, out, raw, x_quantised=quantised)

    return row(f"project_x {LATENT + HEAD_DIM}+{rows_bf16}", T, [(LATENT + HEAD_DIM, D, 1), (rows_bf16, D, 2)], make)


def linear(T: int, name: str, rows: int, columns: int) -> Row:
    x, room = bf16(T, columns), empty(T * columns)

    def make() -> Callable[[], None]:
        weight, out = fp8_weight(rows, columns), empty(T, rows)
        return lambda: kernels.linear(x, weight, out, rounded=room)

    return row(f"linear {name} {rows}x{columns}", T, [(rows, columns, 1)], make)


def grouped(T: int) -> Row:
    columns = HEADS * HEAD_DIM // GROUPS
    x = bf16(T, GROUPS, columns)

    def make() -> Callable[[], None]:
        weight, out = fp8_weight(GROUPS * RANK, columns), empty(T, GROUPS * RANK)
        return lambda: kernels.grouped_linear(x, weight, out)

    return row(f"grouped_linear wo_a {GROUPS}x{RANK}x{columns}", T, [(GROUPS * RANK, columns, 1)], make)


def gate(T: int) -> Row:
    x = bf16(T, D)
    quantised = fp8_fake_quant(x, 128)

    def make() -> Callable[[], None]:
        w13, hidden = fp8_weight(2 * INNER, D), empty(T, INNER)
        return lambda: kernels.shared_gate_up(x, w13, LIMIT, hidden, x_quantised=quantised)

    return row("shared_gate_up 2x2048", T, [(2 * INNER, D, 1)], make)


def head(T: int) -> Row:
    x = bf16(T, D)

    def make() -> Callable[[], None]:
        weight, out = bf16(VOCABULARY, D), empty(T, VOCABULARY, dtype=torch.float32)
        return lambda: kernels.head(x, weight, out)

    return row(f"head {VOCABULARY}x{D}", T, [(VOCABULARY, D, 2)], make)


OPERATIONS: dict[str, Callable[[int], Row]] = {
    "project_c4": lambda T: project(T, ROWS_C4),
    "project_c128": lambda T: project(T, ROWS_C128),
    "project": lambda T: project(T, 0),
    "q": lambda T: linear(T, "q_fp8", HEADS * HEAD_DIM + INDEX_ROWS, LATENT),
    "wo_a": grouped,
    "wo_b": lambda T: linear(T, "wo_b", D, GROUPS * RANK),
    "gate": gate,
    "head": head,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    options = parser.parse_args()
    rows = [OPERATIONS[name](T) for T in options.tokens for name in options.only]
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
