"""Decode linears whose weights are on their way before the launch waits: the form for sm_90 and later, in Gluon.

Weights are older than the kernels before, so a program starts the copies of its first steps, 64 to 96 KB, and only then
executes `gdc_wait` and reads activations. Behind a kernel that signals early (`launch.py`), memory is busy while small
kernels run, and the tail of one product overlaps the start of the next.

Programs walk several tiles of rows, so that copies never stop, and fill the GPU: one or two a multiprocessor, as shared
memory admits. (The GPU places the programs of an early launch as many on a multiprocessor as fit.) The ring of slots in
shared memory is filled step by step, over the ends of tiles. A warp holds one block of 128 columns of a slot; the sums
and their order are those of `row_products.py`, and so are the bits.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mma_v2

from workers.kernels.launch import L2_LINE_BYTES, num_sms, prefetch_l2
from workers.kernels.linear_inputs import hold, hold_words, norm_weights, operand, room
from workers.kernels.mhc import TILE_CHANNELS, Mixed
from workers.kernels.mhc_stream import mix_factors
from workers.kernels.tiles import Tile, architecture, tile

WARPS = 8

NORM_LINE = gl.constexpr(L2_LINE_BYTES // 4)

Signal = Literal["first", "waited", "last"]
"""When a launch lets the next one start: first of all, after its own wait, or when its sums are done."""

SHORT = 1536
"""Weights up to this K have four partial sums (`linear_decode`), and room for the activations of `MOST_TOKENS`."""

MOST_TOKENS = 64
"""Of one program; their activations of all columns stay in shared memory."""

ARCHITECTURES = (90, 100)
"""With PDL and shared memory for the ring."""

H200_SMS = 132
"""Multiprocessors, where kernels are compiled without a GPU."""

SHARED_BYTES, PROGRAM_BYTES, SYSTEM_BYTES = 233_472, 232_448, 1_024
"""Shared memory of a multiprocessor, the most of one program, and what the system adds to each (CUDA programming guide,
compute capability 9.0)."""

MOST_TILES = 8
"""Of a program, as far as shared memory for their scales is planned."""


@gluon.jit
def _copy(slot, source, row, last, column, PITCH: gl.constexpr, K: gl.constexpr):
    """Start copying rows from `row` on to `slot [KW, ROWS, C]`; rows past `last` repeat it.

    Block b of the slot is the C columns from `column + b * PITCH` on.
    """
    KW: gl.constexpr = slot.shape[0]
    VEC: gl.constexpr = slot.shape[2] // 8
    L: gl.constexpr = gl.BlockedLayout([1, 1, VEC], [4, 1, 8], [KW // 4, gl.num_warps() * 4 // KW, 1], [2, 1, 0])
    block = gl.arange(0, KW, gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    rows = row + gl.arange(0, slot.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    lane = gl.arange(0, slot.shape[2], gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    rows = gl.minimum(rows, last)
    async_copy.async_copy_global_to_shared(slot, source + rows * K + (column + block * PITCH + lane))


@gluon.jit
def _words_of(slot):
    """A slot of the ring as bf16 `[KW, ROWS, 64]`."""
    L: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    return slot._reinterpret(gl.bfloat16, [slot.shape[0], slot.shape[1], 64], L)


@gluon.jit
def _tile(i, NEIGHBOURS: gl.constexpr):
    """This program's i-th tile: of so many neighbours, or (0) dealt to and fro, for the first tiles are heavier."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    if NEIGHBOURS > 0:
        tile = program * NEIGHBOURS + i
    else:
        tile = i * programs + gl.where(i % 2 == 0, program, programs - 1 - program)
    return tile


