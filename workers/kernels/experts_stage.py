"""Absent experts on their way to the products of a decode step: each program brings the rows that it will multiply.

Owns: `stage`, one run of bytes from host memory to scratch. Used by `experts_decode.py`: a program whose expert is in
the bank copies its own rows to the expert's place in scratch, in whole lines, and then reads them there as it would a
resident's. So a step with absent experts has no more launches than one without, experts that are there are multiplied
while the others' bytes come, and a byte crosses the link once however many tokens ask for it.

The products could read host memory in place, but they ask for 64 bytes a row, which fill the link badly.
# measured, one layer and token of V4-Flash with 0, 1, 2, 6 experts absent (H200, link 54.6 GB/s, 2026-11-21): staged
# 42, 279, 540, 1589 us; in place 41, 312, 616, 1797; copied by a launch of their own 44, 316, 566, 1609. 2 KB at a time
# are 2 % better than 4 or 8.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.experts.layout import TIER_SHIFT, Tier

CHUNK_WORDS = tl.constexpr(256)
"""int64 words of one turn, at most: 64 bytes a thread are on their way at a time, 0.5 MB of an expert in all."""

SHIFT = tl.constexpr(TIER_SHIFT)
HOST_TIER = tl.constexpr(Tier.HOST.value)


@triton.jit
def in_host_memory(expert, table):
    """Whether an expert is in the host's tier."""
    return (tl.load(table + expert) >> SHIFT) == HOST_TIER


@triton.jit
def stage(source, target, at, BYTES: tl.constexpr):
    """Bytes `[at, at + BYTES)` of the expert at `source` to the same place of the one at `target`, both uint8 pointers;
    `at` and `BYTES` are multiples of 16. The caller puts a barrier between this and its reads."""
    # The largest power of two that divides the words.
    EVEN: tl.constexpr = (BYTES // 8) & -(BYTES // 8)
    WORDS: tl.constexpr = CHUNK_WORDS if EVEN > CHUNK_WORDS else EVEN
    source = (source + at).to(tl.pointer_type(tl.int64)) + tl.arange(0, WORDS)
    target = (target + at).to(tl.pointer_type(tl.int64)) + tl.arange(0, WORDS)
    for turn in range(BYTES // 8 // WORDS):
        tl.store(target + turn * WORDS, tl.load(source + turn * WORDS))
