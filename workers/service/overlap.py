"""How much of a transfer hid behind computing: arithmetic on time intervals."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def total(intervals: Iterable[Interval]) -> float:
    """Seconds covered by any of the intervals."""
    return sum(end - start for start, end in union(intervals))


def covered(inner: Iterable[Interval], outer: Iterable[Interval]) -> float:
    """Seconds of `inner` that `outer` also covers."""
    others = union(outer)
    return sum(max(0.0, min(end, b) - max(start, a)) for start, end in union(inner) for a, b in others)
