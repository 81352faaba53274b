"""Where each stored tensor lies: safetensors headers, the shard index, and exact reads of byte ranges.

Owns: parsing and checking of `*.safetensors` headers and `model.safetensors.index.json`, and `pread` of ranges. Does
not own: which tensors a model needs (`check.py`), number formats (`quant.py`). Torch-free. Every refusal is a
`BadCheckpoint` with file, tensor, expected and found; nothing in a file is trusted before it is checked against the
file's real size. Source: safetensors format description (8-byte little-endian header length, JSON header, payload).
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from workers.checkpoint.names import DTYPE_BYTES, Shape, tensor_bytes
from workers.checkpoint.recipe import Recipe
from workers.errors import BadCheckpoint

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library; a larger claim is a corrupt or hostile file, and would be parsed into memory."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of one shard; `start` and `end` are byte offsets in the file."""

    name: str
    file: str
    dtype: str
    shape: Shape
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class CheckpointIndex:
    """All stored tensors of a directory. `problems` is empty for an intact one; `notes` are harmless oddities."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    shards: tuple[str, ...]
    problems: tuple[BadCheckpoint, ...]
    notes: tuple[str, ...]
    recipe: Recipe | None = None
    """Where values are drawn from when no shard holds them."""

    @property
    def payload_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def path(self, file: str) -> str:
        """Path of a shard, as error messages name it."""
        return str(self.directory / file)


def read_index(directory: str | Path) -> CheckpointIndex:
    """Read all headers of a checkpoint directory; problems are collected, not raised, so that all can be shown.

    Raises `BadCheckpoint` only when the directory holds no checkpoint or its index cannot be understood.
    """
    directory = Path(directory)
    weight_map, total_size = _read_weight_map(directory)
    problems: list[BadCheckpoint] = []
    tensors: dict[str, StoredTensor] = {}
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else (SINGLE_NAME,)
    readable = set()
    for shard in shards:
        try:
            stored = read_header(directory / shard)
        except BadCheckpoint as problem:
            problems.append(problem)
            continue
        readable.add(shard)
        for tensor in stored:
            if weight_map is not None and weight_map.get(tensor.name) != shard:
                where = weight_map.get(tensor.name, "no shard")
                problems.append(
                    BadCheckpoint(str(directory / shard), tensor.name, f"the tensor in {where} ({INDEX_NAME})", "here")
                )
            else:
                tensors[tensor.name] = tensor
    for name, shard in (weight_map or {}).items():
        if shard in readable and name not in tensors:
            problems.append(BadCheckpoint(str(directory / shard), name, f"the tensor ({INDEX_NAME} lists it)", "none"))
    payload = sum(tensor.nbytes for tensor in tensors.values())
    notes = (
        () if total_size in (None, payload) else (f"{INDEX_NAME} says total_size {total_size}, shards hold {payload}",)
    )
    return CheckpointIndex(directory, tensors, shards, tuple(problems), notes)


def read_header(path: Path) -> list[StoredTensor]:
    """Tensors of one safetensors file in payload order; they must cover the payload exactly, without holes."""
    file = str(path)
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            if size < 8:
                raise BadCheckpoint(file, None, "at least the 8 bytes of a header length", f"{size} bytes (truncated)")
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > MAX_HEADER_BYTES:
                raise BadCheckpoint(file, None, f"a header of at most {MAX_HEADER_BYTES} bytes", f"{length} bytes")
            if 8 + length > size:
                raise BadCheckpoint(file, None, f"a header of {length} bytes", f"{size - 8} bytes (truncated)")
            raw = handle.read(length)
    except OSError as exc:
        raise BadCheckpoint(file, None, "a readable file", exc.strerror or str(exc)) from exc
    try:
        header = json.loads(raw, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as exc:
        raise BadCheckpoint(file, None, "a header of JSON with unique names", f"garbage: {exc}") from exc
    if not isinstance(header, dict):
        raise BadCheckpoint(file, None, "a header that is a JSON object", type(header).__name__)
    entries = [_parse_entry(file, n, entry, 8 + length) for n, entry in header.items() if n != "__metadata__"]
    entries.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_coverage(file, entries, 8 + length, size)
    return entries


class ShardReader:
    """Exact reads from the shards of one directory; a context manager that keeps one file open at a time.

    Plain `pread` into the caller's buffer: pages stay in the kernel's cache and never count as our memory, and a short
    file gives an error where a mapping would give SIGBUS. `bytes_read` counts what was delivered.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: str | None = None
        self._fd: int | None = None
        self.bytes_read = 0

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the open shard, if any; the reader may be used again."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = self._file = None

    def read(self, tensor: StoredTensor, offset: int, buffer: memoryview) -> None:
        """Fill the byte `buffer` from `offset` bytes into the tensor; raises `BadCheckpoint` if the file ends early."""
        assert offset >= 0 and offset + len(buffer) <= tensor.nbytes
        path = str(self._directory / tensor.file)
        position, done = tensor.start + offset, 0
        try:
            if self._file != tensor.file:
                self.close()
                self._fd, self._file = os.open(path, os.O_RDONLY), tensor.file
            assert self._fd is not None
            while done < len(buffer):
                got = os.preadv(self._fd, [buffer[done:]], position + done)
                if got == 0:
                    expected = f"{len(buffer)} bytes at offset {position}"
                    raise BadCheckpoint(path, tensor.name, expected, f"{done} bytes (truncated)")
                done += got
                self.bytes_read += got
        except OSError as exc:
            raise BadCheckpoint(path, tensor.name, "readable bytes", exc.strerror or str(exc)) from exc


