"""Which of many scores are the K best: the search of a program of `topk.py`.

Owns: the order of scores (as integers of the same order, NaN below everything), the search for the K-th, and the place
of each chosen one. The search keeps an interval around the K-th largest and counts, in two packed sums, how many scores
reach four thresholds inside it: two beside the place where interpolation expects the K-th, and two between these and
the ends, halfway by value and by order in turn, so that no distribution is slow. It ends when exactly K reach a
threshold, when so few are left in the interval that their ranks are counted, or when it is one number wide.
# measured (H200, 2026-11-22, 64 rows of 16,384 scores): 3 rounds in the mean, 4 at most; 6 and 13 with two thresholds,
# and a launch waits for its slowest row. Index scores and selection of 64 sequences of 64K 65.9 us, 71.8 with two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def ordered(scores):
    """int32 whose order is that of fp32 scores; -0.0 equals 0.0, NaN is the least."""
    bits = (scores + 0.0).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(scores == scores, key, -2147483647)


@triton.jit
def _value(key):
    """The fp32 number of an ordered key; infinities as the largest numbers."""
    key = tl.minimum(tl.maximum(key, -0x7F800000), 0x7F7FFFFF)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _odds(reach, count):
    """log2 of the odds of reaching a threshold: nearly linear in the threshold for scores of any bell shape."""
    reached = reach.to(tl.float32)
    return tl.log2((reached + 0.5) / (count.to(tl.float32) - reached + 0.5))


@triton.jit
def _between(least, most, part):
    part = tl.minimum(tl.maximum(part, 0.0), 1.0)
    return ordered(least * (1.0 - part) + most * part)


@triton.jit
def _middle(lo, hi):
    return lo + ((hi - lo).to(tl.uint32, bitcast=True) >> 1).to(tl.int32)


@triton.jit
def _thresholds(lo, hi, reach_lo, reach_hi, count, by_value, K: tl.constexpr):
    """Four ascending keys between lo and hi, where `reach_lo` >= K > `reach_hi` of `count` keys reach the ends.

    The spread of the inner two is twice the standard deviation of the place of one of so many random keys.
    """
    inside = (reach_lo - reach_hi).to(tl.float32)
    linear = ((reach_lo - K).to(tl.float32) + 0.5) / inside
    odds_lo = _odds(reach_lo, count)
    part = (odds_lo - _odds(K + 0 * count, count)) / (odds_lo - _odds(reach_hi, count))
    spread = 2.0 * tl.sqrt(linear * (1.0 - linear) / inside) + 1.0 / inside
    low, high = part - spread, part + spread
    least, most = _value(lo), _value(hi)
    second, third = _between(least, most, low), _between(least, most, high)
    first = tl.where(by_value, _between(least, most, 0.5 * low), _middle(lo, second))
    fourth = tl.where(by_value, _between(least, most, 0.5 + 0.5 * high), _middle(third, hi))
    first = tl.minimum(tl.maximum(first, lo + 1), hi - 1)
    second = tl.minimum(tl.maximum(second, first), hi - 1)
    third = tl.minimum(tl.maximum(third, second), hi - 1)
    return first, second, third, tl.minimum(tl.maximum(fourth, third), hi - 1)


@triton.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@triton.jit
def narrowed(key, lo, hi, reach_lo, count, K: tl.constexpr, NEAR: tl.constexpr):
    """(lo, hi, how many keys reach lo, and hi): the K-th largest of the keys [N] is in [lo, hi).

    `reach_lo` >= K of the keys reach lo, none hi. Ends when K reach lo, when NEAR or fewer are inside, or when all that
    are inside are equal.
    """
    reach_hi = count * 0
    step = count * 0
    while (hi - lo != 1) & (reach_lo != K) & (reach_lo - reach_hi > NEAR):
        if step % 6 == 5:  # ends on keys that exist: many ties are found at once
            least = tl.min(tl.where(key >= lo, key, 2147483647), 0)
            hi = tl.max(tl.where(key < hi, key, -2147483648), 0) + 1
            lo = least
        else:
            at = _thresholds(lo, hi, reach_lo, reach_hi, count, step % 2 == 0, K)
            low = (key >= at[0]).to(tl.int32) + tl.where(key >= at[1], 65536, 0)
            high = (key >= at[2]).to(tl.int32) + tl.where(key >= at[3], 65536, 0)
            low, high = tl.reduce((low, high), 0, _add_pairs)
            reach = (low & 0xFFFF, low >> 16, high & 0xFFFF, high >> 16)
            for i in tl.static_range(4):
                enough, few = reach[i] >= K, reach[3 - i] < K
                lo, reach_lo = tl.where(enough, at[i], lo), tl.where(enough, reach[i], reach_lo)
                hi, reach_hi = tl.where(few, at[3 - i], hi), tl.where(few, reach[3 - i], reach_hi)
        step += 1
    return lo, hi, reach_lo, reach_hi


@triton.jit
def places(chosen, N: tl.constexpr, COLUMNS: tl.constexpr):
    """The place of each of the chosen among them, in the order of (key % COLUMNS, key // COLUMNS): a thread holds whole
    columns, so that only their sums are scanned across threads."""
    C: tl.constexpr = COLUMNS if N > COLUMNS else N
    number = tl.reshape(chosen.to(tl.int32), (N // C, C))
    columns = tl.sum(number, 0)
    before = tl.cumsum(columns, 0) - columns
    return tl.reshape(before[None, :] + tl.cumsum(number, 0) - number, (N,))


@triton.jit
def _cut_by_rank(scores, entries, scratch, count, missing, NEAR: tl.constexpr, INDIRECT: tl.constexpr):
    """Key and entry of the `missing`-th best of `count` <= NEAR scores, whose places `scratch` has."""
    at = tl.arange(0, NEAR)
    place = tl.load(scratch + at, mask=at < count, other=0)
    key = tl.where(at < count, ordered(tl.load(scores + place, mask=at < count, other=0.0)), -2147483648)
    entry = place
    if INDIRECT:
        entry = tl.load(entries + place, mask=at < count, other=0)
    before = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (entry[None, :] < entry[:, None]))
    last = (at < count) & (tl.sum(before.to(tl.int32), 1) == missing - 1)
    return tl.max(tl.where(last, key, -2147483648), 0), tl.max(tl.where(last, entry, 0), 0)


@triton.jit
def _last_of_ties(key, entry, number, missing):
    """The entry up to which `missing` keys are `number`."""
    begin = missing * 0
    end = tl.max(tl.where(key == number, entry, 0), 0) + 1  # not enough of them before `begin`, enough before `end`
    while end - begin > 1:
        middle = (begin + end) // 2
        enough = tl.sum(((key == number) & (entry < middle)).to(tl.int32), 0) >= missing
        begin = tl.where(enough, begin, middle)
        end = tl.where(enough, middle, end)
    return end - 1


@triton.jit
def chosen_keys(
    scores, entries, key, entry, live, count, scratch, K: tl.constexpr, NEAR: tl.constexpr, COLUMNS: tl.constexpr,
    INDIRECT: tl.constexpr,
):  # fmt: skip
    """Which of the keys [N] are the K best (K <= count live ones).

    scores: those of the keys; entries: INDIRECT, theirs, else a score's place is its entry; scratch: K int32.
    """
    N: tl.constexpr = key.shape[0]
    lo = tl.min(tl.where(live, key, 2147483647), 0)
    hi = tl.max(key, 0) + 1
    lo, hi, reach_lo, reach_hi = narrowed(key, lo, hi, count, count, K, NEAR)
    cut = lo
    last = count * 0 + 2147483647
    if reach_lo != K:
        if reach_lo - reach_hi <= NEAR:
            inside = live & (key >= lo) & (key < hi)
            tl.store(scratch + places(inside, N, COLUMNS), tl.arange(0, N), mask=inside)
            tl.debug_barrier()
            cut, last = _cut_by_rank(scores, entries, scratch, reach_lo - reach_hi, K - reach_hi, NEAR, INDIRECT)
            tl.debug_barrier()  # `scratch` may be written from here on
        else:  # all keys of [lo, hi) are one number: as many as are missing, from the lowest entry on
            last = _last_of_ties(key, entry, lo, K - reach_hi)
    return (key > cut) | ((key == cut) & (entry <= last))
