"""`dsv4 eval`: held-out questions through the HTTP endpoint, scored and timed.

Owns: choosing samples, asking them concurrently, the figures of one task. Does not own: the tasks and their scoring
(`cluster/tasks`), starting a cluster. Greedy, so that two runs of one checkpoint give the same score.
"""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from cluster.chat import thinking_field
from cluster.http_client import ApiFailure, ChatAnswer
from cluster.tasks import arithmetic, recall
from cluster.tasks.sample import Split, Task, TaskSample
from cluster.tasks.scoring import is_correct

MAX_ANSWER_TOKENS = {Task.ARITHMETIC: 1024, Task.RECALL: 128, Task.SMALLTALK: 256}


class Asker(Protocol):
    """One connection to the endpoint; used by one thread."""

    def chat(self, body: dict[str, Any]) -> ChatAnswer: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Outcome:
    """One sample, answered or failed."""

    sample: TaskSample
    answer: ChatAnswer | None
    correct: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class TaskReport:
    """Figures of one task. Times are seconds, rates tokens per second of wall time over all connections."""

    task: str
    context_tokens: int | None
    samples: int
    correct: int
    errors: int
    score: float
    prompt_tokens: int
    completion_tokens: int
    wall_s: float
    completion_tokens_per_s: float
    prompt_tokens_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def held_out_samples(task: Task, count: int, seed: int, context_tokens: int | None) -> list[TaskSample]:
    """The first `count` held-out samples of a seed. `context_tokens` is the length of a recall's context."""
    stream: Iterator[TaskSample]
    if task is Task.ARITHMETIC:
        stream = arithmetic.generate(Split.HELD_OUT, seed)
    elif task is Task.RECALL:
        stream = recall.generate(Split.HELD_OUT, seed, num_tokens=context_tokens)
    else:
        raise ValueError(f"task {task.value} has no score")
    return list(itertools.islice(stream, count))


def request_body(sample: TaskSample, model: str) -> dict[str, Any]:
    """The greedy chat request of one sample."""
    return {
        "model": model,
        "messages": sample.messages(),
        "temperature": 0,
        "max_tokens": MAX_ANSWER_TOKENS[sample.task],
        **thinking_field(sample.thinking),
    }


def ask_all(
    samples: Sequence[TaskSample],
    model: str,
    connect: Callable[[], Asker],
    concurrency: int,
    progress: Callable[[Outcome], None],
) -> tuple[list[Outcome], float]:
    """Asks every sample over `concurrency` connections; outcomes in sample order, and the wall time in seconds."""
    local = threading.local()
    askers: list[Asker] = []

    def ask(sample: TaskSample) -> Outcome:
        if not hasattr(local, "asker"):
            local.asker = connect()
            askers.append(local.asker)
        try:
            answer: ChatAnswer = local.asker.chat(request_body(sample, model))
        except ApiFailure as exc:
            return Outcome(sample, None, False, str(exc))
        return Outcome(sample, answer, is_correct(sample, answer.reasoning or None, answer.content))

    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency, thread_name_prefix="eval") as pool:
        futures = [pool.submit(ask, sample) for sample in samples]
        try:
            for future in as_completed(futures):
                progress(future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for asker in askers:
                asker.close()
            raise
    wall_s = time.perf_counter() - start
    for asker in askers:
        asker.close()
    return [future.result() for future in futures], wall_s


def report_of(task: Task, context_tokens: int | None, outcomes: Sequence[Outcome], wall_s: float) -> TaskReport:
    """Sums up one task."""
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    first = sorted(answer.first_token_s for answer in answers) or [0.0]
    prompt = sum(answer.prompt_tokens for answer in answers)
    completion = sum(answer.completion_tokens for answer in answers)
    correct = sum(outcome.correct for outcome in outcomes)
    return TaskReport(
        task=task.value,
        context_tokens=context_tokens if task is Task.RECALL else None,
        samples=len(outcomes),
        correct=correct,
        errors=len(outcomes) - len(answers),
        score=correct / len(outcomes) if outcomes else 0.0,
        prompt_tokens=prompt,
        completion_tokens=completion,
        wall_s=wall_s,
        completion_tokens_per_s=completion / wall_s if wall_s else 0.0,
        prompt_tokens_per_s=prompt / wall_s if wall_s else 0.0,
        first_token_p50_s=statistics.median(first),
        first_token_p95_s=first[min(len(first) - 1, int(0.95 * len(first)))],
    )
