"""The KV compressor on the GPU: finished entries and indexer keys into their pages, raw rows into the rings.

Owns: pooling (`workers/reference/compressor.py`), norm, rope, and the stored bytes of entries (584-byte rows at Flash's
head size) and of indexer keys (`workers/reference/kv_format.py`). Does not own: the raw rows, which are columns of the
fused bf16 projection, or which entries a query reads.

Decode is one launch per layer: a program is one token of one compressor (C128: some channels of it), reads the rows
before its own from the ring, and writes its own row there; a ring is as long as an entry's sources, so no row is
overwritten before it is read. A prefill chunk may be longer than the ring, and programs run in any order, so there the
rings are written by a second launch. An entry is pooled in one order, so its bytes depend neither on batch nor on
chunking; C128 entries that decode finishes are summed in another order than those of prefill.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.compressor_entry import finish_part, finish_token, write_ring_row
from workers.kernels.compressor_prefill import compress_c4_pool, compress_c128_pool, write_rings
from workers.kernels.formats import hardware_formats
from workers.kernels.launch import pdl_options


class StepMeta(Protocol):
    """The step's metadata on the device, all int32. A padding token has position -1."""

    positions: Tensor  # [T]
    sequence_of_token: Tensor  # [T]
    slots: Tensor  # [B]
    full_pages: Tensor  # [B, S]
    start: Tensor  # [B] tokens before this chunk (prefill)
    cu_starts: Tensor  # [B + 1] first token of each sequence (prefill)


class C128Work(NamedTuple):
    """Scratch of the C128 compressor at decode, shared by all layers: parts of entries, and zeroed counters."""

    parts: Tensor  # fp32 [T, hd]
    arrived: Tensor  # int32 [T]

    @classmethod
    def allocate(cls, tokens: int, head_dim: int, device: torch.device | str) -> C128Work:
        """For steps of up to `tokens` tokens."""
        parts = torch.empty(tokens, head_dim, dtype=torch.float32, device=device)
        return cls(parts, torch.zeros(tokens, dtype=torch.int32, device=device))


class CompressorTensors(NamedTuple):
    """One compressor of one layer: its weights, and the layer's bytes of the two pools it writes."""

    ape: Tensor  # fp32 [ratio, c * hd], c = 2 for C4, 1 for C128
    norm: Tensor  # fp32 [hd]
    state: Tensor  # uint8 [slots, ring bytes]
    entries: Tensor  # uint8 [pages, stride]: entries, or indexer keys


@triton.jit
def decode_c4(token, rows, tensors, rope_table, step, eps, ROW: tl.constexpr, SHAPE: tl.constexpr, PDL: tl.constexpr):
    """One token of one C4 compressor: its ring row, and its entry if it is the last of one. Token b is sequence b's.

    tensors, SHAPE: as in `compressor_entry.finish_pooled`; step: (positions, slots, full_pages, page_columns).
    Waits for the launch before once all that is older is on its way.
    """
    positions, slots, full_pages, page_columns = step
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    if (position >= 0) & (position % 4 == 3):
        pages = full_pages + token * page_columns
        finish_token(rows, tensors, rope_table, pages, slot, token, position, position, eps, 4, ROW, SHAPE, PDL)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if position >= 0:
        write_ring_row(rows, tensors[0], slot, token, position, ROW, 8, 4 * SHAPE[1])


