"""Decode linears of V4-Flash in a CUDA graph, against copy bandwidth. `python -m tests.bench.kernels.linear_decode`.

Floor: every weight byte once at the bandwidth of a device-to-device copy; activations are kilobytes. On an H200 at
4,230 GB/s: x 6.6 us (3.5 where compression is C128, 1.5 without), q 9.9 us, wo_a and wo_b 7.9 us, gate and shared
expert 4.5 us, head 250 us; together 43 layers of C4 would take 1.6 ms. Prediction: a launch costs 1-2 us of idle memory
unless it overlaps its predecessor, so 80 % needs overlap.

Result (H200, 2026-11-21, one token, alone in a graph): project_x 7.6 us (87 %), 5.3 with C128, 3.3 without compressor;
q 12.4 (81 %), wo_a 10.1 (80 %), wo_b 9.7 (83 %), head 240 (106 %). In a model they are shorter: weights are on their
way behind the launch before. Half a C4 layer, mHC to wo_b, takes 68.0 us with the plain forms and late signals, 60.9
streamed with early signals before, 59.3 with those of project_x and wo_b after their own wait, 58.5 with that of q;
C128 55.7, 48.3, 46.1 and 45.5. Copies alone, without activations and products, take 1.0 to 1.3 us less.
8 tokens: project_x 10.0, q 14.2, wo_a 11.2, wo_b 12.9: streamed and early they gained nothing, for every program rounds
all activations before it multiplies. 64 tokens: q 35.8, wo_a 31.9 (53.0 with programs of 16 rows and 64 tokens), wo_b
29.2 (35.8), project_x 21.5 (23.6): there a program reads more bytes of activations than of weights.
Tried and left out: the ring filled by TMA (-0.4 to +0.3 us), rings of 160 to 192 KB (+0.4 to +1.5: activations wait
behind what is in flight), prefetches to L2 by the launches before attention (+1.9 to +7), or by a kernel on a branch of
the graph beside selection and attention (-0.4 to +1.1, 8 to 34 MB of wo_a), q in two launches with the selection
between (-0.7 in C4 layers), prologues that wait for a copy before they start the next (-1 to +5), in the plain form 8
or 16 warps a program (13-20 us), walking several tiles of K = 4096 (13.6 us).

q stands behind `store_and_compress`, which norms its input; without that launch half a layer would be 3.3 us (C4), 3.4
(C128) and 1.1 (windows) shorter. Tried, with q norming the raw latent by itself (equal bits): q first, then the store,
then attention that reads no key ahead of its wait (+0.9, -0.4, +0.7); the store between two launches of q (+1 to +4,
-1 to +2, 0 to +3); q that waits for a counter of the projection's programs and not for the launch between (+1.9, +0.9,
-0.3); the store on a branch of the captured graph beside q (-1.9, -2.1, -0.5), in C4 with the selection beside wq_b's
rows (-3.9). Of these the last is in the tree, for one token (`workers/gpu/branch.py`): 8 layers, three of them C4, take
1.009 ms instead of 1.018. With the branch in every layer and at every number of tokens the whole model lost: 1.047 ms
against 1.033, 8 tokens 2.361 and 2.348, 64 tokens 8.01 and 7.79; where no selection follows the store, attention's
early reads need one more launch at the end of the branch, for edges into a join are those of dependent launches.
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
