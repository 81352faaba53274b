"""Who is worth having before anything has run: a recorded profile, from a routing trace. Torch-free."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from workers.errors import BadConfig
from workers.experts.policy import Values
from workers.experts.trace import BadTrace, RoutingTrace


def step_shares(trace: RoutingTrace) -> Values:
    """Share of steps that needed each pair: float64 [L * E]."""
    uses = np.zeros(trace.num_pairs)
    for step in range(trace.num_steps):
        uses[trace.needed(step)] += 1
    return uses / max(1, trace.num_steps)


def read_profile(path: str | Path, layers: int, experts: int) -> Values:
    """`step_shares` of a trace file. Raises `BadConfig` when there is none or it is of another model."""
    try:
        trace = RoutingTrace.load(path)
    except (BadTrace, OSError) as exc:
        raise BadConfig("experts.preload", str(path), f"a file of `dsv4 experts record` ({exc})", "config") from exc
    if (trace.num_layers, trace.num_experts) != (layers, experts):
        found = f"{trace.num_layers} layers x {trace.num_experts} experts"
        raise BadConfig("experts.preload", f"{path}: {found}", f"{layers} x {experts}, the model's", "worker config")
    return step_shares(trace)
