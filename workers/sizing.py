"""How many pages and slots a byte budget buys. Torch-free.

The request slots come first (one a running request), then the window pages that many requests can hold at once, and all
the rest goes to full pages. A budget that cannot hold one request of the longest context is refused, with the number of
bytes that would.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.spec import IndexSpace, KVSpec
from workers.errors import BadConfig
from workers.scheduler.admission import pages_of, pages_spanned


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Units of each index space and the bytes they take."""

    full_pages: int
    window_pages: int
    slots: int
    total_bytes: int


def unit_bytes(spec: KVSpec, space: IndexSpace) -> int:
    """Bytes of one unit of `space`, over all of its pools and layers."""
    return sum(pool.unit_stride_bytes * len(pool.layers) for pool in spec.pools if pool.space is space)


def plan_pools(
    spec: KVSpec, *, budget_bytes: int, max_running: int, max_context: int, chunk_tokens: int = 1
) -> PoolPlan:
    """Pool sizes within `budget_bytes` for requests that add at most `chunk_tokens` tokens a step.

    Raises `BadConfig` when one request of `max_context` tokens beside `max_running` slots would not fit.
    """
    full_bytes = unit_bytes(spec, IndexSpace.FULL_PAGE)
    pages_each = pages_of(max_context)
    window_each = min(pages_each, pages_spanned(spec.window_tokens + chunk_tokens))
    window_pages = max_running * window_each
    fixed = max_running * unit_bytes(spec, IndexSpace.SLOT) + window_pages * unit_bytes(spec, IndexSpace.WINDOW_PAGE)
    needed = fixed + pages_each * full_bytes
    if needed > budget_bytes:
        raise BadConfig(
            "kv_budget_bytes",
            budget_bytes,
            f"at least {needed} bytes for {max_running} request slots and one context of {max_context} tokens "
            "(or fewer running requests, or a shorter context)",
            "worker config",
        )
    most = max_running * pages_each
    full_pages = most if full_bytes == 0 else min(most, (budget_bytes - fixed) // full_bytes)
    return PoolPlan(full_pages, window_pages, max_running, fixed + full_pages * full_bytes)
