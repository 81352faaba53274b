"""Exact top-k of index scores: the K best visible entries of each token, ties to the lower entry, in ascending order.

Owns: the choice (`workers/reference/indexer.select_topk`, as a set). Scores are compared as integers of the same order.
The K-th largest is found by narrowing an interval of integers, eight parts a step: thresholds are counted, nothing is
sorted or moved, and the search ends as soon as some threshold leaves exactly K. What passes is then compacted by one
scan, so the order is that of the entries: it depends on nothing but the scores.

One program looks at CHUNK entries of a token. Longer contexts have several: each leaves its own K best, and the last
to arrive (an integer counter) chooses among those, so that length costs no further launch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import pdl_options

CHUNK = 4096
"""Entries one program chooses from; 16K tokens of context are one chunk. At most 16384: a scan packs two counts."""

_WARPS = 8


@triton.jit
def _ordered(scores):
    """int32 whose order is that of fp32 scores; -0.0 equals 0.0."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _counts(key, live, lo, step, hi):
    """How many keys reach lo + d * step, d = 1 .. 4 and 5 .. 7, as 16-bit fields of two int64; none from `hi` on."""
    low = tl.zeros(key.shape, tl.int64)
    high = tl.zeros(key.shape, tl.int64)
    for d in tl.static_range(1, 8):
        bound = lo + d * step
        reaches = live & (key >= tl.minimum(bound, 2147483647).to(tl.int32)) & (bound < hi)
        if d <= 4:
            low += reaches.to(tl.int64) << (16 * (d - 1))
        else:
            high += reaches.to(tl.int64) << (16 * (d - 5))
    return tl.sum(low, 0), tl.sum(high, 0)


@triton.jit
def _narrow(low, high, lo, hi, step, count, K: tl.constexpr):
    """The part of [lo, hi) that still holds the K-th largest, and how many keys reach its lower end."""
    parts = tl.zeros((), tl.int64)
    for d in tl.static_range(1, 8):
        reached = ((low >> (16 * (d - 1))) if d <= 4 else (high >> (16 * (d - 5)))) & 0xFFFF
        enough = reached >= K
        parts = tl.where(enough, d, parts)
        count = tl.where(enough, reached, count)
    new_lo = lo + parts * step
    return new_lo, tl.minimum(hi, new_lo + step), count


@triton.jit
def _bounds(key, live):
    """Interval [lo, hi) of int64 around the live keys."""
    lo = tl.min(tl.where(live, key, 2147483647), 0).to(tl.int64)
    return lo, tl.max(tl.where(live, key, -2147483648), 0).to(tl.int64) + 1


@triton.jit
def _compact(key, live, lo, exact, K: tl.constexpr):
    """Which keys are chosen, and where each goes. `lo`: K-th largest, or (exact) a bound that exactly K reach."""
    above = live & (key.to(tl.int64) >= tl.where(exact, lo, lo + 1))
    equal = live & (key.to(tl.int64) == lo) & (exact == 0)
    packed = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(packed, 0) - packed
    needed = K - (tl.sum(packed, 0) & 0xFFFF)
    above_before = before & 0xFFFF
    equal_before = before >> 16
    chosen = above | (equal & (equal_before < needed))
    return chosen, above_before + tl.minimum(equal_before, needed)


@triton.jit
def _choose(scores, first, count, ids, keys, K: tl.constexpr, N: tl.constexpr, WITH_KEYS: tl.constexpr):
    """The K best of `count` <= N scores (K < count): entries first + i ascending to ids[0:K], with their keys."""
    at = tl.arange(0, N)
    live = at < count
    key = _ordered(tl.load(scores + at, mask=live, other=0.0))
    lo, hi = _bounds(key, live)
    reached = count.to(tl.int64)
    while (hi - lo > 1) & (reached != K):
        step = (hi - lo + 7) // 8
        low, high = _counts(key, live, lo, step, hi)
        lo, hi, reached = _narrow(low, high, lo, hi, step, reached, K)
    chosen, place = _compact(key, live, lo, reached == K, K)
    tl.store(ids + place, first + at, mask=chosen)
    if WITH_KEYS:
        tl.store(keys + place, key, mask=chosen)


