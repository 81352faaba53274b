"""The K best of very many scores by one program, block by block in loops: the form of `topk.py` for long rows.

Owns: which scores may be among the K best, the list of those, and the search in it. The maxima of two disjoint groups
of scores for each of K have a K-th largest that K scores reach at least, and of scores in no particular order 1.5 K.
Those that reach it, or a little less, are listed in the order of the selection, and searched there: each round counts
how many reach eight thresholds, ninths of the interval that has the K-th. Where more reach the bound than the list
holds, the K-th largest of all is found by halving, which is slow and takes any scores.

A program reads its scores twice and keeps few of them, so it is short.
# measured (H200, 64 programs, 512 of 16,384 scores; stamps): reading for the maxima 3.3 us, their search 1.6, reading
# for the marks 1.6, listing 1.5, loading the list 0.7, its search 3.2, storing 0.7.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.topk_search import last_of_ties, middle_key, ordered, places, value_of

SECTIONS = tl.constexpr(9)
"""Of an interval, in each round of a search."""


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _sections(lo, hi, by_value):
    """The eight keys between the sections of [lo, hi), hi - lo > 1: by value, or by order."""
    low, high = value_of(lo), value_of(hi)
    width = ((hi - lo).to(tl.uint32, bitcast=True) // SECTIONS).to(tl.int32)
    at = ()
    for i in tl.static_range(1, SECTIONS):
        key = ordered(low * ((SECTIONS - i) / SECTIONS) + high * (i / SECTIONS))
        key = tl.where(by_value, key, lo + i * width)
        at = at + (tl.minimum(tl.maximum(key, lo + 1), hi - 1),)  # noqa: RUF005
    return at


@triton.jit
def _narrowed(key, lo, hi, reach_lo, K: tl.constexpr, SPARE: tl.constexpr):
    """(lo, hi, how many keys reach lo, and hi): the K-th largest of the keys [N] is in [lo, hi).

    `reach_lo` >= K of the keys reach lo, none hi. Ends when `K + SPARE` or fewer reach lo, or all inside are equal.
    """
    reach_hi = reach_lo * 0
    step = reach_lo * 0
    while (hi - lo != 1) & (reach_lo > K + SPARE):
        if step % 6 == 5:  # ends on keys that exist: many ties are found at once
            least = tl.min(tl.where(key >= lo, key, 2147483647), 0)
            hi = tl.max(tl.where(key < hi, key, -2147483648), 0) + 1
            lo = least
        else:
            at = _sections(lo, hi, step % 4 != 3)
            pairs = ()
            for i in tl.static_range(4):
                pair = (key >= at[2 * i]).to(tl.int32) + tl.where(key >= at[2 * i + 1], 65536, 0)
                pairs = pairs + (pair,)  # noqa: RUF005
            pairs = tl.reduce(pairs, 0, _add_four)
            for i in tl.static_range(8):
                reach = (pairs[i // 2] >> (16 * (i % 2))) & 0xFFFF
                lo, reach_lo = tl.where(reach >= K, at[i], lo), tl.where(reach >= K, reach, reach_lo)
            for i in tl.static_range(7, -1, -1):
                reach = (pairs[i // 2] >> (16 * (i % 2))) & 0xFFFF
                hi, reach_hi = tl.where(reach < K, at[i], hi), tl.where(reach < K, reach, reach_hi)
        step += 1
    return lo, hi, reach_lo, reach_hi


@triton.jit
def _bound(scores, count, K: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr):
    """A number that K of `count` scores reach, if K of them are more than -inf and no NaN."""
    at = tl.arange(0, BLOCK)
    most = tl.full((GROUPS,), float("-inf"), tl.float32)
    score = tl.load(scores + at, mask=at < count, other=float("-inf"), cache_modifier=CACHE)
    for first in range(0, count, BLOCK):
        ahead = first + BLOCK + at
        following = tl.load(scores + ahead, mask=ahead < count, other=float("-inf"), cache_modifier=CACHE)
        most = tl.maximum(most, tl.max(tl.reshape(score, (BLOCK // GROUPS, GROUPS)), 0))
        score = following
    key = ordered(most)
    lo, hi = tl.min(key, 0), tl.max(key, 0) + 1
    lo, hi, reach_lo, reach_hi = _narrowed(key, lo, hi, lo * 0 + GROUPS, K, K // 8)
    return value_of(lo)


@triton.jit
def _marked(
    scores, entries, count, least, cut, last,
    C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Bits [C] and their numbers: bit r of column c is score r * C + c, if it reaches `least`; EXACT: if its key is
    above `cut`, or is `cut` and its entry not above `last`."""
    WORD: tl.constexpr = tl.int64 if ROWS > 32 else tl.int32
    at = tl.arange(0, BLOCK)
    bit = (tl.full((BLOCK // C,), 1, WORD) << tl.arange(0, BLOCK // C))[:, None]
    bits = tl.zeros((C,), WORD)
    number = tl.zeros((C,), tl.int32)
    score = tl.load(scores + at, mask=at < count, other=float("-inf"), cache_modifier=CACHE)
    for first in range(0, count, BLOCK):
        ahead = first + BLOCK + at
        following = tl.load(scores + ahead, mask=ahead < count, other=float("-inf"), cache_modifier=CACHE)
        marks = score >= least
        if EXACT:
            key = ordered(score)
            entry = _entries(entries, first + at, count, CACHE)
            marks = (first + at < count) & ((key > cut) | ((key == cut) & (entry <= last)))
        marks = tl.reshape(marks, (BLOCK // C, C))
        bits |= tl.sum(tl.where(marks, bit, 0), 0) << (first // C)
        number += tl.sum(marks.to(tl.int32), 0)
        score = following
    return bits, number


@triton.jit
def _list_marked(room, bits, number, count, C: tl.constexpr):
    place = tl.cumsum(number, 0) - number
    column = tl.arange(0, C)
    for r in range(tl.cdiv(count, C)):
        here = ((bits >> r) & 1).to(tl.int32)
        tl.store(room + place, r * C + column, mask=here != 0)
        place += here


@triton.jit
def _entries(entries, at, count, CACHE: tl.constexpr):
    """Those of the scores `at`: where there is no list of entries (None), they are the same."""
    entry = at
    if entries is not None:
        entry = tl.load(entries + at, mask=at < count, other=2147483647, cache_modifier=CACHE)
    return entry


@triton.jit
def _reaching(
    scores, entries, count, cut, last, BLOCK: tl.constexpr, CACHE: tl.constexpr
):  # fmt: skip
    """How many of the scores have a key above `cut`, or the key and an entry that is not above `last`."""
    at = tl.arange(0, BLOCK)
    number = count * 0
    for first in range(0, count, BLOCK):
        here = first + at
        key = ordered(tl.load(scores + here, mask=here < count, other=0.0, cache_modifier=CACHE))
        entry = _entries(entries, here, count, CACHE)
        number += tl.sum(((here < count) & ((key > cut) | ((key == cut) & (entry <= last)))).to(tl.int32), 0)
    return number


@triton.jit
def _exact_cut(scores, entries, count, K: tl.constexpr, BLOCK: tl.constexpr, CACHE: tl.constexpr):
    """Key of the K-th largest of more than K scores, and the last entry that has it and is chosen.

    For rows with more equal scores at the bound than the list holds, or of NaN: it reads the row 64 times.
    # measured (H200, 2026-11-22, 64 sequences of 64K tokens): index scores and selection 298 us where this ran, which
    # otherwise take 62; that it ran is inferred from the time.
    """
    lo = count * 0 - 2147483647  # of a NaN, which all reach
    hi = count * 0 + 0x7F800001  # above infinity
    for _ in range(32):  # not `while`: this compiler fails on loads in a loop inside one
        key = middle_key(lo, hi)
        enough = _reaching(scores, entries, count, key, 2147483647, BLOCK, CACHE) >= K
        lo, hi = tl.where(enough, key, lo), tl.where(enough, hi, key)
    begin = count * 0 - 1  # too few up to here
    end = count * 0 + 2147483646
    for _ in range(32):
        entry = begin + (end - begin) // 2
        enough = _reaching(scores, entries, count, lo, entry, BLOCK, CACHE) >= K
        begin, end = tl.where(enough, begin, entry), tl.where(enough, entry, end)
    return lo, end


@triton.jit
def choose_listed(
    scores, entries, count, first, ids, kept, room,
    K: tl.constexpr, WALK: tl.constexpr, MOST: tl.constexpr, KEEP: tl.constexpr, CACHE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The K best of `count` scores, K < count: entries first + i to ids[0:K], (KEEP) their scores to `kept`.

    entries: int32 pointer to those of the scores, None: their places. room: int32 [MOST]. Chosen ones are in the order
    of (place % C, place // C). CACHE: of loads, where another program has just written the scores. WALK: (C, scores at
    most, scores of a block).
    """
    C: tl.constexpr = WALK[0]
    ROWS: tl.constexpr = WALK[1] // C
    BLOCK: tl.constexpr = WALK[2]
    GROUPS: tl.constexpr = max(2 * triton.next_power_of_2(K), C)
    least = _bound(scores, count, K, GROUPS, BLOCK, CACHE)
    bits, number = _marked(scores, entries, count, least, 0, 0, C, BLOCK, ROWS, False, CACHE)
    listed = tl.sum(number, 0)
    if (listed >= K) & (listed <= MOST):
        _list_marked(room, bits, number, count, C)
    else:
        cut, last = _exact_cut(scores, entries, count, K, BLOCK, CACHE)
        bits_of_best, number_of_best = _marked(scores, entries, count, least, cut, last, C, BLOCK, ROWS, True, CACHE)
        _list_marked(room, bits_of_best, number_of_best, count, C)
        listed = K + listed * 0
    tl.debug_barrier()
    at = tl.arange(0, MOST)
    live = at < listed
    place = tl.load(room + at, mask=live, other=0)
    score = tl.load(scores + place, mask=live, other=0.0, cache_modifier=CACHE)
    entry = place
    if entries is not None:
        entry = tl.load(entries + place, mask=live, other=0, cache_modifier=CACHE)
    key = tl.where(live, ordered(score), -2147483648)
    lo, hi = tl.min(tl.where(live, key, 2147483647), 0), tl.max(key, 0) + 1
    lo, hi, reach_lo, reach_hi = _narrowed(key, lo, hi, listed, K, 0)
    last = listed * 0 + 2147483647
    if reach_lo != K:
        last = last_of_ties(key, entry, lo, K - reach_hi)
    chosen = (key > lo) | ((key == lo) & (entry <= last))
    place = places(chosen, MOST, MOST)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(ids + place, first + entry, mask=chosen)
    if KEEP:
        tl.store(kept + place, score, mask=chosen)
