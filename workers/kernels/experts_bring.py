"""Absent experts that a prefill step's routing has chosen, brought to staging on the device right before its products.

Owns: one launch between routing and products, which copies what lies in host memory or on the other GPU, whole, to the
staging places of the slab, and writes the table by which the products find it. The host takes no part: it does not know
what was chosen. Who finds no place stays where he is and is read there. Does not own: decode, whose programs bring
their own rows (`experts_stage.py`), and steps that use nearly every expert (`workers/gpu/expert_stream.py`).

The choices of a step are few numbers, so every program looks at all of them and works out by itself which pieces of
which experts are its own: one launch of as many programs as the GPU holds, whatever the number of absent experts.
"""

from __future__ import annotations

from typing import Any, Protocol

import triton
import triton.language as tl
from torch import Tensor

from workers.experts.layout import TIER_SHIFT, ExpertSlab, Tier
from workers.kernels.launch import num_sms

PROGRAMS_EACH = 2
"""Programs a multiprocessor: with 16 KB of each on the way, 4 MB of the GPU's, many times what a link holds."""

MOST_PIECE = 1 << 16
"""Bytes of one program's turn, at most: V4-Flash's experts have 204 such pieces."""

TURN_WORDS = 2048
"""int64 words that a program has on the way at a time."""

SHIFT = tl.constexpr(TIER_SHIFT)
INDEX = tl.constexpr((1 << TIER_SHIFT) - 1)
SLAB_TIER = tl.constexpr(Tier.SLAB.value)
HOST_TIER = tl.constexpr(Tier.HOST.value)
PEER_TIER = tl.constexpr(Tier.PEER.value)


class Groups(Protocol):
    """Who was chosen, as `routing.route` writes it, int32 on the device."""

    num_active: Tensor  # [1]
    active_experts: Tensor  # [at most the layer's experts]


@triton.jit
def bring_kernel(
    homes,  # int32 [E], where experts are
    table,  # int32 [E], where the products find the chosen ones; nothing else is written
    count,  # int64 [1], grows by the experts that were copied
    num_active,
    active_experts,
    base,  # uint8, the slab; host, peer: the other tiers
    host,
    peer,
    first,  # the first staging place, and how many there are
    room,
    EXPERT_BYTES: tl.constexpr,
    PIECE: tl.constexpr,  # bytes, a divisor of EXPERT_BYTES
    WORDS: tl.constexpr,  # int64 words of one turn, a divisor of PIECE / 8
    E: tl.constexpr,  # a power of two, at least the layer's experts
    HOST: tl.constexpr,
    PEER: tl.constexpr,
):
    """Any grid."""
    member = tl.arange(0, E)
    live = member < tl.load(num_active)
    expert = tl.load(active_experts + member, mask=live, other=0)
    code = tl.load(homes + expert, mask=live, other=0)
    absent = live & ((code >> SHIFT) != SLAB_TIER)
    rank = tl.cumsum(absent.to(tl.int32), 0) - 1
    absent &= rank < room
    num_absent = tl.sum(absent.to(tl.int32), 0)
    if tl.program_id(0) == 0:
        tl.store(table + expert, tl.where(absent, first + rank, code), mask=live)
        tl.store(count, tl.load(count) + num_absent)
    PIECES: tl.constexpr = EXPERT_BYTES // PIECE
    for item in range(tl.program_id(0), num_absent * PIECES, tl.num_programs(0)):
        place = item // PIECES
        found = tl.sum(tl.where(absent & (rank == place), code, 0), 0)
        at = tl.full((), PIECE, tl.int64) * (item % PIECES)
        offset = (found & INDEX).to(tl.int64) * EXPERT_BYTES + at
        source = base + offset
        if HOST:
            source = tl.where((found >> SHIFT) == HOST_TIER, host + offset, source)
        if PEER:
            source = tl.where((found >> SHIFT) == PEER_TIER, peer + offset, source)
        target = base + (tl.full((), EXPERT_BYTES, tl.int64) * (first + place) + at)
        word = tl.arange(0, WORDS)
        for turn in range(PIECE // 8 // WORDS):
            value = tl.load(source.to(tl.pointer_type(tl.int64)) + turn * WORDS + word)
            tl.store(target.to(tl.pointer_type(tl.int64)) + turn * WORDS + word, value)


def piece_bytes(expert_bytes: int) -> int:
    """Bytes of one program's turn: the largest power of two that divides an expert, up to `MOST_PIECE`."""
    return min(MOST_PIECE, expert_bytes & -expert_bytes)


def bring(
    groups: Groups, slab: ExpertSlab, expert_bytes: int, first: int, room: int, table: Tensor, count: Tensor
) -> None:
    """Bring the chosen experts that `slab.table` has outside the slab to the places from `first` on, `room` at most.

    Args:
        slab: its table says where experts are; tiers as kernels read them.
        table: int32 [E], entries of chosen experts are written.
        count: int64 [1], grows by the experts that were copied.
    """
    piece = piece_bytes(expert_bytes)
    host = slab.base if slab.host is None else slab.host
    peer: Any = slab.base if slab.peer is None else slab.peer
    bring_kernel[(PROGRAMS_EACH * num_sms(slab.base.device),)](
        slab.table, table, count, groups.num_active, groups.active_experts, slab.base, host, peer, first, room,
        EXPERT_BYTES=expert_bytes, PIECE=piece, WORDS=min(TURN_WORDS, piece // 8),
        E=triton.next_power_of_2(table.numel()), HOST=slab.host is not None,
        PEER=slab.peer is not None, num_warps=4,
    )  # fmt: skip


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash's shape with all tiers."""
    types = dict.fromkeys(("homes", "table", "num_active", "active_experts"), "*i32")
    types |= dict.fromkeys(("base", "host", "peer"), "*u8") | {"count": "*i64", "first": "i32", "room": "i32"}
    size = 13_369_344
    values = {"EXPERT_BYTES": size, "PIECE": piece_bytes(size), "WORDS": TURN_WORDS, "E": 256}
    return [("bring", bring_kernel, types, values | {"HOST": True, "PEER": True}, {"num_warps": 4})]
