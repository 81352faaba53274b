"""The matrix product of the CPU path, as LLVM IR.

Numba's loop vectoriser cannot keep a block of accumulators in registers, which is what a small matrix product lives
on, so the inner loop is written by hand: `rows x vectors` accumulators of `LANES` floats, one fused multiply-add per k.
Each output element is summed over k = 0, 1, 2, ... alone, whatever the block: its bits depend neither on how many rows
share the call nor on the vector width of the machine. That is the batch invariance of this path.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from workers.cpu.simd import F32, HAS_AVX512, I8, I16, I32, I64, LANES, address_of, declare, fmuladd, splat

MAX_VECTORS = 4 if HAS_AVX512 else 2
"""Vectors of one panel row. With 4 rows: 16 of 32 (AVX-512) or 8 of 16 registers hold sums."""

FP32, BF16, FP4 = 4, 2, 1
"""Forms of packed weights: bytes of an element, or 1 for e2m1 codes (two to a byte) with e8m0 scales per 32."""

HAS_FP4 = HAS_AVX512
"""Whether e2m1 panels can be read: 16-entry lookups in a register."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitude of codes 0..7."""

PANEL = LANES * MAX_VECTORS
"""Output columns of one weight panel (64 or 16)."""

ROW_BLOCKS = (8, 4, 2, 1)
"""Rows of one call of the inner loop."""


VECTOR_BLOCKS = (4, 2, 1) if HAS_AVX512 else (2, 1)
"""Vectors of one call of the inner loop."""


def has_block(rows: int, vectors: int) -> bool:
    """Which block shapes exist: 8 rows only where their sums leave registers for the operands. Narrow outputs need
    them: fewer than 8 independent sums wait for each other (latency 4, two multiply-adds a cycle)."""
    return rows * vectors * LANES <= 16 * 16 if HAS_AVX512 else rows * vectors <= 8


def _load_panel_vector(builder: ir.IRBuilder, address: ir.Value, index: int, bf16: bool) -> ir.Value:
    """LANES floats of a panel row; bf16 panels widen by a 16-bit shift, which is exact."""
    wide = ir.VectorType(F32, LANES)
    if not bf16:
        return builder.load(address_of(builder, address, I64(4 * LANES * index), wide), align=4)
    raw = builder.load(address_of(builder, address, I64(2 * LANES * index), ir.VectorType(I16, LANES)), align=2)
    ints = builder.zext(raw, ir.VectorType(I32, LANES))
    shifted = builder.shl(ints, ir.Constant(ir.VectorType(I32, LANES), [16] * LANES))
    return builder.bitcast(shifted, wide)


def _build_product(function: ir.Function, rows: int, vectors: int, bf16: bool) -> None:
    """Body of `c[m, n] = sum_k a[m, k] * b[k, n]` for `rows` m and `vectors * LANES` n."""
    a, row_stride, k_stride, b, b_stride, c, c_stride, size = function.args  # strides in bytes
    vector = ir.VectorType(F32, LANES)
    zero = ir.Constant(vector, [0.0] * LANES)
    entry = function.append_basic_block("entry")
    loop, done = function.append_basic_block("loop"), function.append_basic_block("done")
    builder = ir.IRBuilder(entry)
    a_rows = [builder.add(a, builder.mul(row_stride, I64(m))) for m in range(rows)]
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(I64)
    k.add_incoming(I64(0), entry)
    sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    a_offset, b_address = builder.mul(k, k_stride), builder.add(b, builder.mul(k, b_stride))
    panel = [_load_panel_vector(builder, b_address, v, bf16) for v in range(vectors)]
    for m in range(rows):
        scalar = splat(builder, builder.load(address_of(builder, a_rows[m], a_offset, F32), align=4))
        for v in range(vectors):
            total = fmuladd(builder, scalar, panel[v], sums[m][v])
            sums[m][v].add_incoming(zero, entry)
            sums[m][v].add_incoming(total, loop)
            sums[m][v] = total
    following = builder.add(k, I64(1))
    k.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", following, size), loop, done)
    builder.position_at_end(done)
    _store_sums(builder, {(m, v): sums[m][v] for m in range(rows) for v in range(vectors)}, c, c_stride)
    builder.ret_void()


def _lookup(builder: ir.IRBuilder, table: ir.Value, codes: ir.Value) -> ir.Value:
    """`table[codes & 15]` lane by lane: one AVX-512 instruction."""
    kind = ir.FunctionType(table.type, [table.type, codes.type])
    return builder.call(declare(builder.module, "llvm.x86.avx512.permvar.sf.512", kind), [table, codes])


