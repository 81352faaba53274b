"""The cost of batch invariance: which launches are compared with what."""

from __future__ import annotations

from cluster.bench.costs import CostModel
from cluster.bench.invariance import invariance_rows, library_call
from cluster.bench.results import InvarianceRow
from cluster.bench.scene import Scene
from cluster.bench.tables import invariance_table
from tests.cluster.bench.test_costs import BATCH, CONTEXT, idle_kernels, scene  # noqa: F401 - the fixture
from workers.gpu.weights import Fp8Weight


def test_every_op_of_a_layer_is_compared_with_its_prefill_form(scene: Scene) -> None:  # noqa: F811
    timed: list[int] = []

    def timer(calls: list[object], nbytes: float) -> float:
        timed.append(len(calls))
        return 1.0

    rows = {row.op: row for row in invariance_rows(scene, BATCH, CONTEXT, lambda line: None, timer=timer)}
    assert {"project_x", "linear wo_b", "sparse_attention", "expert_gate_up", "route", "top head"} <= set(rows)
    assert all("prefill form" in row.free for row in rows.values())
    compared = {op for op, row in rows.items() if "library" in row.free}
    assert compared == {"project_x", "linear q_fp8", "linear wo_b", "top head"}
    assert rows["hc_post_pre"].calls == 2 and rows["top head"].calls == 0 and rows["route"].calls == 1
    assert max(timed) <= 2 * 6


def test_the_library_multiplies_the_same_matrices(scene: Scene) -> None:  # noqa: F811
    costs = CostModel(scene.config, scene.weights)
    layer = scene.weights.layers[2]
    launches = [x for x in scene.model.launches(scene.decode_batch(BATCH, CONTEXT, CONTEXT - 1)) if x.layer == 2]
    by_name = {costs.name(launch): launch for launch in launches}
    assert costs.matrices(by_name["route"])[0] is layer.gate
    x_fp8, x_bf16 = costs.matrices(by_name["project_x"])
    assert isinstance(x_fp8, Fp8Weight) and x_fp8.codes is layer.x_fp8.codes and x_bf16 is layer.x_bf16
    assert library_call(by_name["sparse_attention"], costs) is None
    call = library_call(by_name["project_x"], costs)
    assert call is not None
    call()


def test_the_cost_is_that_of_the_fastest_forms_together() -> None:
    rows = [
        InvarianceRow(8, 4096, "linear wo_b", 1, 0.02, {"library": 0.01, "prefill form": 0.03}),
        InvarianceRow(8, 4096, "hc_post_pre", 2, 0.01, {"prefill form": 0.02}),
        InvarianceRow(8, 4096, "top head", 0, 9.0, {"library": 1.0}),
    ]
    assert [row.fastest for row in rows] == [0.01, 0.01, 1.0]
    cells = [list(column.cells) for column in invariance_table(rows).columns]
    assert cells[0][-1] == "layer" and cells[2][-1] == "40.0"
    assert cells[-1] == ["100%", "0%", "800%", "33%"]
