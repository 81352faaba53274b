"""What a checkpoint directory holds and what is wrong with it, as plain data for a table or JSON.

Owns: grouping by organ, dtype and shard. Does not own: the checks (`check.py`, `load.scan_values`) or the drawing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workers.checkpoint.check import CheckedCheckpoint, check_directory
from workers.checkpoint.index import StoredTensor
from workers.checkpoint.load import scan_values
from workers.checkpoint.names import Organ, Total
from workers.checkpoint.progress import OnProgress
from workers.errors import BadCheckpoint
from workers.model.config import ModelConfig

UNKNOWN = "(unknown)"


@dataclass(frozen=True, slots=True)
class Group:
    """Stored tensors that share an organ, dtype or shard; `dtypes` counts tensors per safetensors tag."""

    name: str
    tensors: int
    bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True, slots=True)
class Problem:
    """One refusal, as `BadCheckpoint` carries it."""

    file: str
    tensor: str | None
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about one directory; `config` is None when it could not be read. Sizes are payload bytes."""

    directory: str
    config: dict[str, Any] | None
    total: Total
    organs: tuple[Group, ...]
    dtypes: tuple[Group, ...]
    shards: tuple[Group, ...]
    unused: tuple[str, ...]
    notes: tuple[str, ...]
    problems: tuple[Problem, ...]
    tensors: tuple[dict[str, Any], ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready mapping of all fields."""
        return asdict(self)


def inspect_directory(directory: str | Path, *, values: bool = False, on_progress: OnProgress | None = None) -> Report:
    """Report on a directory from its headers; `values` also reads every byte for NaN codes, scales and expert ids."""
    try:
        checked = check_directory(directory)
    except BadCheckpoint as problem:
        return Report(str(directory), None, Total(), (), (), (), (), (), (_problem(problem),), ())
    problems = list(checked.problems)
    if values:
        problems += scan_values(checked, on_progress)
    stored = list(checked.index.tensors.values())
    organ_of = _organs(checked)
    return Report(
        directory=str(directory),
        config=_summary(checked.config),
        total=Total(len(stored), sum(tensor.nbytes for tensor in stored)),
        organs=_in_table_order(_groups(stored, [organ_of.get(tensor.name, UNKNOWN) for tensor in stored])),
        dtypes=_groups(stored, [tensor.dtype for tensor in stored]),
        shards=_groups(stored, [tensor.file for tensor in stored]),
        unused=checked.unused,
        notes=checked.notes,
        problems=tuple(_problem(problem) for problem in problems),
        tensors=tuple(_row(tensor, organ_of.get(tensor.name, UNKNOWN)) for tensor in stored),
    )


def _organs(checked: CheckedCheckpoint) -> dict[str, str]:
    organ_of: dict[str, str] = {}
    for item in checked.matched:
        organ_of[item.weight.name] = item.spec.organ.value
        if item.scale is not None:
            organ_of[item.scale.name] = item.spec.organ.value
    return organ_of


def _groups(stored: list[StoredTensor], keys: Iterable[str]) -> tuple[Group, ...]:
    members: dict[str, list[StoredTensor]] = {}
    for tensor, key in zip(stored, keys, strict=True):
        members.setdefault(key, []).append(tensor)
    groups = []
    for name, tensors in members.items():
        dtypes: dict[str, int] = {}
        for tensor in tensors:
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
        groups.append(Group(name, len(tensors), sum(t.nbytes for t in tensors), dict(sorted(dtypes.items()))))
    return tuple(groups)


def _in_table_order(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Organs in the order of `Organ`, unknown tensors last."""
    order = [organ.value for organ in Organ] + [UNKNOWN]
    return tuple(sorted(groups, key=lambda group: order.index(group.name)))


def _summary(config: ModelConfig) -> dict[str, Any]:
    kinds = [kind.name for kind in config.layer_kinds]
    return {
        "model_name": config.model_name,
        "num_hidden_layers": config.num_hidden_layers,
        "layer_kinds": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "num_hash_layers": config.num_hash_layers,
        "num_draft_blocks": config.num_draft_blocks,
        "expert_dtype": config.expert_dtype,
    }


def _row(tensor: StoredTensor, organ: str) -> dict[str, Any]:
    return {
        "name": tensor.name,
        "organ": organ,
        "file": tensor.file,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "bytes": tensor.nbytes,
    }


def _problem(problem: BadCheckpoint) -> Problem:
    return Problem(problem.file, problem.tensor, str(problem.expected), str(problem.found))
