"""A deployment with a tenth of its experts in memory answers like one with all of them, token for token.

`pytest -m stress -s tests/e2e/test_expert_budget.py` asks 500 samples and prints the figures.

# measured: 2 shared cores (AVX-512) under load 5-8, 2026-11-21: 500 samples identical, 246 s with all experts, 263 s
# with 9 of 96; decode hit 12.7 % of 412,266 needed (best fixed set 12.4 %), 44 s stalled, 18.8 GB read from the page
# cache; prefill hit 9.5 % of 246,504; fast memory 522,240 bytes, as asked.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.evaluation import ask_all, held_out_samples, request_body
from cluster.experts.top import WorkerExperts, read_experts
from cluster.http_client import ApiFailure, RouterClient
from cluster.tasks.sample import Task, TaskSample
from tests.e2e.deployment import CONFIG, LIMIT_S, Deployment, deploy

pytestmark = pytest.mark.timeout(LIMIT_S)

SLOTS = 9
"""Of the 96 experts of dsv4-nano: the largest number that is no more than 10 %."""

BUDGET = CONFIG + "experts: {{slots: {slots}, source: {source}, host: {host}, preload: prefix, verify: true}}\n"


@dataclass(frozen=True)
class Answers:
    """What a client saw of each sample, and the wall time."""

    texts: list[tuple[str, str, str | None, int]]
    wall_s: float


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """A copy of the checkpoint, to damage."""
    return Path(shutil.copytree(model, tmp_path_factory.mktemp("own") / "dsv4-nano"))


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, own_model: Path) -> Iterator[Deployment]:
    config = BUDGET.format(model=own_model, slots=SLOTS, source="mmap", host="0MiB")
    running = deploy(tmp_path_factory.mktemp("limited"), config)
    try:
        yield running
    finally:
        running.dsv4("down")
        running.destroy()


def samples(count: int) -> list[TaskSample]:
    half = count // 2
    return held_out_samples(Task.ARITHMETIC, count - half, 7, None) + held_out_samples(Task.RECALL, half, 7, None)


def ask(deployment: Deployment, asked: list[TaskSample]) -> Answers:
    began = time.monotonic()
    outcomes, _ = ask_all(asked, deployment.model, lambda: RouterClient(deployment.url), 8, lambda outcome: None)
    assert not [outcome.error for outcome in outcomes if outcome.answer is None]
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    texts = [(a.reasoning, a.content, a.finish_reason, a.completion_tokens) for a in answers]
    return Answers(texts, time.monotonic() - began)


def experts_of(deployment: Deployment) -> list[WorkerExperts]:
    with deployment.client() as client:
        return read_experts(client)


def compare(limited: Deployment, whole: Deployment, count: int) -> str:
    """Asks both; one line of figures. Fails on the first difference."""
    asked = samples(count)
    expected, found = ask(whole, asked), ask(limited, asked)
    differing = [n for n in range(count) if expected.texts[n] != found.texts[n]]
    assert not differing, f"{len(differing)} of {count} differ, first: {expected.texts[differing[0]]}"
    lines = [f"{count} samples identical, {expected.wall_s:.0f} s with all experts, {found.wall_s:.0f} s with {SLOTS}"]
    for worker in experts_of(limited):
        hits, lookups = worker.value("hits_total"), worker.value("lookups_total")
        misses = ", ".join(f"{cause} {n:.0f}" for cause, n in worker.series["misses_total"].items())
        budget = {kind: int(n) for kind, n in worker.series["budget_bytes"].items()}
        assert budget["measured"] <= budget["effective"] <= budget["requested"]
        assert lookups > hits > 0 and worker.series["slots"] == {"used": SLOTS, "free": 0}
        lines.append(
            f"{worker.name}: hit {hits / lookups:.1%} of {lookups:.0f} needed, {misses}, best fixed set "
            f"{worker.value('oracle_hit_ratio'):.1%}, {worker.value('loads_total'):.0f} loads, "
            f"{worker.value('stall_seconds_total'):.1f} s stalled, {worker.value('bytes_total', 'disk') / 1e9:.2f} GB "
            f"read, fast memory {budget['measured']} bytes"
        )
    return "\n".join(lines)


def test_a_tenth_of_the_experts_answers_the_same(limited: Deployment, deployment: Deployment) -> None:
    print(compare(limited, deployment, 6))
    assert "caching no longer pays" in limited.log.read_text()
    assert not any(worker.value("io_errors_total") for worker in experts_of(limited))


def test_top_shows_every_layer_of_a_limited_worker(limited: Deployment) -> None:
    shown = limited.dsv4("experts", "top", "--once")
    assert shown.returncode == 0, shown.stderr
    assert "9 of 9" in shown.stdout and "decode-0" in shown.stdout and "prefill-0" in shown.stdout
    assert all(worker.num_layers == 8 for worker in experts_of(limited))


@pytest.mark.stress
def test_a_truncated_shard_fails_requests_by_name_until_it_is_whole_again(limited: Deployment, own_model: Path) -> None:
    before = ask(limited, samples(2)).texts
    shard = own_model / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    os.truncate(shard, len(whole) // 2)
    with limited.client() as client, pytest.raises(ApiFailure, match="cannot be read.*model-00002.*truncated"):
        client.chat(request_body(samples(2)[0], limited.model))
    with shard.open("r+b") as file:
        file.write(whole)
    # The router gives a worker that failed a moment before it asks it again.
    deadline_s = time.monotonic() + 60
    while time.monotonic() < deadline_s:
        try:
            with limited.client() as client:
                client.chat(request_body(samples(2)[0], limited.model))
            break
        except ApiFailure:
            time.sleep(0.5)
    assert ask(limited, samples(2)).texts == before
    assert max(worker.value("io_errors_total") for worker in experts_of(limited)) >= 3


def test_too_small_a_budget_is_refused_with_the_smallest_that_works(tmp_path, model: object) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(AssertionError, match=r"(?s)experts\.slots.*at least 3 slots"):
        deploy(tmp_path, BUDGET.format(model=model, slots=2, source="mmap", host="0MiB"))


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_500_samples_answer_the_same(limited: Deployment, deployment: Deployment) -> None:
    print("\n" + compare(limited, deployment, 500))
