"""`KVStoreConfig`: sizes, budgets and waits of one worker's KV store. Torch-free.

Every field has its unit in its name or in its line below. The worker adds pool sizes from its memory budget.
"""

from __future__ import annotations

from dataclasses import dataclass

FRAMING_BYTES = 64 << 10
"""Room that one message may need beyond its payload: a segment header, or a commit tail with its logprobs."""


@dataclass(frozen=True, slots=True)
class KVStoreConfig:
    """Knobs of the KV store. Raises `ValueError` for values that cannot work together.

    Attributes:
        full_pages: pages of 256 tokens for compressed entries (default 512: 131,072 tokens over all requests).
        window_pages: pages of 256 tokens for the sliding window (default 96: two or three a request).
        slots: requests that may hold KV at the same time (default 32).
        landing_budget_bytes: host memory for KV that has arrived but is not in the pools yet (default 512 MiB).
        credit_bytes: payload bytes a sender may have unacknowledged (default 64 MiB).
        segment_bytes: target size of one transfer segment (default 2 MiB: those of larger pools are then 1 to 2 MiB).
        max_message_bytes: largest gRPC message accepted or sent; larger segments are split (default 8 MiB).
        lease_s: seconds a grant lives without any sign of its sender (default 30).
        max_lease_s: seconds after which a grant ends whatever its sender does (default 600).
        connect_timeout_s: wait for the receiver's first answer (default 10).
        stall_timeout_s: wait for any one acknowledgement, credit or commit (default 30).
    """

    full_pages: int = 512
    window_pages: int = 96
    slots: int = 32
    landing_budget_bytes: int = 512 << 20
    credit_bytes: int = 64 << 20
    segment_bytes: int = 2 << 20
    max_message_bytes: int = 8 << 20
    lease_s: float = 30.0
    max_lease_s: float = 600.0
    connect_timeout_s: float = 10.0
    stall_timeout_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("full_pages", "window_pages", "slots", "landing_budget_bytes", "segment_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1: {getattr(self, name)}")
        for name in ("lease_s", "max_lease_s", "connect_timeout_s", "stall_timeout_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive: {getattr(self, name)}")
        if self.max_message_bytes <= FRAMING_BYTES:
            raise ValueError(f"max_message_bytes must exceed {FRAMING_BYTES}: {self.max_message_bytes}")
        if self.max_segment_bytes > self.credit_bytes:
            raise ValueError(f"credit_bytes {self.credit_bytes} cannot hold one segment of {self.max_segment_bytes}")

    @property
    def max_segment_bytes(self) -> int:
        """Largest payload of one message."""
        return min(max(self.segment_bytes, 1), self.max_message_bytes - FRAMING_BYTES)
