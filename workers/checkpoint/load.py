"""Loads a checkpoint directory, as fp32 tensors for the reference path or as raw stored tensors for kernel layouts.

Owns: order of reading, the memory bound, content checks while reading. Does not own: matching (`check.py`), formats
(`quant.py`). Everything that headers can show is checked before the first tensor is read.

Memory: `load_named` needs the final fp32 weights plus at most `WORKING_BYTES` for the chunk of rows in flight, its
scales and the decoder's temporaries, because a tensor is read and decoded by row ranges straight into its final place.
`iter_tensors` holds one stored tensor and its scale (two while the caller keeps the previous one). Every payload byte
is read once, shard by shard, front to back.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoint.check import CheckedCheckpoint, MatchedTensor, check_directory
from workers.checkpoint.draw import Draw, DrawReader
from workers.checkpoint.index import CheckpointIndex, ShardReader, StoredTensor
from workers.checkpoint.names import FP4_GROUP, Encoding, Organ, StoredForm, TensorSpec
from workers.checkpoint.progress import OnProgress, ProgressCounter
from workers.checkpoint.quant import (
    TORCH_DTYPES,
    StoredPair,
    byte_view,
    decode,
    find_bad_scale,
    find_bad_table,
    find_bad_weight,
    row_granularity,
)
from workers.errors import BadCheckpoint
from workers.model.config import ModelConfig

CHUNK_ELEMENTS = 1 << 19
"""Logical elements decoded at a time. The FP4 decoder's temporaries take about 32 bytes per element: 16 MiB."""

WORKING_BYTES = 48 << 20
"""Bound of what `load_named` holds beside the final weights (tested): chunk, scales of one tensor, temporaries.

The name and header tables come on top, about 0.9 KB per stored tensor  # measured: 60 MB for Flash, 129 MB for Pro
"""


TensorReader = ShardReader | DrawReader

DRAW_THREADS = 16
"""Tensors of a recipe that are drawn at once, each on one CPU; as many may be in memory beside the caller's."""


@dataclass(frozen=True, slots=True)
class RawTensor:
    """One tensor as stored, owned by the caller: `weight` in its tag's torch dtype, `scale` uint8 (e8m0) or fp32."""

    spec: TensorSpec
    form: StoredForm
    weight: Tensor
    scale: Tensor | None


HEAD_BYTES = 4096
"""Bytes of each tensor that enter a model's identity: enough to tell two trainings of one shape apart."""


@dataclass(frozen=True, slots=True)
class TensorHead:
    """Shape of a tensor and its first `HEAD_BYTES` as `load_named` would hold them (fp32, or int64 tables)."""

    shape: tuple[int, ...]
    values: Tensor


