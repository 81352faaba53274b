"""Sparse attention of the tokens of a step over fp8 pages: window rows and compressed entries, sink, inverse rope.

Owns: launch shapes of decode and prefill and the size of the workspace. Does not own: the arithmetic
(`sparse_attention_decode.py`, `sparse_attention_prefill.py` and their `_sm90` forms), which entries are selected
(indexer), or writing rows (`kv_store.py`).

Decode splits a token's keys over programs where there are few tokens, and gives one program many or all of them where
there are many; on sm_90 several tokens have a form of their own (`sparse_attention_decode_sm90.py`). All yield the same
bits, so a request's result does not depend on its batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, Protocol

import torch
import triton
from torch import Tensor

from workers.kernels.formats import hardware_formats
from workers.kernels.kv_rows import NOPE_DIMS, ROPE_DIMS
from workers.kernels.launch import EARLY_TOKENS, num_sms, pdl_options
from workers.kernels.sparse_attention_decode import RUN_KEYS, attend_decode, combine
from workers.kernels.sparse_attention_prefill import (
    MARGIN,
    ROWS_OF_PROGRAM,
    attend_prefill,
    expand_rows,
    workspace_rows,
)
from workers.kernels.tiles import Tile, architecture, tile

PAGE_TOKENS = 256
MOST_CHUNK_PROGRAMS = 1024
"""Programs of one launch up to which every chunk gets its own: beyond, the GPU is full and parts only cost memory."""

MOST_RUN_PROGRAMS = 4096
"""The same for runs of chunks."""

ENOUGH_PROGRAMS = 128
"""Programs that fill the GPU when each computes all of a token's keys: from here on keys are not split."""

MOST_PLAIN_PROGRAMS = 480
"""Programs of a chunk each, beyond which the form with explicit layouts is sooner, where there is one.
# measured (H200, 2026-11-21): C4, which has 80 a token: 4 tokens 16.7 us and 18.8, 6 tokens 19.9 and 19.7, 8 tokens
# 27.3 and 21.3; C128 at 4K of context, 20 a token: 8 tokens 9.7 and 16.7."""

MOST_PAIR_PROGRAMS = 128
"""Programs of that form, one a multiprocessor, up to which each has two chunks alone."""


class StepMetadata(Protocol):
    """What attention reads of a step; int32 on the device."""

    positions: Tensor  # [T], -1 = padding
    sequence_of_token: Tensor  # [T]
    full_pages: Tensor  # [B, S], -1 = none
    window_pages: Tensor  # [B, S]
    start: Tensor  # [B], prefill only
    cu_starts: Tensor  # [B + 1], prefill only


class DecodeForm(NamedTuple):
    """How the keys of a decode step's tokens are dealt to programs. The bits are the same for all."""

    explicit: bool
    """Whether the form with explicit layouts computes them."""
    split: int
    """What a part is: 1 a chunk, 2 a run of chunks, 0 all keys; one part needs no workspace and no second launch."""
    programs: int
    """Of a token and its heads."""
    parts: int
    """Of a token."""
    pairs: int = 0
    """The explicit form's programs have so many times two chunks."""
    halves: bool = False
    """Whether the two programs of a token and its heads may exchange halves in place of the second launch."""


