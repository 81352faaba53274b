"""Figures of `dsv4 bench serve`: one level of concurrency as the clients saw it, tables and JSON.

Owns: the definitions. Tokens a second count prompt and output tokens over the wall time of the level, from the first
request sent to the last answer ended (what other servers' load tests report). `full` is the stretch in which every
client had its first token and none had run out of requests: the steady state. A prompt counts where its first token is.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Served:
    """One request. Times are of one clock, in seconds."""

    began_s: float
    ended_s: float
    arrivals_s: tuple[float, ...]
    """Of each streamed piece of text: one token each, rarely more."""
    prompt_tokens: int
    completion_tokens: int
    error: str = ""
    is_cut: bool = False
    """The level's time was over before the answer was."""

    @property
    def first_token_s(self) -> float | None:
        """Seconds to the first text; None when none came."""
        return self.arrivals_s[0] - self.began_s if self.arrivals_s else None

    @property
    def token_s(self) -> float | None:
        """Seconds a token after the first; None for answers of one token."""
        if self.completion_tokens < 2 or not self.arrivals_s:
            return None
        return (self.arrivals_s[-1] - self.arrivals_s[0]) / (self.completion_tokens - 1)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the deployment runs on, as far as the figures need it."""

    gpus: int
    """Divisor of the figures `per GPU`; 0 where there are none."""


@dataclass(frozen=True, slots=True)
class Level:
    """One concurrency. Milliseconds are percentiles over requests."""

    concurrency: int
    requests: int
    errors: int
    first_error: str
    wall_s: float
    prompt_tokens: int
    completion_tokens: int
    tokens_per_s: float
    tokens_per_s_gpu: float | None
    output_per_s: float
    full_output_per_s: float | None
    full_per_s_gpu: float | None
    """Prompt and output tokens."""
    full_s: float
    first_token_ms: tuple[float, float, float]
    """50th, 90th, 99th percentile."""
    token_ms: tuple[float, float, float]
    workers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Growth of each worker's counters over the level."""
    cut: int = 0
    """Requests that the level's time limit ended; their tokens count as far as they came."""
    name: str = ""
    """What tables call it; empty: its clients."""


def level_of(
    concurrency: int, served: Sequence[Served], machine: Machine, workers: dict[str, dict[str, float]]
) -> Level:
    """Sums up one level; failed requests count as errors only."""
    good = [item for item in served if not item.error]
    wall_s = max((item.ended_s for item in served), default=0.0) - min((item.began_s for item in served), default=0.0)
    prompt, output = sum(item.prompt_tokens for item in good), sum(item.completion_tokens for item in good)
    rate = (prompt + output) / wall_s if wall_s else 0.0
    start, end = full_stretch(concurrency, good)
    out_full = sum(_tokens_within(item, start, end) for item in good)
    in_full = sum(item.prompt_tokens for item in good if item.arrivals_s and start < item.arrivals_s[0] <= end)
    first = [1e3 * item.first_token_s for item in good if item.first_token_s is not None]
    each = [1e3 * item.token_s for item in good if item.token_s is not None]
    return Level(
        concurrency=concurrency,
        requests=len(served),
        errors=len(served) - len(good),
        first_error=next((item.error for item in served if item.error), ""),
        wall_s=wall_s,
        prompt_tokens=prompt,
        completion_tokens=output,
        tokens_per_s=rate,
        tokens_per_s_gpu=rate / machine.gpus if machine.gpus else None,
        output_per_s=output / wall_s if wall_s else 0.0,
        full_output_per_s=out_full / (end - start) if end > start else None,
        full_per_s_gpu=(in_full + out_full) / (end - start) / machine.gpus if end > start and machine.gpus else None,
        full_s=max(0.0, end - start),
        first_token_ms=_percentiles(first),
        token_ms=_percentiles(each),
        workers=workers,
        cut=sum(item.is_cut for item in served),
    )


def full_stretch(concurrency: int, served: Sequence[Served]) -> tuple[float, float]:
    """(start, end) while every client decodes: from the last first token of the first round to the earliest end after
    which a client had nothing left to ask. Empty (end <= start) when rounds were too short."""
    began = sorted(served, key=lambda item: item.began_s)
    if len(began) < concurrency or any(not item.arrivals_s for item in began[:concurrency]):
        return 0.0, 0.0
    start = max(item.arrivals_s[0] for item in began[:concurrency])
    # The last `concurrency` requests to end are each the last of a client.
    end = min(sorted(item.ended_s for item in began)[-concurrency:])
    return start, end


