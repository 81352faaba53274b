"""What `dsv4 bench experts` finds, as plain data and as tables. Torch-free.

Owns: the form of the file and the derived figures. Definition of a hit: `workers/experts/trace.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from cluster.bench.results import BadResults

Made = TypeVar("Made")
GB = 1e9


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One cell: a budget, a batch and a routing. Milliseconds are of a decode step."""

    routing: str
    budget: str
    slots: int
    share: float
    batch: int
    policy: str
    steps: int
    ms: float
    resident_ms: float
    """The same batch with every expert in a slot (experts share bytes where they do not fit)."""
    needed: float
    """Unique (layer, expert) pairs a step needs, mean."""
    hit_rate: float
    best_rate: float | None
    """Belady's over the same steps; None where it was not computed."""
    misses: float
    """Pairs a step reads over the host link, mean."""
    expert_bytes: int
    moved: float
    """Pairs a step copies into slots, mean."""
    host_ms: float
    """The cache's own work on the host, a step."""
    fill_s: float
    """Bringing in the first residents; those of the cell before stayed where they were."""
    identical: bool | None
    """Logits after the first steps equal those of the workload's first cell bit for bit; None for that cell itself."""

    @property
    def tokens_s(self) -> float:
        """Tokens per second of the whole batch."""
        return 1e3 * self.batch / self.ms

    @property
    def link_gb_token(self) -> float:
        """GB over the link for each token."""
        return (self.misses + self.moved) * self.expert_bytes / self.batch / GB

    @property
    def stall(self) -> float:
        """Share of the step that a resident model would not need."""
        return max(0.0, 1 - self.resident_ms / self.ms)

    @property
    def ms_a_miss(self) -> float | None:
        """What one absent expert adds to the step."""
        return (self.ms - self.resident_ms) / self.misses if self.misses else None

    def as_dict(self) -> dict[str, Any]:
        """Measured and derived figures."""
        derived = ("tokens_s", "link_gb_token", "stall", "ms_a_miss")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in derived}


@dataclass(frozen=True, slots=True)
class PrefillCell:
    """One chunk of one prompt at one budget."""

    budget: str
    slots: int
    tokens: int
    ms: float
    copied_bytes: float
    """Bytes that came over the host link ahead of their layer."""
    identical: bool
    """Logits equal those of the largest budget bit for bit."""

    @property
    def tokens_s(self) -> float:
        """Prompt tokens per second."""
        return 1e3 * self.tokens / self.ms


@dataclass(slots=True)
class ExpertResults:
    """A whole run."""

    machine: dict[str, Any]
    setup: dict[str, Any]
    memory: dict[str, float] = field(default_factory=dict)
    rows: list[ExpertRow] = field(default_factory=list)
    prefill: list[PrefillCell] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """As JSON, with the derived figures."""
        rows = [row.as_dict() for row in self.rows]
        prefill = [dataclasses.asdict(cell) | {"tokens_s": cell.tokens_s} for cell in self.prefill]
        form = {"machine": self.machine, "setup": self.setup, "memory": self.memory, "rows": rows, "prefill": prefill}
        path.write_text(json.dumps(form, indent=1))


