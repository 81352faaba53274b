"""The roofline of a run as a PNG or SVG. Needs matplotlib, which is optional; no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cluster.bench.results import KernelRow, Results
from cluster.errors import ClusterError

NAMED_SHARE = 0.04
"""Ops that take less than this part of their step are drawn without a name."""


class CannotPlot(ClusterError):
    """matplotlib is missing, or there is nothing to draw."""


def draw(results: Results, path: Path) -> None:
    """Kernels under the roofline on the left, decode steps over their floor on the right. Raises `CannotPlot`."""
    pyplot = pyplot_module()
    if not results.kernels and not results.decode:
        raise CannotPlot("neither kernels nor decode steps were measured")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6.5), layout="constrained")
    _roofline(left, results)
    _decode(right, results)
    s, m = results.setup, results.machine
    scope = f"all {s.layers} layers" if s.whole else f"{s.layers} of {s.all_layers} layers"
    figure.suptitle(f"{s.preset}, synthetic weights, {scope}, one {m.gpu}, {m.date}")
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as exc:
        raise CannotPlot(f"{path}: {exc}") from exc
    finally:
        pyplot.close(figure)


def pyplot_module() -> Any:
    """matplotlib's pyplot without a screen. Raises `CannotPlot` where it is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as exc:
        raise CannotPlot(f"drawing needs matplotlib: pip install 'dsv4-cluster[plot]' ({exc})") from exc
    return pyplot


def _roofline(axes: Any, results: Results) -> None:
    rates = results.rates
    ceiling = rates.fp8_tflop_s or rates.bf16_tflop_s
    drawn = [row for row in results.kernels if row.tflop_s > 0]
    lowest = min((row.tflop_s for row in drawn), default=0.1) / 2
    ridge = 1e3 * ceiling / rates.copy_gb_s
    most = max((10 * ridge, *(2 * (row.bf16_flops + row.fp8_flops) / row.nbytes for row in drawn)))
    intensities = [most / 10 ** (i / 20) for i in range(120)][::-1]
    for label, top in (("bf16", rates.bf16_tflop_s), ("FP8", ceiling)):
        axes.plot(intensities, [min(top, x * rates.copy_gb_s / 1e3) for x in intensities], color="0.4", lw=1)
        axes.annotate(
            f"{label} product {top:,.0f} TFLOP/s", (intensities[-1], top), ha="right", va="bottom", fontsize=8
        )
    axes.annotate(f"copy {rates.copy_gb_s:,.0f} GB/s", (ridge / 3, ceiling / 3), ha="right", va="bottom", fontsize=8)
    for number, (title, rows) in enumerate(_steps(drawn).items()):
        points = [((row.bf16_flops + row.fp8_flops) / row.nbytes, row.tflop_s) for row in rows]
        axes.scatter(*zip(*points, strict=True), s=24, color=f"C{number}", label=title, zorder=3)
        whole = sum(row.ms * row.calls for row in rows)
        for row, point in zip(rows, points, strict=True):
            if row.ms * row.calls > NAMED_SHARE * whole:
                axes.annotate(row.op, point, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TFLOP/s", title="kernels")
    axes.set_ylim(bottom=lowest, top=2 * ceiling)
    axes.set_xlim(left=lowest / rates.copy_gb_s * 1e3 / 2, right=most)
    axes.grid(alpha=0.2, which="both")
    if drawn:
        axes.legend(loc="lower right", fontsize=8)


def _steps(rows: list[KernelRow]) -> dict[str, list[KernelRow]]:
    steps: dict[str, list[KernelRow]] = {}
    for row in rows:
        unit = "sequences" if row.phase == "decode" else "tokens"
        steps.setdefault(f"{row.phase}, {row.tokens:,} {unit}", []).append(row)
    return steps


def _decode(axes: Any, results: Results) -> None:
    for number, context in enumerate(sorted({row.context for row in results.decode})):
        rows = sorted((row for row in results.decode if row.context == context), key=lambda row: row.batch)
        batches = [row.batch for row in rows]
        axes.plot(batches, [row.full_ms for row in rows], "o-", color=f"C{number}", label=f"{context:,} tokens")
        axes.plot(batches, [row.full_floor_ms for row in rows], "--", color=f"C{number}", lw=1)
    measured = "measured" if results.setup.whole else f"extrapolated from {results.setup.layers} layers"
    title = f"decode, {results.setup.all_layers} layers ({measured}); dashed: floor"
    axes.set(xscale="log", yscale="log", xlabel="sequences", ylabel="ms per step", title=title)
    ticks = sorted({row.batch for row in results.decode})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.grid(alpha=0.2, which="both")
    if results.decode:
        axes.legend(fontsize=8)