@triton.jit
def decode_c128_part(
    token, part, rows, tensors, rope_table, step, work, eps,
    ROW: tl.constexpr, WIDTH: tl.constexpr, SHAPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token of the C128 compressor, WIDTH channels of its entry if it is the last of one; part 0: its ring row.

    work: `C128Work`; the rest as in `decode_c4`.
    """
    positions, slots, full_pages, page_columns = step
    position = tl.load(positions + token)
    slot = tl.load(slots + token)
    if (position >= 0) & (position % 128 == 127):
        pages = full_pages + token * page_columns
        finish_part(rows, tensors, rope_table, pages, slot, token, position, eps, work, part, ROW, WIDTH, SHAPE, PDL)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if (position >= 0) & (part == 0):
        write_ring_row(rows, tensors[0], slot, token, position, ROW, 128, 2 * SHAPE[1])


@triton.jit
def compress_c4_decode(
    rows,
    positions,
    slots,
    full_pages,
    page_columns,
    state,
    entries,
    ape,
    norm,
    index_state,
    index_entries,
    index_ape,
    index_norm,
    rope_table,
    eps,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    HD: tl.constexpr,
    DI: tl.constexpr,
    RD: tl.constexpr,
    HW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T, 2): the main compressor and the indexer's. state pointers fp32, entries uint8."""
    step = (positions, slots, full_pages, page_columns)
    if tl.program_id(1) == 0:
        ENTRY: tl.constexpr = (STRIDE, HD, RD, False, HW)
        decode_c4(tl.program_id(0), rows, (state, entries, ape, norm), rope_table, step, eps, ROW, ENTRY, PDL)
    else:
        KEY: tl.constexpr = (INDEX_STRIDE, DI, RD, True, HW)
        index = (index_state, index_entries, index_ape, index_norm)
        decode_c4(tl.program_id(0), rows + 4 * HD, index, rope_table, step, eps, ROW, KEY, PDL)


@triton.jit
def compress_c128_decode(
    rows,
    positions,
    slots,
    full_pages,
    page_columns,
    state,
    entries,
    ape,
    norm,
    rope_table,
    eps,
    parts,
    arrived,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    HD: tl.constexpr,
    RD: tl.constexpr,
    WIDTH: tl.constexpr,
    HW: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (HD / WIDTH, T)."""
    ENTRY: tl.constexpr = (STRIDE, HD, RD, False, HW)
    step, work = (positions, slots, full_pages, page_columns), (parts, arrived)
    tensors = (state, entries, ape, norm)
    decode_c128_part(
        tl.program_id(1), tl.program_id(0), rows, tensors, rope_table, step, work, eps, ROW, WIDTH, ENTRY, PDL
    )


PREFILL_TOKENS = {4: 16, 128: 128}
"""Tokens whose finished entries one prefill program pools, one after the other."""

Mode = Literal["decode", "prefill"]
"""Decode: one token a sequence, token b is sequence b's, one launch. Prefill: chunks of any length, two launches."""

WARPS = 4
C128_WIDTH = 32
"""Channels of a C128 entry that one program pools at decode: 32 KiB of raw rows.
# measured (H200, 2026-11-21, all that a step stores of 1 and 64 sequences): 3.0 and 13.9 us; 3.3 and 14.5 with 64,
# 3.0 and 15.8 with 16."""


def _static(rows: Tensor, tensors: CompressorTensors, rope_table: Tensor) -> dict[str, Any]:
    return {
        "ROW": rows.stride(0),
        "STRIDE": tensors.entries.stride(0),
        "HD": tensors.norm.shape[0],
        "RD": rope_table.shape[1],
        "HW": hardware_formats(rows.device),
    }


def pointers(tensors: CompressorTensors) -> tuple[Tensor, ...]:
    """Arguments of a kernel: ring as fp32, entries, ape, norm."""
    return tensors.state.view(torch.float32), tensors.entries, tensors.ape, tensors.norm


def compress_c4(
    rows: Tensor,
    meta: StepMeta,
    main: CompressorTensors,
    index: CompressorTensors,
    rope_table: Tensor,
    eps: float,
    *,
    mode: Mode = "decode",
    pdl: bool | None = None,
) -> None:
    """C4 entries and indexer keys that the step finishes, and the raw rows of both rings.

    rows: fp32 [T, N2], columns main kvA | kvB | scA | scB (4 hd), then the indexer's (4 Di); further columns are not
    read. rope_table: fp32 [P, rd], cos | sin. Writes only pages and slots of tokens with a position.
    """
    num_tokens = rows.shape[0]
    static = _static(rows, main, rope_table) | {"INDEX_STRIDE": index.entries.stride(0), "DI": index.norm.shape[0]}
    tensors = (*pointers(main), *pointers(index), rope_table, eps)
    pages = (meta.full_pages, meta.full_pages.stride(0))
    if not num_tokens:
        return
    if mode == "decode":
        step = (meta.positions, meta.slots, *pages)
        options = pdl_options(rows, pdl)
        compress_c4_decode[num_tokens, 2](rows, *step, *tensors, **static, num_warps=WARPS, **options)
        return
    step = (meta.positions, meta.sequence_of_token, meta.slots, meta.start, *pages, num_tokens)
    tile = PREFILL_TOKENS[4]
    grid = (triton.cdiv(num_tokens, tile), 2)
    compress_c4_pool[grid](rows, *step, *tensors, TOKENS=tile, **static, num_warps=WARPS)
    _write_rings(rows, meta, main, index)


def compress_c128(
    rows: Tensor,
    meta: StepMeta,
    main: CompressorTensors,
    rope_table: Tensor,
    eps: float,
    *,
    work: C128Work | None = None,
    mode: Mode = "decode",
    pdl: bool | None = None,
) -> None:
    """C128 entries that the step finishes, and the raw rows of the ring. rows: fp32 [T, N2], columns kv | score.

    work: for decode; allocated here when None.
    """
    num_tokens = rows.shape[0]
    static = _static(rows, main, rope_table)
    tensors = (*pointers(main), rope_table, eps)
    pages = (meta.full_pages, meta.full_pages.stride(0))
    if not num_tokens:
        return
    if mode == "decode":
        work = work or C128Work.allocate(num_tokens, static["HD"], rows.device)
        step = (meta.positions, meta.slots, *pages)
        options = {"WIDTH": C128_WIDTH, "num_warps": WARPS, **pdl_options(rows, pdl)}
        grid = (static["HD"] // C128_WIDTH, num_tokens)
        compress_c128_decode[grid](rows, *step, *tensors, *work, **static, **options)
        return
    step = (meta.positions, meta.sequence_of_token, meta.slots, meta.start, *pages, num_tokens)
    tile = PREFILL_TOKENS[128]
    grid = (triton.cdiv(num_tokens, tile),)
    compress_c128_pool[grid](rows, *step, *tensors, TOKENS=tile, **static, num_warps=WARPS)
    _write_rings(rows, meta, main, None)


def _write_rings(rows: Tensor, meta: StepMeta, main: CompressorTensors, index: CompressorTensors | None) -> None:
    parts, ring = (4, 8) if index is not None else (2, 128)
    other = main if index is None else index
    write_rings[meta.slots.shape[0], ring](
        rows,
        meta.positions,
        meta.slots,
        meta.cu_starts,
        main.state.view(torch.float32),
        other.state.view(torch.float32),
        ROW=rows.stride(0),
        RING=ring,
        WIDTH=parts * main.norm.shape[0],
        INDEX_WIDTH=0 if index is None else parts * index.norm.shape[0],
        num_warps=4,
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations for V4-Flash, for `tests/workers/kernels/compiling.py`."""
    pointers = dict.fromkeys(("rows", "state", "ape", "norm", "rope_table", "parts"), "*fp32")
    pointers |= {f"index_{name}": "*fp32" for name in ("state", "ape", "norm")}
    pointers |= dict.fromkeys(("positions", "sequence_of_token", "slots", "start", "full_pages", "arrived"), "*i32")
    pointers |= {"entries": "*u8", "index_entries": "*u8", "page_columns": "i32", "num_tokens": "i32", "eps": "fp32"}
    static = {"STRIDE": 37440, "HD": 512, "RD": 64, "HW": arch >= 89}
    c4 = static | {"ROW": 2688, "INDEX_STRIDE": 8448, "DI": 128}
    c128 = static | {"STRIDE": 1728, "ROW": 1024}
    pdl = arch >= 90
    four = {"num_warps": WARPS}
    cases = (
        ("compress_c4_decode", compress_c4_decode, c4 | {"PDL": pdl}, four | {"launch_pdl": pdl}),
        (
            "compress_c128_decode",
            compress_c128_decode,
            c128 | {"WIDTH": C128_WIDTH, "PDL": pdl},
            four | {"launch_pdl": pdl},
        ),
        ("compress_c4_pool", compress_c4_pool, c4 | {"TOKENS": PREFILL_TOKENS[4]}, four),
        ("compress_c128_pool", compress_c128_pool, c128 | {"TOKENS": PREFILL_TOKENS[128]}, four),
    )
    return [
        (name, fn, {arg: pointers[arg] for arg in fn.arg_names if arg in pointers}, constants, options)
        for name, fn, constants, options in cases
    ]
