"""The proof of the proof: one planned error of the restore at a time, each of which the comparison must find.

Owns: the runs, which end at the first difference. The errors themselves are the worker's
(`workers/retract/mutation.py`), applied after every checksum was verified, so that nothing but the output can tell.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.stress.answers import Answer, Difference, Parting, difference
from cluster.stress.runs import Bench, forced
from workers.errors import WorkerError
from workers.messages import MUTATIONS

BY_COMPARING = frozenset({Parting.TOKEN, Parting.LOGITS, Parting.END, Parting.BROKEN_LOGITS})
"""Differences in what the model put out; an error of another kind is a fault of ours and catches nothing."""


class UnknownMutation(WorkerError):
    """A name that is not one of `MUTATIONS`."""


@dataclass(frozen=True, slots=True)
class Caught:
    """One mutation and where it was caught; `first` is None when it survived."""

    name: str
    first: Difference | None
    events: int
    asked: int
    """Samples that ended before it was caught."""
    wall_s: float
    problem: str = ""
    """What else went wrong; empty otherwise."""

    @property
    def survived(self) -> bool:
        return self.first is None

    def as_dict(self) -> dict[str, object]:
        return {
            "mutation": self.name,
            "caught": None if self.first is None else self.first.as_dict(),
            "events": self.events,
            "asked": self.asked,
            "wall_s": round(self.wall_s, 3),
            "problem": self.problem,
        }


def mutations_named(name: str) -> tuple[str, ...]:
    """`all`, or one. Raises `UnknownMutation` naming the choices."""
    if name == "all":
        return MUTATIONS
    if name not in MUTATIONS:
        raise UnknownMutation(f"--mutate: found {name!r}, expected all or one of {', '.join(MUTATIONS)}")
    return (name,)


def mutation_run(bench: Bench, name: str, plain: Sequence[Answer]) -> Caught:
    """Asks the samples under one planned error until an answer differs."""
    expected = {answer.index: answer for answer in plain}
    first: Difference | None = None
    problem = ""
    num_asked = 0
    bench.watcher.begin(name, len(bench.samples))
    began = time.perf_counter()
    try:
        with forced(bench.link, bench.options.control(mutate=name)):
            questions = bench.ask(bench.samples, bench.options.concurrency)
            for answer in questions:
                num_asked += 1
                away = difference(expected[answer.index], answer)
                bench.watcher.advance("")
                if away is not None and away.parting in BY_COMPARING:
                    first = away
                    break
                problem = problem or (str(away) if away is not None else "")
            questions.stop()
            wall_s = time.perf_counter() - began
            rest = bench.link.rest()
            events = bench.link.report().events
    finally:
        bench.watcher.end()
    if rest.leaked or rest.problem:
        problem = "; ".join(text for text in (problem, rest.problem, f"{rest.leaked} leaked") if text)
    return Caught(name, first, events, num_asked, wall_s, problem)
