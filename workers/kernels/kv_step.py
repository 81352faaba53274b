"""Everything a decode step stores of a layer, in one launch: latent norm, window row, compressed entries, rings.

Owns: nothing but the launch. The roles are those of `kv_store.py`, the compressors of `compressor.py`, and the gates
that mHC left open (`mhc.hc_sums`), or their steps of Sinkhorn (`mhc.hc_post_pre`); they share no data, and one launch
takes as long as the slowest of them where several in a row take the sum. Bytes are those of `norm_and_store` and
`compress_*` called one by one.

Every role reads what is older than the launch before (rings, norms, page tables) ahead of waiting for it.
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
from workers.kernels.kv_store import store_latent, store_window_row
from workers.kernels.launch import EARLY_TOKENS, pdl_options
from workers.kernels.mhc import TILE_CHANNELS, HyperConnection, Mixed
from workers.kernels.mhc_gates import COMB_TOKENS, finish_comb, write_gates

NUM_WARPS = tl.constexpr(WARPS)


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
    mix_base,
    mix_scale,
    mix_sums,
    post,
    comb,
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
    NOPE: tl.constexpr,
    OUT_ROW: tl.constexpr,
    WINDOW_STRIDE: tl.constexpr,
    ITERS: tl.constexpr,  # steps of Sinkhorn, 0: nothing was left open
    COMB_EPS: tl.constexpr,
    MIX_CHANNELS: tl.constexpr,  # of mHC's streams, whose gates are still to be made; 0: they are there
    MIX_TILES: tl.constexpr,
    NORM_EPS: tl.constexpr,
    RATIO: tl.constexpr,
    ROW: tl.constexpr,
    STRIDE: tl.constexpr,
    INDEX_STRIDE: tl.constexpr,
    DI: tl.constexpr,
    WIDTH: tl.constexpr,
    HW: tl.constexpr,
    WIDEN: tl.constexpr,
    FIRST: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (roles, T): latent, window row, matrices of mHC, then main and indexer's compressor (C4) or HD / WIDTH parts
    of C128's; those from FIRST on. EARLY: the launch behind streams weights, and may start at once (roles signal again,
    to no effect)."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    HD: tl.constexpr = NOPE + 64
    ENTRY: tl.constexpr = (STRIDE, HD, 64, False, HW)
    role = tl.program_id(0) + FIRST
    token = tl.program_id(1)
    row = out_fp8 + token.to(tl.int64) * OUT_ROW
    step = (positions, slots, full_pages, page_columns)
    tensors = (state, entries, ape, norm)
    if role == 0:
        store_latent(row, q_norm, latent, token, eps, LATENT, WIDEN, PDL)
    elif role == 1:
        position = tl.load(positions + token)
        pages = window_pages + tl.load(sequence_of_token + token).to(tl.int64) * window_columns
        pool = (window_codes, window_words)
        row += LATENT
        store_window_row(row, kv_norm, rope_table, position, pages, pool, eps, NOPE, WINDOW_STRIDE, HW, WIDEN, PDL)
    elif role == 2:
        if MIX_CHANNELS > 0:  # of sums that are older than the launch before, which signals after its own wait
            SIZES: tl.constexpr = (MIX_CHANNELS, MIX_TILES, NUM_WARPS, COMB_EPS, NORM_EPS)
            write_gates((mix_base, mix_scale), mix_sums, post, comb, 0, SIZES, True, ITERS, False)
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()  # nobody waits for these matrices
        if (ITERS > 0) & (MIX_CHANNELS == 0) & (token * COMB_TOKENS < tl.num_programs(1)):
            finish_comb(comb, token * COMB_TOKENS, tl.num_programs(1), COMB_TOKENS, ITERS, COMB_EPS)
    elif RATIO == 128:
        work = (parts, arrived)
        decode_c128_part(token, role - 3, rows, tensors, rope_table, step, work, eps, ROW, WIDTH, ENTRY, PDL)
    elif RATIO == 4:
        if role == 3:
            decode_c4(token, rows, tensors, rope_table, step, eps, ROW, ENTRY, PDL)
        else:
            KEY: tl.constexpr = (INDEX_STRIDE, DI, 64, True, HW)
            index = (index_state, index_entries, index_ape, index_norm)
            decode_c4(token, rows + 4 * HD, index, rope_table, step, eps, ROW, KEY, PDL)


ROLES = 3
"""Programs of every token besides those of its compressors, the latent's among them."""


