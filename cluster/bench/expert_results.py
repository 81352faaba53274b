"""What `dsv4 bench experts` finds, as plain data and as tables. Torch-free.

Owns: the form of the file and the derived figures. Definition of a hit: `workers/experts/trace.py`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

GB, GIB = 1e9, 1 << 30


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One cell: a budget, a batch and a routing. Milliseconds are of a decode step."""

    routing: str
    budget: str
    slots: int
    share: float
    batch: int
    steps: int
    ms: float
    resident_ms: float
    """The same batch with every expert in a slot (experts share bytes where they do not fit)."""
    needed: float
    """Unique (layer, expert) pairs a step needs, mean."""
    hit_rate: float
    misses: float
    """Pairs a step reads over the host link, mean."""
    read_bytes: float
    """Bytes a step reads in place over the link, mean."""
    moved_bytes: float
    """Bytes a step copies into slots, mean."""
    identical: bool | None
    """Logits after the first steps equal those of the first budget bit for bit; None for that budget itself."""

    @property
    def tokens_s(self) -> float:
        """Tokens per second of the whole batch."""
        return 1e3 * self.batch / self.ms

    @property
    def link_gb_token(self) -> float:
        """GB over the link for each token."""
        return (self.read_bytes + self.moved_bytes) / self.batch / GB

    @property
    def stall(self) -> float:
        """Share of the step that a resident model would not need."""
        return max(0.0, 1 - self.resident_ms / self.ms)


@dataclass(frozen=True, slots=True)
class PrefillCell:
    """One chunk of one prompt at one budget."""

    budget: str
    slots: int
    tokens: int
    ms: float
    copied_bytes: float
    """Bytes that came over the host link ahead of their layer."""

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
        rows = [
            dataclasses.asdict(r) | {"tokens_s": r.tokens_s, "link_gb_token": r.link_gb_token, "stall": r.stall}
            for r in self.rows
        ]
        prefill = [dataclasses.asdict(cell) | {"tokens_s": cell.tokens_s} for cell in self.prefill]
        form = {"machine": self.machine, "setup": self.setup, "memory": self.memory, "rows": rows, "prefill": prefill}
        path.write_text(json.dumps(form, indent=1))


def tables(results: ExpertResults) -> list[Table]:
    """Conditions, then one table for each routing."""
    about = Table("", "conditions", title="expert cache", title_justify="left")
    for key, value in {**results.machine, **results.setup, **results.memory}.items():
        about.add_row(key, f"{value:,.2f}" if isinstance(value, float) else str(value))
    found = [about]
    for routing in dict.fromkeys(row.routing for row in results.rows):
        found.append(_rows_table(routing, [row for row in results.rows if row.routing == routing]))
    if results.prefill:
        found.append(_prefill_table(results.prefill))
    return found


def _prefill_table(cells: list[PrefillCell]) -> Table:
    title = f"prefill of one chunk of {cells[0].tokens:,} tokens"
    table = Table("budget", "slots", "ms", "tokens/s", "GB copied", title=title, title_justify="left")
    for cell in cells:
        copied = f"{cell.copied_bytes / GB:.2f}"
        table.add_row(cell.budget, f"{cell.slots:,}", f"{cell.ms:,.0f}", f"{cell.tokens_s:,.0f}", copied)
    return table


def _rows_table(routing: str, rows: list[ExpertRow]) -> Table:
    columns = ("budget", "slots", "resident", "batch", "ms", "tokens/s", "hit", "misses a step", "GB a token", "stall")
    table = Table(*columns, "same bits", title=f"decode, {routing} routing", title_justify="left")
    for row in rows:
        same = "" if row.identical is None else ("yes" if row.identical else "NO")
        table.add_row(
            row.budget,
            f"{row.slots:,}",
            f"{row.share:.1%}",
            str(row.batch),
            f"{row.ms:.2f}",
            f"{row.tokens_s:,.1f}",
            f"{row.hit_rate:.1%}",
            f"{row.misses:,.1f}",
            f"{row.link_gb_token:.3f}",
            f"{row.stall:.0%}",
            same,
        )
    return table
