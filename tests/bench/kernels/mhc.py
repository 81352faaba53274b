"""mHC of V4-Flash in a CUDA graph. `python -m tests.bench.kernels.mhc [--tokens 1 8 64] [--json]`.

Floor at decode: `fn` once from memory (1.57 MB: 0.37 us at 4,230 GB/s) plus, per token, streams read and written and
the sublayer's parts read (73 KB attention, 122 KB MoE; they were just written, so they may come from L2). At one token
the floor is latency, not bytes: two dependent launches, each about 1 us of launch and 1 us of memory round trips.
Prediction: 4-5 us at one token, 8 us at 64.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, num_copies, report
from workers.kernels import mhc

HIDDEN, CHOSEN = 4096, 6
FN_BYTES = 24 * 4 * HIDDEN * 4


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def layers(count: int) -> list[mhc.HyperConnection]:
    return [mhc.HyperConnection(normal(24, 4 * HIDDEN) * 0.01, normal(24), normal(3)) for _ in range(count)]


def post_pre(num_tokens: int, parts: int, *, pdl: bool | None = None) -> Row:
    """One sublayer's write-back and the next one's input."""
    streams = normal(num_tokens, 4, HIDDEN, dtype=torch.bfloat16)
    sub_out = normal(num_tokens, parts, HIDDEN, dtype=torch.bfloat16)
    post, comb = torch.rand(num_tokens, 4, device="cuda"), torch.full((num_tokens, 16), 0.25, device="cuda")
    x = torch.empty(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    quantised, gamma = torch.empty_like(x), normal(HIDDEN)
    work = torch.empty(mhc.work_floats(num_tokens, HIDDEN), device="cuda")
    calls = [
        lambda hc=hc: mhc.hc_post_pre(sub_out, streams, post, comb, hc, gamma, x, work, x_quantised=quantised, pdl=pdl)
        for hc in layers(num_copies(FN_BYTES))
    ]
    num_bytes = FN_BYTES + num_tokens * HIDDEN * 2 * (4 + 4 + parts + 2)
    name = f"hc_post_pre R={parts} T={num_tokens}" + (" no PDL" if pdl is False else "")
    return Row(name, graph_ms(calls), num_bytes, 2.0 * num_tokens * 24 * 4 * HIDDEN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 8, 16, 32, 64])
    options = parser.parse_args()
    rows = [post_pre(t, parts) for t in options.tokens for parts in (1, CHOSEN + 1)]
    rows.append(post_pre(1, 1, pdl=False))
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
