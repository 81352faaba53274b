"""Real shortage: pools so small that the batch outgrows them, one space at a time.

Owns: the sizes, and samples whose outputs cross a page boundary while they run. Nothing is forced: admission promises
what outputs usually need, so that long ones outgrow their promise, and the workers must notice, take someone out and
bring them back by themselves. What makes that frequent is arithmetic over pages of 256 tokens:

    space         every context ends      units for 8 requests    shortage when
    full_pages    135 tokens before a     2 a request             an output passes the boundary and no page is free
                  2nd boundary
    window_pages  135 tokens before the   3 for four              likewise; until 128 tokens past it two are held
                  1st boundary
    slots         anywhere                1 for two requests      a hand-off arrives and no slot is free, or one has
                                                                  waited long enough to take another's
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from cluster.config import Admission, ClusterConfig
from cluster.stress.options import StressOptions
from cluster.stress.samples import StressSample, samples_behind
from cluster.tasks import recall
from cluster.tasks.sample import TaskSample

LONGEST_PAGES = 3
"""Pages of the longest prompt among the samples."""

SPACES = ("full_pages", "window_pages", "slots")

PAGE_TOKENS = 256
"""As in `kvstore.spec`."""

USUAL_OUTPUT = 135
"""Tokens before a page boundary at which contexts end; most outputs are longer."""

MARKER_TOKENS = 12
"""Tokens around the notes and the question."""

DIGIT_FACTOR = 1.15
"""Tokens per piece of an ordinary question."""

QUANTILE = 0.02
"""Share of the outputs that keep within their promise: hardly any."""


def pressure_samples(options: StressOptions, space: str) -> list[StressSample]:
    """Samples whose contexts end shortly before a page boundary."""
    rng = random.Random(f"pressure:{options.seed}:{space}")
    boundaries = {"full_pages": (2,), "window_pages": (1,), "slots": (1, 2, 3)}[space]

    def context(index: int, problem: TaskSample) -> int:
        end = rng.choice(boundaries) * PAGE_TOKENS - USUAL_OUTPUT
        return max(0, end - MARKER_TOKENS - round(DIGIT_FACTOR * recall.estimate_tokens(problem.turns[-1].user)))

    return samples_behind(rng, options, context)


def scarce_config(config: ClusterConfig, space: str, options: StressOptions) -> ClusterConfig:
    """`config` with too little of `space` for the concurrency of the options, and enough of the others."""
    most_pages = LONGEST_PAGES + -(-options.max_tokens // PAGE_TOKENS)
    sizes = {
        "full_pages": max(most_pages, 2 * options.concurrency),
        "window_pages": max(2, 3 * options.concurrency // 4),
        "slots": max(1, options.concurrency // 2),
    }
    scarce: dict[str, Any] = {space: sizes[space]}
    decode = dataclasses.replace(config.decode, **scarce)
    retract = dataclasses.replace(
        config.retract,
        admission=Admission.PREDICTED,
        forecast_quantile=QUANTILE,
        forecast_safety=1.0,
        forecast_initial=1,
        # The less it looks ahead, the more often it is wrong.
        horizon_steps=2,
        min_run_steps=4,
        extra_requests=options.concurrency if space == "slots" else 0,
    )
    return dataclasses.replace(config, decode=decode, retract=retract)
