"""`RetractMeter`: counts and durations of retracts and resumes. Written by the engine thread."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvstore.tiers.placement import CascadeStats
from workers.messages import RetractReport

REMEMBERED = 4096
"""Durations kept of each phase: percentiles are of the latest ones."""

REMEMBERED_CONTEXTS = 65536


class Durations:
    """Milliseconds of the latest events of one kind, and how many there were."""

    def __init__(self) -> None:
        self.count = 0
        self.total_ms = 0.0
        self._latest: deque[float] = deque(maxlen=REMEMBERED)

    def add(self, ms: float) -> None:
        self.count += 1
        self.total_ms += ms
        self._latest.append(ms)

    def percentile(self, share: float) -> float:
        """0 when there were none."""
        return percentile(tuple(self._latest), share)


def percentile(values: Iterable[float], share: float) -> float:
    """Nearest-rank percentile; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


@dataclass(frozen=True, slots=True)
class RetractTotals:
    """Counters since the worker started. Addable."""

    causes: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    moved_bytes: Counter[str] = field(default_factory=Counter)
    moved_ms: Counter[str] = field(default_factory=Counter)
    numbers: Counter[str] = field(default_factory=Counter)
    """`repeats`, `checksum_failures`, `resumes`, `resume_wait_ms`."""

    def __add__(self, other: RetractTotals) -> RetractTotals:
        return RetractTotals(
            self.causes + other.causes,
            self.fallbacks + other.fallbacks,
            self.moved_bytes + other.moved_bytes,
            self.moved_ms + other.moved_ms,
            self.numbers + other.numbers,
        )


class RetractMeter:
    """Since the worker started, or the last reset."""

    def __init__(self, tiers: CascadeStats | None = None) -> None:
        """`tiers`: what the cascade had counted before, which is not counted again."""
        self._tiers_before = Counter() if tiers is None else _tier_counts(tiers)
        self.causes: Counter[str] = Counter()
        self.resumed_from: Counter[str] = Counter()
        self.fallbacks: Counter[str] = Counter()
        self.bytes_out = 0
        self.bytes_in = 0
        self.repeats = 0
        self.repeat_max = 0
        self.checksum_failures = 0
        self.added = Durations()
        self.phases: dict[str, Durations] = {}
        self.contexts: deque[int] = deque(maxlen=REMEMBERED_CONTEXTS)

    def phase(self, name: str, seconds: float) -> None:
        """One more duration of a phase."""
        self.phases.setdefault(name, Durations()).add(seconds * 1e3)

    def event(self, cause: str, num_tokens: int, num_retracts: int) -> None:
        """A request left the batch, for the `num_retracts`-th time."""
        self.causes[cause] += 1
        self.contexts.append(num_tokens)
        self.repeats += num_retracts > 1
        self.repeat_max = max(self.repeat_max, num_retracts)

    def totals(self) -> RetractTotals:
        """What this meter adds to the counters since the start. Any thread."""
        ms = {name: phase.total_ms for name, phase in tuple(self.phases.items())}
        numbers = {
            "repeats": self.repeats,
            "checksum_failures": self.checksum_failures,
            "resumes": sum(self.resumed_from.values()),
            "resume_wait_ms": ms.get("resume_wait", 0.0),
        }
        return RetractTotals(
            Counter(self.causes),
            Counter(self.fallbacks),
            Counter({"out/pinned": self.bytes_out, "in/pinned": self.bytes_in}),
            Counter({"out/pinned": ms.get("copy_out", 0.0), "in/pinned": ms.get("copy_in", 0.0)}),  # type: ignore[dict-item]
            Counter(numbers),  # type: ignore[arg-type]
        )

    def report(
        self, *, parked_requests: int, parked_bytes: int, leaked_pages: int, tiers: CascadeStats
    ) -> RetractReport:
        """Everything as a value, together with what the cascade counted."""
        lower = _tier_counts(tiers) - self._tiers_before
        damaged = lower.pop(DAMAGED, 0)
        return RetractReport(
            events=sum(self.causes.values()),
            resumes=sum(self.resumed_from.values()),
            bytes_out=self.bytes_out,
            bytes_in=self.bytes_in,
            by_cause=dict(self.causes),
            by_tier=dict(self.resumed_from),
            phase_ms={
                name: (d.count, d.percentile(0.5), d.percentile(0.99)) for name, d in sorted(self.phases.items())
            },
            parked_requests=parked_requests,
            parked_bytes=parked_bytes,
            checksum_failures=self.checksum_failures + damaged,
            fallbacks=dict(self.fallbacks + lower),
            repeat_max=self.repeat_max,
            added_step_ms_p50=self.added.percentile(0.5),
            added_step_ms_p99=self.added.percentile(0.99),
            leaked_pages=leaked_pages,
            contexts=tuple(self.contexts),
        )


DAMAGED = "damaged"


def _tier_counts(tiers: CascadeStats) -> Counter[str]:
    """Fallbacks by cause, and under `DAMAGED` the loads of images that did not check out."""
    counts: Counter[str] = Counter({cause.value: count for cause, count in tiers.fallbacks})
    counts[DAMAGED] = sum(tier.corrupt + tier.foreign + tier.read_errors for tier in tiers.tiers)
    return counts
