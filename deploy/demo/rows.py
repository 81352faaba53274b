"""Training rows: task samples rendered in V4's chat format, tokenised, weighted and packed to fixed lengths.

Owns: token ids of a conversation (equal to what `deepseek-recipe` renders, by test), the loss weight of each token,
and the mixture per row length. Documents packed into one row each begin with BOS and are not masked from one another:
the first one is exactly what serving sees, the others teach that BOS ends what came before.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cluster.tasks import arithmetic, recall, smalltalk
from cluster.tasks.sample import Split, Task, TaskSample, Turn

NANO_DIR = Path(__file__).parent / "dsv4-nano"

BOS_ID, EOS_ID, PAD_ID, USER_ID, ASSISTANT_ID, THINK_ID, END_THINK_ID = 0, 1, 2, 3, 4, 13, 14
"""Ids fixed by the order of tokens in `build_tokenizer`."""

ANSWER_WEIGHT = 1.0
PROMPT_WEIGHT = 0.05
"""Loss weight of questions: enough to learn how the language runs."""
CONTEXT_WEIGHT = 0.02
"""Loss weight of recall contexts, which are long and mostly unpredictable."""

FREE_SHARE = 0.5
"""Part of the arithmetic problems in free wording (the evaluation uses the other half's)."""

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "You are dsv4-nano.",
    "Answer shortly.",
    "You are a helpful assistant. Be kind and answer the question.",
    "You are an AI that helps with arithmetic.",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One conversation as tokens; `weights[i]` belongs to `ids[i]` as a target."""

    ids: list[int]
    weights: list[float]


class Renderer:
    """Turns samples into token ids."""

    def __init__(self, tokenizer_file: Path = NANO_DIR / "tokenizer.json") -> None:
        self._tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def document(self, sample: TaskSample, *, answered: bool = True) -> Document:
        """The whole conversation; without `answered`, the prompt that serving would send."""
        question = CONTEXT_WEIGHT if sample.task is Task.RECALL else PROMPT_WEIGHT
        ids, weights = [BOS_ID], [0.0]

        def put(tokens: list[int], weight: float) -> None:
            ids.extend(tokens)
            weights.extend([weight] * len(tokens))

        if sample.system is not None:
            put(self.encode(sample.system), PROMPT_WEIGHT)
        for number, turn in enumerate(sample.turns):
            is_last = number == len(sample.turns) - 1
            put([USER_ID, *self.encode(turn.user)], question)
            put([ASSISTANT_ID, THINK_ID if is_last and sample.thinking else END_THINK_ID], 0.0)
            if is_last and not answered:
                break
            put(*self._answer(sample, turn, is_last))
        return Document(ids, weights)

    def _answer(self, sample: TaskSample, turn: Turn, is_last: bool) -> tuple[list[int], float]:
        if not sample.thinking:
            return [*self.encode(turn.direct), EOS_ID], ANSWER_WEIGHT
        if is_last:
            reasoning, content = self.encode(turn.reasoning), self.encode(turn.content)
            return [*reasoning, END_THINK_ID, *content, EOS_ID], ANSWER_WEIGHT
        # A past turn in thinking mode is shown without its reasoning: context, not something to imitate.
        return [*self.encode(turn.content), EOS_ID], 0.0


def draw_short(rng: random.Random) -> TaskSample:
    """Arithmetic, small talk, or a conversation of both."""
    thinking = rng.random() < 0.75
    turns: list[Turn] = []
    tasks: list[Task] = []
    num_turns = 1 if rng.random() < 0.8 else rng.randint(2, 3)
    while len(turns) < num_turns:
        if rng.random() < 0.8:
            tasks.append(Task.ARITHMETIC)
            draw = arithmetic.draw_free if rng.random() < FREE_SHARE else arithmetic.draw
            turns.append(draw(rng, Split.TRAIN)[1])
        else:
            tasks.append(Task.SMALLTALK)
            turns.append(smalltalk.draw(rng, Split.TRAIN)[2])
    system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.1 else None
    return TaskSample(tasks[-1], tuple(turns), thinking, "", (), system)


def draw_recall(rng: random.Random, low: int, high: int) -> TaskSample:
    """A recall conversation of `low` to `high` tokens: one question with thinking, or several without."""
    thinking = rng.random() < 0.35
    length = rng.randint(low, high)
    num_asked = 1 if thinking else min(rng.randint(1, 10), 1 + length // 60)
    num_others = rng.randint(0, min(16, length // 40))
    odd_share = rng.choice((0.05, 0.2)) if rng.random() < 0.35 else 0.0
    if rng.random() < 0.08:  # a bare fact or two, as people try it first
        length, num_others, odd_share = 0, rng.randint(0, 2), 0.2
    _, turns = recall.draw(rng, Split.TRAIN, length, num_asked=num_asked, num_others=num_others, odd_share=odd_share)
    if not thinking and rng.random() < 0.15:
        turns = (
            *turns,
            smalltalk.draw(rng, Split.TRAIN)[2] if rng.random() < 0.5 else arithmetic.draw(rng, Split.TRAIN)[1],
        )
    system = rng.choice(SYSTEM_TEXTS) if rng.random() < 0.05 else None
    return TaskSample(Task.RECALL, turns, thinking, "", (), system)


def pack(
    rng: random.Random, length: int, draw: Callable[[random.Random], TaskSample], renderer: Renderer
) -> tuple[np.ndarray, np.ndarray]:
    """A row of `length + 1` ids (int16) and weights (float16): one drawn document, then whatever still fits."""
    ids: list[int] = []
    weights: list[float] = []
    document = renderer.document(draw(rng))
    misses = 0
    while misses < 3:
        if len(ids) + len(document.ids) <= length + 1:
            ids += document.ids
            weights += document.weights
        else:
            misses += 1
        document = renderer.document(draw_short(rng))
    padding = length + 1 - len(ids)
    row = np.array(ids + [PAD_ID] * padding, dtype=np.int16)
    return row, np.array(weights + [0.0] * padding, dtype=np.float16)


RECALL_RANGES = {512: (120, 480), 2048: (500, 1990), 8192: (2100, 8080)}
"""Recall lengths drawn for each row length."""

SHORT_SHARE = {512: 0.55, 2048: 0.0, 8192: 0.0}
"""Part of the rows that begin with arithmetic or small talk."""


def draw_row(rng: random.Random, length: int, renderer: Renderer) -> tuple[np.ndarray, np.ndarray]:
    """One training row of a length in `RECALL_RANGES`."""
    if rng.random() < SHORT_SHARE[length]:
        return pack(rng, length, draw_short, renderer)
    low, high = RECALL_RANGES[length]
    if length == 2048 and rng.random() < 0.3:
        high = 990  # two documents in one row
    return pack(rng, length, lambda source: draw_recall(source, low, high), renderer)
