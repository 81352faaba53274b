"""The load test: prompts of the wanted length, every client always busy, and figures by their definitions."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cluster.bench import serve
from cluster.bench.serve import CannotMeasure, Clients, Load, Prompts, counted, counters_of, measure_level, warm_up
from cluster.bench.serve_results import (
    Machine,
    Served,
    ServeResults,
    expert_table,
    full_stretch,
    level_of,
    level_table,
)
from cluster.bench.serve_run import ServePlan, run_levels
from cluster.http_client import ApiFailure, ChatDelta
from cluster.metrics import render
from tests.cluster.fake_router import FakeRouter
from workers.messages import WorkerRole, WorkerStats

LOAD = Load("m", input_tokens=300, output_tokens=4, rounds=3)


class FakeClient:
    """Counts two tokens a word and nine for the template; all clients must be in flight before any answer ends."""

    def __init__(self, together: threading.Barrier | None = None, fails: frozenset[str] = frozenset()) -> None:
        self.bodies: list[dict[str, Any]] = []
        self._together, self._fails = together, fails

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
        self.bodies.append(body)
        text = body["messages"][0]["content"]
        if self._together is not None:
            self._together.wait(5.0)
        if text in self._fails:
            raise ApiFailure(503, "no room")
        for _ in range(body["max_tokens"]):
            yield ChatDelta(content="x")
        usage = {"prompt_tokens": 9 + 2 * len(text.split()), "completion_tokens": body["max_tokens"]}
        yield ChatDelta(finish_reason="length", usage=usage)

    def get_text(self, path: str) -> str:
        return ""

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


def test_prompts_have_the_wanted_length_and_differ() -> None:
    client = FakeClient()
    prompts = Prompts.measured(client, LOAD)
    texts = [prompts.text(0, 8, index) for index in range(4)]
    assert {9 + 2 * len(text.split()) for text in texts} <= {299, 300, 301}
    assert len({text.split()[0] for text in texts}) > 1
    assert prompts.text(0, 8, 0) == texts[0]


def test_a_server_that_does_not_count_is_refused() -> None:
    router = FakeRouter()
    try:
        with pytest.raises(CannotMeasure, match="count as"):
            run_levels(router.url, None, ServePlan((1,), 64, 4, 1, 0), Console(quiet=True))
    finally:
        router.close()


def test_every_client_is_always_busy_and_asks_for_full_answers() -> None:
    together, made = threading.Barrier(4), []

    def connect() -> FakeClient:
        made.append(FakeClient(together))
        return made[-1]

    served = list(Clients(Prompts.measured(FakeClient(), LOAD), LOAD, 4, connect))
    assert len(served) == 12
    assert all(item.completion_tokens == 4 == len(item.arrivals_s) for item in served)
    bodies = [body for client in made for body in client.bodies]
    assert len({body["messages"][0]["content"] for body in bodies}) == 12
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in bodies)


def test_the_first_round_leaves_no_prefix_of_a_level_behind() -> None:
    made: list[FakeClient] = []

    def connect() -> FakeClient:
        made.append(FakeClient())
        return made[-1]

    prompts = Prompts.measured(FakeClient(), LOAD)
    warm_up(prompts, LOAD, 2, connect)
    count = len(made)
    assert len(list(Clients(prompts, LOAD, 2, connect))) == 6
    asked = [[body["messages"][0]["content"] for client in part for body in client.bodies]
             for part in (made[:count], made[count:])]  # fmt: skip
    assert len(asked[0]) == 2 and len(asked[1]) == 6
    assert not {text[:12] for text in asked[0]} & {text[:12] for text in asked[1]}


def test_failed_requests_are_counted_and_do_not_count() -> None:
    prompts = Prompts.measured(FakeClient(), LOAD)
    bad = frozenset({prompts.text(LOAD.seed, 2, 1)})
    served = list(Clients(prompts, LOAD, 2, lambda: FakeClient(fails=bad)))
    level = level_of(2, served, Machine(0), {})
    assert (level.requests, level.errors, level.first_error) == (6, 1, "no room")
    assert level.completion_tokens == 5 * 4
    assert level.tokens_per_s_gpu is None


def test_a_broken_client_ends_the_level() -> None:
    def connect() -> FakeClient:
        raise OSError("no socket")

    with pytest.raises(OSError, match="no socket"):
        list(Clients(Prompts.measured(FakeClient(), LOAD), LOAD, 2, connect))


def test_a_level_ends_at_its_limit_and_counts_what_had_come() -> None:
    class Slow(FakeClient):
        def __init__(self) -> None:
            super().__init__()
            self._cut = threading.Event()

        def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
            yield ChatDelta(content="x")
            yield ChatDelta(content="y")
            assert self._cut.wait(5.0)
            raise ApiFailure(0, "the stream broke off")

        def interrupt(self) -> None:
            self._cut.set()

    prompts = Prompts.measured(FakeClient(), LOAD)
    found = list(Clients(prompts, dataclasses.replace(LOAD, limit_s=0.3), 2, Slow))
    level = level_of(2, found, Machine(1), {})
    assert (level.requests, level.errors, level.cut) == (2, 0, 2)
    assert (level.prompt_tokens, level.completion_tokens) == (600, 4)


def test_a_request_that_cannot_be_cut_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "JOIN_S", 0.1)
    gate = threading.Event()

    class Deaf(FakeClient):
        def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
            yield ChatDelta(content="x")
            gate.wait(20.0)

    prompts = Prompts.measured(FakeClient(), LOAD)
    with pytest.raises(CannotMeasure, match="2 clients ran on"):
        list(Clients(prompts, dataclasses.replace(LOAD, limit_s=0.1), 2, Deaf))
    gate.set()


def test_a_level_begins_when_the_one_before_it_has_left_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "IDLE_POLL_S", 0.0)
    left, asked_at = [(2, 1), (0, 1), (0, 0)], []

    class Watching(FakeClient):
        def get_text(self, path: str) -> str:
            running, waiting = left.pop(0) if len(left) > 1 else left[0]
            stats = WorkerStats("decode-0", WorkerRole.DECODE, "i", "a", 1.0, True, running=running, waiting=waiting)
            return render([stats])

        def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
            asked_at.append(len(left))
            return super().stream_chat(body)

    level = measure_level(
        Watching(), Prompts.measured(FakeClient(), LOAD), LOAD, Machine(0), 2, Watching, lambda served: None
    )
    assert asked_at == [1] * 6 and level.requests == 6


def served(began: float, first: float, tokens: int, each: float) -> Served:
    arrivals = tuple(first + number * each for number in range(tokens))
    return Served(began, arrivals[-1], arrivals, 100, tokens)


def test_figures_of_a_level() -> None:
    """Two clients, one round: both decode from 2.0 on, the first ends at 11.0 and the second at 12.0."""
    items = [served(0.0, 1.0, 11, 1.0), served(0.0, 2.0, 11, 1.0)]
    level = level_of(2, items, Machine(2), {})
    assert level.wall_s == 12.0
    assert level.tokens_per_s == pytest.approx((200 + 22) / 12)
    assert level.tokens_per_s_gpu == pytest.approx((200 + 22) / 24)
    assert full_stretch(2, items) == (2.0, 11.0)
    # After 2.0 the first has 9 more tokens until 11.0, the second 9 as well.
    assert level.full_output_per_s == pytest.approx(18 / 9)
    assert level.full_per_s_gpu == pytest.approx(18 / 9 / 2), "both prompts were done before"
    assert level.first_token_ms == (1000.0, 2000.0, 2000.0)
    assert level.token_ms == pytest.approx((1000.0, 1000.0, 1000.0))


def test_prompts_of_the_steady_state_count_where_their_first_token_is() -> None:
    """Two clients, two rounds each; all decode from 2.0 on, and the first to end its last answer does so at 22.0."""
    items = [served(0.0, 1.0, 10, 1.0), served(0.0, 2.0, 10, 1.0), served(10.0, 12.0, 11, 1.0),
             served(11.0, 13.0, 11, 1.0)]  # fmt: skip
    level = level_of(2, items, Machine(1), {})
    assert full_stretch(2, items) == (2.0, 22.0)
    # Outputs after 2.0: 8 and 9 of the first round, 11 and 10 of the second; prompts: both of the second.
    assert level.full_output_per_s == pytest.approx(38 / 20)
    assert level.full_per_s_gpu == pytest.approx((38 + 200) / 20)


def test_no_figure_for_a_stretch_that_never_was() -> None:
    items = [served(0.0, 1.0, 3, 1.0), served(0.0, 9.0, 3, 1.0)]
    level = level_of(2, items, Machine(1), {})
    assert level.full_output_per_s is None and level.full_s == 0.0


def test_counters_are_differences() -> None:
    before = {"decode-0": {"steps": 5.0, "step_s_total": 1.0, "resumes": 3.0}}
    after = {"decode-0": {"steps": 9.0, "step_s_total": 1.5, "resumes": 3.0, "expert_hits": 7.0}}
    assert counted(before, after) == {"decode-0": {"steps": 4.0, "step_s_total": 0.5, "expert_hits": 7.0}}


def test_counters_by_cause_and_path_are_read() -> None:
    stats = WorkerStats(
        "decode-0", WorkerRole.DECODE, "a", "127.0.0.1:1", 1.0, True, steps=4, tokens_generated=8,
        expert_lookups=40, expert_hits=30, expert_bytes={"host": 16_000_000}, expert_misses={"capacity": 10},
        expert_layer_hits={"0": 3}, step_ms_mean=1.5, running=2,
    )  # fmt: skip
    row = counters_of(render([stats]))["decode-0"]
    assert "step_ms_mean" not in row and "running" not in row  # a difference of gauges says nothing
    assert (row["expert_bytes/host"], row["expert_misses/capacity"], row["steps"]) == (16e6, 10, 4)
    assert not any(key.startswith("expert_layer") for key in row)
    grown = counted({}, {"decode-0": row})
    level = dataclasses.replace(level_of(1, [served(0.0, 1.0, 4, 1.0)], Machine(1), grown), name="here")
    found = expert_table(ServeResults("m", {}, [level]))
    assert found is not None
    assert [next(iter(column.cells)) for column in found.columns] == [
        "here", "decode-0", "4", "0.0", "2.0", "10", "75.0%", "capacity 2.5", "host 2.0 MB",
    ]  # fmt: skip
    assert expert_table(ServeResults("m", {}, [level_of(1, [served(0.0, 1.0, 4, 1.0)], Machine(1), {})])) is None


def test_results_survive_a_file(tmp_path: Path) -> None:
    results = ServeResults("m", {"input": 100})
    results.levels.append(level_of(2, [served(0.0, 1.0, 11, 1.0), served(0.0, 2.0, 11, 1.0)], Machine(2), {}))
    results.write(tmp_path / "r.json")
    again = ServeResults.read(tmp_path / "r.json")
    assert again.levels[0].tokens_per_s == results.levels[0].tokens_per_s
    assert level_table(again).row_count == 1
