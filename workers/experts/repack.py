"""Expert-major files: all records of a model back to back, each at a whole page, so that a miss is one aligned read.

Owns: the file form, writing it (to a temporary name, synced, renamed), reading its head strictly. The file belongs to
one checkpoint: it names the checkpoint's experts by the checksums of their records, which every read is checked
against. Form:

    8 bytes magic | 8 bytes little-endian length | JSON head | padding to a page | record 0 | padding | record 1 | ...
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvstore.checksum import CHECKSUM_NAME, checksum
from workers.errors import BadCheckpoint
from workers.experts.config import ExpertConfig
from workers.experts.disk import ALIGN
from workers.experts.records import ExpertRecords, Piece, Run
from workers.experts.supply import ExpertSupply

MAGIC = b"DSV4EXPT"
FORMAT = 1
MAX_HEAD_BYTES = 64 << 20

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


def write_packed(records: ExpertRecords, path: str | Path, on_progress: Progress | None = None) -> int:
    """Writes every record; the file's bytes. Raises `ExpertUnavailable` or `OSError` and leaves no file then."""
    path = Path(path)
    scratch = path.with_name(f"{path.name}.writing")
    stride = -(-records.record_bytes // ALIGN) * ALIGN
    # Checksums are 16 digits each, so that the head's length is known before they are.
    head_bytes = len(_head(records, stride, [0] * records.num_pairs))
    first = -(-head_bytes // ALIGN) * ALIGN
    supply = ExpertSupply(records, ExpertConfig(), num_readers=1)
    block, sums = np.zeros(stride, np.uint8), []
    try:
        with open(scratch, "wb") as file:
            file.seek(first)
            for pair in range(records.num_pairs):
                supply.read(pair, block[: records.record_bytes], stream=True)
                sums.append(checksum(block[: records.record_bytes].data))
                file.write(block)
                if on_progress is not None:
                    on_progress((pair + 1) * records.record_bytes, records.total_bytes)
            file.seek(0)
            file.write(_head(records, stride, sums))
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        supply.close()
        scratch.unlink(missing_ok=True)
    return path.stat().st_size


def read_packed(path: str | Path, original: ExpertRecords) -> ExpertRecords:
    """Records over a repacked file of the checkpoint with records `original`. Raises `BadCheckpoint`."""
    path = Path(path)
    head = _read_head(path)
    expected = {
        "format": FORMAT,
        "checksum": CHECKSUM_NAME,
        "num_pairs": original.num_pairs,
        "record_bytes": original.record_bytes,
        "order": _order(original),
    }
    for key, value in expected.items():
        if head.get(key) != value:
            raise BadCheckpoint(str(path), None, f"{key} {value}, as the checkpoint", f"{head.get(key)!r}")
    stride, first, sums = head["stride"], head["first"], head["sums"]
    size = path.stat().st_size
    if size != first + stride * original.num_pairs or stride < original.record_bytes:
        raise BadCheckpoint(str(path), None, f"{first + stride * original.num_pairs} bytes", f"{size} bytes")
    if len(sums) != original.num_pairs:
        raise BadCheckpoint(str(path), None, f"{original.num_pairs} checksums", f"{len(sums)}")
    runs = []
    for pair in range(original.num_pairs):
        start = first + pair * stride
        end = start + original.record_bytes
        runs.append((Run(path, start, end, (Piece(start, 0, original.record_bytes),)),))
    return dataclasses.replace(original, runs=tuple(runs), checksums=tuple(int(text, 16) for text in sums))


def _order(records: ExpertRecords) -> list[list[object]]:
    return [[name, start, end] for name, (start, end) in records.form.offsets.items()]


def _head(records: ExpertRecords, stride: int, sums: list[int]) -> bytes:
    values = {
        "format": FORMAT,
        "checksum": CHECKSUM_NAME,
        "num_pairs": records.num_pairs,
        "record_bytes": records.record_bytes,
        "order": _order(records),
        "stride": stride,
        "sums": [f"{value:016x}" for value in sums],
    }
    text = json.dumps(values).encode()
    return MAGIC + struct.pack("<Q", len(text)) + text


def _read_head(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            magic, length = file.read(8), file.read(8)
            if magic != MAGIC or len(length) != 8:
                raise BadCheckpoint(str(path), None, "a file of `dsv4 experts repack`", f"magic {magic!r}")
            (size,) = struct.unpack("<Q", length)
            if size > MAX_HEAD_BYTES:
                raise BadCheckpoint(str(path), None, f"a head of at most {MAX_HEAD_BYTES} bytes", f"{size} bytes")
            head = json.loads(file.read(size))
    except OSError as exc:
        raise BadCheckpoint(str(path), None, "a readable file", exc.strerror or str(exc)) from exc
    except ValueError as exc:
        raise BadCheckpoint(str(path), None, "a JSON head", f"garbage: {exc}") from exc
    wanted = {"stride": int, "sums": list}
    if not isinstance(head, dict) or any(not isinstance(head.get(key), kind) for key, kind in wanted.items()):
        raise BadCheckpoint(str(path), None, "a head with stride and sums", "another one")
    return {**head, "first": -(-(16 + size) // ALIGN) * ALIGN}
