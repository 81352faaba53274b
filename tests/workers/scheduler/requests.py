"""Requests and sequences for scheduler tests."""

from __future__ import annotations

from workers.messages import GenerateRequest, SamplingParams
from workers.sequence import Sequence, StopRule

EOS = 1


def make_sequence(
    name: str, num_prompt: int, *, max_tokens: int = 8, priority: int = 0, arrival_s: float = 0.0
) -> Sequence:
    """A fresh sequence whose prompt ids count up from 2."""
    request = GenerateRequest(
        name, 0, tuple(range(2, 2 + num_prompt)), SamplingParams(max_tokens=max_tokens), priority=priority
    )
    return Sequence(request, stop=StopRule.of(request, EOS), arrival_s=arrival_s, deadline_s=1e9)
