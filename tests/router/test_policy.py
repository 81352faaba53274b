"""Choice of workers."""

from __future__ import annotations

import dataclasses
from collections import Counter

from router.policy import WorkerView, choose_decode, choose_prefill

IDLE = WorkerView("a", True, 0, 0, 0, 8)


def view(name: str, **fields: object) -> WorkerView:
    return dataclasses.replace(IDLE, name=name, **fields)  # type: ignore[arg-type]


def test_prefill_goes_by_outstanding_tokens():
    views = [view("one-long", own_requests=1, own_tokens=8000), view("many-short", own_requests=9, own_tokens=900)]
    assert choose_prefill(views, (), 0) == "many-short"


def test_decode_goes_by_share_of_the_batch():
    views = [view("small", own_requests=3, capacity=4), view("large", own_requests=5, capacity=16)]
    assert choose_decode(views, (), 0) == "large"


def test_other_routers_requests_count():
    views = [view("a", reported_requests=5), view("b", own_requests=2)]
    assert choose_decode(views, (), 0) == "b"


def test_unreachable_and_excluded_workers_are_never_chosen():
    views = [view("a", reachable=False), view("b"), view("c", own_requests=7, own_tokens=7)]
    for choose in (choose_prefill, choose_decode):
        assert choose(views, {"b"}, 0) == "c"
        assert choose(views, {"b", "c"}, 0) is None
        assert choose([], (), 0) is None


def test_ties_take_turns():
    views = [view("a"), view("b"), view("c")]
    chosen = Counter(choose_decode(views, (), turn) for turn in range(9))
    assert chosen == {"a": 3, "b": 3, "c": 3}
