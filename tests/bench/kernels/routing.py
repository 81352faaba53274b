"""Routing and greedy sampling of V4-Flash in a CUDA graph. `python -m tests.bench.kernels.routing`.

Floor: bytes are small (2 MB of gate: 0.5 us; 8 MB of logits at 8,192 tokens: 2 us; 0.5 MB of head logits a row), so
time is latency: one launch in decode, which also makes the logits, three in prefill. Prediction: 4.5 us at one token,
25 us at 8,192 tokens; sampling 6 us.

Result (H200, 2026-11-21): decode, behind the launch that makes its input, 6.3 us at one token (hash 5.7); the logits by
a launch of their own and a routing launch behind it took 2.7 us more for the choice alone. 8 tokens 9.0 us, 64 tokens
18.9. Prefill in an earlier form that counted uses instead of sorting: 50 us at 8,192; sampling 9.3 us for one row and
15.3 us for 64.

Tried for one token, equal bits: the router's programs mix their 512 columns of the input themselves, so that mHC's
second launch goes, and the experts' launch behind polls a counter before it reads what eight of them store. The router
ends 1.7 us earlier, but gate_up and down 2.6 us later: the chain wo_b, mHC, router, experts, mHC, project_x takes 67.1
us instead of 66.2; 69.9 where the experts' launch may start only when the input is stored, 67.3 where one program polls
the partial products instead of a counter that tells who is last. By %globaltimer, from the end of the launch before:
inputs are mixed after 0.5 us, products there after 1.3, all programs have arrived after 2.8, logits are there at 3.8,
experts at 5.9, groups at 6.4; at 8.4 while the experts' launch behind reads the shared expert.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.kernels import routing, routing_gate, sampling

EXPERTS, CHOSEN, VOCABULARY, HIDDEN = 256, 6, 129_280, 4096
COPIES = 40


def route(num_tokens: int, *, hashed: bool) -> Row:
    """Decode: with the gate's product."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="cuda")

    pairs, active = num_tokens * CHOSEN, min(num_tokens * CHOSEN, EXPERTS)
    groups = SimpleNamespace(
        num_active=empty(1), active_experts=empty(active), active_begin=empty(active + 1), pair_order=empty(pairs)
    )
    ids, weights = empty(num_tokens, CHOSEN), empty(num_tokens, CHOSEN, dtype=torch.float32)
    token_ids = torch.randint(0, VOCABULARY, (num_tokens,), dtype=torch.int32, device="cuda")
    decode = num_tokens <= routing_gate.DECODE_TOKENS
    if hashed:
        chooser = torch.rand(VOCABULARY, EXPERTS, device="cuda").topk(CHOSEN).indices.to(torch.int32)
    else:
        chooser = torch.randn(EXPERTS, device="cuda") * 0.1

    rest = (chooser, token_ids, 1.5, ids, weights, groups)
    all_logits = [torch.randn(num_tokens, EXPERTS, device="cuda") for _ in range(COPIES)]
    if decode:
        gates = [torch.randn(EXPERTS, HIDDEN, dtype=torch.bfloat16, device="cuda") for _ in range(COPIES)]
        x = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
        work = routing_gate.GateWork.allocate(num_tokens, EXPERTS, HIDDEN, "cuda")
        calls = [lambda gate=gate: routing_gate.gate_route(x, gate, all_logits[0], *rest, work=work) for gate in gates]
    else:
        words = empty(routing.work_words(num_tokens, EXPERTS))
        calls = [lambda logits=logits: routing.route(logits, *rest, work=words) for logits in all_logits]
    name = f"{'gate_' * decode}route {'hash' if hashed else 'learned'} T={num_tokens}"
    gate_bytes = decode * HIDDEN * 2.0 * (EXPERTS + num_tokens)
    return Row(name, graph_ms(calls), gate_bytes + num_tokens * (EXPERTS * 4.0 + CHOSEN * 12))


def greedy(num_rows: int) -> Row:
    logits = [torch.randn(num_rows, VOCABULARY, device="cuda") for _ in range(COPIES)]
    token_ids = torch.zeros(num_rows, dtype=torch.int32, device="cuda")
    results = torch.zeros(num_rows, 2, dtype=torch.int32, device="cuda")
    work = sampling.SampleWork.allocate(num_rows, VOCABULARY, "cuda")
    calls = [lambda rows=rows: sampling.sample_greedy(rows, token_ids, results, work=work) for rows in logits]
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
