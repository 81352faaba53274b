"""A folder with a recipe reads like the checkpoint that `synthesise` would have written from the same seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.workers.checkpoint.conftest import TINY
from workers.checkpoint.check import check_directory
from workers.checkpoint.inspect import inspect_directory
from workers.checkpoint.load import head_of, iter_tensors, load_named, load_without_experts
from workers.checkpoint.recipe import RECIPE_NAME
from workers.checkpoint.synth import synthesise, write_recipe
from workers.errors import BadCheckpoint
from workers.experts.config import ExpertConfig
from workers.experts.records import ExpertRecords
from workers.experts.supply import ExpertSupply
from workers.model_bundle import identity_of_heads

LAYERS = (0, 2)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """(recipe, shards) of the same model."""
    write_recipe(tmp_path / "recipe", TINY, layer_ids=LAYERS, seed=3)
    synthesise(tmp_path / "shards", TINY, layer_ids=LAYERS, seed=3)
    return tmp_path / "recipe", tmp_path / "shards"


def test_holds_no_tensor_and_is_sound(folders: tuple[Path, Path]) -> None:
    recipe, _ = folders
    assert {path.name for path in recipe.iterdir()} == {"config.json", RECIPE_NAME}
    assert not inspect_directory(recipe, values=True).problems


def test_values_are_those_of_the_written_checkpoint(folders: tuple[Path, Path]) -> None:
    (drawn_config, drawn), (config, stored) = (load_named(folder) for folder in folders)
    assert drawn_config == config
    assert drawn.keys() == stored.keys()
    for name, values in stored.items():
        assert torch.equal(drawn[name], values), name


def test_stored_forms_come_in_order_and_equal(folders: tuple[Path, Path]) -> None:
    drawn, stored = ({raw.spec.name: raw for raw in iter_tensors(folder)} for folder in folders)
    assert drawn.keys() == stored.keys()
    for name, raw in stored.items():
        assert torch.equal(drawn[name].weight.view(torch.uint8), raw.weight.view(torch.uint8)), name
        assert (raw.scale is None) == (drawn[name].scale is None)
        assert raw.scale is None or torch.equal(drawn[name].scale, raw.scale), name


def test_identity_needs_only_the_first_rows(folders: tuple[Path, Path]) -> None:
    found = []
    for folder in folders:
        _, tensors, heads = load_without_experts(folder)
        found.append(identity_of_heads(heads))
        whole = {raw.spec.name: head_of(raw) for raw in iter_tensors(folder) if raw.spec.name in heads}
        assert identity_of_heads(whole) == found[-1]
        assert not heads.keys() & tensors.keys()
    assert found[0] == found[1]


def test_expert_records_are_those_of_the_written_checkpoint(folders: tuple[Path, Path]) -> None:
    supplies = []
    for folder in folders:
        records = ExpertRecords.of_checkpoint(check_directory(folder).require_sound())
        supplies.append(ExpertSupply(records, ExpertConfig(slots=8, source="mmap"), num_readers=1))
    drawn, stored = supplies
    for pair in range(drawn.records.num_pairs):
        found, expected = (np.zeros(supply.record_bytes, np.uint8) for supply in supplies)
        drawn.read(pair, found)
        stored.read(pair, expected)
        assert np.array_equal(found, expected), pair
    assert drawn.disk.bytes_read == drawn.records.total_bytes
    for supply in supplies:
        supply.close()


def test_other_seed_other_values(tmp_path: Path) -> None:
    write_recipe(tmp_path / "a", TINY, seed=3)
    write_recipe(tmp_path / "b", TINY, seed=4)
    first, second = (load_named(tmp_path / name)[1]["head.weight"] for name in "ab")
    assert not torch.equal(first, second)


@pytest.mark.parametrize("text", ["{", "[]", '{"seed": 1}', '{"seed": "x", "layer_ids": null}'])
def test_unreadable_recipe_is_refused(tmp_path: Path, text: str) -> None:
    write_recipe(tmp_path, TINY)
    (tmp_path / RECIPE_NAME).write_text(text)
    with pytest.raises(BadCheckpoint, match="seed and layer_ids"):
        load_named(tmp_path)


def test_a_recipe_of_other_layers_than_the_config_is_refused(tmp_path: Path) -> None:
    write_recipe(tmp_path, TINY, layer_ids=LAYERS)
    (tmp_path / RECIPE_NAME).write_text('{"seed": 0, "layer_ids": [2]}')
    with pytest.raises(BadCheckpoint, match=r"synthetic\.json.*2 layer_ids.*\[2\]"):
        load_named(tmp_path)