def store_and_compress(
    out_fp8: Tensor,
    q_norm: Tensor,
    kv_norm: Tensor,
    rope_table: Tensor,
    meta: Any,
    window_pool: Tensor,
    latent: Tensor | None,
    rows: Tensor | None,
    main: CompressorTensors | None,
    index: CompressorTensors | None,
    eps: float,
    *,
    work: C128Work | None = None,
    comb: tuple[Tensor, HyperConnection] | None = None,
    mixed: Mixed | None = None,
    pdl: bool | None = None,
) -> None:
    """Decode: `kv_store.norm_and_store` and `compress_c4` (`index` None: `compress_c128`) of one layer at once.

    Arguments as theirs; `rows` fp32 [T, N2] are the raw rows of the compressors, None (and `main`) for a layer without.
    `latent` None: nobody reads it, and this is not the launch before one that streams. Token b is sequence b's.

    Args:
        work: for C128; allocated here when None.
        comb: fp32 [T, 16] of `mhc.hc_post_pre(finish=False)`, and its constants: finished by the way.
        mixed: of `mhc.hc_sums`, one token's: its `post` and `comb` are made by the way, instead. The launch before must
            signal after its own wait.
    """
    num_tokens, first = out_fp8.shape[0], 1 if latent is None else 0
    if not num_tokens:
        return
    compressors, programs, sizes = _compressors(rows, main, index, rope_table, window_pool)
    scratch = (rope_table, meta.slots)  # read by C128 alone
    if sizes["RATIO"] == 128:
        scratch = work or C128Work.allocate(num_tokens, kv_norm.shape[0], out_fp8.device)
    pages = (meta.full_pages, meta.full_pages.stride(0))
    window = (meta.window_pages, meta.window_pages.shape[1], window_pool, window_pool.view(torch.bfloat16))
    options = pdl_options(out_fp8, pdl)
    gates, mixing = _gates(q_norm, comb, mixed)
    _store_step[ROLES - first + programs, num_tokens](
        *(out_fp8, q_norm, kv_norm, rope_table, meta.positions, meta.sequence_of_token, *window),
        *(out_fp8 if latent is None else latent, eps),
        *gates,
        *(rope_table if rows is None else rows, meta.slots, *pages, *compressors, *scratch),
        LATENT=q_norm.shape[0],
        NOPE=kv_norm.shape[0] - 64,
        OUT_ROW=out_fp8.stride(0),
        WINDOW_STRIDE=window_pool.shape[1],
        **mixing,
        **sizes,
        WIDTH=C128_WIDTH,
        HW=hardware_formats(out_fp8.device),
        WIDEN=not out_fp8.is_cuda,
        FIRST=first,
        EARLY=options["PDL"] and num_tokens <= EARLY_TOKENS and not first,
        num_warps=WARPS,
        **options,
    )


def _gates(
    stand_in: Tensor, comb: tuple[Tensor, HyperConnection] | None, mixed: Mixed | None
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Operands from `mix_base` to `comb`, and constants of mHC."""
    sizes = {"MIX_CHANNELS": 0, "MIX_TILES": 0, "NORM_EPS": 0.0, "ITERS": 0, "COMB_EPS": 0.0}
    if mixed is not None:
        hc, channels = mixed.hc, mixed.norm_weight.shape[0]
        sizes = {"MIX_CHANNELS": channels, "MIX_TILES": channels // TILE_CHANNELS, "NORM_EPS": hc.norm_eps}
        sizes |= {"ITERS": hc.iters, "COMB_EPS": hc.eps}
        return (hc.base, hc.scale, mixed.work, mixed.post, mixed.comb), sizes
    if comb is None:
        return (stand_in,) * 5, sizes
    return (*(stand_in,) * 4, comb[0]), sizes | {"ITERS": comb[1].iters, "COMB_EPS": comb[1].eps}


def _compressors(
    rows: Tensor | None,
    main: CompressorTensors | None,
    index: CompressorTensors | None,
    floats: Tensor,
    codes: Tensor,
) -> tuple[tuple[Tensor, ...], int, dict[str, int]]:
    """Operands from `state` to `index_norm`, programs of a token, sizes. `floats`, `codes`: stand-ins."""
    if rows is None or main is None:
        absent = (floats, codes, floats, floats)
        return absent * 2, 0, {"RATIO": 0, "ROW": 0, "STRIDE": 0, "INDEX_STRIDE": 0, "DI": 0}
    second = main if index is None else index
    sizes = {
        "RATIO": 128 if index is None else 4,
        "ROW": rows.stride(0),
        "STRIDE": main.entries.stride(0),
        "INDEX_STRIDE": second.entries.stride(0),
        "DI": second.norm.shape[0],
    }
    programs = main.norm.shape[0] // C128_WIDTH if index is None else 2
    return (*pointers(main), *pointers(second)), programs, sizes


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations for V4-Flash, for `tests/workers/kernels/compiling.py`."""
    floats = ("q_norm", "kv_norm", "rope_table", "rows", "state", "ape", "norm", "index_state", "index_ape", "parts")
    gates = ("mix_base", "mix_scale", "mix_sums", "post", "comb")
    kinds = dict.fromkeys((*floats, "index_norm", *gates), "*fp32") | {"eps": "fp32"}
    kinds |= dict.fromkeys(("out_fp8", "window_words", "latent"), "*bf16")
    kinds |= dict.fromkeys(("positions", "sequence_of_token", "window_pages", "slots", "full_pages", "arrived"), "*i32")
    kinds |= dict.fromkeys(("window_columns", "page_columns"), "i32")
    kinds |= dict.fromkeys(("window_codes", "entries", "index_entries"), "*u8")
    static = {"LATENT": 1024, "NOPE": 448, "OUT_ROW": 1536, "WINDOW_STRIDE": 149_760, "ITERS": 20, "COMB_EPS": 1e-6}
    static |= {"MIX_CHANNELS": 4096, "MIX_TILES": 128, "NORM_EPS": 1e-6}
    static |= {"WIDTH": C128_WIDTH, "HW": arch >= 89, "WIDEN": False, "EARLY": arch >= 90, "PDL": arch >= 90}
    static["FIRST"] = 0
    none = static | {"RATIO": 0, "ROW": 0, "STRIDE": 0, "INDEX_STRIDE": 0, "DI": 0}
    c4 = static | {"RATIO": 4, "ROW": 2624, "STRIDE": 37440, "INDEX_STRIDE": 8448, "DI": 128}
    c128 = static | {"RATIO": 128, "ROW": 1024, "STRIDE": 1728, "INDEX_STRIDE": 1728, "DI": 512}
    options = {"num_warps": WARPS, "launch_pdl": arch >= 90}
    later, beside = {"MIX_CHANNELS": 0}, c128 | {"FIRST": 1, "EARLY": False}
    cases = (
        ("store", none),
        ("store_c4", c4),
        ("store_c4 of many", c4 | later),
        ("store_c128", c128),
        ("store_c128 beside", beside),
    )
    return [(name, _store_step, kinds, case, options) for name, case in cases]
