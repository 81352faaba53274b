"""What batch invariance costs: ops of a decode step beside forms that are free to depend on the batch.

Decode's ops add in one order whatever the number of tokens, so that a row's bits do not depend on its batch. Whoever
gives that up may take for each number of tokens what is fastest: here the same op as prefill computes it (other tiles,
other order), and for plain products torch's own, whose library chooses tile and split of K by the shape. The library's
FP8 product has one scale a tensor and gets its input rounded already, which is less work than ours: the cost is an
upper bound. An op whose split follows the batch without changing bits (attention) costs nothing by this measure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cluster.bench.costs import TOP, Cost, CostModel
from cluster.bench.results import InvarianceRow
from cluster.bench.scene import Scene
from cluster.bench.timing import cold_ms
from workers.gpu.kernel_set import Launch
from workers.gpu.weights import Fp8Weight
from workers.model.config import LayerKind

KIND = LayerKind.C4
"""The layers that are measured: they have every op and are half of the model."""

MOST_LAYERS = 6
"""Layers of a measurement: enough that their operands do not stay in the L2 cache."""

LIBRARY_OPS = ("project_x", "linear", "head")
"""Ops that are products of whole matrices; grouped and routed ones have no counterpart of the same recipe."""

Say = Callable[[str], None]
Timer = Callable[[list[Callable[[], Any]], float], float]


def invariance_rows(scene: Scene, batch: int, context: int, say: Say, *, timer: Timer = cold_ms) -> list[InvarianceRow]:
    """One row for each op of a layer and for the head, by `timer(calls, their bytes)` in milliseconds a call."""
    costs = CostModel(scene.config, scene.weights)
    step = scene.decode_batch(batch, context, context - 1)
    fixed = _by_op(scene, costs, scene.model.launches(step))
    rows = []
    for name, launches in fixed.items():
        nbytes = sum((costs.cost(launch, KIND) for launch in launches), Cost(0.0)).nbytes
        calls = sum(launch.layer == launches[0].layer for launch in launches if launch.layer is not None)
        ms = timer([launch.call for launch in launches], nbytes)
        rows.append(InvarianceRow(batch, context, name, calls, ms, {}))
        if library := [call for launch in launches if (call := library_call(launch, costs))]:
            try:
                rows[-1].free["library"] = timer(library, nbytes)
            except RuntimeError as exc:  # a shape that the library does not take
                say(f"library {name}: {exc}")
    other = _by_op(scene, costs, scene.model.prefill_launches(step))
    for row in rows:
        same = other.get(row.op, [])
        if same:
            nbytes = sum((costs.cost(launch, KIND) for launch in same), Cost(0.0)).nbytes
            row.free["prefill form"] = timer([launch.call for launch in same], nbytes)
        say(f"invariance batch {batch} {row.op}: {1e3 * row.ms:.1f} us, {row.free}")
    return rows


def _by_op(scene: Scene, costs: CostModel, launches: Iterable[Launch]) -> dict[str, list[Launch]]:
    """Launches of the first layers of `KIND` and of the head, by name; all launches run once, in order."""
    layers = [i for i, kind in enumerate(scene.config.layer_kinds) if kind is KIND][:MOST_LAYERS]
    found: dict[str, list[Launch]] = {}
    for launch in launches:
        launch.call()
        if launch.layer in layers or launch.op == "head":
            found.setdefault(costs.name(launch) if launch.layer is not None else f"{TOP} {launch.op}", []).append(
                launch
            )
    return found


def library_call(launch: Launch, costs: CostModel) -> Callable[[], Any] | None:
    """torch's products with the same weights and as many rows; None for other ops."""
    if launch.op not in LIBRARY_OPS:
        return None
    matrices, rows = costs.matrices(launch), costs.rows(launch)
    calls = [_fp8_call(m, rows) if isinstance(m, Fp8Weight) else _bf16_call(m, rows) for m in matrices]
    return partial(_call_all, calls)


def _fp8_call(weight: Fp8Weight, rows: int) -> Callable[[], Any]:
    codes = weight.codes.view(torch.float8_e4m3fn)
    x = torch.randn(rows, codes.shape[1], device=codes.device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=codes.device)
    return partial(torch._scaled_mm, x, codes.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def _bf16_call(weight: Tensor, rows: int) -> Callable[[], Any]:
    x = torch.randn(rows, weight.shape[1], device=weight.device).to(torch.bfloat16)
    return partial(torch.mm, x, weight.t(), out=x.new_empty(rows, len(weight)))


def _call_all(calls: list[Callable[[], Any]]) -> None:
    for call in calls:
        call()
