"""Device functions of decode's expert products on sm_90: tiles of weights in a ring of shared memory, Gluon.

Owns: the products of one FP4 tile, from asynchronous copies to fp32 sums (`tile_product`), the slots, and the inputs
(`fill_inputs`). Does not own: FP8 rows (`experts_rows.py`), which program does which tile (`experts_sm90.py`).
A program has `WARPS` warps, one tensor-core group, and two pairs of slots. A turn, two steps of a tile, takes a pair;
copies go on from one tile to the next. They are boxes of the tensor memory accelerator, 512 columns with their scales,
asked for by one thread when the pair's last ones have been read. Copies by all threads, 16 bytes each, stand in the way
of the warps that multiply: memory takes them up only as fast as it answers.
# measured (H200, 2026-11-21, V4-Flash): both launches 41.0, 66.7, 110.7, 295 and 543 us at 1, 2, 4, 16, 64 tokens with
such copies, and 40.2, 64.1, 100.2, 259 and 506 with boxes; boxes alone, without products and the shared expert, 22 and
72 us at 1 and 4 tokens. From the host's memory 0.30 ms an expert, from the other GPU's 186 to 331 GB/s.
Slots of even and of odd steps are two buffers, because the compiler puts a barrier between a read and a later write of
one buffer. Loops are rolled up where they can be: programs at different places do not share the instruction cache
otherwise.

An FP4 tile is `ROWS` rows; a step 256 columns of them. Codes go from shared memory to registers, become e4m3 there
(seven instructions for eight; exact, times 2**-6) and meet inputs in e4m3 with one instruction per 32 columns, the
reach of a weight scale: a sum of 32 products in the tensor core, then `sum * weight scale` four times, then the input
scale of the 128 columns, in fp32. The products of one half step run while the next codes are unpacked.

Of the eight codes in a word the even ones come out first. Inputs therefore stand so, too: place `16 h + b` of every 32
holds column `2 b + h`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from workers.experts.layout import TIER_SHIFT, Tier

WARPS = gl.constexpr(4)
ROWS = gl.constexpr(64)
"""Weight rows of a tile: one instruction's."""

TOKENS = gl.constexpr(8)
"""Inputs of a tile: the fewest columns of the tensor cores. Must not depend on the batch."""

PLACE = gl.constexpr((1 << TIER_SHIFT) - 1)
SHIFT = gl.constexpr(TIER_SHIFT)
SLAB_TIER = gl.constexpr(Tier.SLAB.value)
HOST_TIER = gl.constexpr(Tier.HOST.value)
PEER_TIER = gl.constexpr(Tier.PEER.value)
STEP = gl.constexpr(256)
"""FP4 columns of a step: 128 bytes a row."""

UNSCALE = gl.constexpr(64.0)
"""e2m1 as e4m3 is 2**-6 of its value; the input scales in shared memory make up for it."""

# -- layouts ------------------------------------------------------------------------------------------------------

SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32]))
SUM_ROWS = gl.constexpr(gl.SliceLayout(1, SUMS.value))
SUM_TOKENS = gl.constexpr(gl.SliceLayout(0, SUMS.value))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS.value, 4))
CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 128],
    )
)
"""`[ROWS, 128]` bytes: thread t of a row's four has bytes 4t .. 4t + 3 of every 16, as the tensor cores ask."""
SCALES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 4]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 8]
    )
)
SCALES_OF_TURN = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0], [0, 4], [0, 8]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0]],
        [],
        [64, 16],
    )
)
BOX = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=2))
BOX3 = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=3))
BOX5 = gl.constexpr(gl.NVMMASharedLayout(128, 8, rank=5))
SCALE_BOX3 = gl.constexpr(gl.NVMMASharedLayout(0, 8, rank=3))
SCALE_BOX5 = gl.constexpr(gl.NVMMASharedLayout(0, 8, rank=5))
"""What the accelerator writes: `[ROWS, 128]` codes, `[ROWS, 16]` scales; as tile, by one row, by eight rows."""
FLAT1 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
FLAT2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
FLAT3 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
"""The first of eight inputs stands so in `INPUTS`, too."""
INPUTS = gl.constexpr(gl.NVMMASharedLayout(32, 8, rank=2))
INPUT_WORDS3 = gl.constexpr(gl.NVMMASharedLayout(32, 32, rank=3))


