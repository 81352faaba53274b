"""Random tensors in the stored form: codes and scale bytes, from one stream for each tensor and one for its scale.

Owns: the values. Does not own: which tensors there are, writing them (`save.py`), names of recipes (`recipe.py`). A
stream is seeded by the recipe's seed and the tensor's name in the whole model, and is drawn front to back: the first
rows are the same whether the rest is drawn or not. Any thread may draw; generators run without the interpreter's lock.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.checkpoint.index import CheckpointIndex, StoredTensor
from workers.checkpoint.names import Encoding, Organ, Shape, TensorSpec, tensor_table
from workers.checkpoint.quant import StoredPair, byte_view
from workers.checkpoint.recipe import Recipe
from workers.model.config import ModelConfig

Bytes = npt.NDArray[np.uint8]

E2M1_RMS = 2.926
"""Root mean square of the sixteen e2m1 codes drawn uniformly (magnitudes 0, .5, 1, 1.5, 2, 3, 4, 6)."""

E4M3_SIGMA = 112.0
"""Standard deviation of the e4m3 codes: a quarter of 448, so the drawn quantiles (at most 2.9 sigma) never saturate."""

CHUNK_BYTES = 1 << 22
"""Random bytes drawn at a time: one matrix of a V4-Flash expert, since each call takes the interpreter lock once. A
multiple of 8."""

HASH_ROWS = 4096
"""Rows of `tid2eid` drawn at a time; each row permutes all experts to get distinct ids."""


class Draw:
    """One tensor of a recipe, in its official form."""

    def __init__(self, spec: TensorSpec, config: ModelConfig, recipe: Recipe) -> None:
        self._spec, self._config = spec, config
        self._key = f"{recipe.seed}:{recipe.original_name(spec.name)}"

    def pair(self) -> StoredPair:
        """The whole tensor."""
        return StoredPair(self._spec.official, self.weight(), self.scale())

    def weight(self, rows: int | None = None) -> Tensor:
        """The stored tensor, or its first `rows`."""
        shape = _cut(self._spec.official.shape, rows)
        rng = _stream(self._key)
        match self._spec.encoding:
            case Encoding.FP4:
                packed = np.empty(shape, np.uint8)
                _fill(rng, packed.reshape(-1))
                return torch.from_numpy(packed).view(torch.int8)
            case Encoding.FP8:
                return _looked_up(rng, shape, _E4M3_PAIRS, np.uint8, per_lookup=2).view(torch.float8_e4m3fn)
            case Encoding.BF16:
                is_norm = self._spec.organ is Organ.NORM or self._spec.name.endswith("norm.weight")
                values = _QUANTILES * self._std() + (1.0 if is_norm else 0.0)
                table = values.to(torch.bfloat16).view(torch.int16).numpy()
                return _looked_up(rng, shape, table, np.int16, per_lookup=1).view(torch.bfloat16)
            case Encoding.F32:
                if self._spec.name.endswith("_scale"):
                    return torch.ones(shape)
                return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32) * np.float32(self._std()))
            case Encoding.I64:
                return torch.from_numpy(self._expert_table(rng, shape))

    def scale(self, rows: int | None = None) -> Tensor | None:
        """Scale bytes around the one that gives `_std`, so that a mix-up of scale blocks changes values."""
        form = self._spec.official
        if not form.scale_dtypes:
            return None
        scale = np.empty(_cut(form.scale_shape, rows), np.uint8)
        self._fill_scale(scale.reshape(-1))
        return torch.from_numpy(scale)

    def fill_expert(self, out: Bytes, *, scale: bool) -> None:
        """`weight()` or `scale()` of an FP4 matrix, whole, into `out` uint8 [n]: no memory is taken for it."""
        assert self._spec.encoding is Encoding.FP4
        if scale:
            self._fill_scale(out)
        else:
            _fill(_stream(self._key), out)

    def _fill_scale(self, out: Bytes) -> None:
        code_std = E2M1_RMS if self._spec.encoding is Encoding.FP4 else E4M3_SIGMA
        _fill(_stream(f"{self._key}:scale"), out)
        np.bitwise_and(out, 1, out=out)
        np.add(out, np.uint8(127 + round(math.log2(self._std() / code_std))), out=out)

    def _std(self) -> float:
        """Keeps activations near unit size: 1 / sqrt(inputs) for matrices; small for biases and position rows."""
        leaf = self._spec.name.rsplit(".", 1)[-1]
        if self._spec.organ is Organ.EMBED or leaf == "attn_sink":
            return 1.0
        if leaf in ("ape", "bias") or leaf.endswith("_base") or len(self._spec.shape) == 1:
            return 0.02
        return 1.0 / math.sqrt(self._spec.shape[-1])

    def _expert_table(self, rng: np.random.Generator, shape: Shape) -> npt.NDArray[np.int64]:
        """Distinct experts per token id, as routing chooses them."""
        rows, top_k = shape
        table = np.empty(shape, np.int64)
        for start in range(0, rows, HASH_ROWS):
            keys = rng.random((min(HASH_ROWS, rows - start), self._config.n_routed_experts), dtype=np.float32)
            table[start : start + HASH_ROWS] = np.argsort(keys, axis=1)[:, :top_k]
        return table


class DrawReader:
    """Reads a recipe's tensors as `ShardReader` reads stored ones. One thread; keeps the tensor read last."""

    def __init__(self, index: CheckpointIndex, config: ModelConfig) -> None:
        assert index.recipe is not None
        self._recipe, self._config = index.recipe, config
        self._specs = {name: spec for spec in tensor_table(config).values() for name, _, _ in spec.stored()}
        self._name, self._rows, self._data = "", 0, memoryview(b"")

    def __enter__(self) -> DrawReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._data = memoryview(b"")

    def read(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill the byte `buffer` from `offset` bytes into the tensor."""
        assert offset >= 0 and offset + len(buffer) <= tensor.nbytes
        rows = -(-(offset + len(buffer)) * tensor.shape[0] // max(1, tensor.nbytes))
        if self._name != tensor.name or rows > self._rows:
            # A first read may be the only one (a tensor's head); whoever comes back wants all of it.
            rows = rows if self._name != tensor.name else tensor.shape[0]
            spec = self._specs[tensor.name]
            draw = Draw(spec, self._config, self._recipe)
            values = draw.weight(rows) if tensor.name == spec.name else draw.scale(rows)
            assert values is not None
            self._name, self._rows, self._data = tensor.name, rows, byte_view(values)
        buffer[:] = self._data[offset : offset + len(buffer)]


def _fill(rng: np.random.Generator, out: Bytes) -> None:
    """`out` uint8 [n], contiguous, from the stream, in pieces that the allocator keeps: fresh pages cost more."""
    for start in range(0, out.size, CHUNK_BYTES):
        part = out[start : start + CHUNK_BYTES]
        part[:] = _words(rng, part.size).view(np.uint8)[: part.size]


def _stream(key: str) -> np.random.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))


def _words(rng: np.random.Generator, num_bytes: int) -> npt.NDArray[np.uint64]:
    words: npt.NDArray[np.uint64] = rng.bit_generator.random_raw(-(-num_bytes // 8))
    return words


def _looked_up(rng: np.random.Generator, shape: Shape, table: Any, dtype: Any, *, per_lookup: int) -> Tensor:
    """Gaussian by table lookup of 16 random bits for `per_lookup` values: far faster than to draw."""
    count = math.prod(shape)
    out = np.empty(count + count % per_lookup, dtype)
    looked = out.view(table.dtype)
    step = CHUNK_BYTES // 2
    for start in range(0, looked.size, step):
        part = looked[start : start + step]
        part[:] = table[_words(rng, 2 * part.size).view(np.uint16)[: part.size]]
    return torch.from_numpy(out[:count].reshape(shape))


def _cut(shape: Shape, rows: int | None) -> Shape:
    return shape if rows is None else (rows, *shape[1:])


_QUANTILES = torch.special.ndtri((torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)).to(torch.float32)
"""As many as BF16 can tell apart."""

_E4M3_QUANTILES = (
    (torch.special.ndtri((torch.arange(256, dtype=torch.float64) + 0.5) / 256) * E4M3_SIGMA)
    .to(torch.float8_e4m3fn)
    .view(torch.uint8)
    .numpy()
)
"""e4m3 code of each of 256 equally likely Gaussian quantiles: a random byte indexes a random code, never NaN."""

_E4M3_PAIRS = (_E4M3_QUANTILES[None, :].astype(np.uint16) | _E4M3_QUANTILES[:, None].astype(np.uint16) << 8).reshape(-1)
"""Two codes for 16 random bits, in the order of their bytes."""
