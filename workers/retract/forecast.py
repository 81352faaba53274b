"""How long outputs will be, learnt online, and what admission promises on that ground. Torch-free."""

from __future__ import annotations

import math
from collections import deque

from workers.messages import GenerateRequest
from workers.scheduler.admission import Need, decode_need, pages_of, pages_spanned

MIN_SAMPLES = 32
"""Finished requests before which `max_tokens` is taken at its word."""

WINDOW = 512
"""Finished requests that are remembered."""

RAISE, MAX_SAFETY, DECAY = 1.25, 4.0, 0.98
"""A shortage multiplies the safety factor, up to a limit; each request that ends brings it nearer to its start."""


class OutputForecast:
    """An upper guess of output lengths: a quantile of recent ones times a safety factor."""

    def __init__(self, quantile: float, safety: float, initial: int = 0) -> None:
        """See `RetractConfig`."""
        self._quantile, self._base, self._initial = quantile, safety, initial
        self._recent: deque[int] = deque(maxlen=WINDOW)
        self._sorted: list[int] | None = None
        self.safety = safety

    def observe(self, num_output: int) -> None:
        """A request has ended by itself after so many output tokens."""
        self._recent.append(num_output)
        self._sorted = None
        self.safety = self._base + (self.safety - self._base) * DECAY

    def on_shortage(self) -> None:
        """A guess was too low."""
        self.safety = min(MAX_SAFETY, self.safety * RAISE)

    def expected(self, max_tokens: int, num_output: int = 0) -> int:
        """Output tokens that a request with `num_output` so far will have in the end, at most `max_tokens`."""
        if len(self._recent) >= MIN_SAMPLES:
            if self._sorted is None:
                self._sorted = sorted(self._recent)
            index = min(len(self._sorted) - 1, math.ceil(self._quantile * len(self._sorted)) - 1)
            guess = max(1, math.ceil(self._sorted[index] * self.safety))
        elif self._initial:
            guess = self._initial
        else:
            return max_tokens
        # Past the guess, the same amount again is the best that is known.
        while guess <= num_output:
            guess += max(1, guess // 2)
        return min(max_tokens, guess)

    def need(self, request: GenerateRequest, window_tokens: int) -> Need:
        """As `decode_need`, for the expected output."""
        return self.need_after(request, window_tokens, 0)

    def need_after(self, request: GenerateRequest, window_tokens: int, num_output: int) -> Need:
        """As `need`, for a request that has produced `num_output` tokens."""
        expected = self.expected(request.sampling.max_tokens, num_output)
        if expected >= request.sampling.max_tokens:
            return decode_need(request, window_tokens)
        num_stored = len(request.prompt_ids) + expected
        return Need(pages_of(num_stored), min(pages_of(num_stored), pages_spanned(window_tokens + 1)))
