"""How much of a transfer was hidden behind compute, from time stamps alone. No clock, no sockets, torch-free.

Transfer time is the union of the intervals in which a segment was on the wire; it is hidden where it intersects the
union of the compute intervals. What is left lengthens time to first token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Interval = tuple[float, float]
"""[start, end) in seconds of one clock."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Transfer time of one prompt, in seconds."""

    transfer_s: float
    hidden_s: float
    compute_s: float

    @property
    def hidden_share(self) -> float:
        """Hidden part of the transfer time; 1.0 when nothing was transferred."""
        return self.hidden_s / self.transfer_s if self.transfer_s else 1.0


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same points as sorted, disjoint intervals."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def measure_overlap(transfers: Iterable[Interval], computes: Iterable[Interval]) -> Overlap:
    """Overlap of wire intervals (`SegmentTrace.sent_s, acked_s`) with compute intervals (one per chunk)."""
    wire, busy = union(transfers), union(computes)
    hidden = sum(max(0.0, min(w[1], b[1]) - max(w[0], b[0])) for w in wire for b in busy)
    return Overlap(sum(e - s for s, e in wire), hidden, sum(e - s for s, e in busy))


def segments_behind_next_chunk(
    segment_chunks: Iterable[tuple[int, Interval]], computes: list[Interval]
) -> dict[int, int]:
    """How many segments of chunk i were on the wire while chunk i + 1 computed, for every chunk but the last."""
    counts = dict.fromkeys(range(len(computes) - 1), 0)
    for chunk, (start, end) in segment_chunks:
        if chunk in counts:
            after = computes[chunk + 1]
            counts[chunk] += start < after[1] and end > after[0]
    return counts
