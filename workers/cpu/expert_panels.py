"""From a stored expert record to the packed panels of a slot, without fp32 in between where codes are FP4.

Owns: which form the panels of a model have when no expert has been seen yet, the layout of a slot ([w1 | w3] panels,
then w2's), the conversion. Values equal those of `pack_panels` on the dequantised tensors, so products give the same
bits; stored values that the form cannot hold are refused.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from workers.checkpoint.names import StoredForm
from workers.checkpoint.quant import TORCH_DTYPES, decode, find_bad_scale, find_bad_weight
from workers.cpu.block_product import BF16, FP4, FP32, HAS_FP4, PANEL
from workers.cpu.panels import FP4_GROUP, padded
from workers.errors import BadCheckpoint
from workers.experts.records import RecordForm
from workers.model.config import ModelConfig

Bytes = np.ndarray
"""uint8 [bytes]."""


class ExpertPanels:
    """Layout of one slot, and how a record becomes one. Stateless; any thread may unpack."""

    def __init__(self, config: ModelConfig, form: RecordForm) -> None:
        self._form = form
        hidden, inner = config.hidden_size, config.moe_intermediate_size
        self._w13, self._w2 = (2 * inner, hidden), (hidden, inner)
        self.element13 = element_of(form.gate, _size(form, "w1.scale"), *self._w13)
        self.element2 = element_of(form.down, _size(form, "w2.scale"), *self._w2)
        self.w2_offset = panel_bytes(self.element13, *self._w13)
        self.slot_bytes = -(-(self.w2_offset + panel_bytes(self.element2, *self._w2)) // 64) * 64

    def unpack(self, record: Bytes, slot: Bytes) -> None:
        """Fills `slot` [slot_bytes] from `record` [record_bytes]. Raises `BadCheckpoint` for values without meaning."""
        offsets = self._form.offsets
        part13, part2 = slot[: self.w2_offset], slot[self.w2_offset :]
        gate = record[offsets["w1.weight"][0] : offsets["w3.weight"][1]]
        gate_scale = record[offsets["w1.scale"][0] : offsets["w3.scale"][1]]
        self._fill(part13, self.element13, self._form.gate, self._w13, 2, gate, gate_scale)
        down, down_scale = (record[slice(*offsets[name])] for name in ("w2.weight", "w2.scale"))
        self._fill(part2, self.element2, self._form.down, self._w2, 1, down, down_scale)

    def _fill(
        self, out: Bytes, element: int, form: StoredForm, shape: tuple[int, int], stack: int, data: Bytes, scale: Bytes
    ) -> None:
        """One matrix [N, K] of `stack` stored ones on top of each other."""
        rows, size = shape
        if form.scale_dtypes and form.dtype in ("I8", "U8") and (scale == 255).any():
            raise BadCheckpoint("expert record", None, "finite scales", f"{int((scale == 255).sum())} NaN scale bytes")
        if element == FP4:
            halves = (data.reshape(rows, size // 2), scale.reshape(rows, size // FP4_GROUP))
            write_panels(out, halves, rows)
            return
        values = np.concatenate(
            [
                _decoded(form, part, part_scale)
                for part, part_scale in zip(np.split(data, stack), np.split(scale, stack), strict=True)
            ]
        )
        if element == FP32:
            write_panels(out.view(np.float32), (values,), rows)
            return
        bits = values.view(np.uint32)
        if (bits & 0xFFFF).any():
            raise BadCheckpoint("expert record", None, "values that bf16 holds exactly", "finer ones")
        write_panels(out.view(np.uint16), ((bits >> 16).astype(np.uint16),), rows)


def _size(form: RecordForm, part: str) -> int:
    start, end = form.offsets[part]
    return end - start


def element_of(form: StoredForm, scale_bytes: int, rows: int, size: int) -> int:
    """The panels' form for matrices stored so, with `scale_bytes` of scales each."""
    if form.dtype in ("I8", "U8"):
        return FP4 if HAS_FP4 and rows % PANEL == 0 and size % FP4_GROUP == 0 else BF16
    has_byte_scales = scale_bytes == math.prod(form.scale_shape)
    return BF16 if form.dtype == "BF16" or (form.dtype == "F8_E4M3" and has_byte_scales) else FP32


def panel_bytes(element: int, rows: int, size: int) -> int:
    """Bytes of the packed matrix [rows, size]."""
    if element == FP4:
        return rows * (size // 2 + size // FP4_GROUP)
    return padded(rows) * size * element


def write_panels(out: np.ndarray, parts: tuple[np.ndarray, ...], rows: int) -> None:
    """Panels of `[rows, X]` parts, as `workers.cpu.panels` lays them out, into `out` of the same dtype."""
    at, total = 0, padded(rows)
    for first in range(0, total, PANEL):
        width = min(PANEL, total - first)
        for part in parts:
            size = part.shape[1]
            panel = out[at : at + size * width].reshape(size, width)
            real = part[first : first + width]
            panel[:, : len(real)] = real.T
            panel[:, len(real) :] = 0
            at += size * width


def _decoded(form: StoredForm, data: Bytes, scale: Bytes) -> np.ndarray:
    """fp32 values of one stored matrix. Raises `BadCheckpoint` for NaN codes and scales."""
    weight = torch.from_numpy(data).view(TORCH_DTYPES[form.dtype]).reshape(form.shape)
    if bad := find_bad_weight(form, weight):
        raise BadCheckpoint("expert record", None, "finite values", bad)
    scales = None
    if form.scale_dtypes:
        is_fp32 = scale.nbytes == 4 * math.prod(form.scale_shape)
        scales = torch.from_numpy(scale).view(torch.float32 if is_fp32 else torch.uint8).reshape(form.scale_shape)
        if bad := find_bad_scale(scales):
            raise BadCheckpoint("expert record", None, "finite scales", bad)
    values: np.ndarray = decode(form, weight, scales).numpy()
    return values
