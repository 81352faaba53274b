"""The runs of a proof: plain answers first, then the same questions while requests are taken out and brought back.

Owns: the order of one run (reset, force, ask, take back, wait for rest, report), its figures, and what makes it fail.
Does not own: drawing (`cluster/stress/table.py`), starting clusters (`cluster/stress/target.py`). A run that is
interrupted leaves a row of what it saw so far, and never leaves anything forced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cluster.http_client import ApiFailure
from cluster.stress.answers import Answer, Difference, difference
from cluster.stress.asking import Questions, Streamer
from cluster.stress.link import Rest, RetractLink
from cluster.stress.options import StressOptions
from cluster.stress.samples import StressSample
from workers.messages import RetractControl, RetractReport


@dataclass(frozen=True, slots=True)
class Row:
    """One run of all samples."""

    name: str
    samples: int
    """Asked for; `answers` are those that ended."""
    answers: tuple[Answer, ...]
    right: int
    wall_s: float
    scored: bool = True
    """Whether the questions have answers."""
    compared: int = 0
    """Answers that have a plain one to compare with; 0 for the plain run itself."""
    differences: tuple[Difference, ...] = ()
    report: RetractReport = field(default_factory=RetractReport)
    rest: Rest = field(default_factory=lambda: Rest(0))
    far_events: int = 0
    """Of the events that the workers remember, those at contexts beyond the bound."""
    known_events: int = 0
    interrupted: bool = False
    problems: tuple[str, ...] = ()
    """Why the run proves nothing or proves a fault; empty when it passed."""

    @property
    def identical(self) -> int:
        return self.compared - len(self.differences)

    @property
    def errors(self) -> int:
        return sum(bool(answer.error) for answer in self.answers)

    @property
    def score(self) -> float | None:
        """Share of right answers; None where there is nothing to be right about."""
        if not self.scored:
            return None
        return self.right / len(self.answers) if self.answers else 0.0

    @property
    def output_tokens(self) -> int:
        return sum(answer.completion_tokens for answer in self.answers)


class Watcher(Protocol):
    """Shows a run while it goes on."""

    def begin(self, name: str, total: int) -> None: ...

    def advance(self, note: str) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Bench:
    """What every run of one deployment shares."""

    samples: Sequence[StressSample]
    model: str
    connect: Callable[[], Streamer]
    link: RetractLink
    options: StressOptions
    watcher: Watcher
    rows: list[Row]
    """Finished and interrupted runs, in order."""

    def ask(self, samples: Sequence[StressSample], concurrency: int) -> Questions:
        """The samples' requests, not yet sent."""
        return Questions(
            samples, lambda sample: sample.body(self.model, self.options.top_logprobs), self.connect, concurrency
        )


def plain_run(bench: Bench, concurrency: int = 1, plain: Sequence[Answer] = ()) -> Row:
    """Nothing forced. With `plain`, a second one whose answers must agree (batched with others)."""
    name = f"plain x{concurrency}"
    return _run(bench, name, RetractControl(), concurrency, plain, must_retract=False)


def retracted_run(bench: Bench, plain: Sequence[Answer]) -> Row:
    """The forced run of the options."""
    options = bench.options
    name = f"retract {options.tier} x{options.concurrency}"
    return _run(bench, name, options.control(), options.concurrency, plain, must_retract=True)


def shortage_run(bench: Bench, space: str, plain: Sequence[Answer]) -> Row:
    """Nothing forced, but too little of `space`: the workers must retract by themselves, and for that reason."""
    options = bench.options
    row = _run(
        bench, f"short of {space}", options.pressure_control(), options.concurrency, plain, must_retract=True,
        cause=space,
    )  # fmt: skip
    return row


def _run(
    bench: Bench,
    name: str,
    control: RetractControl,
    concurrency: int,
    plain: Sequence[Answer],
    *,
    must_retract: bool,
    cause: str = "",
) -> Row:
    expected = {answer.index: answer for answer in plain}
    answers: list[Answer] = []
    found: list[Difference] = []
    right = 0
    interrupted = True
    with forced(bench.link, control):
        bench.watcher.begin(name, len(bench.samples))
        began = time.perf_counter()
        try:
            for answer in bench.ask(bench.samples, concurrency):
                answers.append(answer)
                right += bench.options.vocabulary is None and answer.is_right(bench.samples[answer.index])
                if answer.index in expected and (away := difference(expected[answer.index], answer)) is not None:
                    found.append(away)
                bench.watcher.advance(_note(bench.options, len(answers), right, len(found), compares=bool(expected)))
            interrupted = False
        finally:
            wall_s = time.perf_counter() - began
            bench.watcher.end()
            report, rest = _aftermath(bench.link, waits=not interrupted)
            row = Row(
                name=name,
                samples=len(bench.samples),
                answers=tuple(sorted(answers, key=lambda answer: answer.index)),
                right=right,
                wall_s=wall_s,
                scored=bench.options.vocabulary is None,
                compared=sum(answer.index in expected for answer in answers),
                differences=tuple(sorted(found, key=lambda item: item.index)),
                report=report,
                rest=rest,
                far_events=sum(context > bench.options.far_tokens for context in report.contexts),
                known_events=len(report.contexts),
                interrupted=interrupted,
                problems=(),
            )
            row = _judged(row, bench.options, must_retract=must_retract, cause=cause)
            bench.rows.append(row)
    return row


def _note(options: StressOptions, num_answers: int, right: int, num_different: int, *, compares: bool) -> str:
    score = [f"{right / num_answers:.0%} right"] if options.vocabulary is None else []
    return ", ".join([*score, f"{num_answers - num_different} identical"] if compares else score)


def _aftermath(link: RetractLink, *, waits: bool) -> tuple[RetractReport, Rest]:
    """Report and rest of a run. An interrupted one takes what it gets: the cluster may be gone already."""
    try:
        rest = link.rest() if waits else Rest(0)
        return link.report(), rest
    except ApiFailure as exc:
        return RetractReport(), Rest(0, f"no report: {exc}")


def _judged(row: Row, options: StressOptions, *, must_retract: bool, cause: str) -> Row:
    problems = []
    if row.interrupted:
        problems.append(f"interrupted after {len(row.answers)} of {row.samples}")
    if row.errors:
        first = next(answer for answer in row.answers if answer.error)
        problems.append(f"{row.errors} failed, the first at sample {first.index}: {first.error}")
    # Recomputing KV is the one way back that may round differently; it is reported, not judged.
    may_differ = must_retract and options.tier == "recompute"
    if row.differences and not may_differ:
        problems.append(f"{len(row.differences)} differ, the first at {row.differences[0]}"[:400])
    if row.rest.leaked:
        problems.append(f"{row.rest.leaked} pages or slots leaked")
    if row.rest.problem:
        problems.append(row.rest.problem)
    if must_retract and not row.interrupted:
        if row.report.events == 0:
            problems.append("nothing was retracted")
        elif cause and not row.report.by_cause.get(cause):
            problems.append(f"no retract for want of {cause}")
    return dataclasses.replace(row, problems=tuple(problems))


@contextlib.contextmanager
def forced(link: RetractLink, control: RetractControl) -> Iterator[None]:
    """`control` holds for the length of the block, with counters that start at 0, and is taken back in any case."""
    link.report(reset=True)
    link.force(control)
    try:
        yield
    finally:
        # The router may be what failed: then nothing is left to take back, and its error must not hide the first.
        with contextlib.suppress(ApiFailure):
            link.clear()
