"""Exact top-k of index scores: the K best visible entries of each token, ties to the lower entry.

Owns: the choice (`workers/reference/indexer.select_topk`, as a set), and how programs share a row. Does not own: the
search for the K-th score, among scores that a program keeps (`topk_search.py`) or in rows too long for that
(`topk_list.py`). The order inside a selection is fixed: it depends on the scores and their number alone.

One program looks at CHUNK entries of a token. Longer contexts have several: each leaves its own K best, and the last
to arrive (an integer counter) chooses among those, so that length costs no further launch.

Up to RANKED entries the place of a chosen one is its rank, by counting the entries before it. For few tokens many
programs count, each for some entries, and nothing is searched; for many, one program sorts those it has found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import EARLY_TOKENS, pdl_options
from workers.kernels.topk_list import choose_listed
from workers.kernels.topk_search import chosen_keys, ordered, places

CHUNKS = (4096, 16384)
"""Entries one program chooses from: the least that holds a row, or the last (64K tokens of context) over and over.
At most 32767: two counts share an int32."""

DIRECT = 4096
"""Scores of a row that one program keeps while it searches; it walks through more.
# measured (H200, 2026-11-22, 64 sequences of 16K tokens): index scores and selection 25.6 us, 28.1 with 2,048."""

LIST_ROOM = 2
"""Scores that a list has room for, for each of K.
# measured (64 sequences of 64K tokens): 61.5 us, 63.3 with 4."""

MAX_CANDIDATES = 16384
"""Of all chunks of a token, chosen from by one program: 1M tokens of context at K = 1024."""

RANKED = 2048
"""Most visible entries whose selection is in the order of their scores."""

RANK_TOKENS = 8
"""Most tokens whose ranks are counted by many programs: the counts grow with the square of the entries."""

RANK_ROWS, RANK_WIDTH = 16, 128
"""Entries that such a program counts for, and with how many at a time it compares them.
# measured (H200, 2026-11-21, one token at 4K of context): 2.0 us, 3.1 with 32 entries; the search takes 4.8, and 9.6
# with 32 warps."""

MOST_NEAR = 32
"""A search ends when so many scores are left around the K-th."""

WARPS = 8
"""Of a program of decode.
# measured (H200, 2026-11-22, index scores and selection of 1, 16 and 64 sequences of 64K tokens): 17.5, 32.4, 61.6 us;
# 17.9, 32.3, 61.5 with 16 warps, and 18.2, 34.5, 65.5 where 16 warps keep all scores of a row."""

COLUMNS = (256, 512)
"""Of the order of selections above RANKED entries, for each chunk: ascending (entry % COLUMNS, entry // COLUMNS)."""

PREFILL_SIZES = ((2048, 2), (4096, 4), (16384, 16))
"""(entries, warps) of a program of prefill: very many tokens need few instructions, not many threads.
# measured (H200, 2026-11-21, 8,192 tokens of one prompt): 74 us, 77 with 4 warps, 116 with one, and 130 and 141 with 4
# and 8 for 4,096 entries. 2,048 tokens at 43K of context 229 us, 279 where a program keeps all scores (2026-11-22)."""

PREFILL_COLUMNS = 256
"""Columns of the order of prefill's selections. One number for all tables: those of a step are as wide as its longest
context asks, and the bits of a token must not depend on the others."""


