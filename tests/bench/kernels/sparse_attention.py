"""Sparse attention and the window store of V4-Flash in a CUDA graph. `python -m tests.bench.kernels.sparse_attention`.

Every call reads other pages of large pools, so that nothing is found in L2. Floor of decode: the fp8 rows of window and
entries, raw queries and results once at copy bandwidth; at batch 1 that is 0.12 us at any context of C4 (640 keys,
374 kB), so decode is bound by latency: two launches and four dependent loads (position, selection, page, row).
Prediction 6-8 us. Floor of prefill: 4 * keys * H * hd FLOP a token at the tensor cores' bf16 rate (790 TFLOP/s reached
by plain products): 8,192 tokens of C4 from the start 0.78 ms, C128 0.22 ms. Prediction 1.6 ms: with 64 heads two
warp groups compute the same scores, which makes 4,100 cycles a chunk of 64 keys.

Results, one H200, 2026-11-21. norm_and_store: 1.15 us at 1 token, 1.29 at 64, 20.1 at 8,192 (55 % of copy bandwidth).
Decode at batch 1 and 4K context: 5.0 us sliding, 8.8 C4, 5.2 C128 in a row; C4 takes 7.1 where its second launch
signals late, but in a model that launch hides the start of wo_a. 8, 16, 32, 64 tokens before the changes below: C4
21.6, 31.7, 33.2, 39.8 us (110 us at 64 tokens before wgmma), C128 at 64K the same, at 4K 9.8, 17.1, 23.4, 23.8; sliding
7.6, 11.2, 20.5, 21.2. In a model, one token: rope angles ahead of the waits -0.3 us a layer, top-k that lets attention
in behind its own wait -0.7 us a C4 layer; page numbers ahead of the wait, queries while rows are on their way, more
programs in `combine`: nothing. The way to the form of one token, C4 between reads: 16.0 us as a batch of products over
groups of 64 dimensions, of which bank conflicts (scores summed over warps, values read across) were about 4 by ncu;
12.7 once `combine` loaded all parts at once and the window came before the wait; 9.0 with plain products. At 64 tokens
338 us, then 110: queries as operands of every warp had filled the registers. Chunks of 16 keys are 0.2 us faster for
the window alone and 4.5 us slower for C4. Tried before: 64 heads by wgmma, a chunk a program: 13.1, 16.0, 15.3 us; the
same in a loop: 18-24 us; 16 warps of 32 dimensions, in 43 layers: 18.1, 21.0, 19.2 us.
One token in one launch, whose programs pass on weights in place of values and wait for each other, from the queries'
product to wo_b: sliding 34.6 to 33.2 us a layer, C128 34.8 to 34.1, C4 44.8 to 44.6 at best. In a model sliding and
C128 lose by it (8 layers 1.003 ms, twice, and 1.000; wo_a comes into its way), so it is not in the tree. With
stamps of its time C4 spent 1.8 us on looking rows up, 0.8 each on queries and keys, 1.8 on scores, 1.5 on waiting for
all of them, 1.8 on values. wo_a, streaming beside it, makes the exchange slower (4.1 us in place of 2.3 from keys to
scores); where wo_a asks for 32 KB at a time and not for 96 before it waits, sliding takes 35.9 in two launches.
64 tokens, 2026-11-22, in a row: 39.7 us in C4 and 39.4 in C128 at 64K, with queries (C4) or keys (C128) ahead of the
wait 37.6 and 37.0, the second launch 8.5 of them, sliding 19.7. Sums as volatile assembly, which the compiler does not
move to the end of the loop, where it kept all products (690 bytes of spills): sliding 13.6, others the same. Warps of
their own that bring rows, each pair's loads behind the pair before: 38.6, 36.6 and 12.1; with an exchange of halves in
place of the second launch 33.3, 31.5 and 12.4, which in a model of 8 layers, rows also loaded a pair ahead, are 36.0,
35.4 and 16.0 (21, 21, 19 % of the floor; 42.8, 42.5 and 24.2 before, by every warp and in two launches) and 0.07 ms of
the step's 8.05. Exchanged by programs whose warps do all in turn, halves lost: 47.7.
Prefill of 8,192 tokens in Triton's form: C4 3.03 ms (204 TFLOP/s), C128 1.11, sliding 0.84; after 57,344 tokens C4
3.38, C128 2.73. C4 took 4.0 to 8.6 ms when every program undid the fp8 of its rows. With explicit layouts (sm_90): C4
1.93 (320), C128 0.93, sliding 0.77; after 57,344 C4 2.08, C128 1.87 (349). There, by ncu: with one allocation for
both buffers of keys C4 took 2.08, a barrier between scores and copies being 13 % of all samples; copies issued before
the scores let the compiler put the next rows' addresses before them, too. One program a multiprocessor that walks all
tokens and brings the next one's queries early: sliding 0.65, C128 0.88, but C4 2.23, since what it carries spills.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from tests.workers.kernels.attention_steps import EPS, Meta
from workers.kernels.kv_store import norm_and_store
from workers.kernels.sparse_attention import prefill_work_floats, sparse_attention, work_floats

HEADS, HEAD_DIM, LATENT, SELECTED, WINDOW, PAGE = 64, 512, 1024, 512, 128, 256
Q_COLUMNS = HEADS * HEAD_DIM + 64 * 128
ROW_BYTES = 584
COLD_BYTES = 160 << 20
"""Least bytes of rows that the calls of one graph read: three times L2."""

MAX_CALLS = 200
TENSOR_TFLOPS = 790.0
STRIDE = {0: 149_760, 4: 37_440, 128: 1_728}
UNITS = {0: 6_000, 4: 16_000, 128: 60_000}


class Pools:
    """One large pool of each kind, filled with harmless bytes."""

    def __init__(self) -> None:
        self.of = {ratio: self._filled(UNITS[ratio], STRIDE[ratio]) for ratio in STRIDE}
        self.rope_table = torch.randn(1 << 20, 64, device="cuda")
        self.sink = torch.zeros(HEADS, device="cuda")

    @staticmethod
    def _filled(units: int, stride: int) -> Tensor:
        return torch.randint(0x38, 0x40, (units, stride), dtype=torch.uint8, device="cuda")


def tables(ratio: int, positions: list[int], sequences: list[int], num_pages: int) -> Meta:
    """Step metadata with random pages."""
    shape = (max(sequences) + 1, num_pages)
    full = torch.randint(0, UNITS[ratio], shape, dtype=torch.int32, device="cuda")
    window = torch.randint(0, UNITS[0], shape, dtype=torch.int32, device="cuda")
    places = [torch.tensor(values, dtype=torch.int32, device="cuda") for values in (positions, sequences)]
    start = torch.tensor(positions[:1], dtype=torch.int32, device="cuda")  # prefill: one sequence
    return Meta(*places, full, window, start, start.new_tensor([0, len(positions)]))


def selection(meta: Meta) -> Tensor:
    """Entries of each token: all that it sees, or SELECTED of them."""
    visible = ((meta.positions + 1) // 4)[:, None]
    index = torch.arange(SELECTED, device="cuda")[None, :]
    spread = (index * 2_654_435_761 + meta.positions[:, None].long() * 40_503) % visible.clamp(min=1)
    return torch.where(visible > SELECTED, spread, torch.where(index < visible, index, -1)).int()


def entries_of(ratio: int, positions: list[int]) -> int:
    """Compressed entries that the tokens read together."""
    return sum({0: 0, 4: min(SELECTED, (p + 1) // 4), 128: (p + 1) // 128}[ratio] for p in positions)


def attention(pools: Pools, name: str, ratio: int, positions: list[int], sequences: list[int], num_pages: int) -> Row:
    """Time one shape. `name` begins with the mode."""
    T = len(positions)
    mode = "decode" if name.startswith("decode") else "prefill"
    keys = sum(min(WINDOW, p + 1) for p in positions) + entries_of(ratio, positions)
    num_bytes = keys * ROW_BYTES + T * HEADS * HEAD_DIM * 4
    num_calls = 2 if mode == "prefill" else min(MAX_CALLS, max(24, COLD_BYTES // num_bytes))
    q = torch.randn(T, Q_COLUMNS, dtype=torch.bfloat16, device="cuda")
    out = torch.empty(T, HEADS * HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    if mode == "decode":
        floats = work_floats(T, HEADS, HEAD_DIM, num_pages, SELECTED, ratio)
    else:
        floats = prefill_work_floats(T, 1, (positions[-1] + 1) // ratio if ratio else 0, HEAD_DIM)
    work = torch.empty(max(floats, 1), device="cuda")
    entry_pool = pools.of[ratio] if ratio else None
    arrived = torch.zeros(T * HEADS, dtype=torch.int32, device="cuda")

    def make() -> Callable[[], None]:
        meta = tables(ratio, positions, sequences, num_pages)
        chosen = selection(meta) if ratio == 4 else None
        inputs = (q, meta, pools.of[0], entry_pool, chosen, ratio, pools.sink, pools.rope_table)
        return lambda: sparse_attention(*inputs, out, work, EPS, mode=mode, arrived=arrived)

    ms = graph_ms([make() for _ in range(num_calls)], replays=7 if mode == "prefill" else 15)
    flops = 4.0 * keys * HEADS * HEAD_DIM
    return Row(name, ms, num_bytes, flops, f"{flops / ms / 1e9 / TENSOR_TFLOPS:.0%} of {TENSOR_TFLOPS:.0f} TFLOP/s")


def decode(pools: Pools, ratio: int, T: int, context: int, num_pages: int = 0) -> Row:
    """One token of each of T sequences at `context` tokens."""
    pages = max(num_pages, -(-context // PAGE))
    name = f"decode C{ratio} T={T} context {context}" + (f" of {pages} pages" if num_pages else "")
    return attention(pools, name, ratio, [context - 1] * T, list(range(T)), pages)


def prefill(pools: Pools, ratio: int, start: int, T: int) -> Row:
    """T tokens of one sequence after `start`."""
    positions = list(range(start, start + T))
    return attention(pools, f"prefill C{ratio} T={T} after {start}", ratio, positions, [0] * T, -(-(start + T) // PAGE))


def store(pools: Pools, T: int) -> Row:
    """Latent norm and window rows of T tokens."""
    rows = torch.randn(T, LATENT + HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    latent = torch.empty(T, LATENT, dtype=torch.bfloat16, device="cuda")
    norms = [torch.ones(n, device="cuda") for n in (LATENT, HEAD_DIM)]

    def make() -> Callable[[], None]:
        meta = tables(0, [4000] * T, list(range(T)), 16)
        return lambda: norm_and_store(rows, *norms, pools.rope_table, meta, pools.of[0], latent, EPS)

    num_bytes = T * ((LATENT + HEAD_DIM) * 2 + LATENT * 2 + ROW_BYTES)
    return Row(f"norm_and_store T={T}", graph_ms([make() for _ in range(40)]), num_bytes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few shapes")
    quick = parser.parse_args().quick
    pools = Pools()
    copy_gbps = copy_bandwidth()
    rows = [store(pools, T) for T in ((1, 64) if quick else (1, 8, 64, 8192))]
    for ratio, context in ((4, 4096), (128, 4096)) if quick else ((0, 4096), (4, 1024), (4, 4096), (128, 4096)):
        rows += [decode(pools, ratio, T, context) for T in ((1, 8, 64) if quick else (1, 2, 4, 8, 16, 32, 64))]
    rows += [decode(pools, 128, T, context) for context in (65536, 1 << 20) for T in ((1, 8) if quick else (1, 8, 64))]
    rows.append(decode(pools, 128, 1, 4096, num_pages=4096))
    for ratio, start, T in ((4, 0, 8192), (128, 0, 8192), (0, 0, 8192), (4, 57344, 8192), (128, 57344, 8192)):
        rows.append(prefill(pools, ratio, start, T))
    report(rows, copy_gbps)


if __name__ == "__main__":
    main()
