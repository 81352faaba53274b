"""Routed FP4 experts at decode (`workers/kernels/experts_decode.py`), V4-Flash shapes, GB/s of weights.

    python -m tests.bench.kernels.experts_decode

Floor: bytes of the distinct experts of the step (13.37 MB each) and the shared expert's w2 (8.39 MB) over the measured
copy bandwidth. Prediction: 75 % at one token; unpacking takes about 2.7 instructions per weight, 80 % of what the
multiprocessors can issue at full bandwidth. Result (H200, 2026-11-21, copy 4,200 GB/s), both launches: 2,120 to 2,140
GB/s at one token (41.5 us: 25.7 + 16.7), 2,640 at 4, 2,690 at 8, 2,860 to 3,180 at 16.

Why one token stays at half of the bandwidth, measured the same day. The same programs that only read their weights take
34.6 us (3,750 GB/s at 4 tokens): launches of 35 and 53 MB begin and end slowly. Of the form with two warps a program
the profiler says: the schedulers issue in every second cycle, a fifth of a warp's time goes into waiting for scale
bytes and inputs that are not in L1, and a multiprocessor is at work for 85 % of the launch. w2 of the shared expert,
whose programs read twice as much as the others, costs 3.6 us. What was tried instead, us for both launches at 1, 4 and
16 tokens, where the form in the tree takes 41.5, 125 and 361:
    weights through asynchronous copies, unpacking with fewer moves         43.0  113  327   (equal bits)
    the same, successor let in before the products                          42.3  112
    two warps share the columns of 16 rows, 24 warps on a multiprocessor    41.1  124
    four warps                                                              51.6  157
Scales through asynchronous copies too, inputs sent to L1 a turn ahead, and w2 of the shared expert in the first launch:
54.5 (40.9 + 13.8) at one token, 212 at 8 (the tree 217); the shared expert's programs, which wait for its hidden state
to be rounded, then outlast all others.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels import experts_decode

WIDE, INNER, CHOICES, EXPERTS = 4096, 2048, 6, 256
LAYOUT = ExpertShape(WIDE, INNER)
LAYERS = 24
"""Steps in one graph, each with experts of its own choice: 1.9 GB at batch 1."""


def random_slab(num_slots: int = EXPERTS) -> ExpertSlab:
    """Random codes; scales near 2**-8 as in a trained checkpoint."""
    base = torch.randint(0, 256, (num_slots, LAYOUT.expert_bytes), dtype=torch.uint8, device="cuda")
    base[:, 3 * LAYOUT.codes_bytes :] &= 3
    base[:, 3 * LAYOUT.codes_bytes :] += 117
    return ExpertSlab(base=base.flatten(), table=torch.arange(num_slots, dtype=torch.int32, device="cuda"))


def grouped(ids: Tensor) -> SimpleNamespace:
    """The groups of `route`, made on the host."""
    most = min(ids.numel(), EXPERTS)
    order = ids.flatten().sort(stable=True).indices
    active, counts = ids.unique(return_counts=True)
    begin = torch.zeros(most + 1, dtype=torch.int32)
    begin[1 : len(active) + 1] = counts.cumsum(0)
    experts = torch.zeros(most, dtype=torch.int32)
    experts[: len(active)] = active
    return SimpleNamespace(
        num_active=torch.tensor([len(active)], dtype=torch.int32).cuda(),
        active_experts=experts.cuda(),
        active_begin=begin.cuda(),
        pair_order=order.int().cuda(),
    )


def fp8(rows: int, columns: int) -> SimpleNamespace:
    """A random matrix of the shared expert."""
    codes = torch.randint(0, 120, (rows, columns), dtype=torch.uint8, device="cuda")
    return SimpleNamespace(codes=codes, scales=torch.full((rows // 128, columns // 128), 2.0**-8, device="cuda"))


class Step:
    """One layer's step of `tokens` tokens; `ids [T, k]`."""

    def __init__(self, slab: ExpertSlab, ids: Tensor) -> None:
        tokens = ids.shape[0]
        self.shared_w13, shared_w2 = fp8(2 * INNER, WIDE), fp8(WIDE, INNER)
        self.slab, self.ids, self.groups, self.shared_w2 = slab, ids.int().cuda(), grouped(ids), shared_w2
        self.num_active = len(ids.unique())
        self.natural_x = torch.randn(tokens, WIDE, device="cuda").bfloat16()
        self.x = torch.empty_like(self.natural_x)
        experts_decode.quantise_rows(self.natural_x, self.x)
        self.weights = torch.rand(tokens, CHOICES, device="cuda")
        self.hidden = torch.zeros(tokens, CHOICES, INNER, dtype=torch.bfloat16, device="cuda")
        self.shared_hidden = torch.randn(tokens, INNER, device="cuda").bfloat16()
        self.out = torch.zeros(tokens, CHOICES + 1, WIDE, dtype=torch.bfloat16, device="cuda")
        count = experts_decode.num_counters(tokens, CHOICES, EXPERTS, INNER)
        self.counters = torch.zeros(count, dtype=torch.int32, device="cuda")

    def gate_up(self, pdl: bool | None = None) -> None:
        experts_decode.expert_gate_up(
            self.natural_x, self.x, self.shared_w13, self.ids, self.weights, self.groups, self.slab, self.hidden, 10.0,
            shared_hidden=self.shared_hidden, counters=self.counters, pdl=pdl,
        )  # fmt: skip

    def down(self, pdl: bool | None = None) -> None:
        experts_decode.expert_down(
            self.hidden, self.shared_hidden, self.shared_w2, self.ids, self.groups, self.slab, self.out, pdl=pdl
        )

    @property
    def gate_up_bytes(self) -> float:
        return self.num_active * LAYOUT.expert_bytes * 2 / 3 + 2 * WIDE * INNER

    @property
    def down_bytes(self) -> float:
        return self.num_active * LAYOUT.expert_bytes / 3 + WIDE * INNER

    @property
    def flops(self) -> float:
        return (self.ids.numel() + self.ids.shape[0]) * 6 * WIDE * INNER


