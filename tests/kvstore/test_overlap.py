"""The overlap measure on time lines small enough to check by hand."""

from __future__ import annotations

import pytest

from kvstore.transfer.overlap import measure_overlap, segments_behind_next_chunk, union


def test_union_merges_touching_intervals_and_drops_empty_ones() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4), (7, 7)]) == [(0, 4), (5, 6)]


def test_parallel_segments_count_once() -> None:
    overlap = measure_overlap([(0, 4), (1, 3)], [(2, 10)])
    assert (overlap.transfer_s, overlap.hidden_s, overlap.compute_s) == (4, 2, 8)
    assert overlap.hidden_share == pytest.approx(0.5)


def test_transfer_between_two_chunks_is_exposed() -> None:
    assert measure_overlap([(2, 3)], [(0, 2), (3, 5)]).hidden_share == 0.0


def test_nothing_sent_is_fully_hidden() -> None:
    assert measure_overlap([], [(0, 1)]).hidden_share == 1.0


def test_segments_are_counted_only_under_the_chunk_after_theirs() -> None:
    computes = [(0.0, 1.0), (1.0, 2.0), (2.0, 3.0)]
    segments = [(0, (1.1, 1.2)), (0, (2.5, 2.6)), (1, (1.5, 2.5)), (2, (3.0, 3.1))]
    assert segments_behind_next_chunk(segments, computes) == {0: 1, 1: 1}