def _read_weight_map(directory: Path) -> tuple[dict[str, str] | None, object]:
    """(tensor name -> shard file, claimed total size); (None, None) for a single-file checkpoint."""
    path = directory / INDEX_NAME
    if not path.exists():
        if (directory / SINGLE_NAME).exists():
            return None, None
        raise BadCheckpoint(str(directory), None, f"{INDEX_NAME} or {SINGLE_NAME}", "neither")
    try:
        data = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except OSError as exc:
        raise BadCheckpoint(str(path), None, "a readable file", exc.strerror or str(exc)) from exc
    except (ValueError, RecursionError) as exc:
        raise BadCheckpoint(str(path), None, "JSON with unique names", f"garbage: {exc}") from exc
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(str(path), None, "a 'weight_map' object of tensor name to shard", repr(weight_map)[:80])
    for name, shard in weight_map.items():
        # A bare file name: an index must not make us read outside its directory.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BadCheckpoint(str(path), name, "a .safetensors file name without a folder", repr(shard)[:80])
    metadata = data.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object hook: a repeated name would silently hide a tensor."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"name {twice!r} appears twice")
    return result


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse_entry(file: str, name: str, entry: object, base: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadCheckpoint(file, name, "an object with dtype, shape and data_offsets", repr(entry)[:80])
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise BadCheckpoint(file, name, f"a dtype of {sorted(DTYPE_BYTES)}", repr(dtype)[:80])
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise BadCheckpoint(file, name, "a shape of non-negative integers", repr(shape)[:80])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise BadCheckpoint(file, name, "data_offsets of two non-negative integers", repr(offsets)[:80])
    expected = tensor_bytes(dtype, tuple(shape))
    if offsets[1] - offsets[0] != expected:
        found = f"data_offsets {offsets}, {offsets[1] - offsets[0]} bytes"
        raise BadCheckpoint(file, name, f"{expected} bytes for {dtype} {shape}", found)
    return StoredTensor(name, Path(file).name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _check_coverage(file: str, entries: list[StoredTensor], base: int, size: int) -> None:
    """The payload must be the tensors one after another: no overlap, no hole, no missing or extra bytes at the end."""
    end = base
    for tensor in entries:
        if tensor.start != end:
            what = "overlaps its predecessor" if tensor.start < end else "leaves a hole"
            raise BadCheckpoint(file, tensor.name, f"payload offset {end - base}", f"{tensor.start - base} ({what})")
        end = tensor.end
    if end != size:
        what = "truncated" if end > size else "trailing bytes"
        last = entries[-1].name if entries and end > size else None
        raise BadCheckpoint(file, last, f"a file of {end} bytes", f"{size} bytes ({what})")
