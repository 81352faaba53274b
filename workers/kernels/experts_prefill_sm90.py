"""Prefill's routed experts on sm_90: FP4 weights times e4m3 activations on FP8 tensor cores, Gluon.

Owns: both products of `experts_prefill.py`, which cuts pairs into tiles, for the sizes of `serves`. Does not own: other
sizes and GPUs (there), the activations' rounding and places (`quantise_rows.py`).

FP8 tensor cores are twice as fast as bf16 ones and activations take half the room. A weight becomes an e4m3 code that
carries its scale relative to the largest of its row: the eight magnitudes of a code fit two registers, a byte each, so
that one permutation of bytes looks up four codes. This is exact for scales down to 2**-11 of the row's largest; codes
under smaller ones count as zero, and are at most 2**-12 of the largest weight that the row can have. The tensor core
sums 128 columns (it keeps few bits, as in `linear_prefill.py`); such a sum times the activations' scale is added in
fp32, and the row's largest scale multiplies the end.

A program of 4 warps has 128 weight rows and 128 pairs (or 64), two programs a multiprocessor. Sums of 64 rows at a time
are in registers beside the totals. Rows of w1 and the same rows of w3 are the two halves of a tile, so that a gate and
its up share a thread. Both operands come by boxes of the tensor memory accelerator, for which the activations stand by
place of the pair: asynchronous copies of 16 bytes from the tokens' rows took 2,894 and 1,453 us instead of 2,645 and
1,366 (# measured: 8,192 tokens of V4-Flash, H200, 2026-11-21), because the fence behind them waits for all of them.

Columns stand in the order in which a thread of the tensor core unpacks them: it has 32 consecutive columns of each 128,
which share a scale. Of every 128, place `32 b + 16 h + 4 t + i` holds column `32 t + 8 b + 2 i + h`.

    shared memory: stages of 128 x 64 bytes of codes and 128 pairs x 128 bytes; all scales of the rows and pairs
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels.experts_tiles import HOST_TIER, PEER_TIER, PLACE, SHIFT, SLAB_TIER
from workers.kernels.quantise_rows import swiglu

HEADER = gl.constexpr(6)
"""`experts_prefill.HEADER`."""

ROWS = gl.constexpr(128)
"""Weight rows of a tile."""

HALF = gl.constexpr(64)
"""Rows of one tensor-core instruction."""

STAGES = gl.constexpr(3)
"""Steps of 128 columns in shared memory; two programs share a multiprocessor's."""

MOST_TOKENS = 128
"""Of a tile: `m` of `experts_prefill.experts` in `tiles.py` must be this."""

NUM_WARPS = 4

# -- layouts ------------------------------------------------------------------------------------------------------

_CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]],
        [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 64],
    )
)
"""`[HALF, 64]` bytes: thread t of a row's four has bytes 16t .. 16t + 15, 32 columns."""
_CODES3 = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [8, 0, 0]],
        [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0]],
        [],
        [64, 4, 16],
    )
)
"""The same as `[HALF, 4, 16]`."""
_SCALES = gl.constexpr(gl.SliceLayout(2, _CODES3.value))
_TOPS = gl.constexpr(gl.SliceLayout(1, _SCALES.value))
_FLAT1 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_FLAT2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_FLAT3 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
_INPUTS = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
_WEIGHTS = gl.constexpr(gl.NVMMASharedLayout(64, 8, rank=2))
_BOX3 = gl.constexpr(gl.NVMMASharedLayout(64, 8, rank=3))
_BOX4 = gl.constexpr(gl.NVMMASharedLayout(64, 8, rank=4))
"""Codes in shared memory: as read, as a box of w2, and as one of w1 and w3."""
_OUT = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))
"""`[HALF, tokens]` as rows of `hidden` and `out` are written: 128 bytes a token."""


@gluon.constexpr_function
def _sums(tokens):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tokens, 32])


@gluon.constexpr_function
def _row_a_thread(columns):
    return gl.BlockedLayout([1, columns], [32, 1], [4, 1], [1, 0])


# -- weights ------------------------------------------------------------------------------------------------------


