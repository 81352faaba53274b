"""`Recipe`: a checkpoint folder without shards, whose tensors are drawn from a seed whenever someone reads them.

Owns: the file that marks such a folder. Does not own: the values (`draw.py`), the index of what the folder would hold
(`check.py`). Torch-free. Everything that reads checkpoints takes such a folder for a real one: 156 GB of V4-Flash need
no disk, and every worker of every machine draws the same bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import BadCheckpoint

RECIPE_NAME = "synthetic.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the values of a model come from."""

    seed: int = 0
    layer_ids: tuple[int, ...] | None = None
    """The trunk layers' numbers in the whole model: layer 3 is the same alone as among all. None: 0, 1, ..."""

    def original_name(self, name: str) -> str:
        """The tensor's name in the whole model, which is what its stream is seeded by."""
        if self.layer_ids is None or not name.startswith("layers."):
            return name
        _, number, leaf = name.split(".", 2)
        return f"layers.{self.layer_ids[int(number)]}.{leaf}"

    def to_json(self) -> dict[str, Any]:
        return {"seed": self.seed, "layer_ids": None if self.layer_ids is None else list(self.layer_ids)}


def read_recipe(directory: Path) -> Recipe | None:
    """The folder's recipe, or None where it has shards. Raises `BadCheckpoint`."""
    path = directory / RECIPE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        ids = data["layer_ids"]
        return Recipe(int(data["seed"]), None if ids is None else tuple(int(number) for number in ids))
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise BadCheckpoint(str(path), None, "a readable file", exc.strerror or str(exc)) from exc
    except (ValueError, KeyError, TypeError) as exc:
        raise BadCheckpoint(str(path), None, "an object with seed and layer_ids", repr(exc)) from exc
