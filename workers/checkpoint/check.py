"""Matches the stored tensors of a directory against the name table, in both directions.

Owns: which stored tensor serves which spec and in which form, and the list of problems (missing, unknown extra, wrong
shape, wrong dtype, wrong scale). Reads headers only. Torch-free.

A draft block (MTP or DSpark stage) may be absent as a whole, because the engine does not run it yet; a part of one is a
problem like any other.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from workers.checkpoint.index import INDEX_NAME, CheckpointIndex, StoredTensor, read_index
from workers.checkpoint.names import StoredForm, TensorSpec, aliases, tensor_bytes, tensor_table
from workers.checkpoint.recipe import RECIPE_NAME, Recipe, read_recipe
from workers.errors import BadCheckpoint, BadConfig
from workers.model.config import WHOLE_FILE, ModelConfig


@dataclass(frozen=True, slots=True)
class MatchedTensor:
    """A spec, the form it was found in, and where its weight and scale lie."""

    spec: TensorSpec
    form: StoredForm
    weight: StoredTensor
    scale: StoredTensor | None

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (self.scale.nbytes if self.scale else 0)


@dataclass(frozen=True, slots=True)
class CheckedCheckpoint:
    """A directory matched against its config; `config.expert_dtype` is what the tensors say where the file is silent.

    `matched` is in file order, so reading it front to back reads each shard sequentially. `problems` is empty for a
    checkpoint that can be loaded; `unused` names draft blocks that are present but not run yet.
    """

    config: ModelConfig
    index: CheckpointIndex
    matched: tuple[MatchedTensor, ...]
    problems: tuple[BadCheckpoint, ...]
    notes: tuple[str, ...]
    unused: tuple[str, ...]

    def require_sound(self) -> CheckedCheckpoint:
        """Itself, or the first problem raised."""
        if self.problems:
            raise self.problems[0]
        return self


def check_directory(directory: str | Path) -> CheckedCheckpoint:
    """Read config.json and all headers. Raises `BadCheckpoint` only if config or index cannot be understood at all.

    A folder with a recipe has no headers: its tensors are the config's own.
    """
    path = Path(directory)
    try:
        config = ModelConfig.from_json(path / "config.json")
    except BadConfig as exc:
        if exc.key == WHOLE_FILE:
            raise BadCheckpoint(exc.source, None, exc.expected, exc.found) from exc
        raise BadCheckpoint(exc.source, None, f"key {exc.key!r} to be {exc.expected}", repr(exc.found)) from exc
    recipe = read_recipe(path)
    return match_tensors(config, read_index(path) if recipe is None else _recipe_index(path, recipe, config))


def _recipe_index(directory: Path, recipe: Recipe, config: ModelConfig) -> CheckpointIndex:
    """Every tensor of the config in its official form, back to back in one file that nobody wrote."""
    ids, layers = recipe.layer_ids, config.num_hidden_layers
    if ids is not None and len(ids) != layers:
        expected = f"{layers} layer_ids, one for each layer of config.json"
        raise BadCheckpoint(str(directory / RECIPE_NAME), None, expected, str(list(ids)))
    tensors: dict[str, StoredTensor] = {}
    at = 0
    for spec in tensor_table(config).values():
        for name, dtype, shape in spec.stored():
            end = at + tensor_bytes(dtype, shape)
            tensors[name] = StoredTensor(name, RECIPE_NAME, dtype, shape, at, end)
            at = end
    return CheckpointIndex(directory, tensors, (), (), (), recipe)


def match_tensors(config: ModelConfig, index: CheckpointIndex) -> CheckedCheckpoint:
    """Match both ways; problems of the index come first, because they cause missing tensors."""
    other_names = aliases(config)
    by_name = {other_names.get(name, name): tensor for name, tensor in index.tensors.items()}
    config = _with_expert_dtype(config, by_name)
    table = tensor_table(config)
    problems = list(index.problems)
    notes = list(index.notes)
    present = {spec.block for spec in table.values() if spec.name in by_name}
    matched: list[MatchedTensor] = []
    consumed: set[str] = set()
    for spec in table.values():
        if not spec.used and spec.block not in present:
            continue
        outcome = _match_one(spec, by_name, index)
        consumed.add(spec.name)
        if isinstance(outcome, MatchedTensor):
            matched.append(outcome)
        else:
            problems.append(outcome)
        if spec.official.scale_dtypes and not (isinstance(outcome, MatchedTensor) and outcome.scale is None):
            consumed.add(spec.scale_name)
    for name, tensor in by_name.items():
        if name not in consumed:
            problems.append(BadCheckpoint(index.path(tensor.file), tensor.name, "no such tensor", f"{tensor}"))
    absent = sorted({spec.block for spec in table.values() if not spec.used} - present)
    notes += [f"{block}: absent (optional, not used yet)" for block in absent]
    unused = tuple(dict.fromkeys(spec.block for spec in table.values() if not spec.used and spec.block in present))
    matched.sort(key=lambda m: (m.weight.file, m.weight.start))
    return CheckedCheckpoint(config, index, tuple(matched), tuple(problems), tuple(notes), unused)


def _with_expert_dtype(config: ModelConfig, by_name: dict[str, StoredTensor]) -> ModelConfig:
    """Where config.json is silent, the first routed expert's dtype decides: F8_E4M3 is a Base checkpoint, else FP4."""
    if config.expert_dtype is not None:
        return config
    first = by_name.get("layers.0.ffn.experts.0.w1.weight")
    inferred = "fp8" if first is not None and first.dtype == "F8_E4M3" else "fp4"
    return dataclasses.replace(config, expert_dtype=inferred)


def _match_one(
    spec: TensorSpec, by_name: dict[str, StoredTensor], index: CheckpointIndex
) -> MatchedTensor | BadCheckpoint:
    weight = by_name.get(spec.name)
    if weight is None:
        return BadCheckpoint(_home(spec, by_name, index), spec.name, str(spec.official), "nothing")
    file = index.path(weight.file)
    forms = spec.forms()
    form = next((form for form in forms if form.dtype == weight.dtype), None)
    if form is None:
        return BadCheckpoint(file, weight.name, " or ".join(f.dtype for f in forms), f"dtype {weight.dtype}")
    if form.shape != weight.shape:
        return BadCheckpoint(file, weight.name, f"{form.dtype} {list(form.shape)}", f"{weight}")
    if not form.scale_dtypes:
        return MatchedTensor(spec, form, weight, None)
    scale = by_name.get(spec.scale_name)
    expected = f"{' or '.join(form.scale_dtypes)} {list(form.scale_shape)}"
    if scale is None:
        return BadCheckpoint(file, spec.scale_name, expected, "nothing")
    if scale.dtype not in form.scale_dtypes or scale.shape != form.scale_shape:
        return BadCheckpoint(index.path(scale.file), scale.name, expected, f"{scale}")
    return MatchedTensor(spec, form, weight, scale)


def _home(spec: TensorSpec, by_name: dict[str, StoredTensor], index: CheckpointIndex) -> str:
    """Where a missing tensor should have been: the shard of its own scale, else the index."""
    scale = by_name.get(spec.scale_name)
    if scale is not None:
        return index.path(scale.file)
    return index.path(INDEX_NAME if len(index.shards) > 1 else index.shards[0])