def holds_experts(file: Path) -> bool:
    """Whether a file looks like the result of `dsv4 bench experts` rather than of `dsv4 bench model`."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and "rows" in stored and "format" not in stored


def read_experts(file: Path) -> ExpertResults:
    """What `ExpertResults.write` wrote. Raises `BadResults`."""
    try:
        stored = json.loads(file.read_text())
        rows = [_from(ExpertRow, row) for row in stored["rows"]]
        prefill = [_from(PrefillCell, cell) for cell in stored["prefill"]]
        return ExpertResults(stored["machine"], stored["setup"], stored["memory"], rows, prefill)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BadResults(f"{file}: not the result of `dsv4 bench experts`: {exc!r}") from exc


def _from(kind: Callable[..., Made], stored: dict[str, Any]) -> Made:
    """A row without its derived figures."""
    names = {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in stored.items() if name in names})


def tables(results: ExpertResults) -> list[Table]:
    """Conditions, one table for each routing, one that compares policies, prefill."""
    about = Table("", "conditions", title="expert cache", title_justify="left")
    for key, value in {**results.machine, **results.setup, **results.memory}.items():
        about.add_row(key, f"{value:,.2f}" if isinstance(value, float) else str(value))
    found = [about]
    usual = results.rows[0].policy or (results.rows[1].policy if len(results.rows) > 1 else "") if results.rows else ""
    for routing in dict.fromkeys(row.routing for row in results.rows):
        rows = [row for row in results.rows if row.routing == routing]
        common = rows if routing.endswith("same text") else [row for row in rows if row.policy in ("", usual)]
        found.append(_rows_table(routing, sorted(common, key=lambda row: (row.batch, -row.slots))))
    if len({row.policy for row in compared(results.rows)}) > 1:
        found.append(_policy_table(compared(results.rows)))
    if results.prefill:
        found.append(_prefill_table(results.prefill))
    return found


def compared(rows: Sequence[ExpertRow]) -> list[ExpertRow]:
    """Rows of the budgets, batch and routing at which more than one policy ran."""
    known: dict[tuple[str, int, str], set[str]] = {}
    for row in rows:
        known.setdefault((row.routing, row.batch, row.budget), set()).add(row.policy)
    return [row for row in rows if len(known[row.routing, row.batch, row.budget]) > 1]


def _policy_table(rows: Sequence[ExpertRow]) -> Table:
    title = f"policies, {rows[0].routing} routing, batch {rows[0].batch}"
    columns = ("budget", "policy", "ms", "tokens/s", "hit", "of Belady", "misses a step", "moves a step", "host ms")
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        of_best = "" if not row.best_rate else f"{row.hit_rate / row.best_rate:.1%}"
        figures = (f"{row.hit_rate:.1%}", of_best, f"{row.misses:.1f}", f"{row.moved:.2f}", f"{row.host_ms:.2f}")
        table.add_row(row.budget, row.policy, f"{row.ms:.2f}", f"{row.tokens_s:,.1f}", *figures)
    return table


def _prefill_table(cells: list[PrefillCell]) -> Table:
    title = f"prefill of one chunk of {cells[0].tokens:,} tokens"
    columns = ("budget", "slots", "ms", "tokens/s", "GB copied", "same bits")
    table = Table(*columns, title=title, title_justify="left")
    for cell in cells:
        figures = (f"{cell.ms:,.0f}", f"{cell.tokens_s:,.0f}", f"{cell.copied_bytes / GB:.2f}")
        table.add_row(cell.budget, f"{cell.slots:,}", *figures, "yes" if cell.identical else "NO")
    return table


def _rows_table(routing: str, rows: list[ExpertRow]) -> Table:
    columns = ("budget", "slots", "slots GB", "resident", "batch", "ms", "tokens/s", "of resident", "hit", "of Belady",
               "misses a step", "ms a miss", "GB a token", "stall")  # fmt: skip
    table = Table(*columns, "same bits", title=f"decode, {routing} routing", title_justify="left")
    for row in rows:
        table.add_row(
            row.budget,
            f"{row.slots:,}",
            f"{row.slots * row.expert_bytes / GB:.1f}",
            f"{row.share:.1%}",
            str(row.batch),
            f"{row.ms:.2f}",
            f"{row.tokens_s:,.1f}",
            f"{row.resident_ms / row.ms:.0%}",
            f"{row.hit_rate:.1%}",
            "" if not row.best_rate else f"{row.hit_rate / row.best_rate:.1%}",
            f"{row.misses:,.1f}",
            "" if row.ms_a_miss is None else f"{row.ms_a_miss:.3f}",
            f"{row.link_gb_token:.3f}",
            f"{row.stall:.0%}",
            "" if row.identical is None else ("yes" if row.identical else "NO"),
        )
    return table
