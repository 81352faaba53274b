"""Greedy sampling on the device: the best token of every row, so that a decode step can feed itself.

Does not own: penalties, truncation, draws and log-probabilities (`workers/sampler.py`).

Several programs look at a row, each at `PART` logits. Each leaves one number, whose order is that of (logit, lower id
first); the last to arrive (an integer counter) takes the largest.
# measured (H200, 2026-11-21, CUPTI, one row of 129,280 logits behind the head): 14.5 us by one program.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import pdl_options

PART = 4096
"""Logits of a program."""

WARPS = 8

LEAST = tl.constexpr(-0x8000000000000000)

INFINITE, MINUS_INFINITE = tl.constexpr(0x7F800000), tl.constexpr(-0x7F800001)
"""`_ordered` of both infinities."""


class SampleWork(NamedTuple):
    """Scratch of `sample_greedy`."""

    parts: Tensor  # int64 [rows * parts of a row]
    arrived: Tensor  # int32 [rows], zero before and after

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device | str) -> SampleWork:
        """For up to `rows` rows of `vocab` logits."""
        parts = torch.empty(rows * triton.cdiv(vocab, PART), dtype=torch.int64, device=device)
        return cls(parts, torch.zeros(rows, dtype=torch.int32, device=device))


@triton.jit
def _ordered(values):
    """int64 in the order of fp32 `values`; -0.0 equals 0.0."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def sample_greedy_kernel(
    logits, token_ids, results, positions, parts, arrived, V: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr,
    ADVANCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (V / PART, B); PARTS: that many rounded up to a power of two. A NaN counts as infinity."""
    part = tl.program_id(0)
    num_parts = tl.num_programs(0)
    row = tl.program_id(1).to(tl.int64)
    token = part * PART + tl.arange(0, PART)
    if PDL:
        tl.extra.cuda.gdc_wait()
    value = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
    value = tl.where(value == value, value, float("inf"))
    top = tl.max(value, 0)
    lowest = tl.min(tl.where(value == top, token, 0x7FFFFFFF), 0)
    tl.store(parts + row * num_parts + part, (_ordered(top) << 32) | (0x7FFFFFFF - lowest).to(tl.int64))
    tl.debug_barrier()  # the store comes before the counter's release
    if tl.atomic_add(arrived + row, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        tl.store(arrived + row, 0)
        lane = tl.arange(0, PARTS)
        found = tl.load(parts + row * num_parts + lane, mask=lane < num_parts, other=LEAST, cache_modifier=".cg")
        best = tl.max(found, 0)
        key = (best >> 32).to(tl.int32)
        usable = (key < INFINITE) & (key > MINUS_INFINITE)
        # All ids stay inside the vocabulary, also where no logit is usable.
        token_id = tl.minimum(0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), V - 1)
        tl.store(results + row * 2, token_id)
        tl.store(results + row * 2 + 1, usable.to(tl.int32))
        if ADVANCE:
            position = tl.load(positions + row)
            running = position >= 0
            tl.store(token_ids + row, token_id, mask=running)
            tl.store(positions + row, position + 1, mask=running)
        else:
            tl.store(token_ids + row, token_id)


def sample_greedy(
    logits: Tensor,
    token_ids: Tensor,
    results: Tensor,
    *,
    positions: Tensor | None = None,
    work: SampleWork | None = None,
    pdl: bool | None = None,
) -> None:
    """Best token of each row of `logits [B, V] fp32` into `token_ids [B] int32`; the lowest id among equals.

    `results [B, 2] int32`, for the host: that token, and 1, or 0 where the row holds a NaN or its best logit is
    infinite: such a token means nothing. With `positions [B] int32` the step feeds the next one: positions move on by
    one, and padding rows (position -1) keep their position and token id. `work`: allocated here when None.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    parts, arrived = work or SampleWork.allocate(num_rows, vocab, logits.device)
    programs = triton.cdiv(vocab, PART)
    where = results if positions is None else positions
    sample_greedy_kernel[(programs, num_rows)](
        logits, token_ids, results, where, parts, arrived, V=vocab, PART=PART,
        PARTS=triton.next_power_of_2(programs), ADVANCE=positions is not None, num_warps=WARPS,
        **pdl_options(logits, pdl),
    )  # fmt: skip


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """For the check that every architecture compiles."""
    signature = {"logits": "*fp32", **dict.fromkeys(("token_ids", "results", "positions"), "*i32")}
    signature |= {"parts": "*i64", "arrived": "*i32"}
    constants = {"V": 129_280, "PART": PART, "PARTS": 32, "ADVANCE": True, "PDL": arch >= 90}
    return [("greedy", sample_greedy_kernel, signature, constants, {"num_warps": WARPS})]
