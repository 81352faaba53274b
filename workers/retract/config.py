"""`RetractConfig`: when a decode worker takes requests out of its batch, and where they may wait. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvstore.tiers.config import TiersConfig

ADMISSION_MODES = ("reserve", "predicted")


@dataclass(frozen=True, slots=True)
class RetractConfig:
    """Knobs of retract and resume. Raises `ValueError` naming the field when a value is unusable."""

    admission: str = "reserve"
    """`reserve` promises prompt and `max_tokens` to each request, so that pages never run out; `predicted` promises
    what recent requests needed, so that more run at once and a wrong guess is retracted."""
    extra_requests: int = 0
    """`predicted`: requests admitted beyond the request slots; whoever finds no slot on arrival is parked."""
    time_slice_steps: int = 64
    """Steps after which a request that waits for a slot takes that of the one that has run longest."""
    horizon_steps: int = 64
    """A shortage frees enough for this many steps of the remaining batch, and a resume needs as much."""
    max_retracts: int = 4
    """Retracts of one request after which others are chosen as long as there are any."""
    min_run_steps: int = 16
    """Steps that a resumed request runs before it is chosen again, as long as there are others."""
    forecast_quantile: float = 0.8
    """`predicted`: the share of recent outputs that were no longer than what is promised."""
    forecast_safety: float = 1.2
    """`predicted`: factor on that quantile; each retract for want of pages raises it, quiet requests lower it."""
    forecast_initial: int = 0
    """`predicted`: output tokens promised until enough requests have ended to tell; 0 promises `max_tokens`."""
    recompute_attempts: int = 3
    """Prefill workers that are asked, one after the other, when an image is lost."""
    recompute_timeout_s: float = 120.0
    """Longest wait for one of them."""
    guest_budget_bytes: int = 256 << 20
    """Host memory for parked images of other decode workers."""
    tiers: TiersConfig = field(default_factory=TiersConfig)
    """Budgets of the places where images wait."""

    def __post_init__(self) -> None:
        self._require("admission", self.admission in ADMISSION_MODES, f"one of {ADMISSION_MODES}")
        for name in ("horizon_steps", "max_retracts", "recompute_attempts", "time_slice_steps"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("min_run_steps", "extra_requests", "forecast_initial", "guest_budget_bytes"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        self._require("forecast_quantile", 0 < self.forecast_quantile <= 1, "in (0, 1]")
        self._require("forecast_safety", self.forecast_safety >= 1, ">= 1")
        self._require("recompute_timeout_s", self.recompute_timeout_s > 0, "> 0 seconds")

    def _require(self, name: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"retract config: {name}: found {getattr(self, name)!r}, expected {expected}")
