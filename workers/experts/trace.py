"""`RoutingTrace`: which experts each token of a run chose, layer by layer. Torch-free; the input of the simulator.

Owns: the array, its file form, the reduction to what one step needs. A trace comes from `dsv4 experts record` or from
`generator.py`. Definition used everywhere: a step NEEDS the unique (layer, expert) pairs of all its tokens; a pair is a
HIT when its weights were in the fast tier before the step began. A miss is cold on the pair's first use in the trace,
else a capacity miss.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

FORMAT = 1


class BadTrace(ValueError):
    """A trace file that cannot be used; the message names file, key and what was expected."""


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """Decode steps of a batch of `B` sequences that all run in every step.

    Attributes:
        experts: int16 [steps, L, B, k] expert ids, distinct along k.
        num_experts: E.
        num_hash_layers: leading layers whose experts follow from the token id alone.
        source: where it comes from, for tables.
    """

    experts: npt.NDArray[np.int16]
    num_experts: int
    num_hash_layers: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if self.experts.ndim != 4 or self.experts.dtype != np.int16:
            raise BadTrace(f"experts must be int16 [steps, layers, batch, k], not {self.experts.dtype} "
                           f"{self.experts.shape}")  # fmt: skip
        if self.experts.size and not 0 <= int(self.experts.min()) <= int(self.experts.max()) < self.num_experts:
            raise BadTrace(f"expert ids outside 0..{self.num_experts - 1}")

    @property
    def num_steps(self) -> int:
        """Decode steps."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.experts.shape[1])

    @property
    def num_pairs(self) -> int:
        """All (layer, expert) pairs of the model."""
        return self.num_layers * self.num_experts

    def needed(self, step: int) -> Ids:
        """Ascending pair numbers `layer * E + expert` that one step needs."""
        layers = np.arange(self.num_layers)[:, None, None] * self.num_experts
        return np.unique(self.experts[step].astype(np.int64) + layers)

    def all_needed(self) -> list[Ids]:
        """`needed` of every step."""
        return [self.needed(step) for step in range(self.num_steps)]

    def histogram(self) -> npt.NDArray[np.int64]:
        """Uses of every pair, counted once a token: int64 [L * E]."""
        layers = np.arange(self.num_layers)[None, :, None, None] * self.num_experts
        return np.bincount((self.experts.astype(np.int64) + layers).ravel(), minlength=self.num_pairs)

    def part(self, start: int, end: int) -> RoutingTrace:
        """Steps [start, end)."""
        return RoutingTrace(self.experts[start:end], self.num_experts, self.num_hash_layers, self.source)

    def save(self, path: str | Path) -> None:
        """Writes a compressed npz file."""
        with open(path, "wb") as file:
            np.savez_compressed(
                file,
                format=FORMAT,
                experts=self.experts,
                num_experts=self.num_experts,
                num_hash_layers=self.num_hash_layers,
                source=self.source,
            )

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Reads what `save` wrote. Raises `BadTrace`, or `OSError` when there is no such file."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
                if int(stored["format"]) != FORMAT:
                    raise BadTrace(f"{path}: format {int(stored['format'])}, expected {FORMAT}")
                return cls(
                    stored["experts"], int(stored["num_experts"]), int(stored["num_hash_layers"]), str(stored["source"])
                )
        except (KeyError, ValueError, zipfile.BadZipFile) as exc:
            raise BadTrace(f"{path}: not a routing trace: {exc}") from exc