@triton.jit
def _choose_by_rank(
    scores, visible, selected, part, K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Of ROWS of the `visible` entries, K < visible <= N, each to the place that is its rank, if that is below K."""
    entry = part * ROWS + tl.arange(0, ROWS)
    live = entry < visible
    key = ordered(tl.load(scores + entry, mask=live, other=0.0))
    lane = tl.arange(0, WIDTH)
    own = part * ROWS // WIDTH
    near = tl.load(scores + own * WIDTH + lane, mask=own * WIDTH + lane < visible, other=0.0)
    blocks = ()
    for b in tl.static_range(N // WIDTH):
        blocks = blocks + (tl.load(scores + b * WIDTH + lane, mask=lane < visible - b * WIDTH, other=0.0),)
    same = (ordered(near)[None, :] == key[:, None]) & (own * WIDTH + lane[None, :] < entry[:, None])
    before = same.to(tl.int32)
    for b in tl.static_range(N // WIDTH):
        other = tl.where(lane < visible - b * WIDTH, ordered(blocks[b]), -2147483648)
        least = key - (own > b).to(tl.int32)  # ties go to the lower entry
        before += (other[None, :] > least[:, None]).to(tl.int32)
    rank = tl.sum(before, 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(selected + rank, entry, mask=live & (rank < K))


@triton.jit
def _choose_in_order(
    scores, visible, selected, kept, ids, K: tl.constexpr, KP: tl.constexpr, NEAR: tl.constexpr, N: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same selection by one program: the K best are searched, and then sorted."""
    _choose(scores, visible, ids, kept, K, NEAR, N, COLUMNS, True, False)
    tl.debug_barrier()
    at = tl.arange(0, KP)
    key = ordered(tl.load(kept + at, mask=at < K, other=0.0)).to(tl.int64) << 32
    key |= (0x7FFFFFFF - tl.load(ids + at, mask=at < K, other=0)).to(tl.int64)
    key = tl.sort(tl.where(at < K, key, -0x8000000000000000), descending=True)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(selected + at, 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32), mask=at < K)


