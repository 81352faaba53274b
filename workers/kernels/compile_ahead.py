"""Compiles the kernels of whole steps on several threads before any of them is launched.

Triton compiles a kernel when it is first launched, one after another. Inside `compile_ahead()` the launches of the
entering thread compile instead of running: a step is walked through once, its kernels are compiled side by side, and
leaving the block waits for them. Outputs hold whatever they held, so a step may be walked through only where nobody
reads on the host what it computes. A kernel that does not compile is left for its first launch to report.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import triton

MOST_THREADS = 16
"""Half of a compilation runs outside Python's lock; beyond this nothing is gained."""

_walking: ContextVar[bool] = ContextVar("walking", default=False)


@contextmanager
def compile_ahead(num_threads: int | None = None) -> Iterator[None]:
    """The block's launches compile and do not run; its end waits for them. Not reentrant.

    `num_threads`: by default one a core, at most `MOST_THREADS`.
    """
    _patch()
    threads = num_threads or min(MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "compile") as executor:
        token = _walking.set(True)
        try:
            with triton.AsyncCompileMode(executor, ignore_errors=True):
                yield
        finally:
            _walking.reset(token)


def _patch() -> None:
    """Let `JITFunction.run` see whether its thread walks through a step. Once a process."""
    kind = triton.runtime.jit.JITFunction
    if getattr(kind.run, "walks", False):
        return
    launch: Callable[..., Any] = kind.run

    def run(self: Any, *args: Any, warmup: bool, **options: Any) -> Any:
        return launch(self, *args, warmup=warmup or _walking.get(), **options)

    run.walks = True  # type: ignore[attr-defined]
    kind.run = run
