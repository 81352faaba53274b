"""`DrawnDisk`: expert records of a recipe, drawn where those of a checkpoint would be read (`checkpoint/recipe.py`).

Owns: which streams make up a record. Does not own: the values (`workers/checkpoint/draw.py`). Any thread may read; each
draws at memory speed without the interpreter's lock, so that 147 GB take seconds on the cores of a GPU host.
"""

from __future__ import annotations

from workers.checkpoint.draw import Bytes, Draw
from workers.checkpoint.names import tensor_table
from workers.experts.records import ORDER, ExpertRecords


class DrawnDisk:
    """`ExpertDisk` without files."""

    def __init__(self, records: ExpertRecords) -> None:
        assert records.drawn is not None
        self._records = records
        self._config, self._recipe = records.drawn
        self._specs = tensor_table(self._config)
        self.bytes_read = 0

    def read(self, pair: int, out: Bytes, *, stream: bool = False) -> None:
        """As `ExpertDisk.read`; never fails."""
        layer, expert = divmod(pair, self._config.n_routed_experts)
        for part in ORDER:
            matrix, _, kind = part.partition(".")
            start, end = self._records.form.offsets[part]
            draw = Draw(self._specs[f"layers.{layer}.ffn.experts.{expert}.{matrix}.weight"], self._config, self._recipe)
            draw.fill_expert(out[start:end], scale=kind == "scale")
        self.bytes_read += self._records.record_bytes

    @property
    def held_bytes(self) -> int:
        return 0

    def close(self) -> None:
        """Nothing is open."""
