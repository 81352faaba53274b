"""`WorkerConfig`: everything one prefill or decode worker is told. Torch-free.

Owns: fields, units, defaults, cross-checks. Does not own: where values come from (`cluster/config.py`), what the budget
buys (`workers/sizing.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from workers.experts.config import ExpertConfig
from workers.messages import WorkerRole
from workers.retract.config import RetractConfig


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker. Raises `ValueError` naming the field when a value is unusable."""

    role: WorkerRole
    name: str
    """Unique among the workers of its role, stable over restarts."""
    model_dir: str = ""
    """Checkpoint folder in the official layout; may be empty when the model is passed in."""
    model_name: str = ""
    """Name in statistics; empty takes the checkpoint's."""
    precision: str = "native"
    """`native` (fp8 KV and activations) or `fp32` (every cast off, for exactness tests)."""
    device: str = "cpu"
    num_threads: int = 1
    """CPU threads of tensor maths."""
    host: str = "127.0.0.1"
    port: int = 0
    """gRPC port, for requests and for KV; 0 takes a free one."""
    advertise_host: str = ""
    """Host that other machines reach; empty is `host`."""
    kv_budget_bytes: int = 512 * 2**20
    """Bytes of all KV pools together, never exceeded."""
    full_pages: int | None = None
    """Pages of the growing pools, instead of what the budget buys; likewise `window_pages` and `slots`."""
    window_pages: int | None = None
    slots: int | None = None
    max_running: int = 16
    """Requests that hold KV at once: the size of the decode batch, or prompts in progress."""
    max_waiting: int = 256
    """Requests that may queue for KV before the worker answers that it is full."""
    max_context: int = 16384
    """Most prompt + output tokens of one request."""
    chunk_tokens: int = 512
    """Prefill: prompt tokens of one step, over all prompts in it."""
    admit_wait_s: float = 60.0
    """Decode: longest wait of a request in the admission queue."""
    request_timeout_s: float = 600.0
    """Longest life of a request that names no deadline, and cap of those that do."""
    lease_s: float = 30.0
    """Decode: how long a grant lives without news from prefill."""
    credit_bytes: int = 64 * 2**20
    """Decode: KV bytes of one request that may be on the wire or unverified."""
    router_grace_s: float = 5.0
    """Decode: how long the requests of a router without an event stream live on."""
    retract: RetractConfig = field(default_factory=RetractConfig)
    """Decode: when requests leave the batch, and where their KV waits."""
    allow_retract_control: bool = False
    """Decode: whether `SetRetractControl` is served: forced retracts and planned errors, for proofs."""
    experts: ExpertConfig = field(default_factory=ExpertConfig)
    """Which routed experts sit in fast memory, and where the others come from."""
    drain_s: float = 2.0
    """Longest wait for running work when the server closes."""

    def __post_init__(self) -> None:
        for name in ("num_threads", "kv_budget_bytes", "max_running", "chunk_tokens", "credit_bytes"):
            self._require(name, getattr(self, name) >= 1, ">= 1")
        for name in ("full_pages", "window_pages", "slots"):
            self._require(name, getattr(self, name) is None or getattr(self, name) >= 1, ">= 1, or unset")
        for name in ("admit_wait_s", "request_timeout_s", "lease_s"):
            self._require(name, getattr(self, name) > 0, "> 0 seconds")
        for name in ("max_waiting", "router_grace_s", "drain_s", "port"):
            self._require(name, getattr(self, name) >= 0, ">= 0")
        self._require("max_context", self.max_context >= 2, ">= 2 tokens")
        self._require("precision", self.precision in ("native", "fp32"), "'native' or 'fp32'")
        self._require("name", bool(self.name), "a non-empty string")

    def _require(self, field: str, ok: bool, expected: str) -> None:
        if not ok:
            raise ValueError(f"worker config: {field}: found {getattr(self, field)!r}, expected {expected}")