@triton.jit
def _choose_all(scores, first, count, ids, keys, K: tl.constexpr, KP: tl.constexpr, WITH_KEYS: tl.constexpr):
    """All of `count` <= K entries; -1 fills the rest."""
    at = tl.arange(0, KP)
    tl.store(ids + at, tl.where(at < count, first + at, -1), mask=at < K)
    if WITH_KEYS:
        tl.store(keys + at, _ordered(tl.load(scores + at, mask=at < count, other=0.0)), mask=at < K)


@triton.jit
def _choose_candidates(keys, ids, count, selected, K: tl.constexpr, N: tl.constexpr):
    """The K best of `count` candidates (K < count), N at a time from memory: the search of `_choose` over tiles."""
    at = tl.arange(0, N)
    lo = tl.full((), 2147483647, tl.int64)
    hi = tl.full((), -2147483648, tl.int64)
    for base in range(0, count, N):
        live = base + at < count
        tile_lo, tile_hi = _bounds(tl.load(keys + base + at, mask=live, other=0), live)
        lo, hi = tl.minimum(lo, tile_lo), tl.maximum(hi, tile_hi)
    reached = count.to(tl.int64)
    while (hi - lo > 1) & (reached != K):
        step = (hi - lo + 7) // 8
        # 16-bit fields suffice for 65,536 candidates: a bound above the least of them leaves one out.
        low = tl.zeros((), tl.int64)
        high = tl.zeros((), tl.int64)
        for base in range(0, count, N):
            live = base + at < count
            tile_low, tile_high = _counts(tl.load(keys + base + at, mask=live, other=0), live, lo, step, hi)
            low += tile_low
            high += tile_high
        lo, hi, reached = _narrow(low, high, lo, hi, step, reached, K)
    exact = reached == K
    upper = tl.where(exact, lo, lo + 1)
    num_above = tl.zeros((), tl.int32)
    for base in range(0, count, N):
        live = base + at < count
        key = tl.load(keys + base + at, mask=live, other=0)
        num_above += tl.sum((live & (key.to(tl.int64) >= upper)).to(tl.int32), 0)
    needed = K - num_above
    above_done = tl.zeros((), tl.int32)
    equal_done = tl.zeros((), tl.int32)
    for base in range(0, count, N):
        live = base + at < count
        key = tl.load(keys + base + at, mask=live, other=0).to(tl.int64)
        above = live & (key >= upper)
        equal = live & (key == lo) & (exact == 0)
        packed = above.to(tl.int32) + (equal.to(tl.int32) << 16)
        before = tl.cumsum(packed, 0) - packed
        total = tl.sum(packed, 0)
        equal_before = equal_done + (before >> 16)
        place = above_done + (before & 0xFFFF) + tl.minimum(equal_before, needed)
        chosen = above | (equal & (equal_before < needed))
        tl.store(selected + place, tl.load(ids + base + at, mask=live, other=0), mask=chosen)
        above_done += total & 0xFFFF
        equal_done += total >> 16


