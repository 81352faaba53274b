"""`ExpertRecords`: the stored bytes of every routed expert, as one record each, and where they lie in files.

Owns: the order of a record, its runs of file bytes. Does not own: reading (`disk.py`), kernel layouts. Torch-free. A
record holds what the checkpoint holds, so that projections that kernels stack are neighbours:

    w1 | w3 | w1.scale | w3.scale | w2 | w2.scale

A run is a stretch of one file that holds parts of a record back to back (in any order): an official checkpoint has one
or a few for each expert, a repacked file exactly one, aligned to pages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from workers.checkpoint.check import CheckedCheckpoint, MatchedTensor
from workers.checkpoint.names import StoredForm
from workers.checkpoint.recipe import Recipe
from workers.errors import BadCheckpoint
from workers.model.config import ModelConfig

ORDER = ("w1.weight", "w3.weight", "w1.scale", "w3.scale", "w2.weight", "w2.scale")

GAP_BYTES = 64 << 10
"""Parts of a record that are no farther apart are read together: a second request costs more than these bytes."""

_NAME = re.compile(r"layers\.(\d+)\.ffn\.experts\.(\d+)\.(w[123])\.weight")


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [file, file + size) of a run's file go to [record, record + size) of the record."""

    file: int
    record: int
    size: int


@dataclass(frozen=True, slots=True)
class Run:
    """One read: bytes [start, end) of `path`."""

    path: Path
    start: int
    end: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class RecordForm:
    """How all experts of a model are stored. `offsets` has the start of each part of `ORDER` (absent ones: empty)."""

    gate: StoredForm
    """Of w1 and of w3."""
    down: StoredForm
    offsets: dict[str, tuple[int, int]]
    """Part -> (start, end) in the record."""
    record_bytes: int


@dataclass(frozen=True, slots=True)
class ExpertRecords:
    """Every (layer, expert) pair's record, by pair number `layer * E + expert`."""

    form: RecordForm
    runs: tuple[tuple[Run, ...], ...]
    checksums: tuple[int, ...] | None = None
    """XXH3 of each record, when a repacked file carries them."""
    drawn: tuple[ModelConfig, Recipe] | None = None
    """Set where the runs name a file that nobody wrote: the values are drawn."""

    @property
    def num_pairs(self) -> int:
        """All pairs of the model."""
        return len(self.runs)

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.form.record_bytes

    @property
    def total_bytes(self) -> int:
        """Bytes of all records."""
        return self.num_pairs * self.record_bytes

    @classmethod
    def of_checkpoint(cls, checked: CheckedCheckpoint) -> ExpertRecords:
        """Records over a checkpoint's own shards. Raises `BadCheckpoint` when experts are not all stored alike."""
        experts = checked.config.n_routed_experts
        found: dict[int, dict[str, MatchedTensor]] = {}
        for item in checked.matched:
            if (match := _NAME.fullmatch(item.spec.name)) is not None:
                pair = int(match[1]) * experts + int(match[2])
                found.setdefault(pair, {})[match[3]] = item
        form = _form_of(found[0])
        runs = []
        for pair in range(checked.config.num_hidden_layers * experts):
            matrices = found[pair]
            for name, expected in (("w1", form.gate), ("w3", form.gate), ("w2", form.down)):
                item = matrices[name]
                if item.form != expected:
                    where = checked.index.path(item.weight.file)
                    raise BadCheckpoint(where, item.weight.name, f"every expert stored as {expected}", str(item.form))
            runs.append(_runs_of(matrices, form, checked.index.directory))
        recipe = checked.index.recipe
        return cls(form, tuple(runs), drawn=None if recipe is None else (checked.config, recipe))


def is_routed(name: str) -> bool:
    """Whether an official tensor name is of a routed expert of the trunk."""
    return _NAME.fullmatch(name) is not None


def _form_of(matrices: dict[str, MatchedTensor]) -> RecordForm:
    offsets, at = {}, 0
    for part in ORDER:
        matrix, _, kind = part.partition(".")
        item = matrices[matrix]
        stored = item.weight if kind == "weight" else item.scale
        size = 0 if stored is None else stored.nbytes
        offsets[part] = (at, at + size)
        at += size
    return RecordForm(matrices["w1"].form, matrices["w2"].form, offsets, at)


def _runs_of(matrices: dict[str, MatchedTensor], form: RecordForm, directory: Path) -> tuple[Run, ...]:
    pieces: dict[str, list[Piece]] = {}
    for part, (start, end) in form.offsets.items():
        matrix, _, kind = part.partition(".")
        stored = matrices[matrix].weight if kind == "weight" else matrices[matrix].scale
        if stored is not None:
            pieces.setdefault(stored.file, []).append(Piece(stored.start, start, end - start))
    return tuple(run for file, parts in pieces.items() for run in _joined(directory / file, parts))


def _joined(path: Path, pieces: Sequence[Piece]) -> list[Run]:
    """Runs of one file, neighbours joined."""
    runs: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda p: p.file):
        if runs and piece.file - (runs[-1][-1].file + runs[-1][-1].size) <= GAP_BYTES:
            runs[-1].append(piece)
        else:
            runs.append([piece])
    return [Run(path, run[0].file, run[-1].file + run[-1].size, tuple(run)) for run in runs]
