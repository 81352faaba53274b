"""Writes checkpoints in DeepSeek's layout: config.json, shards, index.

Owns: shard planning, the safetensors writer, and the order of file replacement. Does not own: number formats
(`quant.py`). Peak memory of every writer here is one tensor in its stored form plus what `produce` needs to make it.

A directory is never left readable but mixed: shards are written under temporary names, then the old index is removed,
the shards are moved into place, and the new index comes last. A crash leaves either the old checkpoint, or none.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from workers.checkpoint.index import INDEX_NAME, SINGLE_NAME
from workers.checkpoint.names import DTYPE_BYTES, Shape, TensorSpec, tensor_bytes, tensor_table
from workers.checkpoint.progress import OnProgress, ProgressCounter
from workers.checkpoint.quant import StoredPair, byte_view, encode
from workers.model.config import ModelConfig

Entry = tuple[str, str, Shape]
"""(name, safetensors dtype tag, shape) of one stored tensor."""


def save_official(
    directory: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    shard_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Quantise fp32 `tensors` (official names, logical shapes; tid2eid int64) and write them as DeepSeek ships them.

    Raises `ValueError` when names or shapes are not exactly those of the config's table. `shard_bytes` None gives one
    shard per layer like the official releases; otherwise neighbouring layers share shards of at most that size.
    """
    table = tensor_table(config)
    if missing := sorted(set(table) - set(tensors)):
        raise ValueError(f"{len(missing)} tensors are missing: {missing[:3]}")
    if extra := sorted(set(tensors) - set(table)):
        raise ValueError(f"{len(extra)} tensors are not part of the config: {extra[:3]}")
    for name, spec in table.items():
        if tuple(tensors[name].shape) != spec.shape:
            raise ValueError(f"{name}: shape {tuple(tensors[name].shape)}, config implies {spec.shape}")
    write_checkpoint(
        directory,
        config,
        lambda spec: encode(spec, tensors[spec.name]),
        shard_bytes=shard_bytes,
        on_progress=on_progress,
    )


def write_checkpoint(
    directory: str | Path,
    config: ModelConfig,
    produce: Callable[[TensorSpec], StoredPair],
    *,
    shard_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> None:
    """Write all tensors of `config`, asking `produce` for one at a time in file order."""
    directory = Path(directory)
    shards = plan_shards(config, shard_bytes)
    total = sum(spec.stored_bytes for shard in shards for spec in shard)
    require_space(directory, total)
    directory.mkdir(parents=True, exist_ok=True)
    counter = ProgressCounter(total, on_progress)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    weight_map: dict[str, str] = {}
    moves: list[tuple[Path, Path]] = []
    try:
        for name, shard in zip(names, shards, strict=True):
            part = directory / f".{name}.part"
            moves.append((part, directory / name))
            entries = [entry for spec in shard for entry in spec.stored()]
            weight_map |= {entry[0]: name for entry in entries}
            write_safetensors(part, entries, _stored_tensors(shard, produce), counter)
        _replace_checkpoint(directory, config, moves, weight_map, total)
    finally:
        for part, _ in moves:
            part.unlink(missing_ok=True)


def plan_shards(config: ModelConfig, shard_bytes: int | None = None) -> list[list[TensorSpec]]:
    """Specs per shard. Blocks stay whole where they fit; inside a shard wide elements come first (alignment)."""
    blocks: dict[str, list[TensorSpec]] = {}
    for spec in tensor_table(config).values():
        blocks.setdefault(spec.block, []).append(spec)
    shards: list[list[TensorSpec]] = []
    free = -1
    for specs in blocks.values():
        size = sum(spec.stored_bytes for spec in specs)
        pieces = [specs] if shard_bytes is None or size <= shard_bytes else [[spec] for spec in specs]
        for piece in pieces:
            size = sum(spec.stored_bytes for spec in piece)
            if shard_bytes is None or size > free:
                shards.append([])
                free = shard_bytes or 0
            shards[-1].extend(piece)
            free -= size
    return [sorted(shard, key=lambda spec: -DTYPE_BYTES[spec.official.dtype]) for shard in shards]


def write_safetensors(
    path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor], counter: ProgressCounter | None = None
) -> None:
    """Write one safetensors file; `tensors` yields the entries' values in order and may be lazy. Synced to disk."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in entries:
        end = offset + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # payload starts at a multiple of 8, as the format asks
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(struct.pack("<Q", len(raw)) + raw))
        for (name, dtype, shape), tensor in zip(entries, tensors, strict=True):
            if tuple(tensor.shape) != shape or tensor.element_size() != DTYPE_BYTES[dtype]:
                raise ValueError(f"{name}: produced {tensor.dtype} {tuple(tensor.shape)}, planned {dtype} {shape}")
            data = byte_view(tensor.contiguous())
            _write_all(file.fileno(), data)
            if counter is not None:
                counter.add(len(data), name)
        os.fsync(file.fileno())


def require_space(directory: Path, num_bytes: int) -> None:
    """Raise `OSError` (ENOSPC) when the file system of `directory`, or of its future home, lacks `num_bytes` + 1 %."""
    directory = directory.resolve()
    directory = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(directory).free
    needed = num_bytes + num_bytes // 100
    if free < needed:
        raise OSError(errno.ENOSPC, f"not enough space: {needed:,} bytes needed, {free:,} free", str(directory))


def _stored_tensors(shard: list[TensorSpec], produce: Callable[[TensorSpec], StoredPair]) -> Iterable[Tensor]:
    for spec in shard:
        pair = produce(spec)
        yield pair.weight
        if pair.scale is not None:
            yield pair.scale


def _replace_checkpoint(
    directory: Path, config: ModelConfig, moves: list[tuple[Path, Path]], weight_map: dict[str, str], total: int
) -> None:
    """Swap the finished parts in. Without an index the directory is no checkpoint, so a crash in here is seen."""
    (directory / INDEX_NAME).unlink(missing_ok=True)
    (directory / SINGLE_NAME).unlink(missing_ok=True)
    for part, final in moves:
        os.replace(part, final)
    keep = {final.name for _, final in moves}
    for stale in directory.glob("model-*-of-*.safetensors"):
        if stale.name not in keep:
            stale.unlink()
    write_json(directory / "config.json", config.to_json())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX_NAME, index)


def write_json(path: Path, data: object) -> None:
    """Replaces `path` as a whole, synced to disk; a file that is right already is left alone."""
    text = json.dumps(data, indent=2) + "\n"
    if path.is_file() and path.read_bytes() == text.encode():
        return
    # Named by process: two that write the same folder would move each other's half-written file.
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def _write_all(fd: int, data: memoryview) -> None:
    """`os.write` moves at most 2 GiB a call, so large tensors need several."""
    done = 0
    while done < len(data):
        done += os.write(fd, data[done:])
