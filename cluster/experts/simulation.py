"""`dsv4 experts simulate`: every policy at every budget on one routing, beside Belady's optimum and the best fixed set.

Owns: which runs make a table, the table, its JSON. Does not own: the replay (`workers/experts/simulate.py`), drawing
(`cluster/experts/plot.py`). The first part of a trace is the recording that the static policy's profile comes from; all
rows are measured on the rest, where every other policy starts with an empty cache. Definitions of needed, hit and cold:
`workers/experts/trace.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from workers.experts.generator import PUBLISHED_HITS, ROUTINGS, generate
from workers.experts.policy import POLICIES, Policy
from workers.experts.profile import step_shares
from workers.experts.simulate import Hits, belady, best_static, simulate
from workers.experts.trace import RoutingTrace

FLASH_EXPERTS_GB = 147.0
"""FP4 experts of V4-Flash: 43 layers of 256 at 13.37 MB; turns a share into the budget that it would cost there."""

SHARES = tuple(PUBLISHED_HITS)
NEAR_SHARE = 0.005

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cell:
    """One policy at one budget."""

    share: float
    """Resident part of all experts, as asked."""
    hits: Hits
    belady: float
    """Hit rate of the optimum at this budget."""

    @property
    def moved_per_step(self) -> float:
        """Pairs brought in a step."""
        return self.hits.moved / max(1, self.hits.steps)

    def as_dict(self) -> dict[str, object]:
        """Counts and derived figures."""
        hits = self.hits
        derived = {
            "rate": hits.rate,
            "warm_rate": hits.warm_rate,
            "misses_per_step": hits.misses_per_step,
            "moved_per_step": self.moved_per_step,
            "of_belady": hits.rate / self.belady if self.belady else 1.0,
        }
        return {"share": self.share, **dataclasses.asdict(hits), **derived}


@dataclass(frozen=True, slots=True)
class Simulation:
    """All cells of one routing."""

    name: str
    source: str
    layers: int
    experts: int
    batch: int
    top_k: int
    recorded_steps: int
    """Steps of the static policy's profile; not measured."""
    moves: int | None
    cells: tuple[Cell, ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """Budgets in the order of the table."""
        return tuple(dict.fromkeys(cell.share for cell in self.cells))

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        flat = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**flat, "cells": [cell.as_dict() for cell in self.cells], "published": published_points()}


def published_points() -> list[dict[str, float]]:
    """Share and hit rate that measurements of V4 report."""
    return [{"share": share, "rate": rate} for share, rate in PUBLISHED_HITS.items()]


def published_line() -> str:
    """The same as one line, for the head of a table."""
    points = ", ".join(f"{rate:.0%} at {share:.1%}" for share, rate in PUBLISHED_HITS.items())
    return f"published for V4, LRU-like, cold misses counted: {points}. Belady starts empty, fixed sets do not."


def generated(name: str, *, steps: int, layers: int, batch: int, seed: int) -> RoutingTrace:
    """A trace of one of `ROUTINGS`."""
    source = f"generated, seed {seed}, calibrated to the published points" if name == "v4-like" else "generated"
    return generate(ROUTINGS[name], steps=steps, layers=layers, batch=batch, seed=seed, source=source)


def run(
    name: str,
    trace: RoutingTrace,
    *,
    shares: Sequence[float] = SHARES,
    policies: Iterable[Policy] = tuple(POLICIES.values()),
    recorded: float = 0.25,
    moves: int | None = None,
    tell: Tell = lambda line: None,
) -> Simulation:
    """Replays everything. `recorded` is the part of the steps that makes the profile; `moves` bounds pairs a step."""
    split = int(recorded * trace.num_steps)
    measured = trace.part(split, trace.num_steps)
    needed = measured.all_needed()
    profile = step_shares(trace.part(0, split))
    cells = []
    for share in shares:
        slots = max(1, round(share * trace.num_pairs))
        best = belady(measured, slots, needed=needed)
        found = [best, best_static(measured, slots, needed=needed)]
        for policy in policies:
            tell(f"{name}: {policy.name} at {share:.1%}")
            start = profile if not policy.admits else None
            found.append(simulate(measured, slots, policy, moves=moves, profile=start, needed=needed))
        cells += [Cell(share, hits, best.rate) for hits in found]
    steps, layers, batch, top_k = trace.experts.shape
    return Simulation(name, trace.source, layers, trace.num_experts, batch, top_k, split, moves, tuple(cells))


def table(simulation: Simulation) -> Table:
    """Rows: policies within budgets."""
    s = simulation
    moves = "no bound on moves" if s.moves is None else f"at most {s.moves} moves a step"
    title = (
        f"{s.name} routing ({s.source}): {s.layers} layers x {s.experts} experts, top {s.top_k}, batch {s.batch}, "
        f"{s.cells[0].hits.steps} steps after {s.recorded_steps} recorded for `static`, {moves}"
    )
    made = Table(title=title, caption=published_line(), title_justify="left", caption_justify="left")
    for head in ("resident", "V4-Flash GB", "slots"):
        made.add_column(head, justify="right")
    made.add_column("policy")
    for head in ("hit", "of Belady", "hit, not cold", "cold", "capacity", "misses a step", "moved a step"):
        made.add_column(head, justify="right")
    for share in s.shares:
        rows = [cell for cell in s.cells if cell.share == share]
        if (rate := published_at(share)) is not None:
            made.add_row(*_budget(rows[0]), "published (V4)", f"{rate:.0%}", *[""] * 6, style="bold")
        for cell in rows:
            hits = cell.hits
            made.add_row(
                *_budget(cell),
                hits.policy,
                f"{hits.rate:.1%}",
                f"{hits.rate / cell.belady:.1%}" if cell.belady else "",
                f"{hits.warm_rate:.1%}",
                f"{hits.cold:,}",
                f"{hits.capacity:,}",
                f"{hits.misses_per_step:.1f}",
                f"{cell.moved_per_step:.1f}",
            )
        made.add_section()
    return made


def published_at(share: float) -> float | None:
    """The published hit rate at (about) this share."""
    return next((rate for known, rate in PUBLISHED_HITS.items() if abs(known - share) <= NEAR_SHARE), None)


def _budget(cell: Cell) -> tuple[str, str, str]:
    return f"{cell.share:.1%}", f"{cell.share * FLASH_EXPERTS_GB:.0f}", f"{cell.hits.slots:,}"


def write_json(simulations: Sequence[Simulation], path: Path) -> None:
    """All figures. Raises `OSError`."""
    path.write_text(json.dumps([simulation.as_dict() for simulation in simulations], indent=1) + "\n")
