"""Absent experts of a step in scratch: bytes and codes, whoever is resident."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.experts.layout import ExpertSlab, Tier, code_of
from workers.kernels.experts_fetch import fetch_experts

EXPERTS = 6
BYTES = 3 * (256 * 128 // 2 + 256 * 128 // 32)


@pytest.mark.parametrize("scratch_experts", [1, 2, 4])
@pytest.mark.parametrize("resident", [[], [1, 4], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("active", [[], [4], [1, 2, 5], [0, 1, 3, 4]])
def test_absent_active_experts_are_copied_and_found(
    active: list[int], resident: list[int], scratch_experts: int, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(3)
    host = torch.randint(0, 256, (EXPERTS, BYTES), dtype=torch.uint8, generator=generator)
    host = host.pin_memory() if device.type == "cuda" else host
    codes = [slot if slot < 0 else code_of(Tier.HOST, slot) for slot in range(EXPERTS)]
    for slot, expert in enumerate(resident):
        codes[expert] = slot
    table = torch.tensor(codes, dtype=torch.int32, device=device)
    first = EXPERTS + 1  # the slots of residents lie before it
    places = torch.full((first + scratch_experts, BYTES), 0xAA, dtype=torch.uint8, device=device)
    slab = ExpertSlab(places.view(-1), table, host=host.view(-1))
    step_table = torch.full((EXPERTS,), -1, dtype=torch.int32, device=device)
    listed = torch.full((4,), 99, dtype=torch.int32, device=device)
    listed[: len(active)] = torch.tensor(active, dtype=torch.int32, device=device)
    groups = SimpleNamespace(
        num_active=torch.tensor([len(active)], dtype=torch.int32, device=device), active_experts=listed
    )
    fetch_experts(groups, slab, step_table, first_scratch=first, scratch_experts=scratch_experts, expert_bytes=BYTES)
    untouched = set(range(first + scratch_experts))
    alone = sum(expert not in resident for expert in active) <= 1
    for member, expert in enumerate(active):
        code = int(step_table[expert])
        if expert in resident or member >= scratch_experts or alone:
            assert code == codes[expert]
            continue
        assert code == code_of(Tier.SLAB, first + member)
        assert torch.equal(places[first + member].cpu(), host[expert])
        untouched.discard(first + member)
    assert all(bool((places[place] == 0xAA).all()) for place in untouched)
    assert all(int(step_table[e]) == -1 for e in range(EXPERTS) if e not in active)
