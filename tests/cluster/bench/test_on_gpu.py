"""The whole benchmark of dsv4-nano on a GPU: every part runs, every figure is there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cluster.bench.results import read_results
from cluster.bench.run import Plan, run
from cluster.bench.scene import Wanted
from workers.gpu.synthetic import synthetic_weights
from workers.gpu.weights import _tensors
from workers.model.presets import NANO

pytestmark = pytest.mark.gpu

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.timeout(300)
def test_a_run_of_nano_has_every_figure(tmp_path: Path) -> None:
    wanted = Wanted("nano", NANO, NANO.num_hidden_layers, False, (1, 3), (512, 1024), (256, 512), long_prompt=1024)
    parts = frozenset({"start", "kernels", "decode", "prefill", "long"})
    said: list[str] = []
    results = run(wanted, Plan(parts, ((3, 1024),), 512, json_file=tmp_path / "r.json"), said.append)
    assert not [line for line in said if "failed" in line], said
    assert results.setup.whole and results.start is not None and results.memory is not None
    assert [(row.context, row.batch) for row in results.decode] == [(512, 1), (512, 3), (1024, 1), (1024, 3)]
    assert {row.tokens for row in results.prefill} == {256, 512}
    assert all(0 < row.ms < 1e3 for row in (*results.kernels, *results.decode, *results.prefill))
    assert {row.phase for row in results.kernels} == {"decode", "prefill"}
    long = results.long_prompt
    assert long is not None and long.decode_s > 0 and long.same_logits
    assert long.peak_bytes < long.reserved_bytes + (8 << 20), "what was not reserved"
    assert read_results(tmp_path / "r.json").decode == results.decode


def test_synthetic_weights_take_little_beside_themselves() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weights = synthetic_weights(NANO, "cuda", seed=1)
    assert all(t.isfinite().all() for t in _tensors(weights) if t.is_floating_point())
    assert torch.cuda.max_memory_allocated() - before < weights.nbytes + (256 << 20)
