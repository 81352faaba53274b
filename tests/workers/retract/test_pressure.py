"""Real shortage, one space at a time: more requests than fit, all of them right, nothing lost."""

from __future__ import annotations

import pytest

from tests.workers.retract.harness import RetractPair, prompt, retract_config
from tests.workers.runtime.fake_model import fake_engine
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


def run_all(requests: list[GenerateRequest], **units: int) -> dict[str, int]:
    """Runs all at once over pools of these units; retracts by cause."""
    sizes = {"full_pages": 64, "window_pages": 64, "slots": 16} | units
    with RetractPair(decode_engine=fake_engine(**sizes), retract=retract_config(**OPTIMISTIC)) as pair:
        images = [(request, pair.compute(request)) for request in requests]
        admitted = [pair.decode.admit(request) for request in requests]
        for (request, sink), future in zip(images, admitted, strict=True):
            future.result(20)
            pair.land(request, sink)
        pair.check_tokens(requests)
        report = pair.report()
        assert report.events == report.resumes and not set(report.fallbacks) & {"failed", "lost"}
        return dict(report.by_cause)


def test_full_pages_run_short() -> None:
    requests = [make_request(f"r{i}", prompt(242 + 2 * i, i), max_tokens=22) for i in range(8)]
    assert run_all(requests, full_pages=10)["full_pages"] >= 1


def test_window_pages_run_short() -> None:
    requests = [make_request(f"r{i}", prompt(242 + 2 * i, i), max_tokens=22) for i in range(8)]
    assert run_all(requests, window_pages=10)["window_pages"] >= 1


def test_slots_run_short() -> None:
    requests = [make_request(f"r{i}", prompt(20 + i, i), max_tokens=40) for i in range(8)]
    assert run_all(requests, slots=3)["slots"] >= 5


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
