"""Routing that behaves like V4's, for tables before anyone has a trace of the real model. Torch-free.

Each layer scores its experts for every token as the sum of four Gaussian parts and picks the best k:

    fixed popularity      + topic, drifting over hundreds of tokens
    + phrase, drifting over a few tokens + fresh noise of the token

and `stray` of the choices are any expert at all: V4 uses nearly all its experts within minutes, so that hit rates rise
slowly at large caches although they are high at small ones, which Gaussian scores alone cannot do.

`V4_LIKE` holds the strengths. They were fitted so that a global LRU cache at batch 1 hits as often as published
measurements of V4 say (expert-cache reports: 40, 59, 74, 86 % at 5.5, 11, 22, 44 % of the experts resident, 97 % at
88 % with cold misses counted as the reports do); `tests/workers/experts` holds the fit to 3 points. The fit was fixed
before any speed was measured with it. `uniform` has no memory at all: the worst case for every cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from workers.experts.trace import RoutingTrace

PUBLISHED_HITS = {0.055: 0.40, 0.11: 0.59, 0.22: 0.74, 0.44: 0.86, 0.88: 0.97}
"""Resident share -> hit rate the generator is calibrated to."""


@dataclass(frozen=True, slots=True)
class RoutingModel:
    """Standard deviations of the parts, memory of the drifting ones in tokens, share of stray choices."""

    popularity: float
    topic: float
    topic_tokens: float
    phrase: float
    phrase_tokens: float
    stray: float
    noise: float = 1.0


V4_LIKE = RoutingModel(popularity=1.154, topic=0.564, topic_tokens=172.0, phrase=0.469, phrase_tokens=8.68, stray=0.137)

UNIFORM = RoutingModel(popularity=0.0, topic=0.0, topic_tokens=1.0, phrase=0.0, phrase_tokens=1.0, stray=1.0)

ROUTINGS = {"v4-like": V4_LIKE, "uniform": UNIFORM}
"""Routings that need no file, by their names on the command line. `uniform` is what no cache can exploit."""


def generate(
    model: RoutingModel,
    *,
    steps: int,
    layers: int = 43,
    experts: int = 256,
    top_k: int = 6,
    batch: int = 1,
    seed: int = 0,
    source: str = "",
) -> RoutingTrace:
    """A trace of `steps` tokens of `batch` independent sequences; popularity is shared, topics are not."""
    rng = np.random.default_rng(seed)
    shape = (layers, batch, experts)
    popularity = model.popularity * rng.standard_normal((layers, 1, experts), dtype=np.float32)
    topic, phrase = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    chosen = np.empty((steps, layers, batch, top_k), np.int16)
    for step in range(steps):
        topic = _drift(topic, model.topic_tokens, rng)
        phrase = _drift(phrase, model.phrase_tokens, rng)
        noise = rng.standard_normal(shape, dtype=np.float32)
        score = popularity + model.topic * topic + model.phrase * phrase + model.noise * noise
        strays = rng.integers(0, experts, (layers, batch, top_k))
        taken = rng.random((layers, batch, top_k)) < model.stray
        bonus = np.where(taken, np.float32(100.0), np.float32(0.0))
        np.put_along_axis(score, strays, np.take_along_axis(score, strays, -1) + bonus, -1)
        best = np.argpartition(score, experts - top_k, axis=-1)[..., experts - top_k :]
        chosen[step] = np.sort(best, axis=-1)
    return RoutingTrace(chosen, experts, 0, source or f"generated, {model}")


def _drift(state: npt.NDArray[np.float32], tokens: float, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """One step of a unit-variance autoregression that forgets with a time constant of `tokens`."""
    keep = np.float32(np.exp(-1.0 / tokens))
    fresh = rng.standard_normal(state.shape, dtype=np.float32)
    return keep * state + np.float32(np.sqrt(1.0 - keep * keep)) * fresh