# -- inputs -------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def part_columns(columns):
    """Columns that `fill_inputs` takes at a time: a power of two that divides them, few enough for registers. Also of
    one row: more at a time are more instructions, and those that run once a launch have to be fetched first.
    # measured (H200, 2026-11-21): 8 layers of V4-Flash at one token 1.018 ms with whole rows, 1.011 so."""
    return min(columns & -columns, 1024)


@gluon.jit
def input_buffers(K: gl.constexpr):
    """Shared memory for the e4m3 codes `[K / 32, TOKENS, 32]` and the scales `[K / 128, TOKENS]` of eight inputs."""
    codes = gl.allocate_shared_memory(gl.float8e4nv, [K // 32, TOKENS, 32], INPUTS)
    return codes, gl.allocate_shared_memory(gl.float32, [K // 128, TOKENS], FLAT1)


@gluon.jit
def _four_codes(a, b, c, d):
    """int32 words of the e4m3 codes of four fp32, nearest, ties to even."""
    return gl.inline_asm_elementwise(
        "{ .reg .b16 s, t; cvt.rn.satfinite.e4m3x2.f32 s, $2, $1; cvt.rn.satfinite.e4m3x2.f32 t, $4, $3;"
        " mov.b32 $0, {s, t}; }",
        "=r,r,r,r,r", [a, b, c, d], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _rows_of(x, pair_order, first, last, CHOICES: gl.constexpr, K: gl.constexpr, KC: gl.constexpr, R: gl.constexpr):
    """Pointers `[KC / 8, R, 8]` to the first columns of rows `first` .. `first + R - 1`, at most `last`, of `x`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, R, 8], [32, 1, 1], [WARPS, 1, 1], [2, 1, 0])
    block = gl.arange(0, KC // 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None, None]
    row = gl.arange(0, R, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :, None]
    inside = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, None, :]
    row = gl.minimum(first + row, last)
    if CHOICES > 0:
        row = gl.load(pair_order + row) // CHOICES
    return x + (row.to(gl.int64) * K + (block * 8 + inside))


@gluon.jit
def _quantised(x):
    """Words `[KC / 32, R, 8]` of four codes each, in the order of the tensor cores, and scales `[KC / 128, R]` of fp32
    `x [KC / 8, R, 8]`: one power of two per 128 columns, the bits of `formats.round_fp8_groups`."""
    R: gl.constexpr = x.shape[1]
    BLOCKS: gl.constexpr = x.shape[0]
    x = gl.reshape(x, [BLOCKS // 16, 16, R, 8])
    bits = gl.maximum(gl.max(gl.max(gl.abs(x), 3), 1), 1e-4).to(gl.int32, bitcast=True)
    # 448 is 1.75 * 2**8.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(gl.int32)
    scale = (exponent << 23).to(gl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    x = x * gl.expand_dims(gl.expand_dims(inverse, 1), 3)
    even, odd = gl.split(gl.reshape(x, [BLOCKS, R, 4, 2]))
    e04, e26 = gl.split(gl.reshape(even, [BLOCKS, R, 2, 2]))
    o15, o37 = gl.split(gl.reshape(odd, [BLOCKS, R, 2, 2]))
    e0, e4 = gl.split(e04)
    e2, e6 = gl.split(e26)
    o1, o5 = gl.split(o15)
    o3, o7 = gl.split(o37)
    words = gl.join(_four_codes(e0, e2, e4, e6), _four_codes(o1, o3, o5, o7))
    words = gl.permute(gl.reshape(words, [BLOCKS // 4, 4, R, 2]), [0, 2, 3, 1])
    return gl.reshape(words, [BLOCKS // 4, R, 8]), scale * UNSCALE


@gluon.jit
def fill_inputs(codes, scales, x, pair_order, first, count, CHOICES: gl.constexpr, K: gl.constexpr):
    """Quantise up to eight rows of bf16 `x [., K]` to the buffers of `input_buffers`.

    Row i is token `first + i` (`CHOICES` 0), or the row of pair `pair_order[first + i]`: pair / CHOICES. Rows beyond
    `count` repeat the last one, or of a single one hold anything.
    """
    if count == 1:
        _fill(codes, scales, x, pair_order, first, first, CHOICES, K, part_columns(K), 1)
    else:
        _fill(codes, scales, x, pair_order, first, first + count - 1, CHOICES, K, part_columns(K), TOKENS)


@gluon.jit
def load_coded(row, wanted, K: gl.constexpr):
    """A coded row (`expert_codes.py`; pointer to uint8), if wanted: words `[K / 32, 1, 8]`, scales `[K / 128, 1]`."""
    WORDS: gl.constexpr = gl.BlockedLayout([1, 1, 8], [32, 1, 1], [WARPS, 1, 1], [2, 1, 0])
    FACTORS: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [WARPS, 1], [1, 0])
    block = gl.arange(0, K // 32, layout=gl.SliceLayout(1, gl.SliceLayout(2, WORDS)))[:, None, None]
    word = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, WORDS)))[None, None, :]
    words = gl.load(row.to(gl.pointer_type(gl.int32)) + (block * 8 + word), mask=wanted, other=0)
    group = gl.arange(0, K // 128, layout=gl.SliceLayout(1, FACTORS))[:, None]
    return words, gl.load((row + K).to(gl.pointer_type(gl.float32)) + group, mask=wanted, other=0.0)


@gluon.jit
def fill_coded(codes, scales, row, K: gl.constexpr):
    """A row of `load_coded` to the buffers."""
    _place_row(codes, scales, row[0], row[1] * UNSCALE, 0, K)


@gluon.jit
def _place_row(codes, scales, words, scale, part, K: gl.constexpr):
    """Words `[KC / 32, 1, 8]` and scales `[KC / 128, 1]` of a part of one row to the first of the eight places. What is
    in the others are inputs of results that nobody looks at."""
    KC: gl.constexpr = words.shape[0] * 32
    code_parts = codes._reinterpret(gl.int32, [K // KC, KC // 32, TOKENS, 8], FLAT3)
    code_parts.index(part).slice(0, 1, dim=1).store(words)
    scale_parts = scales._reinterpret(gl.float32, [K // KC, KC // 128, TOKENS], FLAT2)
    scale_parts.index(part).slice(0, 1, dim=1).store(scale)


@gluon.jit
def _fill(
    codes, scales, x, pair_order, first, last,
    CHOICES: gl.constexpr, K: gl.constexpr, KC: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    rows = _rows_of(x, pair_order, first, last, CHOICES, K, KC, R)
    for part in range(K // KC):
        fill_part(codes, scales, gl.load(rows + part * KC), part, K)


@gluon.jit
def fill_part(codes, scales, x, part, K: gl.constexpr):
    """Quantise `x [columns / 8, rows, 8]`, a part of the columns of eight rows, or of one for the first place."""
    KC: gl.constexpr = x.shape[0] * 8
    words, scale = _quantised(x.to(gl.float32))
    if x.shape[1] == 1:
        _place_row(codes, scales, words, scale, part, K)
    else:
        codes._reinterpret(gl.int32, [K // KC, KC // 32, TOKENS, 8], INPUT_WORDS3).index(part).store(words)
        scales._reinterpret(gl.float32, [K // KC, KC // 128, TOKENS], FLAT2).index(part).store(scale)


# -- FP4 tiles ----------------------------------------------------------------------------------------------------


@gluon.jit
def slots_of_steps():
    """Shared memory of the steps: codes of even and of odd ones, scales of both, and the barriers of the pairs."""
    arrivals = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for pair in gl.static_range(2):
        mbarrier.init(arrivals.index(pair), count=1)
    return (
        gl.allocate_shared_memory(gl.uint8, [2, ROWS, 128], BOX),
        gl.allocate_shared_memory(gl.uint8, [2, ROWS, 128], BOX),
        gl.allocate_shared_memory(gl.uint8, [2, ROWS, 16], FLAT2),
        arrivals,
    )


@gluon.jit
def _box(descriptor, place, row, column, arrival, target, BESIDE: gl.constexpr):
    if BESIDE:
        tma.async_copy_global_to_shared(descriptor, [place, row // 8, 0, 0, column], arrival, target)
    else:
        tma.async_copy_global_to_shared(descriptor, [place, row, column], arrival, target)


@gluon.jit
def _boxes(codes, scales, place, row, turn, arrival, targets, BESIDE: gl.constexpr):
    _box(codes, place, row, turn * 256, arrival, targets[0], BESIDE)
    _box(codes, place, row, turn * 256 + 128, arrival, targets[1], BESIDE)
    _box(scales, place, row, turn * 16, arrival, targets[2], BESIDE)


@gluon.jit
def issue(
    slots, pair, experts, code, row, turn, BESIDE: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr
):  # fmt: skip
    """Start the copies of a turn of the tile that begins at `row` of the expert at `code`, to a pair of slots.

    `experts`: descriptors of codes and of scales in the slab, the host bank and the peer's slab (`boxes`).
    BESIDE: rows 0 .. 7 of every 16 of the tile belong to one matrix, 8 .. 15 are the same rows of the other one, so
    that a gate and its up share a thread.
    """
    arrival = slots[3].index(pair)
    mbarrier.expect(arrival, ROWS * (2 * 128 + 16))
    if BESIDE:
        targets = (
            slots[0].index(pair)._reinterpret(gl.uint8, [1, 4, 2, 8, 128], BOX5),
            slots[1].index(pair)._reinterpret(gl.uint8, [1, 4, 2, 8, 128], BOX5),
            slots[2].index(pair)._reinterpret(gl.uint8, [1, 4, 2, 8, 16], SCALE_BOX5),
        )
    else:
        targets = (
            slots[0].index(pair)._reinterpret(gl.uint8, [1, ROWS, 128], BOX3),
            slots[1].index(pair)._reinterpret(gl.uint8, [1, ROWS, 128], BOX3),
            slots[2].index(pair)._reinterpret(gl.uint8, [1, ROWS, 16], SCALE_BOX3),
        )
    place = code & PLACE
    if HOST or PEER:
        tier = code >> SHIFT
        if tier == SLAB_TIER:
            _boxes(experts[0], experts[1], place, row, turn, arrival, targets, BESIDE)
        if HOST and tier == HOST_TIER:
            _boxes(experts[2], experts[3], place, row, turn, arrival, targets, BESIDE)
        if PEER and tier == PEER_TIER:
            _boxes(experts[4], experts[5], place, row, turn, arrival, targets, BESIDE)
    else:
        _boxes(experts[0], experts[1], place, row, turn, arrival, targets, BESIDE)


@gluon.jit
def issue_first(
    slots, pair, experts, code, row, BESIDE: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr
):  # fmt: skip
    """Start the copies of a tile's first two turns; the first one takes `pair`."""
    issue(slots, pair, experts, code, row, 0, BESIDE, HOST, PEER)
    issue(slots, 1 - pair, experts, code, row, 1, BESIDE, HOST, PEER)


@gluon.jit
def _unpacked(codes):
    """e4m3 codes `[ROWS, 128]` of bytes `[ROWS, 64]` of two e2m1, in each 32 columns the even ones first."""
    even, odd = gl.inline_asm_elementwise(
        "{ .reg .b32 t, u; shl.b32 t, $2, 2; shl.b32 u, $2, 4; and.b32 t, t, 0x1c1c1c1c;"
        " lop3.b32 $0, u, 0x80808080, t, 0xea; shr.u32 t, $2, 2; and.b32 t, t, 0x1c1c1c1c;"
        " lop3.b32 $1, $2, 0x80808080, t, 0xea; }",
        "=&r,=r,r", [codes], dtype=(gl.uint8, gl.uint8), is_pure=True, pack=4,
    )  # fmt: skip
    both = gl.permute(gl.reshape(gl.join(even, odd), [ROWS, 4, 16, 2]), [0, 1, 3, 2])
    return gl.reshape(both, [ROWS, 128]).to(gl.float8e4nv, bitcast=True)


@gluon.jit
def _halves(x):
    """`[M, 2 C]` to its two `[M, C]`."""
    M: gl.constexpr = x.shape[0]
    C: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.permute(gl.reshape(x, [M, 2, C]), [0, 2, 1]))


@gluon.jit
def _quarters(x):
    low, high = _halves(x)
    first, second = _halves(low)
    third, fourth = _halves(high)
    return first, second, third, fourth


@gluon.jit
def _column(factor):
    return gl.convert_layout(gl.reshape(factor, [ROWS]), SUM_ROWS, assert_trivial=True)[:, None]


@gluon.jit
def _factors(codes):
    """Four fp32 `[ROWS, 1]` of e8m0 bytes `[ROWS, 4]`: 2 ** (s - 127), for s below 255."""
    bits = gl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $4, 23; and.b32 $0, t, 0x7f800000; shl.b32 t, $4, 15; and.b32 $1, t, 0x7f800000;"
        " shl.b32 t, $4, 7; and.b32 $2, t, 0x7f800000; shr.u32 t, $4, 1; and.b32 $3, t, 0x7f800000; }",
        "=&r,=&r,=&r,=r,r", [codes], dtype=gl.int32, is_pure=True, pack=4,
    )  # fmt: skip
    first, second, third, fourth = _quarters(bits.to(gl.float32, bitcast=True))
    return _column(first), _column(second), _column(third), _column(fourth)


@gluon.jit
def _part(weights, inputs):
    zero = gl.full([ROWS, TOKENS], 0.0, gl.float32, SUMS)
    weights = gl.convert_layout(weights, WEIGHTS, assert_trivial=True)
    return warpgroup_mma(weights, inputs.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def _parts(weights, inputs, block):
    """Starts the products of 128 columns: four sums."""
    first, second, third, fourth = _quarters(weights)
    return (
        _part(first, inputs.index(block * 4)),
        _part(second, inputs.index(block * 4 + 1)),
        _part(third, inputs.index(block * 4 + 2)),
        _part(fourth, inputs.index(block * 4 + 3)),
    )


@gluon.jit
def _finish(total, parts, factors, input_factor):
    """Waits for four sums and adds them to the total, scaled."""
    p0, p1, p2, p3 = warpgroup_mma_wait(0, deps=[parts[0], parts[1], parts[2], parts[3]])
    return total + (p0 * factors[0] + p1 * factors[1] + p2 * factors[2] + p3 * factors[3]) * input_factor


@gluon.jit
def _step(total, parts, factors, input_factor, codes, scales, inputs, input_scales, step):
    """Products of one step. Those of its second half are left running, for the next step to add."""
    low, high = _halves(gl.convert_layout(scales, SCALES, assert_trivial=True))
    first, second = _halves(codes.load(CODES))
    x0 = input_scales.index(step * 2).load(SUM_TOKENS)[None, :]
    x1 = input_scales.index(step * 2 + 1).load(SUM_TOKENS)[None, :]
    weights = _unpacked(first)
    p0, p1, p2, p3 = warpgroup_mma_wait(0, deps=[parts[0], parts[1], parts[2], parts[3]])
    parts = _parts(weights, inputs, step * 2)
    total += (p0 * factors[0] + p1 * factors[1] + p2 * factors[2] + p3 * factors[3]) * input_factor
    weights = _unpacked(second)
    factors = _factors(low)
    p0, p1, p2, p3 = warpgroup_mma_wait(0, deps=[parts[0], parts[1], parts[2], parts[3]])
    parts = _parts(weights, inputs, step * 2 + 1)
    total += (p0 * factors[0] + p1 * factors[1] + p2 * factors[2] + p3 * factors[3]) * x0
    return total, parts, _factors(high), x1


@gluon.jit
def tile_product(
    slots, pair, turns, inputs, input_scales, experts, code, row, next_code, next_row, has_next,
    BESIDE: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """fp32 `[ROWS, TOKENS]`: a tile times the inputs. Its first two turns are on their way; those of the next tile are
    when it ends, if there is one. `pair`: that of the program's first tile; `turns`: those of the tiles before."""
    TURNS: gl.constexpr = K // STEP // 2
    total = gl.full([ROWS, TOKENS], 0.0, gl.float32, SUMS)
    nothing = warpgroup_mma_init(total)
    none = gl.full([ROWS], 0.0, gl.float32, SUM_ROWS)[:, None]
    parts = (nothing, nothing, nothing, nothing)
    factors = (none, none, none, none)
    input_factor = gl.full([TOKENS], 0.0, gl.float32, SUM_TOKENS)[None, :]
    for turn in range(TURNS):
        here = (pair + turns + turn) % 2
        mbarrier.wait(slots[3].index(here), (turns + turn) // 2 & 1)
        low, high = _halves(slots[2].index(here).load(SCALES_OF_TURN))
        total, parts, factors, input_factor = _step(
            total, parts, factors, input_factor, slots[0].index(here), low, inputs, input_scales, turn * 2
        )
        total, parts, factors, input_factor = _step(
            total, parts, factors, input_factor, slots[1].index(here), high, inputs, input_scales, turn * 2 + 1
        )
        last = turn >= TURNS - 2
        if has_next | (turn < TURNS - 2):
            gl.thread_barrier()  # all warps have read this pair
            from_code, from_row = gl.where(last, next_code, code), gl.where(last, next_row, row)
            issue(slots, here, experts, from_code, from_row, (turn + 2) % TURNS, BESIDE, HOST, PEER)
    return _finish(total, parts, factors, input_factor)
