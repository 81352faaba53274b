"""Chosen absent experts on their way to staging: bytes, table, room, and that nothing else is touched."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.experts.layout import ExpertShape, ExpertSlab, Tier, code_of
from workers.kernels.experts_bring import bring, piece_bytes

EXPERTS, SLOTS, ROOM, UNUSED = 12, 3, 4, -7
BYTES = ExpertShape(128, 128).expert_bytes


class Case:
    """A layer whose experts 0, 4, 8 are in the slab, 1, 5, 9 and 3, 7, 11 on the host, 2, 6, 10 on the other GPU."""

    def __init__(self, chosen: list[int], device: torch.device, *, peer: bool = True) -> None:
        generator = torch.Generator().manual_seed(len(chosen))
        memory = [torch.randint(0, 256, (n, BYTES), dtype=torch.uint8, generator=generator) for n in (SLOTS, 9, 3)]
        memory[0] = torch.cat([memory[0], torch.zeros(ROOM, BYTES, dtype=torch.uint8)])
        self.codes = []
        for expert in range(EXPERTS):
            if expert % 4 == 0:
                self.codes.append(code_of(Tier.SLAB, expert // 4))
            elif expert % 4 == 2 and peer:
                self.codes.append(code_of(Tier.PEER, expert // 4))
            else:
                self.codes.append(code_of(Tier.HOST, expert * 9 // EXPERTS))
        self.base, host, other = (m.to(device).view(-1) for m in memory)
        self.homes = dict(zip(Tier, (self.base.clone(), host, other), strict=True))
        homes = torch.tensor(self.codes, dtype=torch.int32, device=device)
        self.slab = ExpertSlab(self.base, homes, host=host, peer=other if peer else None)
        active = torch.full((EXPERTS,), 10**6, dtype=torch.int32)  # what is not chosen is never followed
        active[: len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        self.groups = SimpleNamespace(
            num_active=torch.tensor([len(chosen)], dtype=torch.int32, device=device), active_experts=active.to(device)
        )
        self.table = torch.full((EXPERTS,), UNUSED, dtype=torch.int32, device=device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.chosen = chosen

    def bytes_of(self, code: int, *, now: bool) -> torch.Tensor:
        memory = self.base if now and code >> 24 == Tier.SLAB else self.homes[Tier(code >> 24)]
        return memory[(code & 0xFFFFFF) * BYTES :][:BYTES]


@pytest.mark.parametrize("chosen", [[], [4], [2], [0, 1, 2, 3], [1, 4, 6, 7, 9, 11], list(range(EXPERTS))])
@pytest.mark.parametrize("peer", [True, False])
def test_chosen_experts_are_found_with_their_own_bytes(chosen: list[int], peer: bool, device: torch.device) -> None:
    case = Case(chosen, device, peer=peer)
    for repeat in range(2):
        bring(case.groups, case.slab, BYTES, SLOTS, ROOM, case.table, case.count)
        absent = [expert for expert in chosen if expert % 4]
        for expert in range(EXPERTS):
            code = int(case.table[expert])
            if expert not in chosen:
                assert code == UNUSED
                continue
            staged = expert in absent[:ROOM]
            expected = code_of(Tier.SLAB, SLOTS + absent.index(expert)) if staged else case.codes[expert]
            assert code == expected
            assert torch.equal(case.bytes_of(code, now=True), case.bytes_of(case.codes[expert], now=False))
        assert int(case.count) == (repeat + 1) * min(ROOM, len(absent))
        untouched = SLOTS + min(ROOM, len(absent))
        assert torch.equal(case.base[untouched * BYTES :], case.homes[Tier.SLAB][untouched * BYTES :])


def test_pieces_fill_an_expert() -> None:
    for hidden, inner in ((256, 128), (4096, 2048), (7168, 3072)):
        size = ExpertShape(hidden, inner).expert_bytes
        assert size % piece_bytes(size) == 0 and 1024 <= piece_bytes(size) <= 65536