def steps_of(slab: ExpertSlab, make_ids: Callable[[], Tensor], num_steps: int) -> list[Step]:
    """Independent layers, shared experts of their own."""
    return [Step(slab, make_ids()) for _ in range(num_steps)]


def random_ids(tokens: int) -> Tensor:
    """Every token chooses at random."""
    return torch.rand(tokens, EXPERTS).argsort(-1)[:, :CHOICES]


def same_ids(tokens: int) -> Tensor:
    """Every token chooses the same experts."""
    return random_ids(1).repeat(tokens, 1)


def both(name: str, steps: list[Step], *, parts: bool = False) -> list[Row]:
    """Time of the pair of launches, and of each alone."""
    num_bytes = sum(s.gate_up_bytes + s.down_bytes for s in steps) / len(steps)
    calls = [call for s in steps for call in (s.gate_up, s.down)]
    rows = [Row(name, 2 * graph_ms(calls), num_bytes, steps[0].flops, f"{steps[0].num_active} experts")]
    if parts:
        rows.append(Row(f"{name}, gate_up", graph_ms([s.gate_up for s in steps]), steps[0].gate_up_bytes))
        rows.append(Row(f"{name}, down", graph_ms([s.down for s in steps]), steps[0].down_bytes))
    return rows


def main() -> None:
    torch.manual_seed(0)
    gbps, slab = copy_bandwidth(), random_slab()
    rows = []
    for tokens in (1, 2, 4, 16, 64):
        count = LAYERS if tokens <= 4 else 6
        rows += both(f"{tokens} tokens, random experts", steps_of(slab, partial(random_ids, tokens), count), parts=True)
    for tokens in (2, 4, 8):
        rows += both(f"{tokens} tokens, the same 6 experts", steps_of(slab, partial(same_ids, tokens), LAYERS))
    report(rows, gbps)


if __name__ == "__main__":
    main()
