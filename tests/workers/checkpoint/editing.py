"""Takes a checkpoint apart and puts it together wrongly, for tests of refusals."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workers.checkpoint.index import INDEX_NAME

Header = dict[str, Any]


def shard_of(directory: Path, tensor: str) -> Path:
    """Path of the shard that the index names for a tensor."""
    return directory / json.loads((directory / INDEX_NAME).read_text())["weight_map"][tensor]


def read_shard(path: Path) -> tuple[Header, bytearray]:
    """(header without metadata, payload)."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return header, bytearray(raw[8 + length :])


def write_shard(path: Path, header: Header | bytes, payload: bytes) -> None:
    """A file with exactly this header, right or wrong."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(payload))


def edit_header(path: Path, edit: Callable[[Header], None]) -> None:
    """Apply `edit` to a shard's header and leave the payload alone."""
    header, payload = read_shard(path)
    edit(header)
    write_shard(path, header, bytes(payload))


def poke(directory: Path, tensor: str, offset: int, data: bytes) -> None:
    """Overwrite bytes inside a stored tensor."""
    path = shard_of(directory, tensor)
    header, payload = read_shard(path)
    start = header[tensor]["data_offsets"][0] + offset
    payload[start : start + len(data)] = data
    write_shard(path, header, bytes(payload))


def replace_tensor(directory: Path, tensor: str, entry: tuple[str, list[int], bytes] | None) -> None:
    """Drop a stored tensor (None) or replace or add one as (dtype, shape, bytes); offsets and index stay consistent."""
    index_path = directory / INDEX_NAME
    index = json.loads(index_path.read_text())
    shard = index["weight_map"].get(tensor, next(iter(index["weight_map"].values())))
    header, payload = read_shard(directory / shard)
    parts = {n: (e["dtype"], e["shape"], bytes(payload[slice(*e["data_offsets"])])) for n, e in header.items()}
    parts.pop(tensor, None)
    index["weight_map"].pop(tensor, None)
    if entry is not None:
        parts[tensor] = entry
        index["weight_map"][tensor] = shard
    new_header: Header = {}
    new_payload = b""
    for name, (dtype, shape, data) in parts.items():
        new_header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(new_payload), len(new_payload + data)]}
        new_payload += data
    write_shard(directory / shard, new_header, new_payload)
    index["metadata"].pop("total_size", None)
    index_path.write_text(json.dumps(index))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Apply `edit` to a JSON object file."""
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