def _build_fp4_product(function: ir.Function, rows: int, vectors: int) -> None:
    """As `_build_product` for e2m1 panels: a byte holds rows 2k (low nibble) and 2k + 1 of one column; after all codes
    follow the e8m0 bytes [K / 32, columns]. Code times scale is exact in fp32, so sums equal those of a bf16 panel."""
    a, row_stride, k_stride, b, b_stride, c, c_stride, size = function.args
    vector, ints = ir.VectorType(F32, LANES), ir.VectorType(I32, LANES)
    zero = ir.Constant(vector, [0.0] * LANES)
    table = ir.Constant(vector, [*E2M1_VALUES, *(-value for value in E2M1_VALUES)])
    names = ("entry", "group", "pair", "next", "done")
    entry, group, pair, following, done = (function.append_basic_block(name) for name in names)
    builder = ir.IRBuilder(entry)
    pairs, groups = builder.lshr(size, I64(1)), builder.lshr(size, I64(5))
    scales = builder.add(b, builder.mul(pairs, b_stride))
    a_rows = [builder.add(a, builder.mul(row_stride, I64(m))) for m in range(rows)]
    shape = [(m, v) for m in range(rows) for v in range(vectors)]

    def load_bytes(address: ir.Value, v: int) -> ir.Value:
        raw = builder.load(address_of(builder, address, I64(LANES * v), ir.VectorType(I8, LANES)), align=1)
        return builder.zext(raw, ints)

    builder.branch(group)
    builder.position_at_end(group)
    g = builder.phi(I64)
    outer = {key: builder.phi(vector) for key in shape}
    scale_row = builder.add(scales, builder.mul(g, b_stride))
    shift = ir.Constant(ints, [23] * LANES)
    scale = [builder.bitcast(builder.shl(load_bytes(scale_row, v), shift), vector) for v in range(vectors)]
    first = builder.mul(g, I64(16))
    builder.branch(pair)
    builder.position_at_end(pair)
    i = builder.phi(I64)
    sums = {key: builder.phi(vector) for key in shape}
    index = builder.add(first, i)
    codes = [load_bytes(builder.add(b, builder.mul(index, b_stride)), v) for v in range(vectors)]
    total = dict(sums)
    for half in range(2):
        picked = [builder.lshr(code, ir.Constant(ints, [4] * LANES)) for code in codes] if half else codes
        panel = [builder.fmul(_lookup(builder, table, code), s) for code, s in zip(picked, scale, strict=True)]
        offset = builder.mul(builder.add(builder.shl(index, I64(1)), I64(half)), k_stride)
        for m in range(rows):
            value = splat(builder, builder.load(address_of(builder, a_rows[m], offset, F32), align=4))
            for v in range(vectors):
                total[m, v] = fmuladd(builder, value, panel[v], total[m, v])
    i_next = builder.add(i, I64(1))
    builder.cbranch(builder.icmp_signed("<", i_next, I64(16)), pair, following)
    builder.position_at_end(following)
    g_next = builder.add(g, I64(1))
    builder.cbranch(builder.icmp_signed("<", g_next, groups), group, done)
    for phi, start, step in ((g, I64(0), g_next), *((outer[key], zero, total[key]) for key in shape)):
        phi.add_incoming(start, entry)
        phi.add_incoming(step, following)
    for phi, start, step in ((i, I64(0), i_next), *((sums[key], outer[key], total[key]) for key in shape)):
        phi.add_incoming(start, group)
        phi.add_incoming(step, pair)
    builder.position_at_end(done)
    _store_sums(builder, total, c, c_stride)
    builder.ret_void()


def _store_sums(builder: ir.IRBuilder, sums: dict[tuple[int, int], ir.Value], c: ir.Value, c_stride: ir.Value) -> None:
    for (m, v), value in sums.items():
        row = builder.add(c, builder.mul(c_stride, I64(m)))
        builder.store(value, address_of(builder, row, I64(4 * LANES * v), value.type), align=4)


def block_shapes() -> list[tuple[int, int, int]]:
    """Every (rows, vectors, element) of the inner loop on this machine. Each costs compile time: e2m1 only in whole
    panels."""
    shapes = [(r, v, e) for r in ROW_BLOCKS for v in VECTOR_BLOCKS for e in (FP32, BF16) if has_block(r, v)]
    return shapes + [(r, MAX_VECTORS, FP4) for r in ROW_BLOCKS if HAS_FP4 and has_block(r, MAX_VECTORS)]


def _build_dispatch(function: ir.Function) -> None:
    """Body that jumps to the inner loop of the first argument's block shape: (rows * 8 + vectors) * 8 + element."""
    entry, other = function.append_basic_block("entry"), function.append_basic_block("other")
    ir.IRBuilder(other).ret_void()
    jump = ir.IRBuilder(entry).switch(function.args[0], other)
    for rows, vectors, element in block_shapes():
        name = f"dsv4_product_{rows}x{vectors}_{element}"
        inner = declare(function.module, name, ir.FunctionType(ir.VoidType(), [I64] * 8))
        inner.linkage = "internal"
        if element == FP4:
            _build_fp4_product(inner, rows, vectors)
        else:
            _build_product(inner, rows, vectors, element == BF16)
        block = function.append_basic_block()
        builder = ir.IRBuilder(block)
        builder.call(inner, function.args[1:])
        builder.ret_void()
        jump.add_case(I64((rows * 8 + vectors) * 8 + element), block)


@intrinsic
def block_product(typingctx, variant, a, row_step, k_step, b, b_step, c, c_step, size):  # type: ignore[no-untyped-def]
    """`c[m, n] = sum_k a[m, k] * b[k, n]` of one block shape (`variant`). Addresses and steps in bytes, size >= 1."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        name = "dsv4_block_product"
        function = declare(builder.module, name, ir.FunctionType(ir.VoidType(), [I64] * 9))
        if not function.blocks:
            function.linkage = "internal"
            function.attributes.add("noinline")
            _build_dispatch(function)
        builder.call(function, args)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 9)), codegen
