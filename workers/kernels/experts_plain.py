"""Decode's expert products in plain Triton: for every GPU, for any sizes, and for the interpreter.

Owns: the kernels of `expert_gate_up` and `expert_down` where `experts_sm90.py` does not serve. Does not own: their
launches (`experts_decode.py`).

The weights are the large operand of every product, `TOKENS` pairs (token, choice) of one expert the small one, whatever
the batch is: a pair's bits depend on nothing but its own row. An expert's pairs beyond `TOKENS` take further turns. A
program is one warp with 16 rows of weights, which go from memory to registers and from there to the tensor cores: no
shared memory, no barrier. For that, sums run over K in the order in which a warp holds it (`_a_order`), and inputs
stand in expert order: inside each 128 columns, place `32 j + h` holds column `4 h + j`, since a 16-bit word `h` of four
codes gives four operands `j`. (`shared_hidden` between the two launches: place `64 j + h` holds column `2 h + j`.)

A code with its scale is exact in bf16 and so is a fake-quantised input: the sums need no scale. Groups of 128 inner
columns belong to several programs of `gate_up_kernel`; the last of them to finish (a counter, not the order of a sum)
quantises the group for `down_kernel`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.expert_numbers import UNSCALE, dot, fp4_column, fp8_column, scale_factors, slot_address, times
from workers.kernels.experts_stage import stage_down, stage_gate_up
from workers.kernels.formats import e4m3_to_f32, f32_to_e4m3, pow2_reciprocal, pow2_scale_ceil
from workers.kernels.launch import prefetch_l2

TOKENS = 8
"""Pairs of one product: the smallest column count of the tensor cores. Must not depend on the batch."""

AHEAD = tl.constexpr(8)
"""Steps beyond those on their way to registers whose weights are on their way to L2, in groups of four."""

ROWS = 16
"""Weight rows of one program: one tile of the tensor cores."""

OPTIONS = {"num_warps": 1, "num_stages": 1, "maxnreg": 128}
"""One warp, and no pipelining through shared memory: loads run ahead in registers. 16 programs share an SM."""


# -- products -----------------------------------------------------------------------------------------------------
#
# A step is 64 bytes of each of 16 rows: thread t of a row's four loads words 8t .. 8t + 7 at once. The tensor cores
# want words 2t, 2t + 1 of every eight from it, so the words of a step are renumbered: word 8t + 2r + i counts as
# 8r + 2t + i, for weights and inputs alike. Layouts on both sides then agree and nothing moves between threads.


@triton.jit
def _a_order(words):
    """`[M, 32]` words of a step, renumbered."""
    M: tl.constexpr = words.shape[0]
    return tl.reshape(tl.permute(tl.reshape(words, (M, 4, 4, 2)), (0, 2, 1, 3)), (M, 32))


@triton.jit
def _b_order(inputs):
    """`[32, N]` inputs of a step, renumbered."""
    N: tl.constexpr = inputs.shape[1]
    return tl.reshape(tl.permute(tl.reshape(inputs, (4, 4, 2, N)), (1, 0, 2, 3)), (32, N))


@triton.jit
def _step_factors(codes):
    """bf16 `[M, 32]` in `_a_order` of the four e8m0 bytes `[4, M]` of a step: one per thread."""
    M: tl.constexpr = codes.shape[1]
    factor = tl.permute(scale_factors(codes), (1, 0))
    return tl.reshape(tl.broadcast_to(factor[:, None, :, None], (M, 4, 4, 2)), (M, 32))


@triton.jit
def _hold_loads(PACKED: tl.constexpr):
    """Loads before it stay before it: the assembler would delay them until their registers are free, and wait then."""
    if PACKED:
        tl.inline_asm_elementwise(
            "{ bar.warp.sync 0xffffffff; mov.u32 $0, $1; }",
            "=r,r", [tl.full((), 0, tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _to_l2(lines, at, ROW_BYTES: tl.constexpr, PACKED: tl.constexpr):
    """Starts reading 256 bytes of each of 16 rows to L2, from byte `at`, or the last ones; `lines`: uint8 pointers
    `[16, 2]` to the first two lines of the rows."""
    if PACKED:
        prefetch_l2(lines + tl.minimum(at, ROW_BYTES - 256))


@triton.jit
def _fp4_inputs(inputs):
    """The four operands of a step: inputs behind bf16 pointers `[32, N]`."""
    x0, x1 = _b_order(tl.load(inputs)), _b_order(tl.load(inputs + 32))
    x2, x3 = _b_order(tl.load(inputs + 64)), _b_order(tl.load(inputs + 96))
    return x0, x1, x2, x3


@triton.jit
def _fp4_step(total, words, codes, x, PACKED: tl.constexpr):
    """Adds one step of 128 columns."""
    words = _a_order(words)
    factor = _step_factors(codes)
    for j in tl.static_range(4):
        total = dot(times(fp4_column(words, j, PACKED), factor, PACKED), x[j], total, PACKED)
    return total


@triton.jit
def _fp4_product(words, scales, inputs, lines, scale_lines, K: tl.constexpr, PACKED: tl.constexpr, WAIT: tl.constexpr):
    """fp32 `[16, N]`: rows behind `words` (uint16 `[16, 32]`) and `scales` (uint8 `[4, 16]`) times inputs
    behind `inputs` (bf16 `[32, N]`), all pointers at the first step. Four steps are on their way at any time, the first
    ones before the launch's wait if `WAIT`; the `AHEAD` steps after these are on their way to L2."""
    STEPS: tl.constexpr = K // 128
    total = tl.zeros((words.shape[0], inputs.shape[1]), tl.float32)
    if STEPS % 4 == 0:
        w0, s0 = tl.load(words), tl.load(scales)
        w1, s1 = tl.load(words + 32), tl.load(scales + 4)
        w2, s2 = tl.load(words + 64), tl.load(scales + 8)
        w3, s3 = tl.load(words + 96), tl.load(scales + 12)
        for step in tl.static_range(4, 4 + AHEAD, 4):
            _to_l2(lines, step * 64, K // 2, PACKED)
        _to_l2(scale_lines, 0, 256, PACKED)
        if WAIT:
            tl.extra.cuda.gdc_wait()
        last = inputs + 128 * (STEPS - 4)
        x = _fp4_inputs(inputs)
        for i in range(STEPS // 4 - 1):
            words += 128
            scales += 16
            _to_l2(lines, (i * 4 + 4 + AHEAD) * 64, K // 2, PACKED)
            next_x = _fp4_inputs(inputs + 128)
            total = _fp4_step(total, w0, s0, x, PACKED)
            w0, s0 = tl.load(words), tl.load(scales)
            _hold_loads(PACKED)
            x = _fp4_inputs(inputs + 256)
            total = _fp4_step(total, w1, s1, next_x, PACKED)
            w1, s1 = tl.load(words + 32), tl.load(scales + 4)
            _hold_loads(PACKED)
            next_x = _fp4_inputs(inputs + 384)
            total = _fp4_step(total, w2, s2, x, PACKED)
            w2, s2 = tl.load(words + 64), tl.load(scales + 8)
            _hold_loads(PACKED)
            x = _fp4_inputs(inputs + 512)
            total = _fp4_step(total, w3, s3, next_x, PACKED)
            w3, s3 = tl.load(words + 96), tl.load(scales + 12)
            _hold_loads(PACKED)
            inputs += 512
        total = _fp4_step(total, w0, s0, x, PACKED)
        total = _fp4_step(total, w1, s1, _fp4_inputs(last + 128), PACKED)
        total = _fp4_step(total, w2, s2, _fp4_inputs(last + 256), PACKED)
        total = _fp4_step(total, w3, s3, _fp4_inputs(last + 384), PACKED)
    else:
        if WAIT:
            tl.extra.cuda.gdc_wait()
        for step in range(STEPS):
            codes = tl.load(words + 32 * step)
            total = _fp4_step(total, codes, tl.load(scales + 4 * step), _fp4_inputs(inputs + 128 * step), PACKED)
    return total * UNSCALE


@triton.jit
def _fp8_block(total, first, second, scale, inputs, PACKED: tl.constexpr):
    """Adds one block of 128 columns: two steps of e4m3 words, one scale."""
    N: tl.constexpr = inputs.shape[1]
    part = tl.zeros((first.shape[0], N), tl.float32)
    first, second = _a_order(first), _a_order(second)
    for j in tl.static_range(2):
        part = dot(fp8_column(first, j, PACKED), _b_order(tl.load(inputs + 64 * j)), part, PACKED)
        part = dot(fp8_column(second, j, PACKED), _b_order(tl.load(inputs + 64 * j + 32)), part, PACKED)
    return total + part * scale


@triton.jit
def _fp8_product(words, scales, inputs, lines, K: tl.constexpr, PACKED: tl.constexpr, WAIT: tl.constexpr):
    """fp32 `[16, N]`: rows behind `words` (uint16 `[16, 32]`) with one fp32 scale per 128 columns behind `scales` times
    inputs behind `inputs` (bf16 `[32, N]`). `WAIT` as for `_fp4_product`."""
    BLOCKS: tl.constexpr = K // 128
    total = tl.zeros((words.shape[0], inputs.shape[1]), tl.float32)
    a0, b0 = tl.load(words), tl.load(words + 32)
    last = inputs + 128 * (BLOCKS - 1)
    if BLOCKS % 2 == 0:
        a1, b1 = tl.load(words + 64), tl.load(words + 96)
        for step in tl.static_range(4, 4 + AHEAD, 4):
            _to_l2(lines, step * 64, K, PACKED)
        if WAIT:
            tl.extra.cuda.gdc_wait()
        for block in range(0, BLOCKS - 2, 2):
            words += 128
            _to_l2(lines, (block * 2 + 4 + AHEAD) * 64, K, PACKED)
            total = _fp8_block(total, a0, b0, tl.load(scales + block), inputs, PACKED)
            a0, b0 = tl.load(words), tl.load(words + 32)
            _hold_loads(PACKED)
            total = _fp8_block(total, a1, b1, tl.load(scales + block + 1), inputs + 128, PACKED)
            a1, b1 = tl.load(words + 64), tl.load(words + 96)
            _hold_loads(PACKED)
            inputs += 256
        total = _fp8_block(total, a0, b0, tl.load(scales + BLOCKS - 2), last - 128, PACKED)
        total = _fp8_block(total, a1, b1, tl.load(scales + BLOCKS - 1), last, PACKED)
    else:
        if WAIT:
            tl.extra.cuda.gdc_wait()
        for block in range(BLOCKS - 1):
            words += 64
            total = _fp8_block(total, a0, b0, tl.load(scales + block), inputs, PACKED)
            a0, b0 = tl.load(words), tl.load(words + 32)
            inputs += 128
        total = _fp8_block(total, a0, b0, tl.load(scales + BLOCKS - 1), last, PACKED)
    return total


@triton.jit
def _thread_groups():
    """0 .. 3, in a form that does not look contiguous: the four scales of a row then are loaded by four threads."""
    return 3 - (tl.arange(0, 4) ^ 3)


@triton.jit
def fake_quantised(x, PLANES: tl.constexpr, HW: tl.constexpr):
    """fp32 `x [M, 128]` through e4m3 with one power-of-two scale per row, as bf16 (exact); place `128 / PLANES * j + h`
    of the result is column `PLANES * h + j`."""
    M: tl.constexpr = x.shape[0]
    scale, _ = pow2_scale_ceil(tl.max(tl.abs(x), 1), 448.0, 1e-4)
    codes = f32_to_e4m3(x * pow2_reciprocal(scale)[:, None], HW)
    value = (e4m3_to_f32(codes, HW) * scale[:, None]).to(tl.bfloat16)
    return tl.reshape(tl.permute(tl.reshape(value, (M, 128 // PLANES, PLANES)), (0, 2, 1)), (M, 128))


# -- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens", "first_scratch", "num_scratch"])
def gate_up_kernel(
    x, routing, hidden, num_active, active_experts, active_begin, pair_order, table, base, host, peer,
    first_scratch, num_scratch, shared_hidden, counters, num_tokens, limit,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, EXPERT_BYTES: tl.constexpr, E: tl.constexpr,
    N: tl.constexpr, HOST: tl.constexpr, PEER: tl.constexpr, PACKED: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (I / 8, most active experts + 1): eight rows of w1 and of w3 of one expert; the last column of programs
    quantises the shared expert's hidden rows."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    member = tl.program_id(1)
    if member == tl.num_programs(1) - 1:
        if block < INNER // 128:
            first = 0
            while first < num_tokens:
                row = first + tl.arange(0, N)
                at = row.to(tl.int64)[:, None] * INNER + block * 128 + tl.arange(0, 128)[None, :]
                inside = (row < num_tokens)[:, None]
                value = tl.load(shared_hidden + at, mask=inside, other=0.0).to(tl.float32)
                tl.store(shared_hidden + at, fake_quantised(value, 2, HW), mask=inside)
                first += N
        return
    if member >= tl.load(num_active):
        return
    expert = tl.load(active_experts + member)
    begin = tl.load(active_begin + member)
    end = tl.load(active_begin + member + 1)
    slot = slot_address(expert, table, base, host, peer, EXPERT_BYTES, HOST, PEER)
    if HOST or PEER:
        slot = stage_gate_up(slot, expert, table, base, active_experts, member, block, first_scratch, num_scratch,
            D, INNER, EXPERT_BYTES, E)  # fmt: skip

    # Tile rows 0 .. 7 are rows of w1, 8 .. 15 the same rows of w3: a gate and its up share a thread.
    tile_row = tl.arange(0, 16)
    row = block * 8 + tile_row % 8 + (tile_row // 8) * INNER
    words = slot.to(tl.pointer_type(tl.uint16)) + row[:, None] * (D // 4) + tl.arange(0, 32)[None, :]
    lines = slot + row[:, None] * (D // 2) + tl.arange(0, 2)[None, :] * 128
    scale_row = slot + 3 * (D * INNER // 2) + row * (D // 32)
    scales = scale_row[None, :] + _thread_groups()[:, None]
    scale_lines = scale_row[:, None] + tl.minimum(tl.arange(0, 2) * 128, D // 32 - 1)[None, :]
    column = block * 8 + tl.arange(0, 8)
    first = begin
    while first < end:
        at = first + tl.arange(0, N)
        # Columns without a pair repeat the last one; they are computed and not stored.
        pair = tl.load(pair_order + tl.minimum(at, end - 1))
        inputs = x + (pair // CHOICES).to(tl.int64)[None, :] * D + tl.arange(0, 32)[:, None]
        total = _fp4_product(words, scales, inputs, lines, scale_lines, D, PACKED, False)
        gate, up = tl.split(tl.permute(tl.reshape(total, (2, 8, N)), (1, 2, 0)))
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        value = gate / (1.0 + tl.exp(-gate)) * up * tl.load(routing + pair)[None, :]
        target = hidden + pair.to(tl.int64)[None, :] * INNER + column[:, None]
        tl.store(target, value.to(tl.bfloat16), mask=(at < end)[None, :])
        first += N

    if PDL:
        # Not earlier: programs of the successor would take room from this launch, and they read the groups, which this
        # kernel's predecessors wrote, before their own wait.
        tl.extra.cuda.gdc_launch_dependents()
    tl.debug_barrier()
    counter = counters + member * (INNER // 128) + block // 16
    if tl.atomic_add(counter, 1) == 15:
        tl.store(counter, 0)
        first = begin
        while first < end:
            at = first + tl.arange(0, N)
            inside = (at < end)[:, None]
            pair = tl.load(pair_order + at, mask=at < end, other=0).to(tl.int64)
            target = hidden + pair[:, None] * INNER + block // 16 * 128 + tl.arange(0, 128)[None, :]
            value = tl.load(target, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            tl.store(target, fake_quantised(value, 4, HW), mask=inside)
            first += N


@triton.jit(do_not_specialize=["num_tokens", "first_scratch", "num_scratch"])
def down_kernel(
    hidden, shared_hidden, shared_codes, shared_scales, out, num_active, active_experts, active_begin, pair_order,
    table, base, host, peer, first_scratch, num_scratch, num_tokens,
    D: tl.constexpr, INNER: tl.constexpr, CHOICES: tl.constexpr, EXPERT_BYTES: tl.constexpr, E: tl.constexpr,
    N: tl.constexpr, HOST: tl.constexpr, PEER: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (D / 16, 1 + most active experts): 16 rows of w2. The first column of programs, whose codes are twice as
    wide, is the shared expert's."""
    # The wait comes inside the products: weights and groups are older than the predecessor, `expert_gate_up`, which
    # lets this kernel start only after its own wait.
    block = tl.program_id(0)
    member = tl.program_id(1) - 1
    row = block * 16 + tl.arange(0, 16)
    if member < 0:
        codes = shared_codes.to(tl.pointer_type(tl.uint16)) + row[:, None] * (INNER // 2) + tl.arange(0, 32)[None, :]
        lines = shared_codes + row[:, None] * INNER + tl.arange(0, 2)[None, :] * 128
        scales = shared_scales + (block // 8) * (INNER // 128)
        first = 0
        while first < num_tokens:
            token = first + tl.arange(0, N)
            inputs = shared_hidden + tl.minimum(token, num_tokens - 1).to(tl.int64)[None, :] * INNER
            total = _fp8_product(codes, scales, inputs + tl.arange(0, 32)[:, None], lines, INNER, PACKED, PDL)
            if PDL:
                tl.extra.cuda.gdc_launch_dependents()
            target = out + (token.to(tl.int64) * (CHOICES + 1) + CHOICES)[None, :] * D + row[:, None]
            tl.store(target, total.to(tl.bfloat16), mask=(token < num_tokens)[None, :])
            first += N
        return
    if member >= tl.load(num_active):
        return
    expert = tl.load(active_experts + member)
    begin = tl.load(active_begin + member)
    end = tl.load(active_begin + member + 1)
    slot = slot_address(expert, table, base, host, peer, EXPERT_BYTES, HOST, PEER)
    if HOST or PEER:
        slot = stage_down(slot, expert, table, base, active_experts, member, block, first_scratch, num_scratch,
            D, INNER, EXPERT_BYTES, E)  # fmt: skip
    words = (slot + D * INNER).to(tl.pointer_type(tl.uint16)) + row[:, None] * (INNER // 4)
    words += tl.arange(0, 32)[None, :]
    lines = slot + D * INNER + row[:, None] * (INNER // 2) + tl.arange(0, 2)[None, :] * 128
    scale_row = slot + 3 * (D * INNER // 2) + 2 * (D * INNER // 32) + row * (INNER // 32)
    scales = scale_row[None, :] + _thread_groups()[:, None]
    scale_lines = scale_row[:, None] + tl.minimum(tl.arange(0, 2) * 128, INNER // 32 - 1)[None, :]
    first = begin
    while first < end:
        at = first + tl.arange(0, N)
        pair = tl.load(pair_order + tl.minimum(at, end - 1))
        inputs = hidden + pair.to(tl.int64)[None, :] * INNER + tl.arange(0, 32)[:, None]
        total = _fp4_product(words, scales, inputs, lines, scale_lines, INNER, PACKED, PDL)
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        target = out + (pair + pair // CHOICES).to(tl.int64)[None, :] * D + row[:, None]
        tl.store(target, total.to(tl.bfloat16), mask=(at < end)[None, :])
        first += N
