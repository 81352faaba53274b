"""Staging of absent experts in prefill: every layer finds every expert's own bytes, whatever is resident."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.experts.bank import HostBank
from workers.experts.slots import Tier, code_of
from workers.gpu.expert_stream import ExpertStream

LAYERS, EXPERTS, BYTES = 5, 6, 4096
PAIRS = LAYERS * EXPERTS


def filled_bank() -> HostBank:
    bank = HostBank(range(PAIRS), PAIRS, BYTES)
    for pair in range(PAIRS):
        bank.expert(pair).fill_(pair + 1)
    return bank


def resident(pairs: list[int], slab: torch.Tensor) -> np.ndarray:
    codes = np.array([code_of(Tier.HOST, pair) for pair in range(PAIRS)], np.int32)
    for slot, pair in enumerate(pairs):
        codes[pair] = code_of(Tier.SLAB, slot)
        slab[slot] = pair + 1
    return codes


@pytest.mark.parametrize("half", [1, 3, EXPERTS])
@pytest.mark.parametrize("inside", [[], [0, 1, 2, 3, 4, 5], [2, 9, 10, 29]])
def test_every_layer_reads_its_own_experts(half: int, inside: list[int]) -> None:
    bank, slab = filled_bank(), torch.zeros(8, BYTES, dtype=torch.uint8)
    codes = resident(inside, slab)
    stream = ExpertStream(slab, bank, lambda: codes, num_layers=LAYERS, half_experts=half, device="cpu")
    for _ in range(3):
        stream.begin()
        for layer in range(LAYERS):
            experts = stream.layer(layer)
            homes = {Tier.SLAB: experts.base, Tier.HOST: experts.host, Tier.PEER: experts.peer}
            for expert in range(EXPERTS):
                code = int(experts.table[expert])
                index = code & 0xFFFFFF
                found = homes[Tier(code >> 24)][index * BYTES : (index + 1) * BYTES]
                assert bool((found == layer * EXPERTS + expert + 1).all())
            stream.done(layer)
    absent = [min(half, sum(layer * EXPERTS + e not in inside for e in range(EXPERTS))) for layer in range(LAYERS)]
    assert stream.copied_bytes == 3 * sum(absent) * BYTES
    bank.close()


def test_a_step_keeps_the_table_it_began_with() -> None:
    bank, slab = filled_bank(), torch.zeros(8, BYTES, dtype=torch.uint8)
    codes = resident([3], slab)
    stream = ExpertStream(slab, bank, lambda: codes, num_layers=LAYERS, half_experts=EXPERTS, device="cpu")
    stream.begin()
    codes[3] = code_of(Tier.HOST, 3)
    assert int(stream.layer(0).table[3]) >> 24 == Tier.SLAB
    with pytest.raises(ValueError, match="at least one"):
        ExpertStream(slab, bank, lambda: codes, num_layers=LAYERS, half_experts=0, device="cpu")
    bank.close()


def test_a_bank_is_seen_by_whoever_attaches_and_never_by_strangers() -> None:
    bank = filled_bank()
    again = HostBank.attach(bank.path, bank.place, BYTES)
    assert bool((again.expert(7) == 8).all())
    again.expert(7).fill_(99)
    assert bool((bank.expert(7) == 99).all())
    path = bank.path
    again.close()
    bank.close()
    with pytest.raises(OSError):
        HostBank.attach(path, bank.place, BYTES)
    partial = HostBank([2], 4, BYTES)
    with pytest.raises(OSError, match="pair 0"):
        partial.expert(0)
    partial.close()
