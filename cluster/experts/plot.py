"""Hit rate over budget as a PNG or SVG, one panel a routing. Needs matplotlib, which is optional."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.bench.plot import CannotPlot
from cluster.experts.simulation import Simulation
from workers.experts.generator import PUBLISHED_HITS

BOUNDS = {"belady": ("0.2", "--"), "best static": ("0.55", "--")}
"""Colour and line of the rows that no policy can know."""


def draw(simulations: Sequence[Simulation], path: Path) -> None:
    """Writes the figure. Raises `CannotPlot`."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as exc:
        raise CannotPlot(f"drawing needs matplotlib: pip install 'dsv4-cluster[plot]' ({exc})") from exc
    size = (7.0 * len(simulations), 5.2)
    figure, panels = pyplot.subplots(
        1, len(simulations), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    for axes, simulation in zip(panels[0], simulations, strict=True):
        _panel(axes, simulation)
    panels[0][0].set_ylabel("hit rate, cold misses counted")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as exc:
        raise CannotPlot(f"{path}: {exc}") from exc
    finally:
        pyplot.close(figure)


def _panel(axes: Any, simulation: Simulation) -> None:
    names = dict.fromkeys(cell.hits.policy for cell in simulation.cells)
    for name in names:
        cells = [cell for cell in simulation.cells if cell.hits.policy == name]
        style: dict[str, Any] = {"marker": "o", "ms": 4}
        if name in BOUNDS:
            style = {"color": BOUNDS[name][0], "ls": BOUNDS[name][1]}
        axes.plot([cell.share for cell in cells], [cell.hits.rate for cell in cells], label=name, lw=1.3, **style)
    axes.plot(PUBLISHED_HITS.keys(), PUBLISHED_HITS.values(), "k*", ms=11, label="published for V4", ls="none")
    shares = simulation.shares
    axes.set(xscale="log", xlabel="share of experts resident", ylim=(0, 1))
    axes.set_xticks(shares, [f"{share:.1%}" for share in shares])
    axes.minorticks_off()
    axes.set_title(f"{simulation.name}, {simulation.layers} layers, batch {simulation.batch}", fontsize=10)
    axes.grid(alpha=0.2)
    axes.legend(fontsize=8, loc="lower right")