def _tokens_within(item: Served, start: float, end: float) -> float:
    if not item.arrivals_s:
        return 0.0
    inside = sum(start < at <= end for at in item.arrivals_s)
    return item.completion_tokens * inside / len(item.arrivals_s)


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """50th, 90th, 99th by nearest rank; zeros for none."""
    ordered = sorted(values)
    if not ordered:
        return 0.0, 0.0, 0.0
    found = [ordered[min(len(ordered), math.ceil(len(ordered) * q / 100)) - 1] for q in (50, 90, 99)]
    return found[0], found[1], found[2]


@dataclass(slots=True)
class ServeResults:
    """All levels of one run."""

    model: str
    setup: dict[str, Any]
    levels: list[Level] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """JSON. Called after each level: an interrupted run keeps what it has measured."""
        data = {"bench": "serve", "model": self.model, "setup": self.setup, "levels": [asdict(x) for x in self.levels]}
        path.write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> ServeResults:
        """What `write` wrote."""
        data = json.loads(path.read_text())
        names = {item.name for item in dataclasses.fields(Level)}
        levels = [Level(**{key: value for key, value in row.items() if key in names}) for row in data["levels"]]
        return cls(data["model"], data["setup"], levels)


def expert_table(results: ServeResults) -> Table | None:
    """What absent experts cost each worker at each level; None where all were in fast memory."""
    columns = ("level", "worker", "steps", "ms a step", "tokens a step", "experts a step", "hits", "misses a step",
               "bytes a token, by path")  # fmt: skip
    table = Table(*columns)
    for level in results.levels:
        for name, grown in sorted(level.workers.items()):
            steps, lookups = grown.get("steps", 0.0), grown.get("expert_lookups", 0.0)
            moved = {key.partition("/")[2]: size for key, size in grown.items() if key.startswith("expert_bytes/")}
            if not steps or not (lookups or moved):
                continue
            tokens = grown.get("tokens_generated", 0.0) or grown.get("prefill_tokens", 0.0)
            missed = {key.partition("/")[2]: n for key, n in grown.items() if key.startswith("expert_misses/")}
            table.add_row(
                level.name or str(level.concurrency),
                name,
                f"{steps:,.0f}",
                f"{1e3 * grown.get('step_s_total', 0.0) / steps:.1f}",
                f"{tokens / steps:,.1f}",
                f"{lookups / steps:,.0f}",
                f"{grown.get('expert_hits', 0.0) / lookups:.1%}" if lookups else "",
                ", ".join(f"{cause} {count / steps:,.1f}" for cause, count in sorted(missed.items())),
                ", ".join(f"{path} {size / max(1.0, tokens) / 1e6:,.1f} MB" for path, size in sorted(moved.items())),
            )
    return table if table.row_count else None


def level_table(results: ServeResults) -> Table:
    """One line a level."""
    setup = ", ".join(f"{key} {value}" for key, value in results.setup.items())
    columns = ("clients", "requests", "failed", "in + out tokens/s", "per GPU", "out tokens/s", "out, all decoding",
               "in + out per GPU, all decoding", "first token p50 / p99", "per token p50 / p99", "time")  # fmt: skip
    table = Table(*columns, title=f"{results.model}: {setup}", title_justify="left")
    for level in results.levels:
        first, token = level.first_token_ms, level.token_ms
        table.add_row(
            level.name or str(level.concurrency),
            f"{level.requests}, {level.cut} cut" if level.cut else str(level.requests),
            str(level.errors),
            f"{level.tokens_per_s:,.0f}",
            "" if level.tokens_per_s_gpu is None else f"{level.tokens_per_s_gpu:,.0f}",
            f"{level.output_per_s:,.0f}",
            "" if level.full_output_per_s is None else f"{level.full_output_per_s:,.0f}",
            "" if level.full_per_s_gpu is None else f"{level.full_per_s_gpu:,.0f} over {level.full_s:.0f} s",
            f"{first[0]:,.0f} / {first[2]:,.0f} ms",
            f"{token[0]:.1f} / {token[2]:.1f} ms",
            f"{level.wall_s:.1f} s",
        )
    return table
