"""Routing and greedy sampling of V4-Flash in a CUDA graph. `python -m tests.bench.kernels.routing`.

Floor: bytes are small (8 MB of logits at 8,192 tokens: 2 us; 0.5 MB of head logits a row), so time is latency: one
launch in decode, three in prefill. Prediction: 3 us at one token, 8 us at 64, 25 us at 8,192 tokens; sampling 6 us.

Result (H200, 2026-11-21): decode of one token 1.5 us hash, 2.7 us learned (3.3 in the kernel table of `dsv4 bench
model`). An earlier form that counted uses instead of sorting took 4.3, 12 and 39 us at 1, 8 and 64 tokens, 50 us at
8,192; sampling 9.3 us for one row and 15.3 us for 64. Not measured: more than one token in the present form.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.kernels import routing, sampling

EXPERTS, CHOSEN, VOCABULARY = 256, 6, 129_280
COPIES = 40


def route(num_tokens: int, *, hashed: bool) -> Row:
    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    pairs, active = num_tokens * CHOSEN, min(num_tokens * CHOSEN, EXPERTS)
    groups = SimpleNamespace(
        num_active=empty(1), active_experts=empty(active), active_begin=empty(active + 1), pair_order=empty(pairs)
    )
    ids, weights = empty(num_tokens, CHOSEN), empty(num_tokens, CHOSEN, dtype=torch.float32)
    token_ids = torch.randint(0, VOCABULARY, (num_tokens,), dtype=torch.int32, device="cuda")
    work = empty(routing.work_words(num_tokens, EXPERTS))
    if hashed:
        chooser = torch.rand(VOCABULARY, EXPERTS, device="cuda").topk(CHOSEN).indices.to(torch.int32)
    else:
        chooser = torch.randn(EXPERTS, device="cuda") * 0.1

    def call(logits: torch.Tensor) -> None:
        routing.route(logits, chooser, token_ids, 1.5, ids, weights, groups, work=work)

    all_logits = [torch.randn(num_tokens, EXPERTS, device="cuda") for _ in range(COPIES)]
    calls = [lambda logits=logits: call(logits) for logits in all_logits]
    name = f"route {'hash' if hashed else 'learned'} T={num_tokens}"
    return Row(name, graph_ms(calls), num_tokens * (EXPERTS * 4.0 + CHOSEN * 12))


def greedy(num_rows: int) -> Row:
    logits = [torch.randn(num_rows, VOCABULARY, device="cuda") for _ in range(COPIES)]
    token_ids = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    finite = torch.zeros_like(token_ids)
    calls = [lambda rows=rows: sampling.sample_greedy(rows, token_ids, finite) for rows in logits]
    return Row(f"sample_greedy B={num_rows}", graph_ms(calls), num_rows * VOCABULARY * 4.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 64, 1024, 8192, 16384])
    options = parser.parse_args()
    rows = [route(t, hashed=hashed) for t in options.tokens for hashed in (False, True)]
    rows += [greedy(1), greedy(64)]
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
