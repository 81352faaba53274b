"""The router's own Prometheus series, on one registry per app so that several routers may live in one process."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_GAP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 10)


class RouterMetrics:
    """Counters and histograms of one router. Not thread-safe beyond what prometheus_client is."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        reg = self.registry
        self.requests = Counter(
            "dsv4_router_requests",
            "HTTP requests answered, by route and status.",
            ["route", "status"],
            registry=reg,
        )
        self.active = Gauge("dsv4_router_active_requests", "Generation requests in flight.", registry=reg)
        self.first_token_s = Histogram(
            "dsv4_router_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_LATENCY_BUCKETS_S,
            registry=reg,
        )
        self.token_gap_s = Histogram(
            "dsv4_router_inter_token_latency_seconds",
            "Between two token events of one choice.",
            buckets=_GAP_BUCKETS_S,
            registry=reg,
        )
        self.request_s = Histogram(
            "dsv4_router_e2e_request_latency_seconds",
            "From the request's arrival to its last byte.",
            buckets=_LATENCY_BUCKETS_S,
            registry=reg,
        )
        self.prompt_tokens = Counter("dsv4_router_prompt_tokens", "Prompt tokens of answered requests.", registry=reg)
        self.cached_tokens = Counter("dsv4_router_cached_tokens", "Of those, tokens found in a cache.", registry=reg)
        self.output_tokens = Counter("dsv4_router_output_tokens", "Output tokens received from decode.", registry=reg)
        self.retries = Counter(
            "dsv4_router_retries", "Attempts repeated, by the error code of the failure.", ["code"], registry=reg
        )
        self.disconnects = Counter("dsv4_router_client_disconnects", "Clients that left before the end.", registry=reg)
        self.finished = Counter("dsv4_router_choices_finished", "Choices ended, by reason.", ["reason"], registry=reg)
        self.workers = Gauge("dsv4_router_workers_reachable", "Workers that answer.", ["role"], registry=reg)

    def render(self) -> bytes:
        """Prometheus text format."""
        return generate_latest(self.registry)
