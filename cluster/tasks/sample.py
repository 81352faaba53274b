"""`TaskSample`: one conversation with its expected answer, and the rule that keeps held-out problems out of training.

Owns: the value that task generators yield, and the split of problems. Does not own: token ids, rendering, scoring.
A problem belongs to a split by a hash of its own key (numbers, asked item, asked phrase), never by seed or position, so
no seed can move a held-out problem into training.
"""

from __future__ import annotations

import enum
import hashlib
from dataclasses import dataclass

HELD_OUT_SHARE = 16
"""One problem in this many is held out. Changing it mixes the splits of a model that is already trained."""


class Task(enum.StrEnum):
    """What a sample exercises."""

    ARITHMETIC = "arithmetic"
    RECALL = "recall"
    SMALLTALK = "smalltalk"


class Split(enum.StrEnum):
    """Which side of the hash a problem falls on."""

    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and the answer that a perfect model gives.

    `reasoning` is written between `<think>` and `</think>` in thinking mode. `content` answers in thinking mode and
    `direct` without it (arithmetic then shows its steps in the content).
    """

    user: str
    reasoning: str
    content: str
    direct: str


@dataclass(frozen=True, slots=True)
class TaskSample:
    """A conversation whose last turn is the question to answer.

    `answer` is what `cluster.tasks.scoring` looks for: the number as digits, or words separated by `|` of which one
    must occur. `keys` names every problem asked in the conversation.
    """

    task: Task
    turns: tuple[Turn, ...]
    thinking: bool
    answer: str
    keys: tuple[str, ...]
    system: str | None = None

    def messages(self) -> list[dict[str, str]]:
        """OpenAI chat messages up to and including the last question."""
        messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        for turn in self.turns[:-1]:
            past = turn.content if self.thinking else turn.direct
            messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": past}]
        return [*messages, {"role": "user", "content": self.turns[-1].user}]


def split_of(key: str) -> Split:
    """The split that a problem key belongs to, for every seed and every run."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return Split.HELD_OUT if int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0 else Split.TRAIN
