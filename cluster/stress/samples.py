"""Questions for the stress runs: long answers, and for more than half a context that the indexer must choose from.

Owns: which held-out problems are asked, the text in front of them, how they are sampled. Does not own: the problems and
their scoring (`cluster/tasks`). A question is arithmetic whose worked answer is long, because a retract needs tokens to
happen in; the text in front holds facts among filler, the kind of long context that the bundled model has learnt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from cluster.chat import thinking_field
from cluster.stress.options import StressOptions
from cluster.tasks import arithmetic, recall
from cluster.tasks.sample import Split, TaskSample

MIN_OUTPUT_TOKENS = 120
"""Tokens of the expected answer, at least: three retracts at an interval of 40."""

TOKENS_PER_PIECE = 1.33
"""Tokens per piece of `estimate_tokens` in worked arithmetic. # measured: 200 held-out ones"""

MIN_BEYOND_TOKENS = 48
"""A far context is at least this much beyond the bound, so that its first retract is too."""

MOST_PENALISED = 256
"""Output budget of penalised requests."""

TOKENS_PER_FACT = 40
"""Short notes hold one fact in so many tokens at most; a fact takes about half of that."""

NEAR_OF_NINE = (0, 2, 4, 6)
"""Samples of nine without a context: a little less than half, so that half of the retracts are surely beyond."""

USUAL_CONTEXT = 768
"""Longest far context unless the user asks for more."""

LEADS = ("Here are some notes.", "Read this text.", "Please read the following notes.", "Notes:")


@dataclass(frozen=True, slots=True)
class StressSample:
    """One request of a run, the same in every run."""

    index: int
    task: TaskSample
    context_tokens: int
    """Estimated tokens in front of the question; 0 when there are none."""
    temperature: float
    seed: int
    max_tokens: int
    repetition_penalty: float = 1.0
    full_length: bool = False
    """The answer has `max_tokens` whatever the model says."""

    def body(self, model: str, top_logprobs: int) -> dict[str, Any]:
        """The streaming chat request, without the streaming fields."""
        return {
            "model": model,
            "messages": self.task.messages(),
            "temperature": self.temperature,
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": self.max_tokens,
            "logprobs": True,
            "top_logprobs": top_logprobs,
            "ignore_eos": self.full_length,
            **thinking_field(self.task.thinking),
        }


def stress_samples(options: StressOptions) -> list[StressSample]:
    """The samples of a seed: some plain, five in nine (or all) behind a context beyond `far_tokens`."""
    rng = random.Random(f"stress:{options.seed}")

    def context(index: int, problem: TaskSample) -> int:
        is_far = options.only_far or options.max_context is not None or index % 9 not in NEAR_OF_NINE
        return _context_tokens(rng, options) if is_far else 0

    return samples_behind(rng, options, context)


def samples_behind(
    rng: random.Random, options: StressOptions, context: Callable[[int, TaskSample], int]
) -> list[StressSample]:
    """The questions of `options`, each behind `context(index, problem)` tokens of notes."""
    problems = _long_problems(options.seed)
    samples = []
    for index in range(options.samples):
        problem = next(problems)
        num_tokens = context(index, problem)
        is_sampled = (index + 1) % options.sampled_every == 0
        is_penalised = (index + 1) % options.penalised_every == 0
        samples.append(
            StressSample(
                index=index,
                task=_behind(rng, problem, num_tokens),
                context_tokens=num_tokens,
                temperature=options.temperature if is_sampled else 0.0,
                seed=rng.getrandbits(31),
                # A penalised answer may never end by itself.
                max_tokens=min(options.max_tokens, MOST_PENALISED) if is_penalised else options.max_tokens,
                repetition_penalty=options.repetition_penalty if is_penalised else 1.0,
            )
        )
    return samples


def _long_problems(seed: int) -> Iterator[TaskSample]:
    for sample in arithmetic.generate(Split.HELD_OUT, seed):
        turn = sample.turns[-1]
        pieces = recall.estimate_tokens(f"{turn.reasoning} {turn.content}")
        if pieces * TOKENS_PER_PIECE >= MIN_OUTPUT_TOKENS + 5:
            yield sample


def _context_tokens(rng: random.Random, options: StressOptions) -> int:
    """Evenly spread over the octaves between the bound and the longest, so that short ones are not rare."""
    least = options.far_tokens + MIN_BEYOND_TOKENS
    if options.max_context is None:
        return rng.randint(least, max(least, USUAL_CONTEXT))
    # The estimate is within a few percent; what is over must not cost the answer its room.
    most = max(least, int(0.97 * (options.max_context - options.max_tokens - recall.RESERVED_TOKENS)))
    return int(math.exp(rng.uniform(math.log(least), math.log(most))))


def _behind(rng: random.Random, problem: TaskSample, num_tokens: int) -> TaskSample:
    """The problem with `num_tokens` tokens of notes in front of its question."""
    if num_tokens == 0:
        return problem
    turn = problem.turns[-1]
    most = min(recall.MAX_DISTRACTORS, num_tokens // TOKENS_PER_FACT)
    facts = recall.draw_facts(rng, Split.HELD_OUT, 0, rng.randint(min(recall.MIN_DISTRACTORS, most), most), 0.0)
    notes = recall.write_context(rng, facts, num_tokens)
    asked = type(turn)(f"{rng.choice(LEADS)}\n\n{notes}\n\n{turn.user}", turn.reasoning, turn.content, turn.direct)
    return TaskSample(problem.task, (*problem.turns[:-1], asked), problem.thinking, problem.answer, problem.keys)
