"""Index scores of prefill, and of decode for many tokens, on sm_90: by the tensor memory accelerator, Gluon.

Owns: the scores of `indexer.scores_decode`, bit for bit, and of `indexer.scores_prefill`, from queries that a launch
before has made. Decode of few tokens, other GPUs and other sizes take the plain forms.

A page of keys is one box of 8 KB codes and one of scales. A program has one token and a run of its pages, four of them
on their way, and a multiprocessor has four programs, so that one multiplies while others wait. Codes go from shared
memory to registers, become f16 there and meet the token's 64 queries, which stay in shared memory.

In prefill it is the queries that pass by, a token's in one box, while the codes of one page stay in registers. They are
multiplied as e4m3: twice the rate, half the bytes. Tensor cores add such products with fewer bits than those of f16.
# measured (H200, 2026-11-21): 3.2e-4 of the largest score between the two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from workers.kernels.launch import num_sms, pdl_options

gdc_wait = tl.extra.cuda.gdc_wait
gdc_launch_dependents = tl.extra.cuda.gdc_launch_dependents

HEADS = 64
DIM = 128
PAGE = 64
"""Sizes of the kernel: queries of a token, their dimensions, keys of a page."""

STAGES = 4
"""Pages of a program that are on their way; in prefill, tokens."""

PROGRAMS_PER_SM = 4

PREFILL_TOKENS = 64
"""Tokens that pass by a program's page."""

_HEADS, _DIM, _PAGE = gl.constexpr(HEADS), gl.constexpr(DIM), gl.constexpr(PAGE)
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 16]))
_ROWS = gl.constexpr(gl.SliceLayout(1, _SUMS.value))
_COLUMNS = gl.constexpr(gl.SliceLayout(0, _SUMS.value))
_KEYS = gl.constexpr(gl.DotOperandLayout(0, _SUMS.value, 2))
_SUMS8 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEADS, 32]))
_ROWS8 = gl.constexpr(gl.SliceLayout(1, _SUMS8.value))
_COLUMNS8 = gl.constexpr(gl.SliceLayout(0, _SUMS8.value))
_KEYS8 = gl.constexpr(gl.DotOperandLayout(0, _SUMS8.value, 4))
_LOAD = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
_CODE_BOX = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=3))
_CODES = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
_SCALE_BOX = gl.constexpr(gl.NVMMASharedLayout(0, 32, rank=2))
_SCALES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_QUERY = gl.constexpr(gl.NVMMASharedLayout(128, 16, rank=2))


@gluon.jit
def _issue(keys, scales, page, ring, slot):
    """Start the copies of a page to a slot of the ring: (codes, scales, barriers)."""
    arrival = ring[2].index(slot)
    mbarrier.expect(arrival, _PAGE * (_DIM + 4))
    page = gl.maximum(page, 0)
    codes = ring[0].index(slot)._reinterpret(gl.uint8, [1, _PAGE, _DIM], _CODE_BOX)
    tma.async_copy_global_to_shared(keys, [page, 0, 0], arrival, codes)
    factors = ring[1].index(slot)._reinterpret(gl.float32, [1, _PAGE], _SCALE_BOX)
    tma.async_copy_global_to_shared(scales, [page, 0], arrival, factors)


