"""Greedy sampling on the device: the best token of every row, so that a decode step can feed itself.

Does not own: penalties, truncation, draws and log-probabilities (`workers/sampler.py`).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import pdl_options

BLOCK = 16384
"""Logits that one step of a row's loop reads: 64 bytes in flight per thread."""

WARPS = 32


@triton.jit
def sample_greedy_kernel(
    logits, token_ids, finite, positions, V: tl.constexpr, BLOCK: tl.constexpr, ADVANCE: tl.constexpr, PDL: tl.constexpr
):
    """Grid (B)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    best_id = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    start = tl.zeros((), tl.int32)
    while start < V:
        token = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * V + token, mask=token < V, other=float("-inf"))
        bad |= (value != value).to(tl.int32)
        better = value > best
        best = tl.where(better, value, best)
        best_id = tl.where(better, token, best_id)
        start += BLOCK
    top = tl.max(best, 0)
    lowest = tl.min(tl.where(best == top, best_id, 0x7FFFFFFF), 0)
    usable = (tl.max(bad, 0) == 0) & (tl.abs(top) < float("inf"))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(finite + row, usable.to(tl.int32))
    # All ids stay inside the vocabulary, also where no logit is usable.
    token = tl.minimum(lowest, V - 1)
    if ADVANCE:
        position = tl.load(positions + row)
        running = position >= 0
        tl.store(token_ids + row, token, mask=running)
        tl.store(positions + row, position + 1, mask=running)
    else:
        tl.store(token_ids + row, token)


def sample_greedy(
    logits: Tensor,
    token_ids: Tensor,
    finite: Tensor,
    *,
    positions: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """Best token of each row of `logits [B, V] fp32` into `token_ids [B] int32`; the lowest id among equals.

    `finite [B] int32` becomes 0 where a row holds a NaN or its best logit is infinite: such a token means nothing. With
    `positions [B] int32` the step feeds the next one: positions move on by one, and padding rows (position -1) keep
    their position and token id.
    """
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    block = min(BLOCK, triton.next_power_of_2(vocab))
    options = pdl_options(logits, pdl)
    where = finite if positions is None else positions
    flags = {"ADVANCE": positions is not None, "num_warps": WARPS, **options}
    sample_greedy_kernel[(num_rows,)](logits, token_ids, finite, where, V=vocab, BLOCK=block, **flags)


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """For the check that every architecture compiles."""
    signature = {"logits": "*fp32", "token_ids": "*i32", "finite": "*i32", "positions": "*i32"}
    constants = {"V": 129_280, "BLOCK": BLOCK, "ADVANCE": True, "PDL": arch >= 90}
    return [("greedy", sample_greedy_kernel, signature, constants, {"num_warps": WARPS})]
