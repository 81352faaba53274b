"""Real shortage: pools so small that the batch outgrows them, one space at a time.

Owns: the sizes, and samples whose outputs cross a page boundary while they run. Nothing is forced: admission promises
what outputs usually need, so that long ones outgrow their promise, and the workers must notice, take someone out and
bring them back by themselves. What makes that frequent is arithmetic over pages of 256 tokens:

    space         every context ends      units for 8 requests    shortage when
    full_pages    125 tokens before a     2 a request             an output passes the boundary and no page is free
                  2nd or 3rd boundary
    window_pages  125 tokens before the   1 a request             likewise; until 128 tokens past it two are held
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

LONGEST_PAGES = 3
"""Pages of the longest prompt among the samples."""

SPACES = ("full_pages", "window_pages", "slots")

PAGE_TOKENS = 256
"""As in `kvstore.spec`."""

USUAL_OUTPUT = 125
"""Tokens before a page boundary at which contexts end; nine outputs in ten are longer."""

QUESTION_TOKENS = 64
"""Tokens of an ordinary question with its markers."""

QUANTILE = 0.2
"""Share of the outputs that keep within their promise: most do not."""


def pressure_samples(options: StressOptions, space: str) -> list[StressSample]:
    """Samples whose contexts end shortly before a page boundary."""
    rng = random.Random(f"pressure:{options.seed}:{space}")
    boundaries = {"full_pages": (2, 3), "window_pages": (1,), "slots": (1, 2, 3)}[space]

    def context(index: int) -> int:
        end = rng.choice(boundaries) * PAGE_TOKENS - USUAL_OUTPUT
        return max(0, end - QUESTION_TOKENS)

    return samples_behind(rng, options, context)


def scarce_config(config: ClusterConfig, space: str, options: StressOptions) -> ClusterConfig:
    """`config` with too little of `space` for the concurrency of the options, and enough of the others."""
    most_pages = LONGEST_PAGES + -(-options.max_tokens // PAGE_TOKENS)
    sizes = {
        "full_pages": max(most_pages, 2 * options.concurrency),
        "window_pages": max(2, options.concurrency),
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
        extra_requests=options.concurrency if space == "slots" else 0,
    )
    return dataclasses.replace(config, decode=decode, retract=retract)
