"""What an operator may set about the router. Durations are seconds, sizes bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of one router process. Raises `ValueError` naming the field when a value is out of range."""

    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """TCP port; 0 lets the system choose one (`RunningRouter.port` tells which)."""
    api_keys: tuple[str, ...] = ()
    """Accepted bearer tokens for /v1 and /admin; empty means no authentication."""
    max_body_bytes: int = 16 * 2**20
    """Largest request body; a longer one is answered with 413."""
    max_active_requests: int = 1024
    """HTTP generation requests in flight; one more is answered with 429."""
    max_choices: int = 8
    """Most choices of one request (`n`, or prompts x `n`)."""
    max_output_tokens: int = 131_072
    """Most output tokens of one choice, whatever the context would allow."""
    default_output_tokens: int = 4096
    """Output budget when the request names none; lowered to what the context leaves."""
    max_stop_strings: int = 16
    """Most stop strings of one request."""
    request_timeout_s: float = 900.0
    """Whole life of a request, from arrival to its last token; then 504."""
    admit_timeout_s: float = 100.0
    """Wait for a decode worker's grant; a full worker queues admissions, so this is the patience with a queue (429)."""
    stall_timeout_s: float = 180.0
    """Longest silence between two events of one request; retracted requests are silent, so keep it generous."""
    abort_timeout_s: float = 5.0
    """Wait for a worker to confirm an abort."""
    stats_interval_s: float = 1.0
    """Period of the load and liveness probe of every worker."""
    stats_timeout_s: float = 2.0
    """Wait for one probe."""
    missed_probes: int = 5
    """Probes in a row without an answer before a worker counts as unreachable; a busy host is slow, not dead. A refused
    connection counts at once."""
    reconnect_s: float = 0.25
    """Pause before an event stream that broke is opened again."""
    keepalive_s: float = 15.0
    """Silence after which a stream gets an SSE comment, so that proxies keep it open."""
    max_attempts: int = 3
    """Attempts at one choice before its first token, the first included."""
    retry_after_s: int = 1
    """Value of the Retry-After header of 429 and 503 answers."""
    drain_s: float = 10.0
    """How long `close` lets running requests finish before it aborts them."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_active_requests", "max_choices", "max_output_tokens"):
            _require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in ("default_output_tokens", "max_attempts", "retry_after_s", "missed_probes"):
            _require(self, name, getattr(self, name) >= 1, ">= 1")
        for name in (
            "request_timeout_s",
            "admit_timeout_s",
            "stall_timeout_s",
            "abort_timeout_s",
            "stats_interval_s",
            "stats_timeout_s",
            "reconnect_s",
            "keepalive_s",
        ):
            _require(self, name, getattr(self, name) > 0, "> 0 seconds")
        _require(self, "drain_s", self.drain_s >= 0, ">= 0 seconds")
        _require(self, "max_stop_strings", self.max_stop_strings >= 0, ">= 0")
        _require(self, "port", 0 <= self.port < 65536, "a TCP port")
        _require(self, "api_keys", all(self.api_keys), "non-empty strings")


def _require(config: RouterConfig, name: str, ok: bool, expected: str) -> None:
    if not ok:
        raise ValueError(f"router.{name}: found {getattr(config, name)!r}, expected {expected}")
