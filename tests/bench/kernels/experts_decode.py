"""Routed FP4 experts at decode (`workers/kernels/experts_decode.py`), V4-Flash shapes, GB/s of weights.

    python -m tests.bench.kernels.experts_decode

Floor: bytes of the distinct experts of the step (13.37 MB each) and of the shared expert (25.2 MB) over the measured
copy bandwidth. Prediction for the form of sm_90: a warp issues 568 instructions for 8,192 weights, at full bandwidth
two thirds of what a multiprocessor can; at one token, launches of 70 and 35 MB begin and end besides. Result (H200,
2026-11-21, copy 4,180 GB/s), us for both launches, in brackets gate_up and down alone; plain with the launch of the
shared expert's first half:
    tokens    1                  2                  4                   16               64 (133 experts)
    sm_90     40.2 (22.5, 15.6)  64.1 (40.3, 23.0)  100.2 (64.2, 34.7)  259 (166, 87)    506 (319, 167)
    plain     50.4               87.9               134.6
Programs that only read the same bytes take 25 us at one token.
Behind the router, route + gate_up + down at one token (the same day, later): 45.2 us with down's shared rows behind its
wait and shared pieces for all programs of gate_up, 41.2 without. Stamps of the global timer, us after gate_up's wait:
the look-ups end at 1.6 and 1.2, gate_up's tiles at 20.0 and 16.8, half of them at 14.2 and 14.0, down at 31.6 and 28.2,
half of its programs at 28.9 and 24.9. Tried besides, with equal bits:
    both launches in one, which count programs between the halves: 48.1 to 50.3 us
    a barrier for each half of a turn: 47.7 us
    turns of down unrolled: 45.1 us
    w2 of the next launch asked for into L2 at the end of gate_up, and the shared expert's before its wait: no gain
    x rounded behind the first copies by programs without a shared piece: 44.9 us
    a tile's code run once on nothing before down's wait, to have its instructions: 8 layers 1.039 ms for 1.018

In the step itself (8 layers of V4-Flash at one token, 2026-11-22, stamps of the last layer, us after half of gate_up's
programs have come behind its wait): with routed rows in words alone, with the shared one's too and gate_up's beginning
shortened, and with one token's x as codes from mHC's collapse:
    programs begin                        -10.1    -8.5    -6.0
    half of those with shared rows begin   -4.7    -4.2    -4.7
    the router has ended                   -3.1    -0.6    -0.2
    the last program behind the wait        4.9     2.1     1.2
    all rows of the hidden state written   16.5    15.5    16.1
    half of down's programs have theirs    17.7    18.1    17.9 (the last: of those with tiles)
    down ends                              26.9    26.8    26.2
8 layers 1.0034 ms without any of it, then 0.9981, 0.9804 and 0.9553 (the last beside 0.976 of the form before it).
Alone, x loaded whole and first gains 11 us, the shared row in words, which needs no release, 11, the table loaded first
2. Part of the last gain is that a row fills one place of the inputs instead of eight, in down too. Now the router is
what gate_up waits for: to look at its list ahead of its end, ask for a tile's first copies, and compare behind the wait
gave 0.9510 ms for 0.9553, with a list that the router empties first; not in the tree.
Half of down's programs begin when the last of gate_up's on their multiprocessor has ended, and need 1.2 us to ask for
their first copies. Tried besides, with equal bits:
    down with two or three programs a multiprocessor, or with two tiles for the programs that begin first: 45, 32 and
    20 us more than 0.9563 ms; and, on 1.0063 ms:
    loops of tiles and shared rows rolled up to one step, code a third shorter: 22 us more
    code of the rounding run once on nothing before down's rows are there: 16 us more
    down's second turn of copies before its row is there: 4 us less gained than with it behind

Where the rest goes, by the profiler, in a form with copies by threads, measured the same day. At one token 44 % of
gate_up's samples stand in the loop and 35 % before its wait, which in a step lies in the shadow of the router's launch.
At four tokens the schedulers issue in 57 % of all cycles and no pipe is full: three programs of four warps do not hide
everything, and inputs of 4,096 columns leave no room for a fourth. What was tried, with equal bits:
    copies of 16 bytes a thread instead of boxes: 41.0, 111, 295 and 543 us at 1, 4, 16 and 64 tokens
    four programs a multiprocessor in down beyond one token: 103, 282 and 554 us at 4, 16 and 64 tokens
    steps unrolled by the number of slots: 17 % of all stalls at four tokens are instructions that are not there
    128 rows and eight warps a program: 27 us in gate_up at one token, 192 tiles for 132 multiprocessors
    three slots of 512 columns, two programs a multiprocessor: 36.3 us for 29.7 with two, without the shared expert
The plain form reads 64-byte pieces to registers, with 2.7 instructions a weight; 34.6 of its 41.8 us for the routed
experts of one token are left when it only reads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels import expert_codes, experts_decode, experts_sm90

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
        if tokens == 1 and experts_sm90.serves(self.natural_x.device, WIDE, INNER):
            self.x = torch.empty(1, expert_codes.coded_bytes(WIDE), dtype=torch.uint8, device="cuda")
            expert_codes.code_rows(self.natural_x, self.x)
        else:
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
            self.hidden, self.shared_hidden, self.shared_w2, self.ids, self.groups, self.slab, self.out,
            counters=self.counters, pdl=pdl,
        )  # fmt: skip

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
