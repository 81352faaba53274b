"""Counts what Triton compiles and how long it takes, apart from what it finds in its cache on disk.

Owns: the compiler's listener while a `CompileClock` is entered. Does not own: the cache, which Triton keeps under
TRITON_CACHE_DIR (~/.triton/cache) across processes, keyed by source, types, constants, options and GPU.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import triton

MICROSECONDS = 1e-6


class CompileClock:
    """Context manager. Figures grow while it is entered; compilations on any thread count."""

    def __init__(self) -> None:
        self.kernels = 0
        """Kernels asked for, each combination of types and constants once."""
        self.compiled = 0
        """Kernels that were not in the cache."""
        self.seconds = 0.0
        """Time in the compiler for them, summed over threads."""
        self._lock = threading.Lock()
        self._before: Any = None

    def __enter__(self) -> CompileClock:
        self._before = triton.knobs.compilation.listener
        triton.knobs.compilation.listener = self._note
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        triton.knobs.compilation.listener = self._before

    def _note(self, *, times: Any, cache_hit: bool, **rest: Any) -> None:
        with self._lock:
            self.kernels += 1
            if not cache_hit:
                self.compiled += 1
                self.seconds += times.total * MICROSECONDS
        if self._before is not None:
            self._before(times=times, cache_hit=cache_hit, **rest)
