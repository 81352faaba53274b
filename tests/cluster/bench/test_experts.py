"""`dsv4 bench experts` without a GPU: budgets, derived figures, tables, the plot of a finished run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from cluster.bench.expert_plot import draw_experts
from cluster.bench.expert_results import (
    ExpertResults,
    ExpertRow,
    PrefillCell,
    holds_experts,
    read_experts,
    tables,
)
from cluster.bench.expert_scene import ExpertScene, routed_by_token
from cluster.bench.expert_sweep import Budget, Workload, batch_cells, budgets_of, first_cells, policy_cells
from cluster.bench.results import BadResults
from cluster.cli_bench import app
from kvstore.errors import IntegrityError
from workers.checkpoint.synth import cut_layers
from workers.experts.bank import HostBank
from workers.experts.layout import ExpertShape
from workers.experts.places import Places
from workers.experts.policy import LFRU
from workers.experts.residency import Residency
from workers.gpu.cached_experts import ExpertMemory
from workers.model.config import RouterKind
from workers.model.presets import NANO, V4_FLASH

LAYERS = 2
PAIRS = LAYERS * NANO.n_routed_experts


def row(**changes: object) -> ExpertRow:
    values: dict[str, object] = {
        "routing": "v4-like", "budget": "64 GB", "slots": 4787, "share": 0.435, "batch": 4, "policy": "lfru",
        "steps": 10, "ms": 20.0, "resident_ms": 5.0, "needed": 258.0, "hit_rate": 0.9, "best_rate": 0.95,
        "misses": 30.0, "expert_bytes": 10_000_000, "moved": 10.0, "host_ms": 0.1, "fill_s": 0.5, "identical": True,
    }  # fmt: skip
    return ExpertRow(**{**values, **changes})  # type: ignore[arg-type]


class Stand(ExpertScene):
    """Bank and slab of a scene, without a model."""

    def __init__(self, num_slots: int) -> None:
        self.device = torch.device("cpu")
        self.bank = HostBank(
            range(PAIRS), PAIRS, ExpertShape(NANO.hidden_size, NANO.moe_intermediate_size).expert_bytes
        )
        self.bank.memory.view(PAIRS, -1)[:] = torch.arange(PAIRS, dtype=torch.uint8)[:, None]
        config = cut_layers(NANO, range(LAYERS))
        self.memory = ExpertMemory.allocate(config, Places(num_slots), self.bank, "cpu")
        self._inside = np.full(num_slots, -1, np.int64)


def held_bytes(stand: Stand) -> list[int]:
    return stand.memory.slab[:, 0].tolist()


def test_a_new_cache_takes_over_whoever_is_where_it_wants_him() -> None:
    stand = Stand(5)
    cache = stand.cache(5, LFRU, None)
    stand.fill(cache, np.array([9, 3, 7, 1, 5]))
    stand.keep_slots(cache)
    assert held_bytes(stand) == [9, 3, 7, 1, 5]
    stand.bank.memory.view(PAIRS, -1)[9] = 77  # would be seen if it were copied again
    cache = stand.cache(4, LFRU, None)
    stand.fill(cache, np.array([3, 5, 9, 2]))
    assert held_bytes(stand)[:4] == [9, 3, 5, 2] and sorted(cache.slots.residents().tolist()) == [2, 3, 5, 9]
    cache.check_integrity()


def test_a_larger_cache_after_a_smaller_one_finds_each_pair_once() -> None:
    stand = Stand(5)
    for pairs in ([9, 3, 7, 1, 5], [5, 2], [1, 5, 9, 3, 7]):
        cache = stand.cache(len(pairs), LFRU, None)
        stand.fill(cache, np.array(pairs))
        stand.keep_slots(cache)
        assert sorted(held_bytes(stand)[: len(pairs)]) == sorted(pairs)
        cache.check_integrity()


def test_a_slot_with_other_bytes_ends_the_run() -> None:
    stand = Stand(3)
    cache = stand.cache(3, LFRU, None)
    stand.fill(cache, np.array([4, 6, 8]))
    stand.memory.slab[1, 7] += 1
    with pytest.raises(IntegrityError, match="expert pair 6"):
        stand.keep_slots(cache)


def test_what_a_larger_batch_left_in_the_tables_routes_no_token_of_a_smaller_one() -> None:
    tables = [torch.full((1024, 6), -1, dtype=torch.int32) for _ in range(LAYERS)]
    stand = Stand(1)
    stand.config, stand.most_running = cut_layers(NANO, range(LAYERS)), 3
    layers = [SimpleNamespace(tid2eid=table) for table in tables]
    stand.scene = SimpleNamespace(weights=SimpleNamespace(layers=layers))  # type: ignore[assignment]
    small, large = (Workload("v4-like", batch, LAYERS, 64, 6) for batch in (1, 3))
    stand.route_as(small)
    expected = [table.clone() for table in tables]
    first = small.trace.experts[small.past, :, 0]
    assert all(torch.equal(table[0], torch.from_numpy(first[i]).int()) for i, table in enumerate(tables))
    stand.route_as(large)
    assert not torch.equal(tables[0], expected[0])
    stand.route_as(small)
    assert all(torch.equal(*pair) for pair in zip(tables, expected, strict=True))


def test_a_measurement_begins_with_what_the_past_made_of_the_policy() -> None:
    workload = Workload("v4-like", 1, LAYERS, 64, 6)
    residency = Residency(LAYERS, 64, 6, LFRU, workload.recorded())
    slots = LAYERS * 12
    before = set(residency.first_residents(slots).tolist())
    inside = workload.residents_after_past(residency, slots)
    assert len(inside) == slots == len(set(inside.tolist())) and set(inside.tolist()) != before
    assert residency.usage.step == workload.replayed
    later = workload.needed[workload.past :]
    hits = [float(np.isin(pairs, list(found)).mean()) for found in (before, set(inside.tolist())) for pairs in later]
    assert np.mean(hits[len(later) :]) >= np.mean(hits[: len(later)])


def test_every_cell_is_planned_once_and_large_budgets_come_first() -> None:
    first, other = Workload("v4-like", 1, 1, 8, 2), Workload("uniform", 1, 1, 8, 2)
    large, small = Budget("large", 6), Budget("small", 2)
    found = [*first_cells(first, [small, large], "lfru"), *batch_cells([other], [small, large], "lfru")]
    found += policy_cells(first, [small], ["lru"])
    names = [(c.workload.routing, c.budget and c.budget.name, c.policy, c.same_text) for c in found]
    assert len(set(names)) == len(names) == 7
    assert [name for _, name, _, _ in names] == [None, "large", "small", "large", "small", "small", "small"]
    assert names[-2:] == [("v4-like", "small", "static", True), ("v4-like", "small", "lru", False)]


def test_a_budget_buys_whole_experts_and_never_less_than_one_token_needs() -> None:
    size = 13_369_344
    small, total, large, binary = budgets_of(["0.01", "24t", "1000", "118gib"], V4_FLASH, 9_000_000_000)
    assert small.slots == V4_FLASH.num_experts_per_tok
    assert total.slots == 15_000_000_000 // size and total.name == "24 GB total"
    assert large.slots == 43 * 256
    assert binary.slots == 118 * 2**30 // size and binary.name == "118 GiB"


@pytest.mark.parametrize("text", ["", "64 GB", "24tt", "t", "gib", "-8"])
def test_what_is_no_budget_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="like 64, 118gib or 24t"):
        budgets_of(["8", text], V4_FLASH, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--budgets", "8,many"), "'many' is not a budget"),
        (("--few", "8g"), "'8g' is not a budget"),
        (("--budgets", "24t", "--few", "", "--compared", "24t", "--prefill", ""), "one budget without t"),
    ],
)
def test_budgets_are_read_before_anything_is_made(options: tuple[str, ...], said: str) -> None:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["experts", *options])
    assert done.exit_code == 2 and said in done.output


def test_every_layer_of_the_benchmark_takes_its_experts_from_a_table() -> None:
    config = routed_by_token(V4_FLASH, 43)
    assert {config.router_kind(layer) for layer in range(43)} == {RouterKind.HASH}


def test_figures_of_a_row_follow_from_its_measurements() -> None:
    found = row()
    assert found.tokens_s == 200.0 and found.stall == 0.75 and found.link_gb_token == pytest.approx(0.1)
    assert found.ms_a_miss == 0.5 and row(misses=0.0).ms_a_miss is None


def test_a_difference_in_bits_is_seen_in_the_table() -> None:
    results = ExpertResults({"gpu": "x", "date": "d"}, {"layers": 43}, rows=[row(identical=False), row(policy="lru")])
    results.prefill.append(PrefillCell("64 GB", 4787, 8192, 1000.0, 2e9, True))
    screen = Console(file=io.StringIO(), width=200)
    for table in tables(results):
        screen.print(table)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "NO" in text and "8,192" in text and "4,787" in text
    assert "policies, v4-like routing, batch 4" in text and "94.7%" in text


def test_a_finished_run_is_drawn_and_another_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    rows = [row(), row(slots=0, share=0.0, policy=""), row(routing="uniform", best_rate=None), row(batch=8)]
    results = ExpertResults({"gpu": "x", "date": "d"}, {"layers": 43}, rows=rows)
    results.prefill.append(PrefillCell("64 GB", 4787, 8192, 1000.0, 2e9, True))
    results.write(file)
    assert holds_experts(file) and not holds_experts(tmp_path / "missing.json")
    assert read_experts(file) == results
    pytest.importorskip("matplotlib")
    draw_experts(file, tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"
    results.prefill.clear()
    results.write(file)
    draw_experts(file, tmp_path / "without.png")
    file.write_text(json.dumps({"rows": 3}))
    with pytest.raises(BadResults, match="run.json"):
        draw_experts(file, tmp_path / "run.png")
