"""Staging of absent experts in prefill: every layer finds every expert's own bytes, whatever is resident."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from workers.experts.bank import HostBank
from workers.experts.layout import ExpertShape, ExpertSlab, Tier, code_of
from workers.experts.places import Places
from workers.gpu.buffers import Groups
from workers.gpu.cached_experts import ExpertMemory
from workers.gpu.expert_stream import FEW_USES, HALVES, ExpertStream, _runs
from workers.model.presets import NANO

LAYERS, EXPERTS, SLOTS = 5, 6, 8
CONFIG = dataclasses.replace(NANO, num_hidden_layers=LAYERS, compress_ratios=(0,) * LAYERS, n_routed_experts=EXPERTS,
                             hidden_size=256, moe_intermediate_size=128)  # fmt: skip
BYTES = ExpertShape(256, 128).expert_bytes
PAIRS = LAYERS * EXPERTS


def filled_bank() -> HostBank:
    bank = HostBank(range(PAIRS), PAIRS, BYTES)
    for pair in range(PAIRS):
        bank.expert(pair).fill_(pair + 1)
    return bank


def memory_of(bank: HostBank, half: int) -> ExpertMemory:
    memory = ExpertMemory.allocate(CONFIG, Places(SLOTS, scratch=1, half=half), bank, "cpu")
    memory.slab.fill_(0)
    return memory


def resident(pairs: list[int], slab: torch.Tensor) -> np.ndarray:
    codes = np.array([code_of(Tier.HOST, pair) for pair in range(PAIRS)], np.int32)
    for slot, pair in enumerate(pairs):
        codes[pair] = code_of(Tier.SLAB, slot)
        slab[slot] = pair + 1
    return codes


def test_no_cache_has_slots_in_scratch_or_staging() -> None:
    bank = filled_bank()
    memory = memory_of(bank, 2)
    assert memory.cache(filled=False).slots.num_slots == SLOTS
    with pytest.raises(ValueError, match=f"{SLOTS + 1} slots wanted, the slab has {SLOTS}"):
        memory.cache(num_slots=SLOTS + 1, filled=False)
    bank.close()


MANY = int(FEW_USES * EXPERTS) // CONFIG.num_experts_per_tok + 1
"""Tokens of the smallest step that brings what it may not use."""


def chosen(*experts: int) -> Groups:
    """What routing tells."""
    active = torch.tensor([*experts, *[EXPERTS] * (EXPERTS - len(experts))], dtype=torch.int32)
    return Groups(torch.tensor([len(experts)], dtype=torch.int32), active, active, active)


def read_by(slab: ExpertSlab, expert: int) -> torch.Tensor:
    """The bytes that a product finds."""
    code = int(slab.table[expert])
    home = {Tier.SLAB: slab.base, Tier.HOST: slab.host, Tier.PEER: slab.peer}[Tier(code >> 24)]
    return home[(code & 0xFFFFFF) * BYTES :][:BYTES]


@pytest.mark.parametrize("num_tokens", [1, MANY - 1, MANY])
@pytest.mark.parametrize("half", [1, 3, EXPERTS])
@pytest.mark.parametrize("inside", [[], [0, 1, 2, 3, 4, 5], [2, 9, 10, 29]])
def test_every_layer_reads_its_own_experts(half: int, inside: list[int], num_tokens: int) -> None:
    bank = filled_bank()
    memory = memory_of(bank, half)
    codes = resident(inside, memory.slab)
    stream = ExpertStream(memory, lambda: codes)
    used = (1, 3, 4, 5) if num_tokens < MANY else tuple(range(EXPERTS))
    for _ in range(2):
        stream.begin(num_tokens)
        for layer in range(LAYERS):
            experts = stream.layer(layer, chosen(*used))
            for expert in used:
                assert bool((read_by(experts, expert) == layer * EXPERTS + expert + 1).all())
            stream.done(layer)
    absent = [sum(layer * EXPERTS + e not in inside for e in used) for layer in range(LAYERS)]
    room = half if num_tokens == MANY else HALVES * half
    assert stream.copied_experts == 2 * sum(min(room, count) for count in absent)
    assert stream.copied_bytes == stream.copied_experts * BYTES
    bank.close()


@pytest.mark.parametrize("num_tokens", [1, MANY])
def test_experts_of_the_other_gpu_are_brought_in_whatever_the_step(num_tokens: int) -> None:
    bank, peer = filled_bank(), torch.zeros(PAIRS * BYTES, dtype=torch.uint8)
    peer.view(PAIRS, BYTES)[5] = 11
    places = Places(SLOTS, scratch=1, half=EXPERTS)
    memory = ExpertMemory.allocate(CONFIG, places, bank, "cpu", peer=peer)
    codes = resident([0, 1], memory.slab)
    codes[10] = code_of(Tier.PEER, 5)
    stream = ExpertStream(memory, lambda: codes)
    stream.begin(num_tokens)
    for layer in range(LAYERS):
        slab = stream.layer(layer, chosen(10 - EXPERTS))
        if layer == 1:
            assert int(slab.table[10 - EXPERTS]) >> 24 == Tier.SLAB
            assert bool((read_by(slab, 10 - EXPERTS) == 11).all())
        stream.done(layer)
    assert stream.copied_experts == (LAYERS if num_tokens == 1 else PAIRS - 2)
    bank.close()


def test_neighbours_at_the_other_gpu_come_in_one_copy() -> None:
    host, peer = (np.arange(9, dtype=np.int32) | code_of(tier, 0) for tier in (Tier.HOST, Tier.PEER))
    codes = np.concatenate([host[:2], peer[3:6], peer[[8]], host[[4]], peer[:1], peer[:2]])
    assert _runs(codes) == [
        (int(host[0]), 1),
        (int(host[1]), 1),
        (int(peer[3]), 3),
        (int(peer[8]), 1),
        (int(host[4]), 1),
        (int(peer[0]), 1),
        (int(peer[0]), 2),
    ]
    assert _runs(codes[:0]) == []


@pytest.mark.parametrize("half", [2, EXPERTS])
def test_a_layer_comes_from_both_tiers(half: int) -> None:
    """Experts 0 and 3 of every layer in the bank, the others in consecutive places of the other GPU."""
    bank, peer = filled_bank(), torch.zeros(PAIRS, BYTES, dtype=torch.uint8)
    codes = resident([], torch.empty(0))
    away = [pair for pair in range(PAIRS) if pair % EXPERTS not in (0, 3)]
    for place, pair in enumerate(away):
        peer[place], codes[pair] = pair + 1, code_of(Tier.PEER, place)
    memory = ExpertMemory.allocate(CONFIG, Places(SLOTS, half=half), bank, "cpu", peer=peer.view(-1))
    stream = ExpertStream(memory, lambda: codes)
    stream.begin(100)
    for layer in range(LAYERS):
        slab = stream.layer(layer, None)
        for expert in range(EXPERTS):
            assert bool((read_by(slab, expert) == layer * EXPERTS + expert + 1).all())
        stream.done(layer)
    assert stream.copied_experts == LAYERS * half and stream.copied_bytes == LAYERS * half * BYTES
    bank.close()


def test_a_step_keeps_the_table_it_began_with() -> None:
    bank = filled_bank()
    memory = memory_of(bank, EXPERTS)
    codes = resident([3], memory.slab)
    stream = ExpertStream(memory, lambda: codes)
    stream.begin(100)
    codes[3] = code_of(Tier.HOST, 3)
    assert int(stream.layer(0, None).table[3]) >> 24 == Tier.SLAB
    stream.begin(1)
    codes[4] = code_of(Tier.SLAB, 1)
    assert bool((read_by(stream.layer(0, chosen(4)), 4) == 5).all())
    with pytest.raises(ValueError, match="at least one"):
        ExpertStream(memory_of(bank, 0), lambda: codes)
    bank.close()


def test_a_pair_without_a_place_has_no_bytes() -> None:
    partial = HostBank([2], 4, BYTES)
    with pytest.raises(OSError, match="pair 0"):
        partial.expert(0)
    partial.close()
