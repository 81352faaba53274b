"""Decode graphs: which there are, and that a step runs exactly once, whether its graph is there or not."""

from __future__ import annotations

import pytest
import torch

from workers.gpu.graphs import DecodeGraphs, bucket_sizes


class _Graph:
    def __init__(self, runs: list[str]) -> None:
        self._runs = runs

    def replay(self) -> None:
        self._runs.append("replay")


def test_a_step_without_a_graph_runs_once_and_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step moves tokens and positions on: launched to be captured and then replayed, it would run twice."""
    runs: list[str] = []
    graphs = DecodeGraphs(lambda bucket: runs.append(f"eager {bucket}"), 4, torch.device("cpu"), enabled=True)

    def capture(bucket: int) -> None:
        graphs._step(bucket)
        graphs._graphs[bucket] = _Graph(runs)  # type: ignore[assignment]

    monkeypatch.setattr(graphs, "_capture", capture)
    graphs.replay(2)
    graphs.replay(2)
    graphs.replay(4)
    assert runs == ["eager 2", "replay", "eager 4"]


def test_buckets_end_with_the_largest_batch() -> None:
    assert bucket_sizes(1) == (1,) and bucket_sizes(20) == (1, 2, 4, 8, 16, 20)
    assert bucket_sizes(130)[-4:] == (64, 96, 128, 130)
    graphs = DecodeGraphs(lambda bucket: None, 20, torch.device("cpu"))
    assert [graphs.bucket_of(n) for n in (1, 3, 9, 17, 20)] == [1, 4, 16, 20, 20] and not graphs.enabled


@pytest.mark.gpu
def test_every_replay_is_one_step_on_a_gpu() -> None:
    count = torch.zeros((), dtype=torch.int32, device="cuda")
    graphs = DecodeGraphs(lambda bucket: count.add_(1), 4, torch.device("cuda"))
    for expected in (1, 2, 3):
        graphs.replay(4)
        assert int(count) == expected
