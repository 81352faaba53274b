"""`dsv4 bench experts` of dsv4-nano on a GPU: every cell has the same bits, every table is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.bench.expert_results import read_experts, tables
from cluster.bench.experts import ExpertPlan, run_experts
from workers.experts.layout import ExpertShape
from workers.model.presets import NANO

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.timeout(300)
def test_every_cell_of_a_small_run_has_the_same_bits(tmp_path: Path) -> None:
    size = ExpertShape(NANO.hidden_size, NANO.moe_intermediate_size).expert_bytes
    budgets = tuple(str(slots * size / 1e9) for slots in (80, 30))
    plan = ExpertPlan(
        budgets=budgets,
        few=budgets[1:],
        compared=budgets[1:],
        prefill=budgets,
        batches=(1, 3),
        routings=("v4-like", "uniform"),
        policies=("lfru", "static"),
        json_file=tmp_path / "run.json",
    )
    layers = NANO.num_hidden_layers
    results = run_experts(NANO, plan, layers=layers, say=print, context=1024, chunk=256)
    # off, 80, 30; at 30: three more workloads, its own text, the other policy
    assert len(results.rows) == 8 and all(row.identical in (None, True) for row in results.rows)
    assert results.rows[0].hit_rate == 0 and all(0 < row.hit_rate < 1 for row in results.rows[1:])
    assert len(results.prefill) == 2 and all(cell.identical for cell in results.prefill)
    assert read_experts(tmp_path / "run.json").rows == results.rows
    assert len(tables(results)) == 6
