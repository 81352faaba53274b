"""mHC of V4-Flash in a CUDA graph. `python -m tests.bench.kernels.mhc [--decode 1 64] [--prefill 8192]`.

Floor: bytes at the bandwidth of a device-to-device copy. Decode: `fn` once (1.57 MB: 0.37 us at 4,230 GB/s) and, per
token, streams read and written, parts read, the input written twice (81 KB after attention, 130 KB after the MoE). At
one token the floor is latency, not bytes: two dependent launches of 0.5 us each and two round trips to memory.
Prefill: the streams are read twice and written once; 8,192 tokens: 290 us after attention, 390 us after the MoE.
Prediction: 4 us at one token, 6 us at 64; prefill 70 % of copy bandwidth.

Result (H200, 2026-11-21): 6.4 us a call at one token, 4.6 with `finish=False`, which leaves the 39 dependent Sinkhorn
steps to another launch, as the model does (6.7 and 5.0 between reads of 34 MB; 6.0 in the model's kernel table). The
first launch alone takes 2.9 us. One launch with a barrier among its programs gave the same bits and no gain (7.8
against 7.7 us in an earlier form). With `finish=False`, 8 tokens take 6.3 us and 64 tokens 12.7. Before a launch that
streams weights the second one signals first of all: with the router's behind it 10.9 us instead of 12.4. At one token
before attention only the first launch is left (`hc_sums`; `project_x` does the rest): 66.2 us instead of 69.5 for the
chain wo_b, mHC, router, experts, mHC, project_x over 22 layers. Where that launch signalled at its end instead of first
of all, the chain took 2.2 us more, after its wait 1.0. Not measured by this script in the present form: prefill.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, num_copies, report
from workers.kernels import mhc, mhc_prefill

HIDDEN, CHOSEN = 4096, 6
FN_BYTES = 24 * 4 * HIDDEN * 4
PREFILL_CALLS = 4
"""A call moves hundreds of MB: nothing of the last one is left in L2."""


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def layers(count: int) -> list[mhc.HyperConnection]:
    return [mhc.HyperConnection(normal(24, 4 * HIDDEN) * 0.01, normal(24), normal(3)) for _ in range(count)]


def post_pre(num_tokens: int, parts: int, *, prefill: bool = False, pdl: bool | None = None) -> Row:
    """One sublayer's write-back and the next one's input, rounded for FP8 products as well."""
    streams = normal(num_tokens, 4, HIDDEN, dtype=torch.bfloat16)
    sub_out = normal(num_tokens, parts, HIDDEN, dtype=torch.bfloat16)
    post, comb = torch.rand(num_tokens, 4, device="cuda"), torch.full((num_tokens, 16), 0.25, device="cuda")
    x = torch.empty(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    rounded, gamma = torch.empty_like(x), normal(HIDDEN)
    ops = mhc_prefill if prefill else mhc
    work = torch.empty(ops.work_floats(num_tokens, HIDDEN), device="cuda")

    def call(hc: mhc.HyperConnection) -> None:
        ops.hc_post_pre(sub_out, streams, post, comb, hc, gamma, x, work, x_quantised=rounded, pdl=pdl)

    count = PREFILL_CALLS if prefill else num_copies(FN_BYTES)
    reads = 8 if prefill else 4
    num_bytes = FN_BYTES + num_tokens * HIDDEN * 2 * (reads + 4 + parts + 2)
    name = f"{'prefill' if prefill else 'decode'} hc_post_pre R={parts} T={num_tokens}" + " no PDL" * (pdl is False)
    ms = graph_ms([lambda hc=hc: call(hc) for hc in layers(count)])
    return Row(name, ms, num_bytes, 2.0 * num_tokens * 24 * 4 * HIDDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", type=int, nargs="*", default=[1, 2, 8, 16, 32, 64])
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 8192, 16384])
    options = parser.parse_args()
    both = (1, CHOSEN + 1)
    rows = [post_pre(t, parts) for t in options.decode for parts in both]
    rows += [post_pre(1, 1, pdl=False)] if options.decode else []
    rows += [post_pre(t, parts, prefill=True) for t in options.prefill for parts in both]
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
