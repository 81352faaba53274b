"""Speed and hit rate over the expert budget, as a PNG or SVG. Needs matplotlib, which is optional; no GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.bench.plot import CannotPlot, pyplot_module
from cluster.bench.results import BadResults


def holds_experts(file: Path) -> bool:
    """Whether a file looks like the result of `dsv4 bench experts` rather than of `dsv4 bench model`."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and "rows" in stored and "format" not in stored


def draw_experts(file: Path, image: Path) -> None:
    """Draws what `dsv4 bench experts --json` wrote. Raises `CannotPlot` or `BadResults`."""
    try:
        stored: dict[str, Any] = json.loads(file.read_text())
        rows = [row for row in stored["rows"] if row["slots"]]
        off = {row["batch"]: row["tokens_s"] for row in stored["rows"] if not row["slots"]}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BadResults(f"{file}: not the result of `dsv4 bench experts`: {exc!r}") from exc
    if not rows:
        raise CannotPlot(f"{file}: no budget was measured")
    pyplot = pyplot_module()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for batch in sorted({row["batch"] for row in rows}):
        mine = sorted((row for row in rows if row["batch"] == batch), key=lambda row: row["share"])
        shares = [100 * row["share"] for row in mine]
        line = left.plot(shares, [row["tokens_s"] for row in mine], marker="o", label=f"batch {batch}")[0]
        resident = batch * 1e3 / mine[0]["resident_ms"]
        left.axhline(resident, color=line.get_color(), ls="--", lw=1)
        if batch in off:
            left.axhline(off[batch], color=line.get_color(), ls=":", lw=1)
        right.plot(shares, [100 * row["hit_rate"] for row in mine], marker="o", label=f"batch {batch}")
    left.set(yscale="log", xlabel="experts resident, %", ylabel="tokens per second")
    left.set_title("decode; dashed: all resident, dotted: cache off")
    right.set(xlabel="experts resident, %", ylabel="pairs of a step found in slots, %", title="hit rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    machine, setup = stored["machine"], stored["setup"]
    what = f"expert cache, {setup['layers']} layers, generated V4-like routing"
    figure.suptitle(f"{what}, one {machine['gpu']}, {machine['date']}")
    try:
        figure.savefig(image, dpi=120)
    except (OSError, ValueError) as exc:
        raise CannotPlot(f"{image}: {exc}") from exc
    finally:
        pyplot.close(figure)
