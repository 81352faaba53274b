"""Plans: frozen output of a scheduler, whole input of one engine step."""

from __future__ import annotations

from dataclasses import dataclass

from workers.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Prompt tokens [start, end) of one sequence; their pages are allocated."""

    sequence: Sequence
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt is complete after this chunk."""
        return self.end == self.sequence.num_prompt


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """Chunks of one prefill step, at most one a sequence."""

    chunks: tuple[Chunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.end - chunk.start for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One decode step: the last known token of each sequence; its page is allocated."""

    sequences: tuple[Sequence, ...]
    composition: int
    """Changes whenever `sequences` or any of their page tables do; equal values mean only positions moved on."""
    victims: tuple[Sequence, ...] = ()
    """Taken out of the batch because a pool is short; the worker must retract or fail each before the step."""
