"""Prompts for models that cannot answer: random words of a known number of tokens, and answers of full length.

Owns: their lengths. Does not own: the vocabulary (`cluster/synthetic.py`). A model of random weights is as good a
witness as a trained one: the proof compares it with its own plain run, and a bit that a restore loses changes what
follows. There is no score.
"""

from __future__ import annotations

import math
import random

from cluster.stress.options import StressOptions
from cluster.stress.samples import MIN_BEYOND_TOKENS, MOST_PENALISED, NEAR_OF_NINE, StressSample
from cluster.synthetic import text_of
from cluster.tasks.sample import Task, TaskSample, Turn

NEAR_TOKENS = (24, 200)
"""Prompts without a context that the indexer must choose from: with any usual output still below its bound."""

TEMPLATE_TOKENS = 16
"""More than what the chat template adds."""


def word_samples(options: StressOptions) -> list[StressSample]:
    """The samples of a seed; five in nine (or all) have more than `far_tokens` in their prompt."""
    assert options.vocabulary is not None
    rng = random.Random(f"words:{options.seed}")
    samples = []
    for index in range(options.samples):
        is_far = options.only_far or index % 9 not in NEAR_OF_NINE
        num_tokens = _far_tokens(rng, options) if is_far else rng.randint(*NEAR_TOKENS)
        text = text_of(rng, num_tokens, options.vocabulary)
        is_penalised = (index + 1) % options.penalised_every == 0
        samples.append(
            StressSample(
                index=index,
                task=TaskSample(Task.SMALLTALK, (Turn(text, "", "", ""),), False, "", ()),
                context_tokens=num_tokens if is_far else 0,
                temperature=options.temperature if (index + 1) % options.sampled_every == 0 else 0.0,
                seed=rng.getrandbits(31),
                max_tokens=min(options.max_tokens, MOST_PENALISED) if is_penalised else options.max_tokens,
                repetition_penalty=options.repetition_penalty if is_penalised else 1.0,
                full_length=True,
            )
        )
    return samples


def _far_tokens(rng: random.Random, options: StressOptions) -> int:
    """Evenly spread over the octaves between the bound and what a request may hold."""
    least = options.far_tokens + MIN_BEYOND_TOKENS
    most = max(least, (options.max_context or 2 * least + options.max_tokens) - options.max_tokens - TEMPLATE_TOKENS)
    return int(math.exp(rng.uniform(math.log(least), math.log(most))))
