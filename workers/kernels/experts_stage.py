"""Absent experts on their way to the products of a decode step: each program brings the rows that it will multiply.

Owns: which bytes a program of `experts_plain.py` needs, and their way to scratch from host memory or the other GPU. A
program whose expert is absent copies its own rows to the expert's place in scratch, in whole lines, and then reads them
there as it would a resident's. So a step with absent experts has no more launches than one without, experts that are
there are multiplied while the others' bytes come, and a byte crosses the link once however many tokens ask for it. The
place in scratch is the expert's rank among the step's absent ones; who finds none is read in place.

These products could read all of it in place, but they ask for 64 bytes a row, which fill a link badly: the host's a
little, NVLink by far, because nothing of another GPU's memory stays in our L2, into which the products fetch ahead.
(The form of sm_90 asks for boxes of 128 bytes a row, many at a time, and reads in place: `experts_sm90.py`.)
# measured, one layer and token of V4-Flash with 0, 1, 2, 6 experts absent (H200, host link 54.6 GB/s, 2026-11-21):
staged 42, 279, 540, 1589 us; in place 41, 312, 616, 1797; copied by a launch of their own 44, 316, 566, 1609. 2 KB at a
time are 2 % better than 4 or 8. In place over NVLink: 2 ms an expert (8 layers, 30 % absent, same day).
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.experts.layout import TIER_SHIFT, Tier

CHUNK_WORDS = tl.constexpr(256)
"""int64 words of one turn, at most: 64 bytes a thread are on their way at a time, 0.5 MB of an expert in all."""

SHIFT = tl.constexpr(TIER_SHIFT)
SLAB_TIER = tl.constexpr(Tier.SLAB.value)


@triton.jit
def _copy(source, target, at, BYTES: tl.constexpr):
    """Bytes `[at, at + BYTES)` of the expert at `source` to the same place of the one at `target`, both uint8 pointers;
    `at` and `BYTES` are multiples of 16."""
    # The largest power of two that divides the words.
    EVEN: tl.constexpr = (BYTES // 8) & -(BYTES // 8)
    WORDS: tl.constexpr = CHUNK_WORDS if EVEN > CHUNK_WORDS else EVEN
    source = (source + at).to(tl.pointer_type(tl.int64)) + tl.arange(0, WORDS)
    target = (target + at).to(tl.pointer_type(tl.int64)) + tl.arange(0, WORDS)
    for turn in range(BYTES // 8 // WORDS):
        tl.store(target + turn * WORDS, tl.load(source + turn * WORDS))


@triton.jit
def _place(expert, table, active_experts, member, num_scratch, E: tl.constexpr):
    """Place of an expert in scratch, -1 when it needs or finds none. `E` is at least the number of experts."""
    place = tl.full((), -1, tl.int32)
    if (tl.load(table + expert) >> SHIFT) != SLAB_TIER:
        other = tl.arange(0, E)
        before = other < member
        others = tl.load(active_experts + other, mask=before, other=0)
        codes = tl.load(table + others, mask=before, other=0)
        rank = tl.sum(((codes >> SHIFT) != SLAB_TIER).to(tl.int32), 0)
        place = tl.where(rank < num_scratch, rank, -1)
    return place


@triton.jit
def stage_gate_up(
    slot, expert, table, base, active_experts, member, block, first_scratch, num_scratch,
    D: tl.constexpr, INNER: tl.constexpr, EXPERT_BYTES: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Where rows `8 block .. 8 block + 7` of w1 and of w3 of the expert at `slot` are now, and their scales."""
    place = _place(expert, table, active_experts, member, num_scratch, E)
    scratch = base + (first_scratch + place).to(tl.int64) * EXPERT_BYTES
    ROWS: tl.constexpr = 8 * (D // 2)
    SCALES: tl.constexpr = 8 * (D // 32)
    if place >= 0:
        _copy(slot, scratch, block * ROWS, ROWS)
        _copy(slot, scratch, D * INNER // 2 + block * ROWS, ROWS)
        _copy(slot, scratch, 3 * (D * INNER // 2) + block * SCALES, SCALES)
        _copy(slot, scratch, 3 * (D * INNER // 2) + D * INNER // 32 + block * SCALES, SCALES)
        tl.debug_barrier()
    return tl.where(place >= 0, scratch, slot)


@triton.jit
def stage_down(
    slot, expert, table, base, active_experts, member, block, first_scratch, num_scratch,
    D: tl.constexpr, INNER: tl.constexpr, EXPERT_BYTES: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """The same for rows `16 block .. 16 block + 15` of w2. May stand before the launch's wait: nobody else touches w2
    of scratch then, `expert_gate_up` has to do with the other parts."""
    place = _place(expert, table, active_experts, member, num_scratch, E)
    scratch = base + (first_scratch + place).to(tl.int64) * EXPERT_BYTES
    ROWS: tl.constexpr = 16 * (INNER // 2)
    SCALES: tl.constexpr = 16 * (INNER // 32)
    if place >= 0:
        _copy(slot, scratch, D * INNER + block * ROWS, ROWS)
        _copy(slot, scratch, 3 * (D * INNER // 2) + 2 * (D * INNER // 32) + block * SCALES, SCALES)
        tl.debug_barrier()
    return tl.where(place >= 0, scratch, slot)
