"""FP8 rows of the shared expert in decode's expert products on sm_90: 16 rows at a time, Gluon.

Owns: their products, from asynchronous copies to fp32 sums, in the slots of `experts_tiles.py` and with its inputs. A
step is 512 columns, 128 a warp; copies run `AHEAD` steps ahead and go on from one piece to the next, or to the first
turns of an FP4 tile. Step n has slot n % 4: even ones the first buffer, odd ones the second. The sums are those of
`row_products.py`: 128 columns exact from the tensor cores, then `sum * (weight scale * input scale)` in fp32.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from workers.kernels.experts_tiles import FLAT1, FLAT2, TOKENS, UNSCALE, WARPS, issue

AHEAD = gl.constexpr(3)

WIDE_STEP = gl.constexpr(512)
"""FP8 columns of a step: 128 a warp, of 16 rows."""

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
SWIZZLED3 = gl.constexpr(gl.SwizzledSharedLayout(16, 1, 8, [2, 1, 0]))
INPUTS3 = gl.constexpr(gl.NVMMASharedLayout(32, 8, rank=3))


@gluon.constexpr_function
def padded(count):
    return 1 << (count - 1).bit_length()


@gluon.jit
def issue_row_scales(buffer, scales, other_scales, K: gl.constexpr):
    """Start the copies of two rows of fp32 scales of FP8 blocks; they belong to the next group that is closed.
    `buffer`: the scales of a pair of slots, in which no tile's come before the last step."""
    buffer = buffer._reinterpret(gl.float32, [2, padded(K // 128)], FLAT1)
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
def issue_first_rows(slots, begin, codes, BESIDE: gl.constexpr, K: gl.constexpr):
    """Start the copies of the rows' first `AHEAD` steps, from slot `2 begin` on."""
    for step in gl.static_range(AHEAD):
        issue_rows(slots, step % 2, begin + step // 2, codes + step * WIDE_STEP, BESIDE, K)
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
def _issue_if(wanted, slots, pair, experts, code, row, turn, HOST: gl.constexpr, PEER: gl.constexpr):
    """Start the copies of a turn of a tile of w2, if wanted."""
    if wanted:
        issue(slots, pair, experts, code, row, turn, False, HOST, PEER)


@gluon.jit
def rows_product(
    slots, begin, inputs, input_scales, row_scales, codes, next_rows, has_rows, experts, code, row, has_tile,
    BESIDE: gl.constexpr, K: gl.constexpr, TILES: gl.constexpr, HOST: gl.constexpr, PEER: gl.constexpr,
):  # fmt: skip
    """fp32 `[16, TOKENS]`: FP8 rows times the inputs; `codes`: to the first row. The first steps are on their way from
    slot `2 begin` on; those of `next_rows` are when it ends, if there are any; or, with TILES and `has_tile`, the first
    turns of the tile that begins at `row` of the expert at `code`, from pair `begin + TURNS` on.
    """
    TURNS: gl.constexpr = K // WIDE_STEP // 2
    total = gl.full([WARPS, 16, TOKENS], 0.0, gl.float32, WIDE_SUMS)
    codes += AHEAD * WIDE_STEP
    for turn in range(TURNS):
        for odd in gl.static_range(2):
            async_copy.wait_group(AHEAD - 1)
            if has_rows | (turn < TURNS - 1 - odd):
                issue_rows(slots, 1 - odd, begin + turn + 1 + odd, codes, BESIDE, K)
            if TILES and odd == 0:
                ends = (turn == TURNS - 1) & (has_rows == 0)
                _issue_if(ends & has_tile, slots, (begin + TURNS) % 2, experts, code, row, 0, HOST, PEER)
            async_copy.commit_group()
            if odd == 0:
                codes = gl.where(turn == TURNS - 2, next_rows, codes + WIDE_STEP)
            else:
                codes += WIDE_STEP
            slot = slots[odd].index((begin + turn) % 2)
            total = _rows_step(total, slot, inputs, input_scales, row_scales, turn * 2 + odd, K)
    if TILES:
        gl.thread_barrier()  # all warps have read the last pair
        ends = has_rows == 0
        _issue_if(ends & has_tile, slots, (begin + TURNS + 1) % 2, experts, code, row, 1, HOST, PEER)
    return gl.sum(total, 0) / UNSCALE