@gluon.jit
def _bring(step, ring, weights, walk, SHAPE: gl.constexpr):
    """Start the copies of one step of this program into its slots, as one group; past the last it is empty.

    A step is SUB slots. A tile of FP8 rows has one slot for KW blocks of 128 columns, a tile of bf16 rows two: the
    first and the second halves of the blocks.
    """
    codes, words = weights
    num_tiles, word_tiles = walk
    K: gl.constexpr = SHAPE[0]
    WORD_ROWS: gl.constexpr = SHAPE[1]
    SUB: gl.constexpr = SHAPE[2]
    KW: gl.constexpr = ring.shape[1]
    ROWS: gl.constexpr = ring.shape[2]
    STAGES: gl.constexpr = ring.shape[0] // SUB
    STEPS: gl.constexpr = K // (KW * 128 * SUB)
    WORD_TILES: gl.constexpr = (WORD_ROWS + ROWS - 1) // ROWS
    slot = step % STAGES * SUB
    later = step - word_tiles * (2 * STEPS)
    if later < 0:
        if WORD_ROWS > 0:
            row = _tile(step // (2 * STEPS), SHAPE[3]) * ROWS
            part = step % (2 * STEPS) * SUB
            for j in gl.static_range(SUB):
                column = (part + j) // 2 * (KW * 128) + (part + j) % 2 * 64
                _copy(_words_of(ring.index(slot + j)), words, row, WORD_ROWS - 1, column, 128, K)
    else:
        tile = _tile(word_tiles + later // STEPS, SHAPE[3])
        if tile < num_tiles:
            row = (tile - WORD_TILES) * ROWS
            for j in gl.static_range(SUB):
                column = (later % STEPS * SUB + j) * (KW * 128)
                _copy(ring.index(slot + j), codes, row, row + ROWS, column, 128, K)
    async_copy.commit_group()


@gluon.jit
def _arrived(step, ring, weights, walk, SHAPE: gl.constexpr):
    """First slot of a step whose bytes are here. The slots of the step before are free now, and are filled again."""
    STAGES: gl.constexpr = ring.shape[0] // SHAPE[2]
    async_copy.wait_group(STAGES - 2)
    gl.thread_barrier()
    _bring(step + STAGES - 1, ring, weights, walk, SHAPE)
    return step % STAGES * SHAPE[2]


@gluon.jit
def _row_scales(scales, shared, num_tiles, WORD_TILES: gl.constexpr, ROWS: gl.constexpr, SHAPE: gl.constexpr):
    """Weight scales of this program's tiles into `shared [tiles, places, KW]`; past the last of either, any."""
    KW: gl.constexpr = shared.shape[2]
    K: gl.constexpr = SHAPE[0]
    L: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 1, 32], [1, gl.num_warps(), 1], [2, 1, 0])
    index = gl.arange(0, shared.shape[0], gl.SliceLayout(1, gl.SliceLayout(2, L)))[:, None, None]
    place = gl.arange(0, shared.shape[1], gl.SliceLayout(0, gl.SliceLayout(2, L)))[None, :, None]
    block = gl.arange(0, KW, gl.SliceLayout(0, gl.SliceLayout(1, L)))[None, None, :]
    tile = gl.minimum(gl.maximum(_tile(index, SHAPE[3]) - WORD_TILES, 0), num_tiles - WORD_TILES - 1)
    column = gl.minimum(place * KW + block, K // 128 - 1)
    shared.store(gl.load(scales + tile * ROWS // 128 * (K // 128) + column))


@gluon.jit
def _codes_sums(i, step, ring, held, weights, walk, BT: gl.constexpr, MMA: gl.constexpr, SHAPE: gl.constexpr):
    """fp32 `[KW, ROWS, BT]`: partial sums of a tile of FP8 rows, the program's i-th. `step`: the tile's first."""
    codes, token_scales, row_scales = held
    PLACES: gl.constexpr = codes.shape[0]
    KW: gl.constexpr = codes.shape[1]
    R: gl.constexpr = codes.shape[2]
    ROWS: gl.constexpr = ring.shape[2]
    SUB: gl.constexpr = SHAPE[2]
    S1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    S2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PER_TOKEN: gl.constexpr = gl.SliceLayout(1, MMA)
    PER_BLOCK: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, MMA))
    row_scales = row_scales._reinterpret(gl.float32, [row_scales.shape[0] * PLACES, KW], S1)
    sums = gl.zeros([KW, ROWS, BT], gl.float32, MMA)
    for k in range(SHAPE[0] // (KW * 128 * SUB)):
        slot = _arrived(step + k, ring, weights, walk, SHAPE)
        for j in gl.static_range(SUB):
            place = k * SUB + j
            w = ring.index(slot + j).load(gl.DotOperandLayout(0, MMA, 4))
            w = w.to(gl.float8e4nv, bitcast=True).to(gl.float16)
            value = operand(codes, place, BT, gl.DotOperandLayout(1, MMA, 4)).to(gl.float16)
            factor = row_scales.index(i * PLACES + place).load(PER_BLOCK)[:, None, None]
            if R == 1:
                scale = (
                    token_scales._reinterpret(gl.float32, [PLACES, KW], S1).index(place).load(PER_BLOCK)[:, None, None]
                )
            else:
                scale = token_scales._reinterpret(gl.float32, [PLACES, KW, R], S2).index(place).load(PER_TOKEN)
                scale = gl.expand_dims(scale, 1)
            sums += mma_v2(w, value, gl.zeros([KW, ROWS, BT], gl.float32, MMA)) * (factor * scale)
    return sums


@gluon.jit
def _words_sums(step, ring, held, weights, walk, BT: gl.constexpr, MMA: gl.constexpr, SHAPE: gl.constexpr):
    """As `_codes_sums`, of bf16 rows and activations `held` in bf16."""
    KW: gl.constexpr = ring.shape[1]
    ROWS: gl.constexpr = ring.shape[2]
    SUB: gl.constexpr = SHAPE[2]
    sums = gl.zeros([KW, ROWS, BT], gl.float32, MMA)
    for k in range(SHAPE[0] // (KW * 64 * SUB)):
        slot = _arrived(step + k, ring, weights, walk, SHAPE)
        for j in gl.static_range(SUB):
            value = operand(held, k * SUB + j, BT, gl.DotOperandLayout(1, MMA, 2))
            sums = mma_v2(_words_of(ring.index(slot + j)).load(gl.DotOperandLayout(0, MMA, 2)), value, sums)
    return sums


@gluon.constexpr_function
def _power(size):
    """The power of two from `size` on: blocks have no other sizes."""
    return triton.next_power_of_2(size)


@gluon.constexpr_function
def _phases(tokens):
    """Of the swizzle of partial sums: without it, rows of 64 tokens would all begin in one bank."""
    return min(16, max(1, tokens // 2))


@gluon.jit
def _total(parts, L: gl.constexpr):
    """Partial sums in shared memory to their total, in the order of `row_products.total_of`."""
    p0 = parts.index(0).load(L)
    p1 = parts.index(1).load(L)
    p2 = parts.index(2).load(L)
    p3 = parts.index(3).load(L)
    if parts.shape[0] == 8:
        p0 += parts.index(4).load(L)
        p1 += parts.index(5).load(L)
        p2 += parts.index(6).load(L)
        p3 += parts.index(7).load(L)
    return (p0 + p2) + (p1 + p3)


@gluon.jit
def _store(sums, parts, out, out_stride, begin, end, start, num_tokens):
    """Partial sums `[KW, ROWS, BT]` to rows `begin..end` and tokens from `start` on of `out [T, N]`.

    `parts [KW, ROWS, R]`: shared memory.
    """
    KW: gl.constexpr = sums.shape[0]
    ROWS: gl.constexpr = sums.shape[1]
    BT: gl.constexpr = sums.shape[2]
    if parts.shape[2] == 1:
        L: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        parts._reinterpret(gl.float32, [KW, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])).store(gl.max(sums, 2))
        gl.thread_barrier()
        total = _total(parts._reinterpret(gl.float32, [KW, ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])), L)
        row = begin + gl.arange(0, ROWS, L)
        gl.store(out + start * out_stride + row, total.to(out.dtype.element_ty), mask=row < end)
    else:
        P: gl.constexpr = gl.BlockedLayout([1, 1], [16, 2], [1, gl.num_warps()], [0, 1])
        parts.store(sums)
        gl.thread_barrier()
        ROOM: gl.constexpr = gl.SwizzledSharedLayout(2, 1, _phases(BT), [1, 0])
        total = _total(parts._reinterpret(gl.float32, parts.shape, ROOM), P)
        row = begin + gl.arange(0, ROWS, gl.SliceLayout(1, P))[:, None]
        token = start + gl.arange(0, BT, gl.SliceLayout(0, P))[None, :]
        mask = (row < end) & (token < num_tokens)
        gl.store(out + token * out_stride + row, total.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _stream_kernel(
    x, codes, scales, words, out_codes, out_words, norm_weight, mix_base, mix_scale, mix_sums,
    num_tokens, out_codes_stride, out_words_stride, num_tiles,
    X_STRIDE: gl.constexpr, K: gl.constexpr, WORD_ROWS: gl.constexpr, KW: gl.constexpr, ROWS: gl.constexpr,
    SUB: gl.constexpr, R: gl.constexpr, ROUND: gl.constexpr, TILES: gl.constexpr, GROUP_TILES: gl.constexpr,
    STAGES: gl.constexpr, MIX_TILES: gl.constexpr, EPS: gl.constexpr, NORM_EPS: gl.constexpr,
    NORM: gl.constexpr, SIGNAL: gl.constexpr,
):  # fmt: skip
    """Programs (walker, token tile). Tiles: first those of bf16 rows, then those of FP8 rows; TILES a program at most.

    Rows of group g (`tile // GROUP_TILES`) see the columns of `x` from `g * K` on; 0: there are no groups.
    MIX_TILES: parts of mHC's partial sums, of which, with streams `x [4, K]`, a program makes the token; 0: it is `x`.
    NORM: FP8 rows see `x` after RMS norm.
    """
    if SIGNAL == "first":
        tl.extra.cuda.gdc_launch_dependents()
    STEPS: gl.constexpr = K // (KW * 128 * SUB)
    PLACES: gl.constexpr = _power(K // (KW * 128))
    BT: gl.constexpr = 8 if R == 1 else R
    WORD_TILES: gl.constexpr = (WORD_ROWS + ROWS - 1) // ROWS
    SHAPE: gl.constexpr = (K, WORD_ROWS, SUB, TILES if GROUP_TILES > 0 else 0)
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [KW, gl.num_warps() // KW, 1], [1, 16, 8])
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    SLOT: gl.constexpr = gl.SwizzledSharedLayout(16, 1, 8, [2, 1, 0])
    word_tiles = 0
    for i in gl.static_range(TILES):
        word_tiles += (_tile(i, SHAPE[3]) < WORD_TILES).to(gl.int32)
    walk = (num_tiles, word_tiles)
    weights = (codes, words)
    ring = gl.allocate_shared_memory(gl.uint8, [STAGES * SUB, KW, ROWS, 128], SLOT)
    for step in gl.static_range(STAGES - 1):
        _bring(step, ring, weights, walk, SHAPE)
    row_scales = gl.allocate_shared_memory(gl.float32, [_power(TILES), PLACES, KW], FLAT)
    _row_scales(scales, row_scales, num_tiles, WORD_TILES, ROWS, SHAPE)
    gamma = norm_weights(norm_weight, PLACES, KW, K) if NORM else 0
    if MIX_TILES > 0:
        base = gl.load(mix_base), gl.load(mix_base + 1), gl.load(mix_base + 2), gl.load(mix_base + 3)
        mix_weights = (gl.load(mix_scale),) + base
        line = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        prefetch_l2(norm_weight + gl.minimum(line * NORM_LINE, K - 1))
    tl.extra.cuda.gdc_wait()
    if SIGNAL == "waited":
        tl.extra.cuda.gdc_launch_dependents()
    mixing = ()
    if MIX_TILES > 0:
        mixing = (norm_weight,) + mix_factors(mix_weights, mix_sums, K, MIX_TILES, EPS, NORM_EPS)
    start = gl.program_id(1) * R
    x += start * X_STRIDE
    if GROUP_TILES > 0:
        x += _tile(0, SHAPE[3]) // GROUP_TILES * K
    CODES: gl.constexpr = gl.float8e4nv if ROUND else gl.float16
    held_codes = room(CODES, PLACES, KW, R, 128)
    token_scales = gl.allocate_shared_memory(gl.float32, [PLACES, KW, R], FLAT)
    if word_tiles < TILES:
        hold(x, mixing, gamma, num_tokens - start, held_codes, token_scales, X_STRIDE, K, ROUND, NORM, NORM_EPS)
    if WORD_ROWS > 0:
        held_words = room(gl.bfloat16, 2 * PLACES, KW, R, 64)
        if word_tiles > 0:
            hold_words(x, mixing, num_tokens - start, held_words, X_STRIDE, K)
    held = (held_codes, token_scales, row_scales)
    parts = gl.allocate_shared_memory(gl.float32, [KW, ROWS, R], gl.SwizzledSharedLayout(2, 1, _phases(R), [2, 1, 0]))
    for i in range(TILES):
        tile = _tile(i, SHAPE[3])
        if i < word_tiles:
            if WORD_TILES > 0:
                sums = _words_sums(i * (2 * STEPS), ring, held_words, weights, walk, BT, MMA, SHAPE)
                _store(sums, parts, out_words, out_words_stride, tile * ROWS, WORD_ROWS, start, num_tokens)
        elif tile < num_tiles:
            begin = (tile - WORD_TILES) * ROWS
            total = _codes_sums(i, (word_tiles + i) * STEPS, ring, held, weights, walk, BT, MMA, SHAPE)
            _store(total, parts, out_codes, out_codes_stride, begin, begin + ROWS, start, num_tokens)
    if SIGNAL == "last":
        tl.extra.cuda.gdc_launch_dependents()


def serves(device: torch.device, rows: int, K: int) -> bool:
    """Whether FP8 weights `[rows, K]` can stream: the GPU has room for the ring, slots and tiles are whole."""
    here = device.type == "cuda" and architecture(device) in ARCHITECTURES
    return here and K // 128 % _blocks(K) == 0 and rows % 128 == 0


def streams(x: Tensor, rows: int, K: int) -> bool:
    """Whether `stream_rows` serves the product of `x [T, K]` with FP8 weights `[rows, K]`."""
    return x.stride(-1) == 1 and serves(x.device, rows, K)


def _blocks(K: int) -> int:
    """Blocks of 128 columns in a slot: as many as there are partial sums of FP8 rows."""
    return 4 if K <= SHORT else 8


def stream_rows(
    op: str,
    x: Tensor,
    weight: Any,
    out: Tensor,
    *,
    words: Tensor | None = None,
    out_words: Tensor | None = None,
    groups: int = 0,
    norm: tuple[Tensor, float] | None = None,
    signal: Signal = "last",
    mixed: Mixed | None = None,
    pdl: bool | None = None,
) -> None:
    """`out [T, N]` bf16 = `x [T, K]` times FP8 rows, `out_words [T, M]` fp32 = `x` times bf16 rows `words [M, K]`.

    `op`: row of the tile table. `weight`: a `linear_decode.Weight`. `groups`: the FP8 rows are cut into as many, which
    see K columns each of a wider `x`, as they are (f16). `norm`: weights fp32 [K] and eps of an RMS norm that `x`
    passes on its way to the FP8 rows. `signal`: when the next launch may start (`launch.py`).
    `mixed`: what the row is made of, instead of `x`. One token, or any number where K is at most `SHORT`.
    """
    codes = weight.codes if weight.codes.dtype == torch.uint8 else weight.codes.view(torch.uint8)
    word_rows = 0 if words is None else words.shape[0]
    rows, K = codes.shape
    tiles, programs, constants = plan(op, x.shape[0], rows, K, word_rows, groups, x.device)
    more, out_more = (weight.scales, out) if words is None or out_words is None else (words, out_words)
    weights, eps = norm or (weight.scales, 0.0)
    mixing, sizes = (weights,) * 4, {"MIX_TILES": 0, "EPS": 0.0, "NORM_EPS": eps}
    if mixed is not None:
        hc, x = mixed.hc, mixed.streams
        mixing = (mixed.norm_weight, hc.base, hc.scale, mixed.work)
        sizes = {"MIX_TILES": K // TILE_CHANNELS, "EPS": hc.eps, "NORM_EPS": hc.norm_eps}
    _stream_kernel[(programs, -(-x.shape[0] // constants["R"]))](
        x, codes, weight.scales, more, out, out_more, *mixing, x.shape[0], out.stride(0), out_more.stride(0), tiles,
        X_STRIDE=x.stride(0), ROUND=not groups, NORM=norm is not None, SIGNAL=signal, **constants, **sizes,
        num_warps=WARPS, launch_pdl=pdl is not False,
    )  # fmt: skip


def plan(
    op: str, T: int, rows: int, K: int, word_rows: int, groups: int, device: Any
) -> tuple[int, int, dict[str, Any]]:
    """Tiles, programs and constants that follow from a launch's sizes. `device`: as `tiles.tile` takes it."""
    R = 1 if T == 1 else min(MOST_TOKENS, max(8, triton.next_power_of_2(T)))
    chosen, shared = _fitting(op, R, K, word_rows, groups, device)
    while shared > PROGRAM_BYTES and R > 8:
        R //= 2
        chosen, shared = _fitting(op, R, K, word_rows, groups, device)
    KW = _blocks(K)
    places, sub = K // (KW * 128), chosen.k // (KW * 128)
    if places % sub:
        sub = 1
    sms = H200_SMS if isinstance(device, int) else num_sms(device)
    programs = sms * min(chosen.group, SHARED_BYTES // (shared + SYSTEM_BYTES))
    tiles = -(-word_rows // chosen.n) + rows // chosen.n
    each = -(-tiles // programs)
    if groups:
        each = next(n for n in range(each, tiles + 1) if tiles // groups % n == 0)
        programs = tiles // each
    constants = {"K": K, "WORD_ROWS": word_rows, "KW": KW, "ROWS": chosen.n, "SUB": sub, "R": R, "TILES": each}
    constants["GROUP_TILES"] = tiles // groups if groups else 0
    constants["STAGES"] = chosen.stages * chosen.k // (KW * 128 * sub)
    return tiles, min(tiles, programs), constants


def _fitting(op: str, R: int, K: int, word_rows: int, groups: int, device: Any) -> tuple[Tile, int]:
    """The tile for R tokens, and the shared memory of its program: ring, activations, partial sums, scales."""
    chosen = tile(f"linear_stream.{op}{'' if R == 1 else '_few' if R <= 16 else '_many'}", device)
    KW = _blocks(K)
    columns = KW * 128 * triton.next_power_of_2(K // (KW * 128))
    held = R * columns * (2 if groups else 1) + (R * columns * 2 if word_rows else 0) + R * columns // 32
    scales = MOST_TILES * columns // 32
    return chosen, chosen.stages * chosen.n * chosen.k + held + R * KW * chosen.n * 4 + scales


def stream_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations that V4-Flash needs, and Pro's odd numbers of blocks."""
    signature = {"x": "*bf16", "codes": "*u8", "scales": "*fp32", "words": "*bf16", "out_codes": "*bf16"}
    signature |= dict.fromkeys(("out_words", "norm_weight", "mix_base", "mix_scale", "mix_sums"), "*fp32")
    signature |= dict.fromkeys(("num_tokens", "out_codes_stride", "out_words_stride", "num_tiles"), "i32")
    options = {"num_warps": WARPS, "launch_pdl": True}

    def case(
        name: str, op: str, T: int, rows: int, K: int, word_rows: int = 0, groups: int = 0, mixed: bool = False
    ) -> tuple[Any, ...]:
        constants = plan(op, T, rows, K, word_rows, groups, arch)[2]
        constants |= {"X_STRIDE": K * max(1, groups), "ROUND": not groups, "SIGNAL": "first" if groups else "waited"}
        constants |= {"MIX_TILES": mixed * K // TILE_CHANNELS, "EPS": 1e-6, "NORM_EPS": 1e-6}
        constants["NORM"] = K <= SHORT
        return name, _stream_kernel, signature, constants, options

    return [
        case("project_x streamed", "project", 1, 1536, 4096, 2624),
        case("project_x mixed and streamed", "project", 1, 1536, 4096, 2624, mixed=True),
        case("project_x mixed and streamed, C128", "project", 1, 1536, 4096, 1024, mixed=True),
        case("project_x mixed and streamed, no bf16 rows", "project_less", 1, 1536, 4096, mixed=True),
        case("project_x of Pro mixed and streamed", "project", 1, 2048, 7168, 2624, mixed=True),
        case("grouped_linear streamed", "grouped", 1, 8192, 4096, 0, 8),
        case("linear streamed", "long", 1, 4096, 8192),
        case("linear wide 1 streamed, few rows", "short_less", 1, 8192, 1024),
        *(case(f"linear wide {T} streamed", "short", T, 40960, 1024) for T in (1, 8, 16, 32, 64)),
        *(case(f"linear wide of Pro, {T}, streamed", "short", T, 73728, 1536) for T in (1, 64)),
    ]
