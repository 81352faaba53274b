"""Device functions of decode's expert products on sm_90: tiles of weights in a ring of shared memory, Gluon.

Owns: the products of one tile, from asynchronous copies to fp32 sums, for FP4 rows (`tile_product`) and for FP8 rows
(`rows_step`), and the inputs of both (`fill_inputs`). Does not own: which program does which tile (`experts_sm90.py`).
A program has `WARPS` warps, one tensor-core group, and `SLOTS` slots of a tile's step; copies run `AHEAD` steps ahead
and go on from one tile to the next. Step n has slot n % SLOTS. Slots of even and of odd steps are two buffers, because
the compiler puts a barrier between a read and a later write of one buffer: so a step has one barrier, that of its wait.
Loops are rolled up where they can be: three programs at different places do not share the instruction cache otherwise.

An FP4 tile is `ROWS` rows; a step 256 columns of them. Codes go from shared memory to registers, become e4m3 there
(seven instructions for eight; exact, times 2**-6) and meet inputs in e4m3 with one instruction per 32 columns, the
reach of a weight scale: a sum of 32 products in the tensor core, then `sum * weight scale` four times, then the input
scale of the 128 columns, in fp32. The products of one half step run while the next codes are unpacked.

Of the eight codes in a word the even ones come out first. Inputs therefore stand so, too: place `16 h + b` of every 32
holds column `2 b + h`. The FP8 rows, one warp to 128 columns, take bytes apart in the same order.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait

WARPS = gl.constexpr(4)
ROWS = gl.constexpr(64)
"""Weight rows of a tile: one instruction's."""

TOKENS = gl.constexpr(8)
"""Inputs of a tile: the fewest columns of the tensor cores. Must not depend on the batch."""

SLOTS = gl.constexpr(4)
AHEAD = gl.constexpr(3)
STEP = gl.constexpr(256)
"""FP4 columns of a step: 128 bytes a row."""

WIDE_STEP = gl.constexpr(512)
"""FP8 columns of a step: 128 a warp, of 16 rows."""

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
COPY_CODES = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
COPY_SCALES = gl.constexpr(gl.BlockedLayout([1, 8], [32, 1], [4, 1], [1, 0]))
WIDE_SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))
WIDE_CODES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 8, 0], [0, 0, 32], [0, 0, 64]],
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0]],
        [],
        [4, 16, 128],
    )
)
"""`[WARPS, 16, 128]` bytes: thread t of a row's four has bytes 8t .. 8t + 7 of every 32."""
WIDE_INPUTS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 16], [1, 0, 0], [2, 0, 0]],
        [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[4, 0, 0], [8, 0, 0]],
        [],
        [16, 8, 32],
    )
)
COPY_WIDE = gl.constexpr(gl.BlockedLayout([1, 1, 16], [4, 1, 8], [1, 4, 1], [2, 1, 0]))

SWIZZLED = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [1, 0]))
SWIZZLED3 = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [2, 1, 0]))
FLAT1 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
FLAT2 = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
INPUTS = gl.constexpr(gl.NVMMASharedLayout(32, 8, rank=2))
INPUTS3 = gl.constexpr(gl.NVMMASharedLayout(32, 8, rank=3))
INPUT_WORDS3 = gl.constexpr(gl.NVMMASharedLayout(32, 32, rank=3))