def decode_form(
    num_tokens: int,
    heads: int,
    head_dim: int,
    num_pages: int,
    num_selected: int,
    ratio: int,
    device: torch.device | str | None,
    window: int = 128,
) -> DecodeForm:
    """By shapes alone."""
    shape = tile("sparse_attention.decode", device)
    entries = {0: 0, 4: num_selected, 128: num_pages * (PAGE_TOKENS // 128)}[ratio]
    chunks = -(-window // shape.k) + -(-entries // shape.k)
    runs = -(-chunks * shape.k // RUN_KEYS)
    programs = num_tokens * -(-heads // shape.n)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if programs * chunks > MOST_PLAIN_PROGRAMS and explicit_form(place, heads, head_dim, window):
        pairs = -(-chunks // 2)
        if runs > 1 and num_tokens * (heads // 64) * pairs <= MOST_PAIR_PROGRAMS:
            return DecodeForm(True, 1, pairs, chunks, 1)
        halves = runs == 2 and num_tokens * (heads // 64) * runs <= num_sms(place)  # all run at the same time
        return DecodeForm(True, 2 if runs > 1 else 0, runs, runs, min(pairs, RUN_KEYS // (2 * shape.k)), halves)
    if programs * chunks <= MOST_CHUNK_PROGRAMS:
        return DecodeForm(False, 1, chunks, chunks)
    if runs > 1 and programs < ENOUGH_PROGRAMS and programs * runs <= MOST_RUN_PROGRAMS:
        return DecodeForm(False, 2, runs, runs)
    return DecodeForm(False, 0, 1, 1)


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
    form = decode_form(num_tokens, heads, head_dim, num_pages, num_selected, ratio, device, window)
    return num_tokens * heads * form.parts * (head_dim + 2) if form.split else 0


def prefill_work_floats(num_tokens: int, num_sequences: int, num_entries: int, head_dim: int) -> int:
    """fp32 elements of workspace that prefill needs (2 kB a token and entry, for two numbers in one element).

    num_entries: at least the entries of the layer that the last token of each sequence sees, of all together.
    """
    return workspace_rows(num_tokens, num_sequences, num_entries) * head_dim // 2 + num_sequences


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
    arrived: Tensor | None = None,
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
        work: fp32, `work_floats` elements for decode, `prefill_work_floats` for prefill. Prefill may be given None and
            then takes, for the time of the call, what the page tables could need.
        mode: "decode" gives the same bits in any batch; "prefill" walks a token's keys in one program.
        arrived: int32 [T * H], zeros before and behind every launch: where programs of decode wait for each other.
            Without it decode takes two launches where it could take one.

    Raises:
        ValueError: sizes that have no kernel.
    """
    _check_sizes(out, sink, rope_table, entry_pool, selected, ratio)
    if not out.shape[0]:
        return
    entries = window_pool if entry_pool is None else entry_pool
    chosen = meta.positions if selected is None else selected
    constants: dict[str, Any] = {
        "HEADS": sink.shape[0],
        "WINDOW": window,
        "RATIO": ratio,
        "SELECTED": 0 if selected is None else selected.shape[1],
        "WIDEN": not q.is_cuda,
    }
    call = _Call(q, meta, (window_pool, entries), chosen, (sink, rope_table, out), work, arrived, eps, constants, pdl)
    (_decode if mode == "decode" else _prefill)(call)


class _Call(NamedTuple):
    """Arguments of both modes, checked."""

    q: Tensor
    meta: StepMetadata
    pools: tuple[Tensor, Tensor]
    """Window and entries."""
    selected: Tensor
    results: tuple[Tensor, Tensor, Tensor]
    """Sink, rope table, out."""
    work: Tensor | None
    arrived: Tensor | None
    eps: float
    constants: dict[str, Any]
    pdl: bool | None

    @property
    def views(self) -> tuple[Tensor, ...]:
        """Each pool as bytes and as bf16."""
        return tuple(pool.view(dtype) for pool in self.pools for dtype in (torch.uint8, torch.bfloat16))


def _check_sizes(
    out: Tensor, sink: Tensor, rope_table: Tensor, entry_pool: Tensor | None, selected: Tensor | None, ratio: int
) -> None:
    head_dim = out.shape[1] // sink.shape[0]
    if head_dim - ROPE_DIMS not in NOPE_DIMS or rope_table.shape[1] != ROPE_DIMS or ratio not in (0, 4, 128):
        raise ValueError(f"no attention kernel for head size {head_dim}, rope {rope_table.shape[1]}, ratio {ratio}")
    if (ratio == 4) != (selected is not None) or (ratio == 0) != (entry_pool is None):
        raise ValueError(f"ratio {ratio}: entry pool {entry_pool is not None}, selection {selected is not None}")


def _decode(call: _Call) -> None:
    """Parts of every token's keys, then their sum."""
    q, meta, results, constants = call.q, call.meta, call.results, call.constants
    num_tokens, heads, num_pages = results[-1].shape[0], constants["HEADS"], meta.full_pages.shape[1]
    head_dim, window = results[-1].shape[1] // heads, constants["WINDOW"]
    step = (num_tokens, heads, head_dim, num_pages, constants["SELECTED"], constants["RATIO"], q.device, window)
    form, shape, options = decode_form(*step), tile("sparse_attention.decode", q.device), pdl_options(q, call.pdl)
    work = results[-1] if call.work is None else call.work
    arguments = (q, meta.positions, meta.sequence_of_token, meta.window_pages, meta.full_pages, num_pages, *call.views)
    arguments += (call.selected, *results, work, form.parts, call.eps)
    strides = {"Q_STRIDE": q.stride(0), "WINDOW_STRIDE": call.pools[0].shape[1], "ENTRY_STRIDE": call.pools[1].shape[1]}
    layout = {"W": head_dim // 64, "KEYS": shape.k, "RUN": RUN_KEYS // shape.k, "SPLIT": form.split}
    layout["EARLY"] = options["PDL"] and num_tokens <= EARLY_TOKENS
    if form.explicit:
        from workers.kernels.sparse_attention_decode_sm90 import attend

        kept = {name: constants[name] for name in ("HEADS", "WINDOW", "RATIO", "SELECTED")}
        halves = form.halves and call.arrived is not None
        sizes = kept | strides | {"PAIRS": form.pairs, "FINAL": not form.split, "HALVES": halves}
        counters = meta.positions if call.arrived is None else call.arrived
        attend(arguments, counters, num_tokens, form.programs, **sizes, **options)
        if halves:
            return
    else:
        attend_decode[(-(-heads // shape.n), num_tokens, form.programs)](
            *arguments,
            BH=shape.n,
            **_plain_options(shape, head_dim, form.split),
            HW=hardware_formats(q.device),
            **strides,
            **layout,
            **constants,
            **options,
        )
    if form.split:
        combine[(heads, num_tokens)](
            *(work, form.parts, meta.positions, *results),
            MOST=triton.next_power_of_2(form.parts),
            num_warps=4 if head_dim == 512 else 1,
            **layout,
            **constants,
            **options,
        )


def _plain_options(shape: Tile, head_dim: int, split: int) -> dict[str, Any]:
    """A warp for 64 dimensions. A program of all keys holds several chunks' sums and would spill under the limit.
    # measured (H200, 2026-11-21): such programs, 64 tokens of a C4 layer: 139 us with the limit, 130 without.
    """
    shape = dataclasses.replace(shape, registers=shape.registers if split else None)
    return shape.options | {"num_warps": head_dim // 64}


def explicit_form(device: torch.device, heads: int, head_dim: int, window: int) -> bool:
    """Whether there are forms with explicit layouts, of decode and prefill."""
    if device.type != "cuda" or architecture(device) != 90:
        return False
    from workers.kernels.sparse_attention_sm90 import serves

    return serves(heads, head_dim, window)


def _prefill(call: _Call) -> None:
    """Rows to bf16, then the attention of every token."""
    q, meta, results, work, constants = call.q, call.meta, call.results, call.work, call.constants
    num_sequences, num_pages = meta.full_pages.shape
    num_tokens, heads, ratio = results[-1].shape[0], constants["HEADS"], constants["RATIO"]
    head_dim = results[-1].shape[1] // heads
    constants = constants | {"NOPE": head_dim - ROPE_DIMS}
    if work is None:
        num_entries = num_sequences * num_pages * PAGE_TOKENS // ratio if ratio else 0
        floats = prefill_work_floats(num_tokens, num_sequences, num_entries, head_dim)
        work = q.new_empty(floats, dtype=torch.float32)
    bases = work.view(torch.int32)[-num_sequences:]
    rows = work.view(torch.bfloat16)
    window_programs = triton.cdiv(num_tokens + MARGIN, ROWS_OF_PROGRAM)
    entry_programs = triton.cdiv(num_pages * PAGE_TOKENS // ratio, ROWS_OF_PROGRAM) if ratio else 0
    step = (meta.positions, meta.sequence_of_token, meta.cu_starts, meta.start)
    options = pdl_options(q, call.pdl)
    expand_rows[(window_programs + entry_programs, num_sequences)](
        *(rows, bases, *step, num_tokens, meta.window_pages, meta.full_pages, num_pages),
        *call.views,
        window_programs,
        NOPE=constants["NOPE"],
        RATIO=ratio,
        WINDOW_STRIDE=call.pools[0].shape[1],
        ENTRY_STRIDE=call.pools[1].shape[1],
        ROWS=ROWS_OF_PROGRAM,
        HW=hardware_formats(q.device),
        num_warps=8,
        **options,
    )
    arguments = (q, *step, rows, bases, num_sequences, call.selected, *results, call.eps)
    if explicit_form(q.device, heads, head_dim, constants["WINDOW"]):
        from workers.kernels.sparse_attention_sm90 import attend

        kept = {name: constants[name] for name in ("HEADS", "WINDOW", "RATIO", "SELECTED")}
        attend(arguments, num_tokens, Q_STRIDE=q.stride(0), **kept, **options)
        return
    shape = tile("sparse_attention.prefill", q.device)
    attend_prefill[(triton.cdiv(heads, shape.n), num_tokens)](
        *arguments,
        Q_STRIDE=q.stride(0),
        BH=shape.n,
        KEYS=shape.k,
        **constants,
        **shape.options,
        **options,
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash's shapes for the check that every kernel compiles."""
    types = {"eps": "fp32", "q": "*bf16", "out": "*bf16", "rows": "*bf16"}
    types |= dict.fromkeys(("num_pages", "num_parts", "num_sequences", "num_tokens", "window_programs"), "i32")
    types |= dict.fromkeys(("sink", "rope_table", "work"), "*fp32")
    integers = "positions sequence_of_token window_pages full_pages selected cu_starts start bases arrived"
    types |= dict.fromkeys(integers.split(), "*i32")
    for view, kind in (("codes", "*u8"), ("words", "*bf16")):
        types |= {f"window_{view}": kind, f"entry_{view}": kind}
    launch = {"launch_pdl": True} if arch >= 90 else {}
    constants: dict[str, Any] = {"HEADS": 64, "WINDOW": 128, "RATIO": 4, "SELECTED": 512, "WIDEN": False}
    constants |= {"PDL": arch >= 90, "Q_STRIDE": 40_960, "WINDOW_STRIDE": 149_760, "ENTRY_STRIDE": 37_440}
    decode, prefill = tile("sparse_attention.decode", arch), tile("sparse_attention.prefill", arch)
    constants |= {"HW": arch >= 89, "W": 8, "NOPE": 448, "MOST": 32, "RUN": RUN_KEYS // decode.k, "EARLY": arch >= 90}
    cases = [
        *(
            (
                name,
                attend_decode,
                {"BH": decode.n, "KEYS": decode.k, "SPLIT": split},
                _plain_options(decode, 512, split),
            )
            for name, split in (("decode_chunk", 1), ("decode_run", 2), ("decode_all", 0))
        ),
        ("combine", combine, {"KEYS": decode.k, "SPLIT": 1}, {}),
        ("expand_rows", expand_rows, {"ROWS": ROWS_OF_PROGRAM}, {"num_warps": 8}),
        *(
            (f"prefill_c{ratio}", attend_prefill, {"BH": prefill.n, "KEYS": prefill.k, "RATIO": ratio}, prefill.options)
            for ratio in (0, 4, 128)
        ),
    ]
    if arch == 90:
        from workers.kernels.sparse_attention_decode_sm90 import attend_decode_sm90
        from workers.kernels.sparse_attention_sm90 import NUM_WARPS, attend_prefill_sm90

        eight = {"num_warps": NUM_WARPS}
        constants |= {"FINAL": False, "HALVES": False}
        cases += [
            *((f"prefill_c{ratio}_explicit", attend_prefill_sm90, {"RATIO": ratio}, eight) for ratio in (0, 4, 128)),
            ("decode_pair_explicit", attend_decode_sm90, {"PAIRS": 1}, eight),
            ("decode_run_explicit", attend_decode_sm90, {"PAIRS": RUN_KEYS // 64}, eight),
            ("decode_halves_explicit", attend_decode_sm90, {"PAIRS": RUN_KEYS // 64, "HALVES": True}, eight),
            ("decode_window_explicit", attend_decode_sm90, {"PAIRS": 2, "FINAL": True, "RATIO": 0}, eight),
        ]
    return [
        (
            name,
            fn,
            {argument: kind for argument, kind in types.items() if argument in fn.arg_names},
            {argument: value for argument, value in (constants | sizes).items() if argument in fn.arg_names},
            options | launch,
        )
        for name, fn, sizes, options in cases
    ]
