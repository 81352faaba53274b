"""A clock that tests move by hand."""

from __future__ import annotations


class ManualClock:
    """Seconds that only `advance` changes."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move time forward."""
        self.now += seconds