@gluon.jit
def scores_decode_sm90(
    codes,
    weights,
    positions,
    full_pages,
    page_columns,
    keys,
    scales,
    scores,
    scores_stride,
    STAGES: gl.constexpr,
    PDL: gl.constexpr,
):
    """Grid (splits, T): program i of a token scores its i-th run of pages. codes f16 [T, 64, 128], weights fp32 [T, 64]
    of the launch before; keys and scales: `_boxes`. All that is older than that launch is read before waiting."""
    token = gl.program_id(1)
    split = gl.program_id(0)
    pages = full_pages + token * page_columns
    visible = (gl.load(positions + token) + 1) // 4
    blocks = (visible + _PAGE - 1) // _PAGE
    each = (blocks + gl.num_programs(0) - 1) // gl.num_programs(0)
    first = split * each
    end = gl.minimum(first + each, blocks)
    if first < end:
        ring = (
            gl.allocate_shared_memory(gl.uint8, [STAGES, _PAGE, _DIM], _CODES),
            gl.allocate_shared_memory(gl.float32, [STAGES, _PAGE], _SCALES),
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        )
        for slot in gl.static_range(STAGES):
            mbarrier.init(ring[2].index(slot), count=1)
        for slot in gl.static_range(STAGES):
            if first + slot < end:
                _issue(keys, scales, gl.load(pages + first + slot), ring, slot)
        page = gl.load(pages + gl.minimum(first + STAGES, end - 1))
        if PDL:
            gdc_wait()
        head = gl.arange(0, _HEADS, gl.SliceLayout(1, _LOAD))[:, None]
        query = gl.load(codes + (token * _HEADS + head) * _DIM + gl.arange(0, _DIM, gl.SliceLayout(0, _LOAD))[None, :])
        query = gl.allocate_shared_memory(gl.float16, [_HEADS, _DIM], _QUERY, query)
        weight = gl.load(weights + token * _HEADS + gl.arange(0, _HEADS, _COLUMNS))[None, :]
        fence_async_shared()
        gl.thread_barrier()
        nothing = gl.zeros([_PAGE, _HEADS], gl.float32, _SUMS)
        out = scores + token.to(gl.int64) * scores_stride
        slot, phase = 0, 0
        for block in range(first, end):
            mbarrier.wait(ring[2].index(slot), phase)
            key_scale = ring[1].index(slot).load(_ROWS)
            code = ring[0].index(slot).load(_KEYS)
            gl.thread_barrier()  # all warps have read the slot
            if block + STAGES < end:
                _issue(keys, scales, page, ring, slot)
            page = gl.load(pages + gl.minimum(block + STAGES + 1, end - 1))
            key = code.to(gl.float8e4nv, bitcast=True).to(gl.float16)
            dots = warpgroup_mma(key, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
            dots = warpgroup_mma_wait(0, deps=[dots])
            score = gl.sum(gl.maximum(dots, 0.0) * weight, 1) * key_scale
            entry = block * _PAGE + gl.arange(0, _PAGE, _ROWS)
            gl.store(out + entry, score, mask=entry < visible)
            slot += 1
            if slot == STAGES:
                slot = 0
                phase = phase ^ 1
    if PDL:
        gdc_wait()  # programs without work too
        gdc_launch_dependents()


@gluon.jit
def scores_prefill_sm90(
    codes,
    weights,
    positions,
    sequence_of_token,
    full_pages,
    page_columns,
    keys,
    key_scales,
    scores,
    scores_stride,
    num_tokens,
    STRIDE: gl.constexpr,
    TOKENS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid (pages, ceil(T / TOKENS)). Tokens of one sequence pass by one page of its keys.

    codes, weights, keys: `descriptors` of the queries, u8 [T, 64, 128] and fp32 [T, 64], and of the pool.
    """
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    first_entry = gl.program_id(0) * _PAGE
    first = gl.program_id(1) * TOKENS
    at = gl.arange(0, TOKENS, LANES)
    inside = first + at < num_tokens
    position = gl.load(positions + first + at, mask=inside, other=-1)
    sequences = gl.load(sequence_of_token + first + at, mask=inside, other=-1)
    sees = (position + 1) // 4 > first_entry
    begin = gl.min(gl.where(sees, at, TOKENS), 0)
    if begin < TOKENS:
        held = gl.allocate_shared_memory(gl.uint8, [_PAGE, _DIM], _CODES)
        arrival = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        ring = (
            gl.allocate_shared_memory(gl.uint8, [STAGES, _PAGE, _DIM], _CODES),
            gl.allocate_shared_memory(gl.float32, [STAGES, _PAGE], _SCALES),
            gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        )
        mbarrier.init(arrival, count=1)
        for slot in gl.static_range(STAGES):
            mbarrier.init(ring[2].index(slot), count=1)
        row = gl.arange(0, _PAGE, _ROWS8)
        nothing = gl.zeros([_PAGE, _HEADS], gl.float32, _SUMS8)
        turn = 0
        slot, phase = 0, 0
        while begin < TOKENS:
            sequence = gl.load(sequence_of_token + first + begin)
            end = gl.min(gl.where((at > begin) & ((sequences != sequence) | (position < 0)), at, TOKENS), 0)
            page = gl.maximum(gl.load(full_pages + sequence * page_columns + gl.program_id(0)), 0)
            mbarrier.expect(arrival, _PAGE * _DIM)
            box = held._reinterpret(gl.uint8, [1, _PAGE, _DIM], _CODE_BOX)
            tma.async_copy_global_to_shared(keys, [page, 0, 0], arrival, box)
            for ahead in gl.static_range(STAGES):
                if begin + ahead < end:
                    _issue(codes, weights, first + begin + ahead, ring, (slot + ahead) % STAGES)
            key_scale = gl.load(key_scales + page.to(gl.int64) * (STRIDE // 4) + _PAGE * _DIM // 4 + row)
            position_now = gl.load(positions + first + begin)
            mbarrier.wait(arrival, turn & 1)
            turn += 1
            key = held._reinterpret(gl.float8e4nv, [_PAGE, _DIM], _CODES).load(_KEYS8)
            for token in range(first + begin, first + end):
                mbarrier.wait(ring[2].index(slot), phase)
                query = ring[0].index(slot)._reinterpret(gl.float8e4nv, [_HEADS, _DIM], _CODES)
                dots = warpgroup_mma(key, query.permute((1, 0)), nothing, use_acc=False, is_async=True)
                weight = ring[1].index(slot).load(_COLUMNS8)[None, :]
                visible = (position_now + 1) // 4
                position_now = gl.load(positions + gl.minimum(token + 1, num_tokens - 1))
                dots = warpgroup_mma_wait(0, deps=[dots])
                gl.thread_barrier()  # all warps have read the slot
                if token + STAGES < first + end:
                    _issue(codes, weights, token + STAGES, ring, slot)
                score = gl.sum(gl.maximum(dots, 0.0) * weight, 1) * key_scale
                entry = first_entry + row
                gl.store(scores + token.to(gl.int64) * scores_stride + entry, score, mask=entry < visible)
                slot += 1
                if slot == STAGES:
                    slot = 0
                    phase = phase ^ 1
            gl.thread_barrier()
            begin = gl.min(gl.where(sees & (at >= end), at, TOKENS), 0)


def serves(device: torch.device, heads: int) -> bool:
    """Whether scores of so many heads are made here."""
    return heads == HEADS and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def descriptors(codes: Tensor, scales: Tensor, stride: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Boxes of 64 rows of codes [N, 64, 128] and of their scales [N, 64], N rows `stride` bytes apart.

    codes: uint8, scales: fp32, of which the first dimension counts.
    """
    return (
        TensorDescriptor(codes, [codes.shape[0], PAGE, DIM], [stride, DIM, 1], [1, PAGE, DIM], _CODE_BOX.value),
        TensorDescriptor(scales, [codes.shape[0], PAGE], [scales.stride(0), 1], [1, PAGE], _SCALE_BOX.value),
    )


def _boxes(pool: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Of a layer's indexer keys, uint8 [pages, stride]."""
    return descriptors(pool, pool.view(torch.float32)[:, PAGE * DIM // 4 :], pool.stride(0))


def score_decode(
    codes: Tensor, weights: Tensor, meta: Any, pool: Tensor, scores: Tensor, *, pdl: bool | None = None
) -> None:
    """fp32 scores [T, N] of each token's visible entries. codes, weights: of `index_queries_tile`."""
    num_tokens = scores.shape[0]
    splits = max(1, min(PROGRAMS_PER_SM * num_sms(pool.device) // num_tokens, scores.shape[1] // PAGE))
    scores_decode_sm90[(splits, num_tokens)](
        codes,
        weights,
        meta.positions,
        meta.full_pages,
        meta.full_pages.stride(0),
        *_boxes(pool),
        scores,
        scores.stride(0),
        STAGES=STAGES,
        num_warps=4,
        **pdl_options(pool, pdl),
    )


def score_prefill(
    codes: Tensor, weights: Tensor, positions: Tensor, sequence_of_token: Tensor, full_pages: Tensor, pool: Tensor,
    scores: Tensor,
) -> None:  # fmt: skip
    """fp32 scores [T, N] of the visible entries of T tokens. codes: e4m3 [T', 64, 128], weights: fp32 [T', 64]."""
    num_tokens, columns = scores.shape
    scores_prefill_sm90[(columns // PAGE, -(-num_tokens // PREFILL_TOKENS))](
        *descriptors(codes.view(torch.uint8), weights, codes.stride(0)),
        positions,
        sequence_of_token,
        full_pages,
        full_pages.stride(0),
        _boxes(pool)[0],
        pool.view(torch.float32),
        scores,
        scores.stride(0),
        num_tokens,
        STRIDE=pool.stride(0),
        TOKENS=PREFILL_TOKENS,
        STAGES=STAGES,
        num_warps=4,
    )


def compile_list() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations of V4-Flash for sm_90: name, function, signature, constants, options."""
    types = dict.fromkeys(("positions", "full_pages", "sequence_of_token"), "*i32")
    types |= dict.fromkeys(("weights", "scores", "key_scales"), "*fp32") | {"codes": "*fp16"}
    types |= dict.fromkeys(("page_columns", "scores_stride", "num_tokens"), "i32")
    types["keys"] = f"tensordesc<u8[1, {PAGE}, {DIM}],{_CODE_BOX.value!r}>"
    types["scales"] = f"tensordesc<fp32[1, {PAGE}],{_SCALE_BOX.value!r}>"
    prefill_types = types | {"codes": types["keys"], "weights": types["scales"]}
    decode = {"STAGES": STAGES, "PDL": True}
    prefill = {"STAGES": STAGES, "TOKENS": PREFILL_TOKENS, "STRIDE": 8448}
    cases = (
        ("sm90_scores_decode", scores_decode_sm90, types, decode, {"num_warps": 4, "launch_pdl": True}),
        ("sm90_scores_prefill", scores_prefill_sm90, prefill_types, prefill, {"num_warps": 4}),
    )
    return [
        (name, kernel, {argument: kinds[argument] for argument in kernel.arg_names if argument in kinds}, *rest)
        for name, kernel, kinds, *rest in cases
    ]
