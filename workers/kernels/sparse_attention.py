"""Sparse attention of the tokens of a step over fp8 pages: window rows and compressed entries, sink, inverse rope.

Owns: launch shapes of decode and prefill and the size of the workspace. Does not own: the arithmetic
(`sparse_attention_decode.py`), which entries are selected (indexer), or writing rows (`kv_store.py`).

Decode splits a token's keys over programs where there are few tokens, and gives one program a whole group of chunks
where there are many. Both yield the same bits, so a request's result does not depend on its batch.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from workers.kernels import sparse_attention_decode as device_code
from workers.kernels.formats import hardware_formats
from workers.kernels.kv_rows import NOPE_DIMS, ROPE_DIMS
from workers.kernels.launch import pdl_options
from workers.kernels.tiles import tile

PAGE_TOKENS = 256
MOST_SPLIT_PROGRAMS = 1024
"""Programs of one launch up to which every chunk gets its own: beyond, the GPU is full and parts only cost memory."""


class StepMetadata(Protocol):
    """What attention reads of a step; int32 on the device."""

    positions: Tensor  # [T], -1 = padding
    sequence_of_token: Tensor  # [T]
    full_pages: Tensor  # [B, S], -1 = none
    window_pages: Tensor  # [B, S]


def most_chunks(num_pages: int, num_selected: int, ratio: int, keys: int, window: int = 128) -> int:
    """Chunks of the longest list of keys that page tables of `num_pages` columns allow."""
    entries = {0: 0, 4: num_selected, 128: num_pages * (PAGE_TOKENS // 128)}[ratio]
    return -(-window // keys) + -(-entries // keys)


def head_tiles(heads: int, head_dim: int, heads_of_tile: int) -> int:
    """Programs that share a token's keys: tiles of heads, times two halves of the value columns at head size 512."""
    return -(-heads // heads_of_tile) * (2 if head_dim == 512 else 1)


def decode_split(num_tokens: int, tiles: int, chunks: int) -> tuple[int, int]:
    """(chunks of a program, parts of a token) by shapes alone. One part: no workspace, no second launch."""
    if num_tokens * chunks * tiles <= MOST_SPLIT_PROGRAMS:
        return 1, chunks
    return device_code.GROUP, -(-chunks // device_code.GROUP)


def work_floats(
    num_tokens: int,
    heads: int,
    head_dim: int,
    num_pages: int,
    num_selected: int,
    ratio: int,
    device: torch.device | str | None = None,
    window: int = 128,
) -> int:
    """fp32 elements of workspace that decode of this shape needs."""
    shape = tile("sparse_attention.decode", device)
    chunks = most_chunks(num_pages, num_selected, ratio, shape.k, window)
    _, parts = decode_split(num_tokens, head_tiles(heads, head_dim, shape.n), chunks)
    return num_tokens * heads * parts * (head_dim + 2) if parts > 1 else 0


def sparse_attention(
    q: Tensor,
    meta: StepMetadata,
    window_pool: Tensor,
    entry_pool: Tensor | None,
    selected: Tensor | None,
    ratio: int,
    sink: Tensor,
    rope_table: Tensor,
    out: Tensor,
    work: Tensor | None,
    eps: float,
    *,
    mode: Literal["decode", "prefill"],
    window: int = 128,
    pdl: bool | None = None,
) -> None:
    """Attention results of every token of the step, ready for the grouped output projection.

    Queries are normed per head (no weight) and rotated here; results are rotated back. Padding tokens get zeros.

    Args:
        q: bf16 [T, >= H * hd], rows of any stride: raw rows of wq_b in front.
        window_pool, entry_pool: uint8 [units, stride], one layer of the window pool and of the C4 or C128 pool.
        selected: int32 [T, K] entry rows of each token, valid ones first (C4 only); the first min(K, visible) are
            read, and -1 among them means none.
        ratio: 0 (window only), 4 or 128.
        sink: fp32 [H].
        rope_table: fp32 [P, 64], cos | sin of each position.
        out: bf16 [T, H * hd].
        work: fp32, `work_floats` elements; not used by prefill.
        mode: "decode" gives the same bits in any batch; "prefill" walks a token's keys in one program.

    Raises:
        ValueError: sizes that have no kernel.
    """
    num_tokens, heads = out.shape[0], sink.shape[0]
    head_dim = out.shape[1] // heads
    nope = head_dim - ROPE_DIMS
    if nope not in NOPE_DIMS or rope_table.shape[1] != ROPE_DIMS or ratio not in (0, 4, 128):
        raise ValueError(f"no attention kernel for head size {head_dim}, rope {rope_table.shape[1]}, ratio {ratio}")
    if (ratio == 4) != (selected is not None) or (ratio == 0) != (entry_pool is None):
        raise ValueError(f"ratio {ratio}: entry pool {entry_pool is not None}, selection {selected is not None}")
    if not num_tokens:
        return
    shape = tile(f"sparse_attention.{mode}", q.device)
    entries = window_pool if entry_pool is None else entry_pool
    num_selected = 0 if selected is None else selected.shape[1]
    num_pages = meta.full_pages.shape[1]
    span, parts = 1 << 30, 1
    if mode == "decode":
        chunks = most_chunks(num_pages, num_selected, ratio, shape.k, window)
        span, parts = decode_split(num_tokens, head_tiles(heads, head_dim, shape.n), chunks)
    sizes: dict[str, Any] = {
        "HEADS": heads,
        "NOPE": nope,
        "WINDOW": window,
        "RATIO": ratio,
        "SELECTED": num_selected,
        "KEYS": shape.k,
        "WIDEN": not q.is_cuda,
    }
    device_code.attend[(head_tiles(heads, head_dim, shape.n), num_tokens, parts)](
        q,
        meta.positions,
        meta.sequence_of_token,
        meta.window_pages,
        meta.full_pages,
        num_pages,
        window_pool,
        window_pool.view(torch.bfloat16),
        entries,
        entries.view(torch.bfloat16),
        meta.positions if selected is None else selected,
        sink,
        rope_table,
        out,
        out if work is None else work,
        parts,
        span,
        eps,
        Q_STRIDE=q.stride(0),
        WINDOW_STRIDE=window_pool.shape[1],
        ENTRY_STRIDE=entries.shape[1],
        BH=shape.n,
        DIRECT=parts == 1,
        LOOP=2 if mode == "prefill" else int(span > 1),
        HW=hardware_formats(q.device),
        **sizes,
        **shape.options,
        **pdl_options(q, pdl),
    )
    if parts > 1:
        device_code.combine[(heads, num_tokens)](
            work,
            parts,
            meta.positions,
            sink,
            rope_table,
            out,
            PER_GROUP=device_code.GROUP if span == 1 else 1,
            num_warps=4 if head_dim == 512 else 1,
            **sizes,
            **pdl_options(q, pdl),
        )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash's shapes for the check that every kernel compiles."""
    pointers = dict.fromkeys(
        ("positions", "sequence_of_token", "window_pages", "full_pages", "selected"), "*i32"
    ) | dict.fromkeys(("sink", "rope_table", "work"), "*fp32")
    signature = pointers | {
        "q": "*bf16",
        "num_pages": "i32",
        "window_codes": "*u8",
        "window_words": "*bf16",
        "entry_codes": "*u8",
        "entry_words": "*bf16",
        "out": "*bf16",
        "num_parts": "i32",
        "span": "i32",
        "eps": "fp32",
    }
    launch = {"launch_pdl": True} if arch >= 90 else {}
    sizes = {"HEADS": 64, "NOPE": 448, "WINDOW": 128, "RATIO": 4, "SELECTED": 512, "WIDEN": False, "PDL": arch >= 90}
    strides = {"Q_STRIDE": 40960, "WINDOW_STRIDE": 149_760, "ENTRY_STRIDE": 37_440, "HW": arch >= 89}
    cases = []
    for mode, loop, direct in (("decode", 0, False), ("decode", 1, True), ("prefill", 2, True)):
        shape = tile(f"sparse_attention.{mode}", arch)
        constants = sizes | strides | {"KEYS": shape.k, "BH": shape.n, "LOOP": loop, "DIRECT": direct}
        name = f"{mode}{'' if direct else '_split'}"
        cases.append((name, device_code.attend, signature, constants, shape.options | launch))
    shape = tile("sparse_attention.decode", arch)
    constants = sizes | {"KEYS": shape.k, "PER_GROUP": device_code.GROUP}
    cases.append(("combine", device_code.combine, signature_of(signature, device_code.combine), constants, launch))
    return cases


def signature_of(types: dict[str, str], fn: Any) -> dict[str, str]:
    """The types of the arguments that `fn` has."""
    return {name: kind for name, kind in types.items() if name in fn.arg_names}
