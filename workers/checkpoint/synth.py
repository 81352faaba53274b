"""Random checkpoints of any config in the official layout: for loaders, layouts and speed, never for sense.

Owns: the cut to chosen layers, and both ways to hold such a model: as shards, or as a recipe that readers draw from.
Does not own: the values (`draw.py`), writing (`save.py`). Values are drawn directly in the stored form, so the speed of
writing is that of the disk; memory is one stored tensor and some MiB.

Layer 3 is the same in a cut with `layer_ids=(2, 3)`, where it is named `layers.1`, as in the whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from workers.checkpoint.draw import Draw
from workers.checkpoint.names import TensorSpec
from workers.checkpoint.progress import OnProgress
from workers.checkpoint.quant import StoredPair
from workers.checkpoint.recipe import RECIPE_NAME, Recipe
from workers.checkpoint.save import write_checkpoint, write_json
from workers.errors import BadConfig
from workers.model.config import ModelConfig


def cut_layers(config: ModelConfig, layer_ids: Sequence[int], *, keep_draft: bool = False) -> ModelConfig:
    """The config of a model made of only these trunk layers, renumbered 0, 1, ... in the given (ascending) order.

    Hash-routed layers come first in any model, so `num_hash_layers` becomes the number of chosen ones. Draft blocks are
    dropped unless `keep_draft`; DSpark target layers cannot survive a cut. Raises `BadConfig` for ids out of range.
    """
    ids = list(layer_ids)
    if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= config.num_hidden_layers:
        expected = f"ascending distinct layers of 0..{config.num_hidden_layers - 1}"
        raise BadConfig("layer_ids", layer_ids, expected, "synth")
    if keep_draft and config.draft is not None:
        raise BadConfig("draft", "DSpark stages", "none in a cut model", "synth")
    num_draft = config.num_draft_blocks if keep_draft else 0
    return dataclasses.replace(
        config,
        num_hidden_layers=len(ids),
        compress_ratios=(*(config.compress_ratios[i] for i in ids), *(0,) * num_draft),
        num_hash_layers=sum(i < config.num_hash_layers for i in ids),
        num_nextn_predict_layers=num_draft,
        draft=None,
        model_name=f"{config.model_name}-layers-{'-'.join(map(str, ids))}",
    )


def synthesise(
    directory: str | Path,
    config: ModelConfig,
    *,
    layer_ids: Sequence[int] | None = None,
    keep_draft: bool | None = None,
    seed: int = 0,
    shard_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> ModelConfig:
    """Write a random checkpoint and return its config; `keep_draft` defaults to true for whole models only.

    Raises `OSError` (ENOSPC) before writing when the disk is too small.
    """
    chosen = planned_config(config, layer_ids, keep_draft=keep_draft)
    recipe = Recipe(seed, None if layer_ids is None else tuple(layer_ids))

    def produce(spec: TensorSpec) -> StoredPair:
        return Draw(spec, chosen, recipe).pair()

    write_checkpoint(directory, chosen, produce, shard_bytes=shard_bytes, on_progress=on_progress)
    return chosen


def write_recipe(
    directory: str | Path, config: ModelConfig, *, layer_ids: Sequence[int] | None = None, seed: int = 0
) -> ModelConfig:
    """Make `directory` a checkpoint of the same values without shards or draft blocks, and return its config."""
    directory = Path(directory)
    chosen = planned_config(config, layer_ids, keep_draft=False)
    recipe = Recipe(seed, None if layer_ids is None else tuple(layer_ids))
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", chosen.to_json())
    write_json(directory / RECIPE_NAME, recipe.to_json())
    return chosen


def planned_config(
    config: ModelConfig, layer_ids: Sequence[int] | None, *, keep_draft: bool | None = None
) -> ModelConfig:
    """The config that `synthesise` would write: its name table gives the byte totals without writing anything."""
    if layer_ids is not None:
        return cut_layers(config, layer_ids, keep_draft=bool(keep_draft))
    if keep_draft is not False:
        return config
    trunk = config.compress_ratios[: config.num_hidden_layers]
    return dataclasses.replace(config, compress_ratios=trunk, num_nextn_predict_layers=0, draft=None)