@triton.jit
def _choose(
    scores, count, ids, kept, K: tl.constexpr, NEAR: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The K best of `count` <= N scores, K < count: entries to ids[0:K], (KEEP) their scores to `kept`."""
    at = tl.arange(0, N)
    live = at < count
    score = tl.load(scores + at, mask=live, other=0.0)
    key = tl.where(live, ordered(score), -2147483648)
    chosen = chosen_keys(scores, key, at, live, count, ids, K, NEAR, COLUMNS)
    place = places(chosen, N, COLUMNS)
    chosen &= place < K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(ids + place, at, mask=chosen)
    if KEEP:
        tl.store(kept + place, score, mask=chosen)


@triton.jit
def _choose_all(scores, count, first, ids, kept, K: tl.constexpr, KP: tl.constexpr, KEEP: tl.constexpr):
    """All of `count` <= K entries; -1 fills the rest."""
    at = tl.arange(0, KP)
    tl.store(ids + at, tl.where(at < count, first + at, -1), mask=at < K)
    if KEEP:
        tl.store(kept + at, tl.load(scores + at, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def _choose_ranked(
    scores, visible, selected, part, kept, ids,
    K: tl.constexpr, KP: tl.constexpr, NEAR: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The K best of `visible` <= N entries in order: `part` of it where ROWS says so, else all."""
    if ROWS > 0:
        _choose_by_rank(scores, visible, selected, part, K, ROWS, WIDTH, N, PDL)
    else:
        _choose_in_order(scores, visible, selected, kept, ids, K, KP, NEAR, N, COLUMNS, PDL)


@triton.jit(do_not_specialize=["scores_stride"])  # wider loads would give a thread other keys than `places` expects
def topk(
    scores,
    scores_stride,
    positions,
    selected,
    candidate_scores,
    candidate_ids,
    arrived,
    room,
    chunks,
    RATIO: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    NEAR: tl.constexpr,  # so many scores around the K-th are ranked, not searched; at most K
    CHUNK: tl.constexpr,
    CANDIDATES: tl.constexpr,  # of all chunks, a power of two; 0 when there is one chunk
    COLUMNS: tl.constexpr,
    MOST: tl.constexpr,  # scores that a list has room for
    DIRECT: tl.constexpr,  # scores that a program keeps
    LISTED: tl.constexpr,  # more are walked through, DIRECT at a time
    RANK: tl.constexpr,  # most entries whose selection is in order
    ROWS: tl.constexpr,  # of a program that counts ranks; 0: one program does
    WIDTH: tl.constexpr,
    EARLY: tl.constexpr,  # the launch behind is small, and waits before it reads what this one writes
    PDL: tl.constexpr,
):
    """Grid (chunks or programs that count ranks, T). scores fp32 [T, scores_stride], selected int32 [T, K], candidates
    [T, chunks, K], room int32 [T, chunks, MOST]."""
    SMALL: tl.constexpr = DIRECT // 4 if DIRECT // 4 > K else DIRECT // 2
    WALK: tl.constexpr = (COLUMNS if COLUMNS < DIRECT else DIRECT, max(CHUNK, CANDIDATES), DIRECT)
    token = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    visible = (tl.load(positions + token) + 1) // RATIO
    if PDL:
        tl.extra.cuda.gdc_wait()
        if EARLY:
            tl.extra.cuda.gdc_launch_dependents()
    first = chunk * CHUNK
    row = scores + token * scores_stride + first
    out = selected + token * K
    kept = candidate_scores + token * chunks * K
    ids = candidate_ids + token * chunks * K
    room += (token * chunks + chunk) * MOST
    if RANK > 0:  # noqa: SIM102 - decided by the compiler
        if (visible > K) & (visible <= RANK):
            if (chunk == 0) | ((ROWS > 0) & (chunk * ROWS < visible)):
                row -= first
                if visible <= RANK // 2:
                    _choose_ranked(
                        row, visible, out, chunk, kept, ids, K, KP, NEAR, RANK // 2, ROWS, WIDTH, COLUMNS, PDL
                    )
                else:
                    _choose_ranked(row, visible, out, chunk, kept, ids, K, KP, NEAR, RANK, ROWS, WIDTH, COLUMNS, PDL)
            return
    if visible <= CHUNK:
        if chunk == 0:
            if visible <= K:
                _choose_all(row, visible, 0, out, row, K, KP, False)
            elif LISTED:
                if visible <= DIRECT:
                    _choose(row, visible, out, row, K, NEAR, DIRECT, COLUMNS, False, PDL)
                else:
                    choose_listed(row, None, visible, 0, out, row, room, K, WALK, MOST, False, "", PDL)
            elif visible <= SMALL:
                _choose(row, visible, out, row, K, NEAR, SMALL, COLUMNS, False, PDL)
            else:
                _choose(row, visible, out, row, K, NEAR, DIRECT, COLUMNS, False, PDL)
    elif CANDIDATES > 0:  # noqa: SIM102 - the outer one is decided by the compiler
        if first < visible:
            own = chunk * K
            count = min(visible - first, CHUNK)
            if count <= K:
                _choose_all(row, count, first, ids + own, kept + own, K, KP, True)
            else:
                choose_listed(row, None, count, first, ids + own, kept + own, room, K, WALK, MOST, True, "", PDL)
            tl.debug_barrier()  # every thread's stores come before the counter's release
            last = tl.cdiv(visible, CHUNK) - 1
            if tl.atomic_add(arrived + token, 1, sem="acq_rel", scope="gpu") == last:
                tl.store(arrived + token, 0)
                count = last * K + min(visible - last * CHUNK, K)
                choose_listed(kept, ids, count, 0, out, row, room, K, WALK, MOST, False, ".cg", False)


def _chunk(max_entries: int) -> int:
    return next((chunk for chunk in CHUNKS if chunk >= max_entries), CHUNKS[-1])


def _size(max_entries: int, ranked: bool) -> tuple[int, int]:
    """Chunk and warps of a program."""
    chunk = _chunk(max_entries)
    if ranked:
        return chunk, WARPS
    return next(size for size in PREFILL_SIZES if size[0] >= min(max_entries, chunk))


def _is_listed(max_entries: int) -> bool:
    return max_entries > min(DIRECT, CHUNKS[-1])


def _most_listed(k: int) -> int:
    return LIST_ROOM * int(triton.next_power_of_2(k))


class TopkWork(NamedTuple):
    """Candidates, [T * chunks * K], zeroed counters int32 [T], and room for lists, int32 [T * chunks * MOST]."""

    scores: Tensor  # fp32
    ids: Tensor  # int32
    arrived: Tensor
    room: Tensor
    chosen: int
    """K."""

    @classmethod
    def allocate(cls, tokens: int, max_entries: int, k: int, device: torch.device | str) -> TopkWork:
        """Raises ValueError for a K above the chunk, or candidates beyond the 16 bits of a packed count."""
        chunks = -(-max_entries // _chunk(max_entries))
        if k > CHUNKS[0] // 4 or (chunks > 1 and chunks * k > MAX_CANDIDATES):
            raise ValueError(f"no top-k kernel for k {k} of {max_entries} entries")
        words = tokens * max(1, chunks) * k
        scores = torch.empty(words, dtype=torch.float32, device=device)
        ids, arrived = (torch.zeros(n, dtype=torch.int32, device=device) for n in (words, tokens))
        listed = tokens * chunks * _most_listed(k) if _is_listed(max_entries) else 0
        return cls(scores, ids, arrived, torch.empty(listed, dtype=torch.int32, device=device), k)

    def capacity(self, max_entries: int) -> int:
        """Tokens that fit when each may see `max_entries`."""
        chunks = -(-max_entries // _chunk(max_entries))
        return min(self.arrived.numel(), self.scores.numel() // (max(1, chunks) * self.chosen))


def select_topk(
    scores: Tensor,
    positions: Tensor,
    selected: Tensor,
    work: TopkWork,
    *,
    ratio: int = 4,
    ranked: bool = True,
    pdl: bool | None = None,
) -> None:
    """The K best of each token's (position + 1) // ratio first scores: selected int32 [T, K], -1 after the last.

    scores: fp32 [T, N], contiguous rows; NaN ranks last. A padding token (position -1) selects nothing. `ranked` False:
    in no order of scores anywhere, which very many tokens are spared.
    """
    num_tokens, k = selected.shape
    if not num_tokens:
        return
    chunk, warps = _size(scores.shape[1], ranked)
    chunks = triton.cdiv(scores.shape[1], chunk)
    assert num_tokens <= work.capacity(scores.shape[1]), "TopkWork is too small"
    most_ranked, spread = min(RANKED, chunk), num_tokens <= RANK_TOKENS
    if not ranked or most_ranked < 2 * RANK_WIDTH:
        most_ranked = 0
    counting = triton.cdiv(min(most_ranked, scores.shape[1]), RANK_ROWS) if spread else 1
    options = pdl_options(scores, pdl)
    topk[max(chunks, counting), num_tokens](
        scores,
        scores.stride(0),
        positions,
        selected,
        work.scores,
        work.ids,
        work.arrived,
        work.room,
        chunks,
        RATIO=ratio,
        K=k,
        KP=triton.next_power_of_2(k),
        NEAR=min(MOST_NEAR, triton.next_power_of_2(k + 1) // 2),
        CHUNK=chunk,
        CANDIDATES=triton.next_power_of_2(chunks * k) if chunks > 1 else 0,
        COLUMNS=COLUMNS[CHUNKS.index(chunk)] if ranked else PREFILL_COLUMNS,
        MOST=_most_listed(k),
        DIRECT=min(DIRECT, chunk),
        LISTED=_is_listed(scores.shape[1]),
        RANK=most_ranked,
        ROWS=RANK_ROWS if spread else 0,
        WIDTH=RANK_WIDTH,
        EARLY=options["PDL"] and num_tokens <= EARLY_TOKENS,
        num_warps=warps,
        **options,
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations for V4-Flash, for `tests/workers/kernels/compiling.py`."""
    signature = dict.fromkeys(("positions", "selected", "candidate_ids", "arrived"), "*i32")
    signature |= dict.fromkeys(("scores", "candidate_scores"), "*fp32")
    signature |= {"scores_stride": "i32", "chunks": "i32", "room": "*i32"}
    constants = {"RATIO": 4, "K": 512, "KP": 512, "NEAR": MOST_NEAR, "PDL": arch >= 90}
    constants["WIDTH"] = RANK_WIDTH
    cases = [
        (f"{name} {tokens}", *_size(columns, bool(rank)), candidates, rank, rows)
        for name, columns, candidates in (("short", CHUNKS[0], 0), ("long", 2 * CHUNKS[1], 8192))
        for tokens, rank, rows in (("few", RANKED, RANK_ROWS), ("many", RANKED, 0), ("prefill", 0, 0))
    ]
    cases.append(("shortest prefill", *PREFILL_SIZES[0], 0, 0, 0))
    found = []
    for name, chunk, warps, candidates, rank, rows in cases:
        columns = COLUMNS[CHUNKS.index(chunk)] if rank else PREFILL_COLUMNS
        sizes = {
            "EARLY": name.endswith("few") and arch >= 90,
            "CHUNK": chunk,
            "MOST": _most_listed(512),
            "DIRECT": min(DIRECT, chunk),
            "LISTED": _is_listed(chunk),
            "CANDIDATES": candidates,
            "COLUMNS": columns,
            "RANK": rank,
            "ROWS": rows,
        }
        options = {"num_warps": warps, "launch_pdl": arch >= 90}
        found.append((name, topk, signature, constants | sizes, options))
    return found