@gluon.jit
def _unpacked(codes, low, high):
    """e4m3 `[HALF, 128]` of bytes `[HALF, 4, 16]` of two e2m1; `low`, `high` int32: what codes 0..3 and 4..7 become."""
    even, odd = gl.inline_asm_elementwise(
        "{ .reg .b32 s, a, b, t; and.b32 s, $2, 0x77777777; prmt.b32 a, $3, $7, s; shr.u32 s, s, 16;"
        " prmt.b32 b, $3, $7, s; prmt.b32 t, a, b, 0x6420; shl.b32 s, $2, 4; lop3.b32 $0, s, 0x80808080, t, 0xea;"
        " prmt.b32 t, a, b, 0x7531; lop3.b32 $1, $2, 0x80808080, t, 0xea; }",
        "=&r,=r,r,r,r,r,r,r,r,r,r", [codes, low, high], dtype=(gl.uint8, gl.uint8), is_pure=True, pack=4,
    )  # fmt: skip
    both = gl.permute(gl.reshape(gl.join(even, odd), [HALF, 4, 4, 4, 2]), [0, 2, 4, 1, 3])
    return gl.reshape(both, [HALF, 128]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _weights(codes, scales, top, N: gl.constexpr):
    """The operand of 64 rows of `codes [HALF, 64]` and `scales [HALF, 4]` in shared memory; `top`: `_row_scales`."""
    packed = gl.convert_layout(gl.reshape(codes.load(_CODES), [HALF, 4, 16]), _CODES3, assert_trivial=True)
    # 0, 0.5, 1, 1.5 and 2, 3, 4, 6 in e4m3, times 2 ** shift: at most 2**6, and no subnormals down to 2**-5.
    shift = scales.load(_SCALES).to(gl.int32) + top
    low = gl.where(shift < -5, 0, 0x3C383000 + shift * 0x08080800)
    high = gl.where(shift < -5, 0, 0x4C484440 + shift * 0x08080808)
    zero = gl.full([HALF, 4, 16], 0, gl.int32, _CODES3)
    value = _unpacked(packed, gl.expand_dims(low, 2) + zero, gl.expand_dims(high, 2) + zero)
    return gl.convert_layout(value, gl.DotOperandLayout(0, _sums(N), 4), assert_trivial=True)


@gluon.jit
def _row_scales(source, K: gl.constexpr):
    """In shared memory: scales `[K / 128, ROWS, 4]` at pointers `source [ROWS, K / 32]`, and 6 - largest `[ROWS]`."""
    scale = gl.load(source)
    tops = gl.allocate_shared_memory(gl.int32, [ROWS], _FLAT1)
    tops.store(6 - gl.max(scale.to(gl.int32), 1))
    scales = gl.allocate_shared_memory(gl.uint8, [K // 128, ROWS, 4], _FLAT3)
    scales.store(gl.permute(gl.reshape(scale, [ROWS, K // 128, 4]), [1, 0, 2]))
    return scales._reinterpret(gl.uint8, [K // 128, ROWS, 4], _FLAT2), tops


@gluon.jit
def _row_factor(top):
    """fp32 `[HALF, 1]` that undoes the shifts: 2 ** (largest - 127 - 6)."""
    return (gl.maximum(-top, 0) << 23).to(gl.float32, bitcast=True)[:, None]


# -- products -----------------------------------------------------------------------------------------------------


@gluon.jit
def _input_scales(scales, begin, count, K: gl.constexpr, STRIDE: gl.constexpr, N: gl.constexpr):
    """In shared memory: the scales fp32 `[K / 128, N]` of a tile's inputs, which lie `STRIDE` apart."""
    LOAD: gl.constexpr = _row_a_thread(K // 128)
    row = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(1, LOAD)), count - 1) + begin
    group = gl.arange(0, K // 128, layout=gl.SliceLayout(0, LOAD))
    factors = gl.allocate_shared_memory(gl.float32, [K // 128, N], _FLAT2)
    factors.store(gl.permute(gl.load(scales + row.to(gl.int64)[:, None] * STRIDE + group[None, :]), [1, 0]))
    return factors._reinterpret(gl.float32, [K // 128, N], _FLAT1)


@gluon.jit
def _box(descriptor, place, row, column, arrival, target, GATES: gl.constexpr):
    if GATES:
        box = target._reinterpret(gl.uint8, [1, 2, HALF, 64], _BOX4)
        tma.async_copy_global_to_shared(descriptor, [place, 0, row, column], arrival, box)
    else:
        box = target._reinterpret(gl.uint8, [1, ROWS, 64], _BOX3)
        tma.async_copy_global_to_shared(descriptor, [place, row, column], arrival, box)


@gluon.jit
def _issue(
    codes, inputs, arrivals, slot, experts, code, row, x, begin, step,
    GATES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """Start the copies of 128 columns: of the weight rows from `row` on, and of the inputs from `begin` on."""
    arrival, target = arrivals.index(slot), codes.index(slot)
    mbarrier.expect(arrival, ROWS * 64 + N * 128)
    for part in gl.static_range(N // 64):
        box = inputs.index(slot).slice(part * 64, 64, 0)
        tma.async_copy_global_to_shared(x, [begin + part * 64, step * 128], arrival, box)
    place = code & PLACE
    if HOST or PEER:
        tier = code >> SHIFT
        if tier == SLAB_TIER:
            _box(experts[0], place, row, step * 64, arrival, target, GATES)
        if HOST and tier == HOST_TIER:
            _box(experts[1], place, row, step * 64, arrival, target, GATES)
        if PEER and tier == PEER_TIER:
            _box(experts[2], place, row, step * 64, arrival, target, GATES)
    else:
        _box(experts[0], place, row, step * 64, arrival, target, GATES)


@gluon.jit
def _product(
    experts, code, row, scales_at, x, x_scales, begin, count,
    GATES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr, K: gl.constexpr, SCALE_STRIDE: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """Two fp32 `[HALF, N]`: a tile's weight rows times its pairs' inputs.

    `experts`: descriptors of codes in the slab, the host bank and the peer's slab (`boxes`); `code`: where the expert
    is. `scales_at [ROWS, K / 32]`: pointers. `x`: descriptor of the inputs; `x_scales` fp32: rows `SCALE_STRIDE` apart.
    """
    STEPS: gl.constexpr = K // 128
    SUMS: gl.constexpr = _sums(N)
    TOKENS: gl.constexpr = gl.SliceLayout(0, SUMS)
    codes = gl.allocate_shared_memory(gl.uint8, [STAGES, ROWS, 64], _WEIGHTS)
    inputs = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, N, 128], _INPUTS)
    arrivals = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(arrivals.index(slot), count=1)
    for step in gl.static_range(STAGES - 1):
        _issue(codes, inputs, arrivals, step, experts, code, row, x, begin, step, GATES, HOST, PEER, N)
    factors = _input_scales(x_scales, begin, count, K, SCALE_STRIDE, N)
    scales, tops = _row_scales(scales_at, K)
    top0 = gl.expand_dims(tops.slice(0, HALF).load(_TOPS), 1)
    top1 = gl.expand_dims(tops.slice(HALF, HALF).load(_TOPS), 1)
    nothing = gl.zeros([HALF, N], gl.float32, SUMS)
    total0 = nothing
    total1 = nothing
    slot = 0
    phase = 0
    free = STAGES - 1
    for step in range(STEPS):
        gl.thread_barrier()  # all warps are done with the step before
        if step + STAGES - 1 < STEPS:
            _issue(codes, inputs, arrivals, free, experts, code, row, x, begin, step + STAGES - 1, GATES, HOST, PEER, N)
        mbarrier.wait(arrivals.index(slot), phase)
        here, scale, columns = codes.index(slot), scales.index(step), inputs.index(slot).permute((1, 0))
        first = _weights(here.slice(0, HALF, 0), scale.slice(0, HALF, 0), top0, N)
        part = warpgroup_mma(first, columns, nothing, use_acc=False, is_async=True)
        second = _weights(here.slice(HALF, HALF, 0), scale.slice(HALF, HALF, 0), top1, N)
        part = warpgroup_mma_wait(0, deps=[part])
        total0 += part * factors.index(step).load(TOKENS)[None, :]
        part = warpgroup_mma(second, columns, nothing, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=[part])
        total1 += part * factors.index(step).load(TOKENS)[None, :]
        free = slot
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
        phase = gl.where(slot == 0, phase ^ 1, phase)
    total0 *= _row_factor(tops.slice(0, HALF).load(gl.SliceLayout(1, SUMS)))
    total1 *= _row_factor(tops.slice(HALF, HALF).load(gl.SliceLayout(1, SUMS)))
    return total0, total1


@gluon.jit
def _gate_and_up_rows(block, INNER: gl.constexpr, LAYOUT: gl.constexpr):
    """Rows of w1 and w3 as one matrix: 64 of w1, then the same of w3."""
    row = gl.arange(0, ROWS, layout=LAYOUT)
    return block * HALF + row % HALF + row // HALF * INNER


@gluon.jit
def _gate_up_tile(
    experts, code, x, x_scales, routing, hidden, pair_order, slot, block, begin, count, limit,
    D: gl.constexpr, INNER: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """`hidden [begin .. begin + count, 64 columns at block]` of up to N pairs of one expert."""
    LOAD: gl.constexpr = _row_a_thread(D // 32)
    row = _gate_and_up_rows(block, INNER, gl.SliceLayout(1, LOAD))
    scales_at = slot + 3 * (D * INNER // 2) + (row * (D // 32))[:, None]
    scales_at += gl.arange(0, D // 32, layout=gl.SliceLayout(0, LOAD))[None, :]
    gate, up = _product(
        experts, code, block * HALF, scales_at, x, x_scales, begin, count, True, HOST, PEER, D, D // 128, N
    )  # fmt: skip
    pair_at = gl.minimum(gl.arange(0, N, layout=gl.SliceLayout(0, gate.type.layout)), count - 1) + begin
    value = swiglu(gate, up, limit) * gl.load(routing + gl.load(pair_order + pair_at))[None, :]
    value = gl.convert_layout(value.to(gl.bfloat16), _OUT)
    token = gl.arange(0, N, layout=gl.SliceLayout(0, _OUT))
    column = block * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, _OUT))
    target = hidden + (begin + token).to(gl.int64)[None, :] * INNER + column[:, None]
    gl.store(target, value, mask=(token < count)[None, :])


@gluon.jit
def _store_out(total, out, pair_order, row, begin, count, D: gl.constexpr, CHOICES: gl.constexpr, N: gl.constexpr):
    value = gl.convert_layout(total.to(gl.bfloat16), _OUT)
    token = gl.arange(0, N, layout=gl.SliceLayout(0, _OUT))
    pair = gl.load(pair_order + begin + gl.minimum(token, count - 1))
    column = row + gl.arange(0, HALF, layout=gl.SliceLayout(1, _OUT))
    target = out + (pair + pair // CHOICES).to(gl.int64)[None, :] * D + column[:, None]
    gl.store(target, value, mask=(token < count)[None, :])


@gluon.jit
def _down_tile(
    experts, code, x, x_scales, out, pair_order, slot, block, begin, count,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr,
    N: gl.constexpr,
):  # fmt: skip
    """`out [token, choice, ROWS columns at block]` of up to N pairs of one expert."""
    LOAD: gl.constexpr = _row_a_thread(INNER // 32)
    row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOAD))
    scales_at = slot + 3 * (D * INNER // 2) + 2 * (D * INNER // 32) + (row * (INNER // 32))[:, None]
    scales_at += gl.arange(0, INNER // 32, layout=gl.SliceLayout(0, LOAD))[None, :]
    low, high = _product(
        experts, code, block * ROWS, scales_at, x, x_scales, begin, count, False, HOST, PEER, INNER, INNER // 2, N
    )  # fmt: skip
    _store_out(low, out, pair_order, block * ROWS, begin, count, D, CHOICES, N)
    _store_out(high, out, pair_order, block * ROWS + HALF, begin, count, D, CHOICES, N)


@gluon.jit
def _slot_of(code, base, host, peer, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr):
    """Address of an expert's bytes."""
    offset = (code & PLACE).to(gl.int64) * EXPERT_BYTES
    slot = base + offset
    if HOST:
        slot = gl.where((code >> SHIFT) == HOST_TIER, host + offset, slot)
    if PEER:
        slot = gl.where((code >> SHIFT) == PEER_TIER, peer + offset, slot)
    return slot


@gluon.jit
def _tile_of(number, tiles, table):
    """Code of the place of a tile's expert, the first of its pairs, and how many."""
    code = gl.load(table + gl.load(tiles + HEADER + 3 * number))
    return code, gl.load(tiles + HEADER + 1 + 3 * number), gl.load(tiles + HEADER + 2 + 3 * number)


@gluon.jit
def gate_up_kernel(
    x, x_scales, routing, hidden, tiles, pair_order, table, base, host, peer, slab_codes, host_codes, peer_codes,
    limit, D: gl.constexpr, INNER: gl.constexpr, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr,
):  # fmt: skip
    """Grid (most tiles * 2 I / ROWS): 64 rows of w1 and of w3 for one tile. `x`: descriptor of e4m3 rows by place of
    the pair; `x_scales` fp32 `[., D / 128]`, `hidden` bf16 in natural columns."""
    BLOCKS: gl.constexpr = 2 * INNER // ROWS
    number = gl.program_id(0) // BLOCKS
    if number < gl.load(tiles):
        block = gl.program_id(0) % BLOCKS
        code, begin, count = _tile_of(number, tiles, table)
        slot = _slot_of(code, base, host, peer, EXPERT_BYTES, HOST, PEER)
        experts = (slab_codes, host_codes, peer_codes)
        if count > 64:
            _gate_up_tile(
                experts, code, x, x_scales, routing, hidden, pair_order, slot, block, begin, count, limit, D, INNER,
                HOST, PEER, 128,
            )  # fmt: skip
        else:
            _gate_up_tile(
                experts, code, x, x_scales, routing, hidden, pair_order, slot, block, begin, count, limit, D, INNER,
                HOST, PEER, 64,
            )  # fmt: skip


@gluon.jit
def down_kernel(
    hidden, scales, out, tiles, pair_order, table, base, host, peer, slab_codes, host_codes, peer_codes,
    D: gl.constexpr, INNER: gl.constexpr, CHOICES: gl.constexpr, EXPERT_BYTES: gl.constexpr, HOST: gl.constexpr,
    PEER: gl.constexpr,
):  # fmt: skip
    """Grid (most tiles * D / ROWS): 128 rows of w2 for one tile. `hidden`: descriptor of e4m3 rows; `scales` fp32, rows
    I / 2 apart."""
    BLOCKS: gl.constexpr = D // ROWS
    number = gl.program_id(0) // BLOCKS
    if number < gl.load(tiles):
        block = gl.program_id(0) % BLOCKS
        code, begin, count = _tile_of(number, tiles, table)
        slot = _slot_of(code, base, host, peer, EXPERT_BYTES, HOST, PEER)
        experts = (slab_codes, host_codes, peer_codes)
        if count > 64:
            _down_tile(
                experts, code, hidden, scales, out, pair_order, slot, block, begin, count, D, INNER, CHOICES, HOST,
                PEER, 128,
            )  # fmt: skip
        else:
            _down_tile(
                experts, code, hidden, scales, out, pair_order, slot, block, begin, count, D, INNER, CHOICES, HOST,
                PEER, 64,
            )  # fmt: skip


# -- launchers ----------------------------------------------------------------------------------------------------


def serves(device: torch.device, wide: int, inner: int) -> bool:
    """Whether experts of `inner` columns on `wide` inputs are multiplied here: sm_90, powers of two of some size."""
    sizes = all(size in (512, 1024, 2048, 4096) for size in (wide, inner))
    return sizes and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def gate_up(
    x: Tensor, x_scales: Tensor, weights: Tensor, groups: Any, slab: ExpertSlab, hidden: Tensor, tiles: Tensor,
    most_tiles: int, limit: float,
) -> None:  # fmt: skip
    """bf16 `hidden [T, k, I]`, natural columns, unrounded, of `quantise_pairs`' codes `x [T * k, D]` and fp32 `x_scales
    [T * k, D / 128]`, all by place of the pair; the rest as in `experts_prefill.gate_up`."""
    wide, inner = x.shape[1], hidden.shape[2]
    gate_up_kernel[(most_tiles * (2 * inner // ROWS.value),)](
        _rows(x), x_scales, weights, hidden, tiles, groups.pair_order, *_tiers(slab),
        *boxes(slab, wide, inner, gates=True), float(limit), D=wide, INNER=inner, **_constants(wide, inner, slab),
        num_warps=NUM_WARPS,
    )  # fmt: skip


def down(hidden: Tensor, groups: Any, slab: ExpertSlab, out: Tensor, tiles: Tensor, most_tiles: int) -> None:
    """Parts 0..k-1 of `out [T, k + 1, D]` of `hidden` as `quantise_rows.quantise_in_place` leaves it."""
    (choices, inner), wide = hidden.shape[1:], out.shape[2]
    codes, scales = hidden.view(torch.float8_e4m3fn).flatten(0, 1), hidden.view(torch.float32)[..., inner // 4 :]
    down_kernel[(most_tiles * (wide // ROWS.value),)](
        _rows(codes[:, :inner]), scales, out, tiles, groups.pair_order, *_tiers(slab),
        *boxes(slab, wide, inner, gates=False), D=wide, INNER=inner, CHOICES=choices, **_constants(wide, inner, slab),
        num_warps=NUM_WARPS,
    )  # fmt: skip


def _rows(x: Tensor) -> TensorDescriptor:
    """Boxes of 64 rows and 128 columns."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [64, 128], _INPUTS.value)


def boxes(slab: ExpertSlab, wide: int, inner: int, *, gates: bool) -> list[TensorDescriptor]:
    """Descriptors of codes in the slab, the host bank and the peer's slab: 128 rows, 64 bytes.

    Dimensions, `gates`: expert, w1 or w3, row, byte; else: expert, row of w2, byte. A tier that is not there has the
    slab's.
    """
    size, stride = wide * inner // 2, ExpertShape(wide, inner).expert_bytes
    found = []
    for tier in (slab.base, slab.host, slab.peer):
        base = slab.base if tier is None else tier
        experts = base.numel() // stride
        if gates:
            shape, strides = [experts, 2, inner, wide // 2], [stride, size, wide // 2, 1]
            found.append(TensorDescriptor(base, shape, strides, [1, 2, HALF.value, 64], _BOX4.value))
        else:
            shape, strides = [experts, wide, inner // 2], [stride, inner // 2, 1]
            found.append(TensorDescriptor(base[2 * size :], shape, strides, [1, ROWS.value, 64], _BOX3.value))
    return found


def _tiers(slab: ExpertSlab) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    host = slab.base if slab.host is None else slab.host
    return slab.table, slab.base, host, slab.base if slab.peer is None else slab.peer


def _constants(wide: int, inner: int, slab: ExpertSlab) -> dict[str, Any]:
    size = ExpertShape(wide, inner).expert_bytes
    return {"EXPERT_BYTES": size, "HOST": slab.host is not None, "PEER": slab.peer is not None}


def compile_list() -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations of V4-Flash for sm_90: name, function, signature, constants, options."""
    wide, inner = 4096, 2048
    types = dict.fromkeys(("tiles", "pair_order", "table"), "*i32") | dict.fromkeys(("base", "host", "peer"), "*u8")
    types |= dict.fromkeys(("x_scales", "scales", "routing"), "*fp32") | {"limit": "fp32", "out": "*bf16"}
    rows = f"tensordesc<fp8e4nv[64, 128],{_INPUTS.value!r}>"
    cases = []
    for kernel, box, layout in (
        (gate_up_kernel, "1, 2, 64, 64", _BOX4),
        (down_kernel, "1, 128, 64", _BOX3),
    ):
        codes = dict.fromkeys(("slab_codes", "host_codes", "peer_codes"), f"tensordesc<u8[{box}],{layout.value!r}>")
        known = types | codes | {"x": rows, "hidden": rows if kernel is down_kernel else "*bf16"}
        signature = {argument: known[argument] for argument in kernel.arg_names if argument in known}
        for tiers in (False, True):
            constants = {"D": wide, "INNER": inner, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes}
            constants |= {"HOST": tiers, "PEER": tiers} | ({"CHOICES": 6} if kernel is down_kernel else {})
            name = f"sm90_{kernel.fn.__name__}_{'tiers' if tiers else 'resident'}"
            cases.append((name, kernel, signature, constants, {"num_warps": NUM_WARPS}))
    return cases
