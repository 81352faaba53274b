"""`StressOptions`: what one `dsv4 stress retract` was asked to do."""

from __future__ import annotations

from dataclasses import dataclass, replace

from workers.messages import RetractControl


@dataclass(frozen=True, slots=True)
class StressOptions:
    """Settings of the proof. `RetractControl` checks what it shares with them."""

    samples: int = 500
    interval: int = 40
    """A request is retracted after each so many of its own tokens."""
    concurrency: int = 8
    """Requests in flight in the retracted run; the plain run has one."""
    victim: str = "all"
    names: tuple[str, ...] = ()
    seed: int = 0
    """Which samples, and where in a request its retracts fall."""
    tier: str = "auto"
    poison_freed: bool = True
    other_pages: bool = True
    max_context: int | None = None
    """Longest prompt plus output; None keeps prompts below a thousand tokens."""
    fail_copy: int | None = None
    max_tokens: int = 512
    """Output budget of one request."""
    top_logprobs: int = 5
    """Alternatives whose log-probabilities are compared at each token."""
    far_tokens: int = 256
    """Contexts beyond this many tokens make the indexer choose: four times its top-k."""
    sampled_every: int = 5
    """One request in so many is sampled with a seed; the others are greedy."""
    temperature: float = 1.0
    """Of the sampled ones."""
    penalised_every: int = 10
    """One request in so many also pays for what it has said before: more state that must survive."""
    repetition_penalty: float = 1.5
    """Of the penalised ones; it makes a sure model unsure, so that what the sampler draws shows."""
    only_far: bool = False
    """Every sample has such a context, instead of five in nine."""
    vocabulary: int | None = None
    """Tokens of a synthetic model's vocabulary: prompts are random words of it, and nothing is scored."""

    def control(self, mutate: str | None = None) -> RetractControl:
        """What the decode workers are told. Raises `ValueError` naming a bad setting."""
        return RetractControl(
            interval=self.interval,
            victim=self.victim,
            names=self.names,
            seed=self.seed,
            tier=self.tier,
            poison_freed=self.poison_freed,
            other_pages=self.other_pages,
            fail_copy=self.fail_copy,
            mutate=mutate,
        )

    def pressure_control(self) -> RetractControl:
        """Forces nothing, but keeps freed memory poisoned and pages changing."""
        return replace(self.control(), interval=None, victim="all", names=(), tier="auto", fail_copy=None)
