"""Real shortage, one space at a time: more requests than fit, all of them right, nothing lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.workers.retract.harness import RetractPair, prompt, retract_config
from tests.workers.runtime.fake_model import fake_engine, tiny_spec
from tests.workers.runtime.pair import make_request
from workers.messages import GenerateRequest

OPTIMISTIC = {
    "admission": "predicted",
    "forecast_initial": 4,
    "extra_requests": 8,
    "horizon_steps": 8,
    "time_slice_steps": 10,
    "min_run_steps": 4,
}


def run_all(requests: list[GenerateRequest], *, tiers: dict[str, object] | None = None, **units: int) -> dict[str, int]:
    """Runs all at once over pools of these units; retracts by cause, and resumes by tier."""
    sizes = {"full_pages": 64, "window_pages": 64, "slots": 16} | units
    config = retract_config(**OPTIMISTIC, **(tiers or {}))
    with RetractPair(decode_engine=fake_engine(**sizes), retract=config) as pair:
        images = [(request, pair.compute(request)) for request in requests]
        admitted = [pair.decode.admit(request) for request in requests]
        for (request, sink), future in zip(images, admitted, strict=True):
            future.result(20)
            pair.land(request, sink)
        pair.check_tokens(requests)
        report = pair.report()
        assert report.events == report.resumes and not set(report.fallbacks) & {"failed", "lost"}
        return dict(report.by_cause) | dict(report.by_tier)


def test_full_pages_run_short() -> None:
    # Long enough that all of them run together, however slowly they arrive.
    requests = [make_request(f"r{i}", prompt(242 + 2 * i, i), max_tokens=64) for i in range(8)]
    assert run_all(requests, full_pages=10)["full_pages"] >= 1


def test_window_pages_run_short() -> None:
    requests = [make_request(f"r{i}", prompt(242 + 2 * i, i), max_tokens=22) for i in range(8)]
    assert run_all(requests, window_pages=10)["window_pages"] >= 1


def test_slots_run_short() -> None:
    requests = [make_request(f"r{i}", prompt(20 + i, i), max_tokens=40) for i in range(8)]
    assert run_all(requests, slots=3)["slots"] >= 5


def test_hand_offs_of_several_chunks_wait_on_disk_when_the_host_tier_is_full(tmp_path: Path) -> None:
    requests = [make_request(f"r{i}", prompt(132 + i, i), max_tokens=30) for i in range(8)]
    host = 2 * tiny_spec().image_bytes(170)
    tiers = {"host": host, "disk": str(tmp_path)}
    counts = run_all(requests, tiers=tiers, slots=3)
    assert counts["slots"] >= 5 and counts["disk"] >= 1


@pytest.mark.parametrize("pages", [2, 3])
def test_the_smallest_pool_that_holds_one_request_serves_many(pages: int) -> None:
    requests = [make_request(f"r{i}", prompt(244 + 3 * i, i), max_tokens=20) for i in range(5)]
    run_all(requests, full_pages=pages, window_pages=pages)


def test_with_full_promises_nothing_is_retracted() -> None:
    requests = [make_request(f"r{i}", prompt(242 + 2 * i, i), max_tokens=22) for i in range(6)]
    with RetractPair(decode_engine=fake_engine(full_pages=4, window_pages=4, slots=8)) as pair:
        for request in requests:
            pair.start(request)
        pair.check_tokens(requests)
        assert pair.report().events == 0
