"""Samples of a run are asked by several connections; what ends one of them ends the run, with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.http_client import ApiFailure, ChatDelta
from cluster.stress.asking import Questions
from cluster.stress.options import StressOptions
from cluster.stress.samples import StressSample, stress_samples


class Parrot:
    """Answers every question with two pieces, or with the router's refusal."""

    def __init__(self, refusal: ApiFailure | None = None) -> None:
        self._refusal = refusal
        self.closed = False

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
        yield ChatDelta(content="a")
        if self._refusal is not None:
            raise self._refusal
        yield ChatDelta(content="b", finish_reason="stop")

    def interrupt(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def samples() -> list[StressSample]:
    return stress_samples(StressOptions(samples=5, seed=1))


def questions(samples: list[StressSample], connect: Any) -> Questions:
    return Questions(samples, lambda sample: sample.body("m", 0), connect, 3)


def test_every_sample_is_answered_once_and_connections_are_closed(samples: list[StressSample]) -> None:
    made: list[Parrot] = []

    def connect() -> Parrot:
        made.append(Parrot())
        return made[-1]

    answers = list(questions(samples, connect))
    assert sorted(answer.index for answer in answers) == [sample.index for sample in samples]
    assert {(answer.content, answer.finish) for answer in answers} == {("ab", "stop")}
    assert len(made) == 3 and all(parrot.closed for parrot in made)


def test_a_refused_request_is_an_answer_with_its_reason(samples: list[StressSample]) -> None:
    answers = list(questions(samples, lambda: Parrot(ApiFailure(503, "no worker", "overloaded"))))
    assert {(answer.error, answer.error_code) for answer in answers} == {("no worker", "overloaded")}
    assert len(answers) == len(samples)


@pytest.mark.timeout(20)
def test_a_connection_that_cannot_be_made_ends_the_run(samples: list[StressSample]) -> None:
    def connect() -> Parrot:
        raise OSError("no such host")

    with pytest.raises(OSError, match="no such host"):
        list(questions(samples, connect))
