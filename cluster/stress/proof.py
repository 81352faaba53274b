"""`Proof`: what one command carries out, over as many deployments as it needs, and what it found.

Owns: which runs there are and the verdict. Does not own: one run (`cluster/stress/runs.py`), signals and drawing
(`cluster/cli_stress.py`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from cluster.config import ClusterConfig
from cluster.stress.link import RetractLink
from cluster.stress.mutations import Caught, mutation_run, mutations_named
from cluster.stress.options import StressOptions
from cluster.stress.pressure import SPACES, pressure_samples, scarce_config
from cluster.stress.runs import Bench, Row, plain_run, retracted_run, shortage_run
from cluster.stress.samples import StressSample, stress_samples
from cluster.stress.target import Target, running_target, started_target, stress_config
from cluster.stress.watcher import ProgressWatcher
from cluster.stress.words import word_samples

OnStarted = Callable[[], None]


class Proof:
    """One proof and its findings. Main thread only."""

    def __init__(
        self, options: StressOptions, base: ClusterConfig, *, url: str | None, api_key: str | None, console: Console
    ) -> None:
        """`base` is what a self-started deployment is made from; `url` names a running one instead."""
        self.options = options
        self.rows: list[Row] = []
        self.caught: list[Caught] = []
        self._planned = 0
        """Mutations that were to run."""
        self._base = base
        self._url, self._api_key = url, api_key
        self._console = console

    @property
    def passed(self) -> bool:
        """True when every run passed and every mutation was caught."""
        if any(row.problems for row in self.rows):
            return False
        if any(item.survived for item in self.caught) or len(self.caught) != self._planned:
            return False
        return bool(self.rows)

    def prove(self, on_started: OnStarted, *, batched: bool) -> None:
        """Plain, then retracted; with `batched` also plain at the same concurrency."""
        with self._bench(self._samples(), on_started) as bench:
            plain = plain_run(bench)
            if batched:
                plain_run(bench, self.options.concurrency, plain.answers)
            retracted_run(bench, plain.answers)

    def mutate(self, name: str, on_started: OnStarted) -> None:
        """Plain, retracted without an error as the control group, then each mutation until it is caught."""
        names = mutations_named(name)
        self._planned = len(names)
        with self._bench(self._samples(), on_started) as bench:
            plain = plain_run(bench)
            retracted_run(bench, plain.answers)
            quiet = dataclasses.replace(bench, watcher=ProgressWatcher(self._console, keeps=False))
            for mutation in names:
                self.caught.append(mutation_run(quiet, mutation, plain.answers))

    def starve(self, on_started: OnStarted) -> None:
        """Each space in turn, in a deployment that has too little of it."""
        for space in SPACES:
            with self._bench(pressure_samples(self.options, space), on_started, space=space) as bench:
                # Also what teaches the workers how long outputs are.
                plain = plain_run(bench)
                shortage_run(bench, space, plain.answers)

    def _samples(self) -> list[StressSample]:
        return stress_samples(self.options) if self.options.vocabulary is None else word_samples(self.options)

    @contextlib.contextmanager
    def _bench(
        self, samples: Sequence[StressSample], on_started: OnStarted, space: str | None = None
    ) -> Iterator[Bench]:
        with self._target(on_started, space) as target, target.client() as client:
            yield Bench(
                samples=samples,
                model=target.model,
                connect=target.client,
                link=RetractLink(client),
                options=self.options,
                watcher=ProgressWatcher(self._console),
                rows=self.rows,
            )

    @contextlib.contextmanager
    def _target(self, on_started: OnStarted, space: str | None) -> Iterator[Target]:
        if self._url is not None:
            with running_target(self._url, self._api_key) as target:
                yield target
            return
        with stress_config(self._base, self.options) as config:
            settings = config if space is None else scarce_config(config, space, self.options)
            with started_target(settings, lambda line: self._console.print(line, style="dim"), on_started) as target:
                yield target