@triton.jit
def topk(
    scores,
    scores_stride,
    positions,
    selected,
    candidate_keys,
    candidate_ids,
    arrived,
    chunks,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKED: tl.constexpr,
    ROW_ALIGN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (chunks, T). scores fp32 [T, scores_stride], selected int32 [T, K], candidates int32 [T, chunks, K]."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    visible = (tl.load(positions + token) + 1) // RATIO
    first = chunk * CHUNK
    row = scores + token * tl.multiple_of(scores_stride, ROW_ALIGN) + first
    out = selected + token * K
    if visible <= CHUNK:
        if chunk == 0:
            if visible <= K:
                _choose_all(row, 0, visible, out, out, K, KP, False)
            elif visible <= CHUNK // 4:
                _choose(row, 0, visible, out, out, K, CHUNK // 4, False)
            elif visible <= CHUNK // 2:
                _choose(row, 0, visible, out, out, K, CHUNK // 2, False)
            else:
                _choose(row, 0, visible, out, out, K, CHUNK, False)
    elif CHUNKED:  # noqa: SIM102 - the outer one is decided by the compiler
        if first < visible:
            keys = candidate_keys + token * chunks * K
            ids = candidate_ids + token * chunks * K
            count = min(visible - first, CHUNK)
            if count <= K:
                _choose_all(row, first, count, ids + chunk * K, keys + chunk * K, K, KP, True)
            else:
                _choose(row, first, count, ids + chunk * K, keys + chunk * K, K, CHUNK, True)
            tl.debug_barrier()  # every thread's stores come before the counter's release
            last = tl.cdiv(visible, CHUNK) - 1
            if tl.atomic_add(arrived + token, 1, sem="acq_rel", scope="gpu") == last:
                tl.store(arrived + token, 0)
                _choose_candidates(keys, ids, last * K + min(visible - last * CHUNK, K), out, K, CHUNK)


class TopkWork(NamedTuple):
    """Candidates of contexts longer than one chunk: int32 [T * chunks * K] each, and zeroed counters int32 [T]."""

    keys: Tensor
    ids: Tensor
    arrived: Tensor
    chosen: int
    """K."""

    @classmethod
    def allocate(cls, tokens: int, max_entries: int, k: int, device: torch.device | str) -> TopkWork:
        """Raises ValueError for a K above the chunk, or candidates beyond the 16 bits of a packed count."""
        chunks = -(-max_entries // CHUNK)
        if k > CHUNK // 4 or (chunks > 1 and chunks * k > 65536):
            raise ValueError(f"no top-k kernel for k {k} of {max_entries} entries")
        words = tokens * chunks * k if chunks > 1 else 1
        keys, ids = (torch.empty(words, dtype=torch.int32, device=device) for _ in range(2))
        return cls(keys, ids, torch.zeros(tokens, dtype=torch.int32, device=device), k)

    def capacity(self, max_entries: int) -> int:
        """Tokens that fit when each may see `max_entries`."""
        chunks = -(-max_entries // CHUNK)
        tokens = self.arrived.numel()
        return tokens if chunks <= 1 else min(tokens, self.keys.numel() // (chunks * self.chosen))


def select_topk(
    scores: Tensor,
    positions: Tensor,
    selected: Tensor,
    work: TopkWork,
    *,
    ratio: int = 4,
    pdl: bool | None = None,
) -> None:
    """The K best of each token's (position + 1) // ratio first scores: selected int32 [T, K], ascending, then -1.

    scores: fp32 [T, N], contiguous rows, without NaN; a padding token (position -1) selects nothing.
    """
    num_tokens, k = selected.shape
    if not num_tokens:
        return
    chunks = triton.cdiv(scores.shape[1], CHUNK)
    assert num_tokens <= work.capacity(scores.shape[1]), "TopkWork is too small"
    topk[chunks, num_tokens](
        scores,
        scores.stride(0),
        positions,
        selected,
        work.keys,
        work.ids,
        work.arrived,
        chunks,
        RATIO=ratio,
        K=k,
        KP=triton.next_power_of_2(k),
        CHUNK=CHUNK,
        CHUNKED=chunks > 1,
        ROW_ALIGN=16 if scores.stride(0) % 16 == 0 else 1,
        num_warps=_WARPS,
        **pdl_options(scores, pdl),
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations for V4-Flash, for `tests/workers/kernels/compiling.py`."""
    signature = dict.fromkeys(("positions", "selected", "candidate_keys", "candidate_ids", "arrived"), "*i32")
    signature |= {"scores": "*fp32", "scores_stride": "i32", "chunks": "i32"}
    constants = {"RATIO": 4, "K": 512, "KP": 512, "CHUNK": CHUNK, "CHUNKED": True, "ROW_ALIGN": 16, "PDL": arch >= 90}
    return [("topk", topk, signature, constants, {"num_warps": _WARPS, "launch_pdl": arch >= 90})]
