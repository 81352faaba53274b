"""Random checkpoints of any config in the official layout: for loaders, layouts and speed, never for sense.

Owns: the random values and the cut to chosen layers. Does not own: writing (`save.py`). Values are drawn directly in
the stored form (codes and scale bytes), so speed is that of the disk; memory is one stored tensor and some MiB.

Every tensor has its own stream, seeded by `seed` and the tensor's name in the whole model. Layer 3 is therefore the
same in a cut with `layer_ids=(2, 3)`, where it is named `layers.1`, as in the whole model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.checkpoint.names import Encoding, Organ, Shape, TensorSpec
from workers.checkpoint.progress import OnProgress
from workers.checkpoint.quant import StoredPair
from workers.checkpoint.save import write_checkpoint
from workers.errors import BadConfig
from workers.model.config import ModelConfig

E2M1_RMS = 2.926
"""Root mean square of the sixteen e2m1 codes drawn uniformly (magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6)."""

E4M3_SIGMA = 112.0
"""Standard deviation of the e4m3 codes: a quarter of 448, so the drawn quantiles (at most 2.9 sigma) never saturate."""

CHUNK = 1 << 20
"""BF16 elements drawn at a time. Even, so that every chunk but the last ends on a 64-bit draw."""

HASH_ROWS = 4096
"""Rows of `tid2eid` drawn at a time; each row permutes all experts to get distinct ids."""


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
    origin = dict(enumerate(layer_ids)) if layer_ids is not None else None

    def produce(spec: TensorSpec) -> StoredPair:
        return _Draw(spec, chosen, _stream(seed, _original_name(spec.name, origin))).pair()

    write_checkpoint(directory, chosen, produce, shard_bytes=shard_bytes, on_progress=on_progress)
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


def _original_name(name: str, origin: dict[int, int] | None) -> str:
    if origin is None or not name.startswith("layers."):
        return name
    _, number, leaf = name.split(".", 2)
    return f"layers.{origin[int(number)]}.{leaf}"


def _stream(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


@dataclasses.dataclass(frozen=True, slots=True)
class _Draw:
    """Draws one tensor in its official form."""

    spec: TensorSpec
    config: ModelConfig
    rng: np.random.Generator

    def pair(self) -> StoredPair:
        form = self.spec.official
        match self.spec.encoding:
            case Encoding.FP4:
                packed = torch.from_numpy(self._bytes(form.shape)).view(torch.int8)
                return StoredPair(form, packed, self._scales(form.scale_shape, E2M1_RMS))
            case Encoding.FP8:
                codes = torch.from_numpy(_E4M3_QUANTILES[self._bytes(form.shape)]).view(torch.float8_e4m3fn)
                return StoredPair(form, codes, self._scales(form.scale_shape, E4M3_SIGMA))
            case Encoding.BF16:
                centre = 1.0 if self.spec.organ is Organ.NORM or self.spec.name.endswith("norm.weight") else 0.0
                return StoredPair(form, self._bf16(form.shape, centre))
            case Encoding.F32:
                return StoredPair(form, self._f32(form.shape))
            case Encoding.I64:
                return StoredPair(form, self._expert_table(form.shape))

    def _std(self) -> float:
        """Keeps activations near unit size: 1 / sqrt(inputs) for matrices; small for biases and position rows."""
        leaf = self.spec.name.rsplit(".", 1)[-1]
        if self.spec.organ is Organ.EMBED or leaf == "attn_sink":
            return 1.0
        if leaf in ("ape", "bias") or leaf.endswith("_base") or len(self.spec.shape) == 1:
            return 0.02
        return 1.0 / math.sqrt(self.spec.shape[-1])

    def _bytes(self, shape: Shape) -> np.ndarray[Any, np.dtype[np.uint8]]:
        count = math.prod(shape)
        words = self.rng.integers(0, 2**64, size=-(-count // 8), dtype=np.uint64)
        return words.view(np.uint8)[:count].reshape(shape)

    def _scales(self, shape: Shape, code_std: float) -> Tensor:
        """Scale bytes around the one that gives `_std`, so that a mix-up of scale blocks changes values."""
        byte = 127 + round(math.log2(self._std() / code_std))
        jitter = self._bytes(shape) & 1
        return torch.from_numpy((byte + jitter).astype(np.uint8))

    def _bf16(self, shape: Shape, centre: float) -> Tensor:
        """Gaussian by table lookup: 65,536 quantiles are as many as BF16 can tell apart, and far faster to draw."""
        table = (_QUANTILES * self._std() + centre).to(torch.bfloat16).view(torch.int16).numpy()
        out = np.empty(math.prod(shape), np.int16)
        for start in range(0, out.size, CHUNK):
            part = out[start : start + CHUNK]
            part[:] = table[self._bytes((2 * part.size,)).view(np.uint16)]
        return torch.from_numpy(out.reshape(shape)).view(torch.bfloat16)

    def _f32(self, shape: Shape) -> Tensor:
        if self.spec.name.endswith("_scale"):
            return torch.ones(shape)
        return torch.from_numpy(self.rng.standard_normal(shape, dtype=np.float32) * np.float32(self._std()))

    def _expert_table(self, shape: Shape) -> Tensor:
        """Distinct experts per token id, as routing chooses them."""
        rows, top_k = shape
        table = np.empty(shape, np.int64)
        for start in range(0, rows, HASH_ROWS):
            keys = self.rng.random((min(HASH_ROWS, rows - start), self.config.n_routed_experts), dtype=np.float32)
            table[start : start + HASH_ROWS] = np.argsort(keys, axis=1)[:, :top_k]
        return torch.from_numpy(table)


_QUANTILES = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)).to(torch.float32)

_E4M3_QUANTILES = (
    (torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256) * E4M3_SIGMA)
    .to(torch.float8_e4m3fn)
    .view(torch.uint8)
    .numpy()
)
"""e4m3 code of each of 256 equally likely Gaussian quantiles: a random byte indexes a random code, never NaN."""
