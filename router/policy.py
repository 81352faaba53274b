"""Which worker takes the next request. Pure: views in, name out.

Prefill work is proportional to prompt tokens, so prefill goes by outstanding tokens; a decode step costs about the same
for every sequence, so decode goes by sequences, as a share of what the worker runs at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WorkerView:
    """What the router knows of one worker when it chooses."""

    name: str
    reachable: bool
    own_requests: int
    """Requests this router has there now."""
    own_tokens: int
    """Prompt tokens of those requests."""
    reported_requests: int
    """Requests the worker last reported, other routers' included."""
    capacity: int
    """Requests it runs at once; 0 when unknown."""

    @property
    def requests(self) -> int:
        """Requests there now: the report is older than what this router knows of itself."""
        return max(self.own_requests, self.reported_requests)


def choose_prefill(views: Sequence[WorkerView], excluded: Collection[str], turn: int) -> str | None:
    """The reachable prefill worker with the fewest outstanding prompt tokens; `turn` breaks ties. None: no worker."""
    return _least(views, excluded, turn, lambda view: (view.own_tokens, view.requests))


def choose_decode(views: Sequence[WorkerView], excluded: Collection[str], turn: int) -> str | None:
    """The reachable decode worker with the smallest share of its batch in use; `turn` breaks ties. None: no worker."""
    return _least(views, excluded, turn, lambda view: (view.requests / max(1, view.capacity), view.requests))


def _least(
    views: Sequence[WorkerView],
    excluded: Collection[str],
    turn: int,
    load: Callable[[WorkerView], tuple[float, float]],
) -> str | None:
    loads = [(load(view), view.name) for view in views if view.reachable and view.name not in excluded]
    if not loads:
        return None
    best = min(value for value, _ in loads)
    ties = [name for value, name in loads if value == best]
    return ties[turn % len(ties)]
