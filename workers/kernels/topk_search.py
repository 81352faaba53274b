"""Which of many scores are the K best: the search of a program of `topk.py`.

Owns: the order of scores (as integers of the same order, NaN below everything), the search for the K-th, and the place
of each chosen one. The search keeps an interval around the K-th largest and counts, in one packed sum, how many scores
reach two thresholds inside it: the two beside the place where interpolation expects it, further apart where these have
missed it once, and the thirds of the interval where twice. It ends when exactly K reach a threshold, when so few are
left in the interval that their ranks are counted, or when it is one number wide.
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
def value_of(key):
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
def middle_key(lo, hi):
    return lo + ((hi - lo).to(tl.uint32, bitcast=True) >> 1).to(tl.int32)


@triton.jit
def _thresholds(lo, hi, reach_lo, reach_hi, count, missed, K: tl.constexpr):
    """Two keys, lo < first <= second < hi, where `reach_lo` >= K > `reach_hi` of `count` keys reach the ends.

    The spread is twice the standard deviation of the place of one of so many random keys. `missed`: so often in a row
    the K-th was not between the two.
    """
    inside = (reach_lo - reach_hi).to(tl.float32)
    linear = ((reach_lo - K).to(tl.float32) + 0.5) / inside
    odds_lo = _odds(reach_lo, count)
    part = (odds_lo - _odds(K + 0 * count, count)) / (odds_lo - _odds(reach_hi, count))
    spread = 2.0 * tl.sqrt(linear * (1.0 - linear) / inside) + 1.0 / inside
    spread *= tl.where(missed == 1, 3.0, 1.0)
    least, most = value_of(lo), value_of(hi)
    third = tl.maximum((hi - lo).to(tl.uint32, bitcast=True) // 3, 1).to(tl.int32)
    first = tl.where(missed == 2, lo + third, _between(least, most, part - spread))
    second = tl.where(missed == 2, hi - third, _between(least, most, part + spread))
    first = tl.minimum(tl.maximum(first, lo + 1), hi - 1)
    return first, tl.minimum(tl.maximum(second, first), hi - 1)


@triton.jit
def _narrowed(key, lo, hi, count, K: tl.constexpr, NEAR: tl.constexpr):
    """(lo, hi, how many keys reach lo, and hi): the K-th largest of the keys [N] is in [lo, hi).

    `count` >= K of the keys reach lo, none hi. Ends when K reach lo, when NEAR or fewer are inside, or when all that
    are inside are equal.
    """
    reach_lo, reach_hi = count, count * 0
    step, missed = count * 0, count * 0
    while (hi - lo != 1) & (reach_lo != K) & (reach_lo - reach_hi > NEAR):
        if step % 6 == 5:  # ends on keys that exist: many ties are found at once
            least = tl.min(tl.where(key >= lo, key, 2147483647), 0)
            hi = tl.max(tl.where(key < hi, key, -2147483648), 0) + 1
            lo = least
        else:
            one, two = _thresholds(lo, hi, reach_lo, reach_hi, count, missed, K)
            counts = tl.sum((key >= one).to(tl.int32) + tl.where(key >= two, 65536, 0), 0)
            reach_one, reach_two = counts & 0xFFFF, counts >> 16
            above_two, above_one = reach_two >= K, reach_one >= K
            hi = tl.where(above_two, hi, tl.where(above_one, two, one))
            reach_hi = tl.where(above_two, reach_hi, tl.where(above_one, reach_two, reach_one))
            lo = tl.where(above_two, two, tl.where(above_one, one, lo))
            reach_lo = tl.where(above_two, reach_two, tl.where(above_one, reach_one, reach_lo))
            missed = tl.where((above_one & (reach_two < K)) | (missed == 2), 0, missed + 1)
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
def _cut_by_rank(scores, scratch, count, missing, NEAR: tl.constexpr):
    """Key and entry of the `missing`-th best of `count` <= NEAR scores, whose entries `scratch` has."""
    at = tl.arange(0, NEAR)
    entry = tl.load(scratch + at, mask=at < count, other=0)
    key = tl.where(at < count, ordered(tl.load(scores + entry, mask=at < count, other=0.0)), -2147483648)
    before = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (entry[None, :] < entry[:, None]))
    last = (at < count) & (tl.sum(before.to(tl.int32), 1) == missing - 1)
    return tl.max(tl.where(last, key, -2147483648), 0), tl.max(tl.where(last, entry, 0), 0)


@triton.jit
def last_of_ties(key, entry, number, missing):
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
    scores, key, entry, live, count, scratch, K: tl.constexpr, NEAR: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Which of the keys [N] of entries 0 to N are the K best (K < `count` live ones). scratch: K int32."""
    N: tl.constexpr = key.shape[0]
    lo = tl.min(tl.where(live, key, 2147483647), 0)
    hi = tl.max(key, 0) + 1
    lo, hi, reach_lo, reach_hi = _narrowed(key, lo, hi, count, K, NEAR)
    cut = lo
    last = count * 0 + 2147483647
    if reach_lo != K:
        if reach_lo - reach_hi <= NEAR:
            inside = live & (key >= lo) & (key < hi)
            tl.store(scratch + places(inside, N, COLUMNS), entry, mask=inside)
            tl.debug_barrier()
            cut, last = _cut_by_rank(scores, scratch, reach_lo - reach_hi, K - reach_hi, NEAR)
            tl.debug_barrier()  # `scratch` may be written from here on
        else:  # all keys of [lo, hi) are one number: as many as are missing, from the lowest entry on
            last = last_of_ties(key, entry, lo, K - reach_hi)
    return (key > cut) | ((key == cut) & (entry <= last))