# -- inputs -------------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def part_columns(columns, most):
    """Columns that `fill_inputs` takes at a time: a power of two that divides them, as few as registers ask for."""
    return min(columns & -columns, most)


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
    `count` repeat the last one.
    """
    if count == 1:
        _fill(codes, scales, x, pair_order, first, first, CHOICES, K, part_columns(K, 4096), 1)
    else:
        _fill(codes, scales, x, pair_order, first, first + count - 1, CHOICES, K, part_columns(K, 1024), TOKENS)


@gluon.jit
def _fill(
    codes, scales, x, pair_order, first, last,
    CHOICES: gl.constexpr, K: gl.constexpr, KC: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    code_parts = codes._reinterpret(gl.int32, [K // KC, KC // 32, TOKENS, 8], INPUT_WORDS3)
    scale_parts = scales._reinterpret(gl.float32, [K // KC, KC // 128, TOKENS], FLAT2)
    rows = _rows_of(x, pair_order, first, last, CHOICES, K, KC, R)
    for part in range(K // KC):
        words, scale = _quantised(gl.load(rows + part * KC).to(gl.float32))
        if R == 1:
            words = gl.full([KC // 32, TOKENS, 8], 0, gl.int32, words.type.layout) + words
            scale = gl.full([KC // 128, TOKENS], 0.0, gl.float32, scale.type.layout) + scale
        code_parts.index(part).store(words)
        scale_parts.index(part).store(scale)


# -- FP4 tiles ----------------------------------------------------------------------------------------------------


@gluon.jit
def slots_of_steps():
    """Shared memory of the steps: codes of even and of odd ones, scales of even and of odd ones."""
    return (
        gl.allocate_shared_memory(gl.uint8, [SLOTS // 2, ROWS, 128], SWIZZLED),
        gl.allocate_shared_memory(gl.uint8, [SLOTS // 2, ROWS, 128], SWIZZLED),
        gl.allocate_shared_memory(gl.uint8, [SLOTS // 2, ROWS, 8], FLAT2),
        gl.allocate_shared_memory(gl.uint8, [SLOTS // 2, ROWS, 8], FLAT2),
    )


@gluon.jit
def _tile_rows(rows, BESIDE: gl.constexpr):
    """Rows of a tile. BESIDE > 0: rows 0 .. 7 of every 16 belong to one matrix, 8 .. 15 are the same rows of the one
    that begins BESIDE rows later, so that a gate and its up share a thread."""
    if BESIDE > 0:
        rows = rows // 16 * 8 + rows % 8 + rows // 8 % 2 * BESIDE
    return rows


@gluon.jit
def issue(slots, odd: gl.constexpr, turn, codes, scales, BESIDE: gl.constexpr, K: gl.constexpr):
    """Start the copies of a step, to slot `2 turn + odd`, of a matrix of K columns; the caller closes the group, also
    an empty one. `codes`, `scales`: uint8 pointers to the tile's first row at this step."""
    rows = _tile_rows(gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY_CODES)), BESIDE)[:, None]
    at = rows * (K // 2) + gl.arange(0, 128, layout=gl.SliceLayout(0, COPY_CODES))[None, :]
    async_copy.async_copy_global_to_shared(slots[odd].index(turn % 2), codes + at)
    rows = _tile_rows(gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY_SCALES)), BESIDE)[:, None]
    at = rows * (K // 32) + gl.arange(0, 8, layout=gl.SliceLayout(0, COPY_SCALES))[None, :]
    async_copy.async_copy_global_to_shared(slots[2 + odd].index(turn % 2), scales + at)


@gluon.jit
def issue_first(slots, begin: gl.constexpr, codes, scales, BESIDE: gl.constexpr, K: gl.constexpr):
    """Start the copies of a tile's first `AHEAD` steps, from slot `2 begin` on."""
    for step in gl.static_range(AHEAD):
        issue(slots, step % 2, begin + step // 2, codes + step * 128, scales + step * 8, BESIDE, K)
        async_copy.commit_group()


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
    low, high = _halves(scales.load(SCALES))
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
    slots, begin: gl.constexpr, inputs, input_scales, codes, scales, next_codes, next_scales, has_next,
    BESIDE: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """fp32 `[ROWS, TOKENS]`: the tile whose first row begins at `codes` and `scales` times the inputs. Its first steps
    are on their way, from slot `2 begin` on; those of the next tile are when it ends, if there is one."""
    TURNS: gl.constexpr = K // STEP // 2
    total = gl.full([ROWS, TOKENS], 0.0, gl.float32, SUMS)
    nothing = warpgroup_mma_init(total)
    none = gl.full([ROWS], 0.0, gl.float32, SUM_ROWS)[:, None]
    parts = (nothing, nothing, nothing, nothing)
    factors = (none, none, none, none)
    input_factor = gl.full([TOKENS], 0.0, gl.float32, SUM_TOKENS)[None, :]
    codes += AHEAD * 128
    scales += AHEAD * 8
    for turn in range(TURNS):
        for odd in gl.static_range(2):
            async_copy.wait_group(AHEAD - 1)
            # Step 2 turn + odd + AHEAD; the tile's last steps copy the next one's first.
            if has_next | (turn < TURNS - 1 - odd):
                issue(slots, 1 - odd, begin + turn + 1 + odd, codes, scales, BESIDE, K)
            async_copy.commit_group()
            if odd == 0:
                ends = turn == TURNS - 2
                codes = gl.where(ends, next_codes, codes + 128)
                scales = gl.where(ends, next_scales, scales + 8)
            else:
                codes += 128
                scales += 8
            slot = (begin + turn) % 2
            total, parts, factors, input_factor = _step(
                total, parts, factors, input_factor, slots[odd].index(slot), slots[2 + odd].index(slot), inputs,
                input_scales, turn * 2 + odd,
            )  # fmt: skip
    return _finish(total, parts, factors, input_factor)


# -- FP8 rows -----------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def padded(count):
    return 1 << (count - 1).bit_length()


@gluon.jit
def row_scale_buffer(K: gl.constexpr):
    """Shared memory for the fp32 scales of two rows of FP8 blocks."""
    return gl.allocate_shared_memory(gl.float32, [2, padded(K // 128)], FLAT1)


@gluon.jit
def issue_row_scales(buffer, scales, other_scales, K: gl.constexpr):
    """Start the copies of both rows of scales; they belong to the next group that is closed."""
    at = gl.arange(0, padded(K // 128), layout=gl.BlockedLayout([4], [32], [WARPS], [0]))
    async_copy.async_copy_global_to_shared(buffer.index(0), scales + at, mask=at < K // 128)
    async_copy.async_copy_global_to_shared(buffer.index(1), other_scales + at, mask=at < K // 128)


@gluon.jit
def issue_rows(slots, odd: gl.constexpr, turn, codes, BESIDE: gl.constexpr, K: gl.constexpr):
    """Start the copies of a step of 16 FP8 rows from `codes` on, or of eight there and the eight BESIDE rows later."""
    INNERMOST: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, COPY_WIDE))
    block = gl.arange(0, WARPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY_WIDE)))[:, None, None]
    rows = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, COPY_WIDE)))[None, :, None]
    if BESIDE > 0:
        rows = rows % 8 + rows // 8 * BESIDE
    at = rows * K + block * 128 + gl.arange(0, 128, layout=INNERMOST)[None, None, :]
    slot = slots[odd].index(turn % 2)._reinterpret(gl.uint8, [WARPS, 16, 128], SWIZZLED3)
    async_copy.async_copy_global_to_shared(slot, codes + at)


@gluon.jit
def issue_first_rows(slots, codes, BESIDE: gl.constexpr, K: gl.constexpr):
    """Start the copies of the rows' first `AHEAD` steps, from slot 0 on."""
    for step in gl.static_range(AHEAD):
        issue_rows(slots, step % 2, step // 2, codes + step * WIDE_STEP, BESIDE, K)
        async_copy.commit_group()


@gluon.jit
def _rows_step(total, codes, inputs, input_scales, row_scales, step, K: gl.constexpr):
    """Adds one step to fp32 `total [WARPS, 16, TOKENS]`; sums of 128 columns come exact from the tensor cores."""
    STEPS: gl.constexpr = K // WIDE_STEP
    BLOCK: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, WIDE_SUMS))
    weights = gl.reshape(codes._reinterpret(gl.uint8, [WARPS, 16, 128], SWIZZLED3).load(WIDE_CODES), [4, 16, 4, 16, 2])
    weights = gl.reshape(gl.permute(weights, [0, 1, 2, 4, 3]), [WARPS, 16, 128])
    weights = weights.to(gl.float8e4nv, bitcast=True).to(gl.float16)
    weights = gl.convert_layout(weights, gl.DotOperandLayout(0, WIDE_SUMS, 4), assert_trivial=True)
    x = inputs._reinterpret(gl.float8e4nv, [STEPS, 4 * WARPS, TOKENS, 32], INPUTS3).index(step).load(WIDE_INPUTS)
    x = gl.reshape(gl.permute(gl.reshape(x, [WARPS, 4, TOKENS, 32]), [0, 1, 3, 2]), [WARPS, 128, TOKENS])
    x = gl.convert_layout(x.to(gl.float16), gl.DotOperandLayout(1, WIDE_SUMS, 4), assert_trivial=True)
    part = mma_v2(weights, x, gl.full([WARPS, 16, TOKENS], 0.0, gl.float32, WIDE_SUMS))
    scales = row_scales._reinterpret(gl.float32, [2 * padded(K // 128) // WARPS, WARPS], FLAT1)
    low = scales.index(step).load(BLOCK)[:, None, None]
    high = scales.index(padded(K // 128) // WARPS + step).load(BLOCK)[:, None, None]
    first = (gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, WIDE_SUMS))) < 8)[None, :, None]
    input_factor = input_scales._reinterpret(gl.float32, [STEPS, WARPS, TOKENS], FLAT2).index(step)
    input_factor = gl.expand_dims(input_factor.load(gl.SliceLayout(1, WIDE_SUMS)), 1)
    return total + part * (gl.where(first, low, high) * input_factor)


@gluon.jit
def rows_product(
    slots, inputs, input_scales, row_scales, codes, next_codes, next_scales, has_next,
    BESIDE: gl.constexpr, K: gl.constexpr, NEXT: gl.constexpr,
):  # fmt: skip
    """fp32 `[16, TOKENS]`: FP8 rows times the inputs; `codes`: to the first row. The first steps are on their way from
    slot 0 on. NEXT: leaves those of the FP4 tile `next_codes` on their way, if there is one."""
    TURNS: gl.constexpr = K // WIDE_STEP // 2
    total = gl.full([WARPS, 16, TOKENS], 0.0, gl.float32, WIDE_SUMS)
    codes += AHEAD * WIDE_STEP
    for turn in range(TURNS):
        for odd in gl.static_range(2):
            async_copy.wait_group(AHEAD - 1)
            if turn < TURNS - 1 - odd:
                issue_rows(slots, 1 - odd, turn + 1 + odd, codes, BESIDE, K)
            elif NEXT and has_next:
                issue(slots, 1 - odd, turn + 1 + odd, next_codes, next_scales, 0, K)
                next_codes += 128
                next_scales += 8
            async_copy.commit_group()
            codes += WIDE_STEP
            slot = slots[odd].index(turn % 2)
            total = _rows_step(total, slot, inputs, input_scales, row_scales, turn * 2 + odd, K)
    return gl.sum(total, 0) / UNSCALE
