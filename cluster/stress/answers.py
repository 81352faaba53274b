"""`Answer`: everything one request showed, token by token, and where two of them part.

Owns: what counts as identical. The witness of a token is the text of its log-probability and of its best alternatives'
as JSON numbers, which round-trip doubles: equal text is equal bits, and every log-probability carries the sum over all
logits, so that a logit that changed anywhere shows.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from cluster.stress.samples import StressSample
from cluster.tasks.scoring import is_correct


class Parting(enum.Enum):
    """How an answer differs from the plain one."""

    TOKEN = "token"
    LOGITS = "logits"
    END = "end"
    """Every shown token agrees; one of them ended earlier or otherwise."""
    BROKEN_LOGITS = "logits not finite"
    """The worker refused to sample."""
    ERROR = "error"


BROKEN_LOGITS_CODE = "model_output_invalid"
"""Error code of a request whose logits were not finite."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's outcome. After an error, what had arrived before it."""

    index: int
    """Of the sample."""
    tokens: tuple[str, ...]
    """Shown tokens in order."""
    witnesses: tuple[str, ...]
    """One a token."""
    reasoning: str
    content: str
    finish: str | None
    prompt_tokens: int
    completion_tokens: int
    total_s: float
    error: str = ""
    error_code: str | None = None

    def is_right(self, sample: StressSample) -> bool:
        """Whether the task's scoring accepts it."""
        return not self.error and is_correct(sample.task, self.reasoning or None, self.content)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a run's answer leaves the plain one."""

    index: int
    """Of the sample."""
    at: int
    """Of the token among the shown ones."""
    parting: Parting
    plain: str
    other: str

    def __str__(self) -> str:
        return f"sample {self.index}, token {self.at}: {self.parting.value}: {self.plain} -> {self.other}"

    def as_dict(self) -> dict[str, object]:
        return {
            "sample": self.index,
            "token": self.at,
            "kind": self.parting.value,
            "plain": self.plain,
            "other": self.other,
        }


def token_of(entry: dict[str, Any]) -> tuple[str, str]:
    """(token, witness) of one entry of a chat answer's logprobs."""
    tops = [[_name(top), top["logprob"]] for top in entry["top_logprobs"]]
    return _name(entry), json.dumps([entry["logprob"], tops])


def _name(entry: dict[str, Any]) -> str:
    """A token by its bytes: its text may be half a character."""
    raw = bytes(entry["bytes"] or ())
    return raw.decode("utf-8", "backslashreplace") or str(entry["token"])


def difference(plain: Answer, other: Answer) -> Difference | None:
    """Where `other` leaves `plain`; None when every token, log-probability and the end agree."""
    shared = min(len(plain.tokens), len(other.tokens))
    for at in range(shared):
        if plain.tokens[at] != other.tokens[at]:
            return Difference(plain.index, at, Parting.TOKEN, repr(plain.tokens[at]), repr(other.tokens[at]))
        if plain.witnesses[at] != other.witnesses[at]:
            return Difference(plain.index, at, Parting.LOGITS, plain.witnesses[at], other.witnesses[at])
    if other.error or plain.error:
        kind = Parting.BROKEN_LOGITS if other.error_code == BROKEN_LOGITS_CODE else Parting.ERROR
        return Difference(plain.index, shared, kind, plain.error or "an answer", other.error or "an answer")
    if _end(plain) != _end(other):
        return Difference(plain.index, shared, Parting.END, str(_end(plain)), str(_end(other)))
    return None


def _end(answer: Answer) -> tuple[int, str | None, int, str, str]:
    """What is left once the shown tokens agree. A stop token is counted and not shown."""
    return len(answer.tokens), answer.finish, answer.completion_tokens, answer.reasoning, answer.content


def differences(plain: Iterable[Answer], other: Iterable[Answer]) -> list[Difference]:
    """First differences by sample, of the samples that both runs have."""
    expected = {answer.index: answer for answer in plain}
    found = (difference(expected[answer.index], answer) for answer in other if answer.index in expected)
    return sorted((item for item in found if item is not None), key=lambda item: item.index)
