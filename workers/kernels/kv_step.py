"""Everything a decode step stores of a layer, in one launch: latent norm, window row, compressed entries, rings.

Owns: nothing but the launch. The roles are `kv_store._norm_and_store` (two programs a token) and the compressors of
`compressor.py`; they share no data, and one launch takes as long as the slowest of them where three in a row take the
sum. Bytes are those of `norm_and_store` and `compress_*` called one by one.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.compressor import (
    C128_WIDTH,
    WARPS,
    C128Work,
    CompressorTensors,
    decode_c4,
    decode_c128_part,
    pointers,
)
from workers.kernels.formats import hardware_formats
from workers.kernels.kv_store import _norm_and_store
from workers.kernels.launch import pdl_options


@triton.jit
def _store_step(
    out_fp8,
    q_norm,
    kv_norm,
    rope_table,
    positions,
    sequence_of_token,
    window_pages,
    window_columns,
    window_codes,
    window_words,
    latent,
    eps,
    rows,
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
    parts,
    arrived,
    LATENT: tl.constexpr,
    LATENT_BLOCK: tl.constexpr,
    NOPE: tl.constexpr,
    OUT_ROW: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    RATIO: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    DI: tl.constexpr,
    WIDTH: tl.constexpr,
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (roles, T): latent, window row, then main and indexer's compressor (C4) or HD / WIDTH parts of C128's."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    HD: tl.constexpr = NOPE + 64
    token = tl.program_id(1)
    if tl.program_id(0) < 2:
        _norm_and_store(
            out_fp8,
            q_norm,
            kv_norm,
            rope_table,
            positions,
            sequence_of_token,
            window_pages,
            window_columns,
            window_codes,
            window_words,
            latent,
            eps,
            LATENT,
            LATENT_BLOCK,
            NOPE,
            OUT_ROW,
            WINDOW_STRIDE,
            HW,
            WIDEN,
            False,
        )
    elif RATIO == 128:
        decode_c128_part(
            token,
            tl.program_id(0) - 2,
            rows,
            state,
            entries,
            ape,
            norm,
            rope_table,
            positions,
            slots,
            full_pages,
            page_columns,
            parts,
            arrived,
            eps,
            ROW,
            STRIDE,
            HD,
            64,
            WIDTH,
            HW,
        )
    elif tl.program_id(0) == 2:
        decode_c4(
            token,
            rows,
            state,
            entries,
            ape,
            norm,
            rope_table,
            positions,
            slots,
            full_pages,
            page_columns,
            eps,
            ROW,
            STRIDE,
            HD,
            64,
            False,
            HW,
        )
    else:
        decode_c4(
            token,
            rows + 4 * HD,
            index_state,
            index_entries,
            index_ape,
            index_norm,
            rope_table,
            positions,
            slots,
            full_pages,
            page_columns,
            eps,
            ROW,
            INDEX_STRIDE,
            DI,
            64,
            True,
            HW,
        )


def store_and_compress(
    out_fp8: Tensor,
    q_norm: Tensor,
    kv_norm: Tensor,
    rope_table: Tensor,
    meta: Any,
    window_pool: Tensor,
    latent: Tensor,
    rows: Tensor,
    main: CompressorTensors,
    index: CompressorTensors | None,
    eps: float,
    *,
    work: C128Work | None = None,
    pdl: bool | None = None,
) -> None:
    """Decode: `kv_store.norm_and_store` and `compress_c4` (`index` None: `compress_c128`) of one layer at once.

    Arguments as theirs; `rows` fp32 [T, N2] are the raw rows of the compressors. Token b is sequence b's.
    work: for C128; allocated here when None.
    """
    num_tokens, q_lora = latent.shape
    if not num_tokens:
        return
    second = main if index is None else index
    roles, scratch = 4, (rows, meta.slots)  # C4 uses no scratch
    if index is None:
        roles = 2 + main.norm.shape[0] // C128_WIDTH
        scratch = work or C128Work.allocate(num_tokens, main.norm.shape[0], rows.device)
    _store_step[roles, num_tokens](
        out_fp8,
        q_norm,
        kv_norm,
        rope_table,
        meta.positions,
        meta.sequence_of_token,
        meta.window_pages,
        meta.window_pages.shape[1],
        window_pool,
        window_pool.view(torch.bfloat16),
        latent,
        eps,
        rows,
        meta.slots,
        meta.full_pages,
        meta.full_pages.stride(0),
        *pointers(main),
        *pointers(second),
        *scratch,
        LATENT=q_lora,
        LATENT_BLOCK=triton.next_power_of_2(q_lora),
        NOPE=kv_norm.shape[0] - 64,
        OUT_ROW=out_fp8.stride(0),
        WINDOW_STRIDE=window_pool.shape[1],
        RATIO=128 if index is None else 4,
        ROW=rows.stride(0),
        STRIDE=main.entries.stride(0),
        INDEX_STRIDE=second.entries.stride(0),
        DI=second.norm.shape[0],
        WIDTH=C128_WIDTH,
        HW=hardware_formats(rows.device),
        WIDEN=not rows.is_cuda,
        num_warps=WARPS,
        **pdl_options(rows, pdl),
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations for V4-Flash, for `tests/workers/kernels/compiling.py`."""
    floats = ("q_norm", "kv_norm", "rope_table", "rows", "state", "ape", "norm", "index_state", "index_ape", "parts")
    kinds = dict.fromkeys((*floats, "index_norm"), "*fp32") | {"eps": "fp32"}
    kinds |= dict.fromkeys(("out_fp8", "window_words", "latent"), "*bf16")
    kinds |= dict.fromkeys(("positions", "sequence_of_token", "window_pages", "slots", "full_pages", "arrived"), "*i32")
    kinds |= dict.fromkeys(("window_columns", "page_columns"), "i32")
    kinds |= dict.fromkeys(("window_codes", "entries", "index_entries"), "*u8")
    static = {"LATENT": 1024, "LATENT_BLOCK": 1024, "NOPE": 448, "OUT_ROW": 1536, "WINDOW_STRIDE": 149_760}
    static |= {"WIDTH": C128_WIDTH, "HW": arch >= 89, "WIDEN": False, "PDL": arch >= 90}
    c4 = static | {"RATIO": 4, "ROW": 2624, "STRIDE": 37440, "INDEX_STRIDE": 8448, "DI": 128}
    c128 = static | {"RATIO": 128, "ROW": 1024, "STRIDE": 1728, "INDEX_STRIDE": 1728, "DI": 512}
    options = {"num_warps": WARPS, "launch_pdl": arch >= 90}
    return [(name, _store_step, kinds, case, options) for name, case in (("store_c4", c4), ("store_c128", c128))]
