"""Kernels that show when dependent launches start: for `test_branch.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def signals(out):
    """Lets its successor in, then waits."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    tl.store(out, 0)


@triton.jit
def copies_late(source, out):
    """Lets its successor in at once, and writes 50 microseconds or so later."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    begin = tl.extra.cuda.globaltimer()
    while tl.extra.cuda.globaltimer() - begin < 50_000:
        pass
    tl.store(out, tl.load(source))


@triton.jit
def reads_early(source, out):
    """Reads what should be older than its predecessor's signal ahead of its wait."""
    value = tl.load(source)
    tl.extra.cuda.gdc_wait()
    tl.store(out, value)
