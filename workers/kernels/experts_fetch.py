"""Absent experts of a decode step, copied to the device right before their products.

Owns: `fetch_experts`: one launch a layer that copies every expert the step needs and the slab lacks from host memory
into scratch, the slab's last slots, and writes the table that the products read instead. Does not own: residency,
products.

The products can read host memory in place, but they ask for 64 bytes a row, which fill the link badly (33 of 54 GB/s,
measured on an H200, 2026-11, six misses a layer); copies ask for whole lines (51 GB/s). One miss alone is read in place
all the same, because it then overlaps with the experts that are there. A layer without a miss costs one short launch.
Scratch holds `scratch_experts`; whoever does not fit stays where it is and is read in place.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from workers.experts.layout import TIER_SHIFT, ExpertSlab, Tier
from workers.kernels.launch import pdl_options
from workers.kernels.routing import Groups

WORDS = 2048
"""int64 words that a program moves at a time: 16 KiB, 128 bytes a thread in flight."""

TURNS = 8
"""Times a program does so: 102 programs an expert of V4-Flash."""

IN_PLACE = 1
"""Absent experts of a layer up to which nothing is copied."""


@triton.jit
def _fetch(
    host,
    base,
    table,
    step_table,
    num_active,
    active_experts,
    first_scratch,
    scratch_experts,
    EXPERT_WORDS: tl.constexpr,
    WORDS: tl.constexpr,
    TURNS: tl.constexpr,
    MOST: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HOST_TIER: tl.constexpr,
    DEVICE_TIER: tl.constexpr,
    SHIFT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (parts of an expert, most active experts)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        # Only now: the products after the next read the table before their own wait.
        tl.extra.cuda.gdc_launch_dependents()
    part, member = tl.program_id(0), tl.program_id(1)
    active = tl.load(num_active)
    if member < active:
        others = tl.load(active_experts + tl.arange(0, MOST), mask=tl.arange(0, MOST) < active, other=0)
        codes = tl.load(table + others, mask=tl.arange(0, MOST) < active, other=0)
        num_absent = tl.sum(((codes >> SHIFT) == HOST_TIER).to(tl.int32), 0)
        expert = tl.load(active_experts + member)
        code = tl.load(table + expert)
        absent = ((code >> SHIFT) == HOST_TIER) & (member < scratch_experts) & (num_absent > IN_PLACE)
        if part == 0:
            place = (DEVICE_TIER << SHIFT) | (first_scratch + member)
            tl.store(step_table + expert, tl.where(absent, place, code))
        if absent:
            source = host.to(tl.pointer_type(tl.int64)) + (code & 0xFFFFFF).to(tl.int64) * EXPERT_WORDS
            target = base.to(tl.pointer_type(tl.int64)) + (first_scratch + member).to(tl.int64) * EXPERT_WORDS
            for turn in range(TURNS):
                at = (part * TURNS + turn) * WORDS + tl.arange(0, WORDS)
                tl.store(target + at, tl.load(source + at, mask=at < EXPERT_WORDS), mask=at < EXPERT_WORDS)


def fetch_experts(
    groups: Groups,
    slab: ExpertSlab,
    step_table: Tensor,
    *,
    first_scratch: int,
    scratch_experts: int,
    expert_bytes: int,
    pdl: bool | None = None,
) -> None:
    """Bytes of absent active experts to the slots `first_scratch` and on of `slab.base`, codes of all active ones to
    `step_table` int32 [E]; `slab.host` holds whoever is absent. Codes of other experts keep their old, meaningless
    value."""
    expert_words = expert_bytes // 8
    parts = triton.cdiv(expert_words, WORDS * TURNS)
    _fetch[(parts, groups.active_experts.shape[0])](
        slab.host,
        slab.base,
        slab.table,
        step_table,
        groups.num_active,
        groups.active_experts,
        first_scratch,
        scratch_experts,
        EXPERT_WORDS=expert_words,
        WORDS=WORDS,
        TURNS=TURNS,
        MOST=triton.next_power_of_2(groups.active_experts.shape[0]),
        IN_PLACE=IN_PLACE,
        HOST_TIER=Tier.HOST.value,
        DEVICE_TIER=Tier.SLAB.value,
        SHIFT=TIER_SHIFT,
        num_warps=4,
        **pdl_options(step_table, pdl),
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash, for the check that every architecture compiles."""
    ints = ("table", "step_table", "num_active", "active_experts")
    signature = {"host": "*u8", "base": "*u8", **dict.fromkeys(ints, "*i32")}
    signature |= {"first_scratch": "i32", "scratch_experts": "i32"}
    constants = {
        "EXPERT_WORDS": 13_369_344 // 8,
        "WORDS": WORDS,
        "TURNS": TURNS,
        "MOST": 256,
        "IN_PLACE": IN_PLACE,
        "HOST_TIER": Tier.HOST.value,
        "DEVICE_TIER": Tier.SLAB.value,
        "SHIFT": TIER_SHIFT,
        "PDL": arch >= 90,
    }
    return [("fetch", _fetch, signature, constants, {"num_warps": 4})]
