"""Speed and hit rate over the expert budget, as a PNG or SVG. Needs matplotlib, which is optional; no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.bench.expert_results import PrefillCell, read_experts
from cluster.bench.plot import CannotPlot, pyplot_module
from cluster.bench.results import BadResults


def draw_experts(file: Path, image: Path) -> None:
    """Draws what `dsv4 bench experts --json` wrote. Raises `CannotPlot` or `BadResults`."""
    results = read_experts(file)
    if not any(row.policy for row in results.rows):
        raise BadResults(f"{file}: no budget was measured")
    every = [row.as_dict() for row in results.rows]
    routing, policy = every[0]["routing"], next(row["policy"] for row in every if row["policy"])
    rows = [row for row in every if row["routing"] == routing and row["policy"] in ("", policy)]
    others = [row for row in every if row["routing"] != routing and row["batch"] == rows[0]["batch"]]
    pyplot = pyplot_module()
    count = 3 if results.prefill else 2
    figure, panels = pyplot.subplots(1, count, figsize=(6 * count, 5), layout="constrained")
    _speed(panels[0], rows, others)
    _hits(panels[1], rows, others)
    if results.prefill:
        _prefill(panels[2], sorted(results.prefill, key=lambda cell: cell.slots))
    for axes in panels:
        axes.grid(alpha=0.3)
    what = f"expert cache, {results.setup['layers']} layers, generated {routing} routing, {policy}"
    figure.suptitle(f"{what}, one {results.machine['gpu']}, {results.machine['date']}")
    try:
        figure.savefig(image, dpi=120)
    except (OSError, ValueError) as exc:
        raise CannotPlot(f"{image}: {exc}") from exc
    finally:
        pyplot.close(figure)


def _lines(rows: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    """Rows with slots by `key`, ascending in share."""
    found: dict[Any, list[dict[str, Any]]] = {}
    for row in sorted((row for row in rows if row["slots"]), key=lambda row: row["share"]):
        found.setdefault(row[key], []).append(row)
    return found


def _speed(axes: Any, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    off = {row["batch"]: row["tokens_s"] for row in rows if not row["slots"]}
    for batch, mine in sorted(_lines(rows, "batch").items()):
        shares, speeds = [100 * row["share"] for row in mine], [row["tokens_s"] for row in mine]
        line = axes.plot(shares, speeds, marker="o", label=f"batch {batch}")[0]
        axes.axhline(batch * 1e3 / mine[0]["resident_ms"], color=line.get_color(), ls="--", lw=1)
        if batch in off:
            axes.axhline(off[batch], color=line.get_color(), ls=":", lw=1)
    for name, mine in _lines(others, "routing").items():
        points = ([100 * row["share"] for row in mine], [row["tokens_s"] for row in mine])
        axes.plot(*points, marker="x", lw=0.8, color="0.4", label=f"batch {mine[0]['batch']}, {name}")
    axes.set(yscale="log", xlabel="experts resident, %", ylabel="tokens per second")
    axes.set_title("decode; dashed: all resident, dotted: cache off")
    axes.legend()


def _hits(axes: Any, rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
    for batch, mine in sorted(_lines(rows, "batch").items()):
        shares = [100 * row["share"] for row in mine]
        line = axes.plot(shares, [100 * row["hit_rate"] for row in mine], marker="o", label=f"batch {batch}")[0]
        best = [(share, 100 * row["best_rate"]) for share, row in zip(shares, mine, strict=True) if row["best_rate"]]
        if best:
            axes.plot(*zip(*best, strict=True), color=line.get_color(), ls="--", lw=1, label=f"batch {batch}, Belady")
    for name, mine in _lines(others, "routing").items():
        points = ([100 * row["share"] for row in mine], [100 * row["hit_rate"] for row in mine])
        axes.plot(*points, marker="x", lw=0.8, color="0.4", label=f"batch {mine[0]['batch']}, {name}")
    axes.set(xlabel="experts resident, %", ylabel="pairs of a step found in slots, %", title="hit rate")
    axes.legend()


def _prefill(axes: Any, cells: list[PrefillCell]) -> None:
    axes.plot([cell.slots for cell in cells], [cell.tokens_s for cell in cells], marker="o")
    title = f"prefill, one chunk of {cells[0].tokens:,} tokens"
    axes.set(xlabel="slots", ylabel="tokens per second", title=title, ylim=(0, None))
