"""Rates come from bytes and the injected clock."""

from __future__ import annotations

from workers.checkpoint.progress import Progress, ProgressCounter


def test_rate_is_bytes_so_far_over_time_so_far() -> None:
    seen: list[Progress] = []
    times = iter([10.0, 12.0, 15.0])
    counter = ProgressCounter(1000, seen.append, clock=lambda: next(times))
    counter.add(400, "a")
    counter.add(600, "b")
    assert [(p.done_bytes, p.total_bytes, p.tensor, p.bytes_per_s) for p in seen] == [
        (400, 1000, "a", 200.0),
        (1000, 1000, "b", 200.0),
    ]


def test_rate_before_any_time_has_passed_is_zero() -> None:
    assert Progress(done_bytes=5, total_bytes=9, elapsed_s=0.0, tensor="a").bytes_per_s == 0.0