def head_of(raw: RawTensor) -> TensorHead:
    """The beginning of a stored tensor, decoded; no larger part of it is."""
    spec, form, scale = raw.spec, raw.form, raw.scale
    wanted = HEAD_BYTES // (8 if form.dtype in ("I32", "I64") else 4)
    rows = min(spec.shape[0], -(-wanted // max(1, math.prod(spec.shape[1:]))))
    weight = raw.weight[:rows]
    if scale is not None:
        scale = scale[: -(-rows // row_granularity(form))]
    if rows == 1 and scale is not None and spec.encoding is Encoding.FP4:
        # Of V4-Flash there are 33,024 such rows, and a quarter of each is wanted.
        weight, scale = weight[:, : -(-wanted // 2)], scale[:, : -(-wanted // FP4_GROUP)]
    return TensorHead(spec.shape, decode(form, weight, scale).reshape(-1)[:wanted].clone())


def load_named(
    directory: str | Path, *, draft_blocks: bool = True, on_progress: OnProgress | None = None
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Config and all tensors by official name, dequantised to fp32 (tid2eid: int64). Raises `BadCheckpoint`.

    `draft_blocks` false leaves out `mtp.*`. Scales are folded in, so only names of `tensor_table(config)` appear.
    """
    checked = check_directory(directory).require_sound()
    matched = _selected(checked, draft_blocks=draft_blocks)
    counter = ProgressCounter(sum(m.nbytes for m in matched), on_progress)
    tensors: dict[str, Tensor] = {}
    with _reader(checked) as reader:
        for item in matched:
            tensors[item.spec.name] = _load_decoded(item, checked, reader)
            counter.add(item.nbytes, item.spec.name)
    return checked.config, tensors


def load_without_experts(
    directory: str | Path, *, on_progress: OnProgress | None = None
) -> tuple[CheckedCheckpoint, dict[str, Tensor], dict[str, TensorHead]]:
    """As `load_named` without draft blocks, but of routed experts only the heads: their payload stays on disk.

    Their values are checked whenever an expert is read, not here. Raises `BadCheckpoint`.
    """
    checked = check_directory(directory).require_sound()
    matched = _selected(checked, draft_blocks=False)
    counter = ProgressCounter(sum(m.nbytes for m in matched if not _is_expert(m)), on_progress)
    tensors: dict[str, Tensor] = {}
    heads: dict[str, TensorHead] = {}
    with _reader(checked) as reader:
        for item in matched:
            name = item.spec.name
            if _is_expert(item):
                heads[name] = _load_head(item, reader)
                continue
            tensors[name] = _load_decoded(item, checked, reader)
            counter.add(item.nbytes, name)
    return checked, tensors, heads


def iter_tensors(
    directory: str | Path,
    *,
    draft_blocks: bool = True,
    routed_experts: bool = True,
    on_progress: OnProgress | None = None,
) -> Iterator[RawTensor]:
    """Every tensor in its stored form, in file order, with the same checks as `load_named`. Raises `BadCheckpoint`."""
    checked = check_directory(directory).require_sound()
    matched = _selected(checked, draft_blocks=draft_blocks)
    matched = [item for item in matched if routed_experts or not _is_expert(item)]
    counter = ProgressCounter(sum(m.nbytes for m in matched), on_progress)
    if checked.index.recipe is not None:
        yield from _iter_drawn(checked, matched, counter)
        return
    with ShardReader(checked.index.directory) as reader:
        for item in matched:
            scale = _load_scale(item, checked.index, reader)
            weight = torch.empty(item.form.shape, dtype=TORCH_DTYPES[item.form.dtype])
            for start, end in _row_ranges(item):
                _read_into(weight[start:end], item.weight, reader, start)
                _check_rows(item, weight[start:end], checked)
            counter.add(item.nbytes, item.spec.name)
            yield RawTensor(item.spec, item.form, weight, scale)


def _iter_drawn(
    checked: CheckedCheckpoint, matched: Sequence[MatchedTensor], counter: ProgressCounter
) -> Iterator[RawTensor]:
    """The tensors of a recipe in order, drawn ahead by several threads."""
    recipe = checked.index.recipe
    assert recipe is not None
    threads = min(DRAW_THREADS, os.cpu_count() or 1)
    ahead: deque[tuple[MatchedTensor, Future[StoredPair]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="draw") as pool:
        for item in (*matched, *[None] * threads):
            if item is not None:
                ahead.append((item, pool.submit(Draw(item.spec, checked.config, recipe).pair)))
            if ahead and (item is None or len(ahead) > threads):
                done, future = ahead.popleft()
                pair = future.result()
                counter.add(done.nbytes, done.spec.name)
                yield RawTensor(done.spec, done.form, pair.weight, pair.scale)


def load_expert_heads(checked: CheckedCheckpoint) -> dict[str, TensorHead]:
    """Heads of the trunk's routed experts: a few rows of each are read. Raises `BadCheckpoint`."""
    matched = _selected(checked, draft_blocks=False)
    with _reader(checked) as reader:
        return {item.spec.name: _load_head(item, reader) for item in matched if _is_expert(item)}


def scan_values(checked: CheckedCheckpoint, on_progress: OnProgress | None = None) -> list[BadCheckpoint]:
    """Read every byte and list the tensors with NaN codes, NaN scales or wild expert ids; memory as one chunk."""
    problems: list[BadCheckpoint] = []
    counter = ProgressCounter(sum(m.nbytes for m in checked.matched), on_progress)
    with _reader(checked) as reader:
        for item in checked.matched:
            try:
                _load_scale(item, checked.index, reader)
                for start, end in _row_ranges(item):
                    _check_rows(item, _read_rows(item.weight, reader, start, end), checked)
            except BadCheckpoint as problem:
                problems.append(problem)
            counter.add(item.nbytes, item.spec.name)
    return problems


def _reader(checked: CheckedCheckpoint) -> TensorReader:
    """What the tensors come from: shards, or a seed."""
    if checked.index.recipe is not None:
        return DrawReader(checked.index, checked.config)
    return ShardReader(checked.index.directory)


def _selected(checked: CheckedCheckpoint, *, draft_blocks: bool) -> list[MatchedTensor]:
    return [m for m in checked.matched if draft_blocks or not m.spec.block.startswith("mtp.")]


def _is_expert(item: MatchedTensor) -> bool:
    return item.spec.organ is Organ.ROUTED_EXPERTS


def _load_head(item: MatchedTensor, reader: TensorReader) -> TensorHead:
    """As `head_of` the whole tensor, from its first rows alone."""
    shape, granularity = item.spec.shape, row_granularity(item.form)
    rows = -(-HEAD_BYTES // 4 // max(1, math.prod(shape[1:])))
    rows = min(shape[0], -(-rows // granularity) * granularity)
    scale = None if item.scale is None else _read_rows(item.scale, reader, 0, -(-rows // granularity))
    raw = RawTensor(item.spec, item.form, _read_rows(item.weight, reader, 0, rows), scale)
    return head_of(raw)


def _load_decoded(item: MatchedTensor, checked: CheckedCheckpoint, reader: TensorReader) -> Tensor:
    """The tensor in its logical shape, filled by row ranges."""
    scale = _load_scale(item, checked.index, reader)
    granularity = row_granularity(item.form)
    is_table = item.form.dtype in ("I32", "I64")
    out = torch.empty(item.spec.shape, dtype=torch.int64 if is_table else torch.float32)
    for start, end in _row_ranges(item):
        weight = _read_rows(item.weight, reader, start, end)
        _check_rows(item, weight, checked)
        rows_scale = None if scale is None else scale[start // granularity : -(-end // granularity)]
        out[start:end] = decode(item.form, weight, rows_scale)
    return out


def _row_ranges(item: MatchedTensor) -> Iterator[tuple[int, int]]:
    """Half-open ranges of dim 0, about `CHUNK_ELEMENTS` logical elements each and whole FP8 block rows."""
    rows = item.spec.shape[0]
    width = 1
    for n in item.spec.shape[1:]:
        width *= n
    granularity = row_granularity(item.form)
    step = max(1, CHUNK_ELEMENTS // max(1, width) // granularity) * granularity
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _read_rows(tensor: StoredTensor, reader: TensorReader, start: int, end: int) -> Tensor:
    """Rows `[start, end)` of dim 0 in a fresh tensor of the stored dtype."""
    rows = torch.empty((end - start, *tensor.shape[1:]), dtype=TORCH_DTYPES[tensor.dtype])
    _read_into(rows, tensor, reader, start)
    return rows


def _read_into(rows: Tensor, tensor: StoredTensor, reader: TensorReader, start: int) -> None:
    row_bytes = tensor.nbytes // max(1, tensor.shape[0])
    reader.read(tensor, start * row_bytes, byte_view(rows))


def _load_scale(item: MatchedTensor, index: CheckpointIndex, reader: TensorReader) -> Tensor | None:
    if item.scale is None:
        return None
    scale = _read_rows(item.scale, reader, 0, item.scale.shape[0])
    if bad := find_bad_scale(scale):
        raise BadCheckpoint(index.path(item.scale.file), item.scale.name, "finite scales", bad)
    return scale


def _check_rows(item: MatchedTensor, weight: Tensor, checked: CheckedCheckpoint) -> None:
    bad = find_bad_weight(item.form, weight)
    expected = "finite values"
    if item.form.dtype in ("I32", "I64"):
        num_experts = checked.config.n_routed_experts
        bad, expected = find_bad_table(weight, num_experts), f"expert ids 0..{num_experts - 1}"
    if bad:
        raise BadCheckpoint(checked.index.path(item.weight.file), item.weight.name, expected, bad)
