"""LLVM building blocks of the CPU kernels: typed addresses, bit-exact conversions, softmax columns.

Everything takes raw addresses (int64). Scalar conversions are straight-line IR, so numba loops around them vectorise;
the two softmax loops are whole because LLVM cannot know that their operands do not overlap.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)

HAS_AVX512 = bool(llvm.get_host_cpu_features().get("avx512f", False))
LANES = 16 if HAS_AVX512 else 8
"""Floats of one vector register of this machine."""


def declare(module: ir.Module, name: str, function_type: ir.FunctionType) -> ir.Function:
    return cgutils.get_or_insert_function(module, function_type, name)


def fmuladd(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    vector = a.type
    name = f"llvm.fmuladd.v{vector.count}f32"
    return builder.call(declare(builder.module, name, ir.FunctionType(vector, [vector] * 3)), [a, b, c])


def splat(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    vector = ir.VectorType(F32, LANES)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    mask = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), mask)


def address_of(builder: ir.IRBuilder, base: ir.Value, byte_offset: ir.Value, pointee: ir.Type) -> ir.Value:
    return builder.inttoptr(builder.add(base, byte_offset), pointee.as_pointer())


def _pointer(item: types.Type) -> Callable[..., Any]:
    """Intrinsic int64 address -> typed pointer; `pointer[i]` reads and writes without bounds or wraparound checks."""

    @intrinsic
    def as_pointer(typingctx, address):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(item)(types.int64), codegen

    return as_pointer


f32_at, i32_at, i64_at = _pointer(types.float32), _pointer(types.int32), _pointer(types.int64)
u8_at, u16_at = _pointer(types.uint8), _pointer(types.uint16)


@intrinsic
def fetch(typingctx, function, pair, thread):  # type: ignore[no-untyped-def]
    """Calls the C function at address `function` with (pair, thread); its int64 result. It takes the GIL itself."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(I64, [I64, I64])
        return builder.call(builder.inttoptr(args[0], kind.as_pointer()), args[1:])

    return types.int64(types.int64, types.int64, types.int64), codegen


def _scalar(result: types.Type, argument: types.Type, build: Callable[[ir.IRBuilder, ir.Value], ir.Value]) -> Any:
    """Intrinsic of one value to one value, emitted in place."""

    @intrinsic
    def convert(typingctx, value):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            return build(builder, args[0])

        return result(argument), codegen

    return convert


def _like(kind: ir.Type, element: ir.Type, value: float) -> ir.Constant:
    """`value` as `element`, once per lane when `kind` is a vector."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(ir.VectorType(element, kind.count), [value] * kind.count)
    return ir.Constant(element, value)


def _build_exp(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """exp of a scalar or vector, x clamped to [-87, 88]: 2^n * polynomial (Cephes expf coefficients), below 2 ulp."""
    kind, integer = x.type, I32
    name = "llvm.fmuladd.f32"
    if isinstance(kind, ir.VectorType):
        name, integer = f"llvm.fmuladd.v{kind.count}f32", ir.VectorType(I32, kind.count)
    fma = declare(builder.module, name, ir.FunctionType(kind, [kind] * 3))

    def f(value: float) -> ir.Constant:
        return _like(kind, F32, value)

    x = builder.select(builder.fcmp_ordered("<", x, f(-87.0)), f(-87.0), x)
    x = builder.select(builder.fcmp_ordered(">", x, f(88.0)), f(88.0), x)
    magic = f(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, held in the low mantissa bits
    shifted = builder.call(fma, [x, f(1.44269502162933349609375), magic])
    whole = builder.fsub(shifted, magic)
    r = builder.call(fma, [whole, f(-0.693359375), x])
    r = builder.call(fma, [whole, f(2.12194440e-4), r])
    total = f(1.9875691500e-4)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        total = builder.call(fma, [total, r, f(coefficient)])
    total = builder.fadd(builder.call(fma, [total, builder.fmul(r, r), r]), f(1.0))
    exponent = builder.sub(builder.bitcast(shifted, integer), _like(kind, I32, 0x4B400000 - 127))
    return builder.fmul(total, builder.bitcast(builder.shl(exponent, _like(kind, I32, 23)), kind))


def _column_loop(builder: ir.IRBuilder, rows: ir.Value, start: ir.Value, body: Callable[..., ir.Value]) -> ir.Value:
    """Emit `for r in range(rows): carried = body(builder, r, carried)` in place; returns the final `carried`."""
    before = builder.block
    loop, done = builder.append_basic_block("rows"), builder.append_basic_block("done")
    builder.cbranch(builder.icmp_signed(">", rows, I64(0)), loop, done)
    builder.position_at_end(loop)
    r, carried = builder.phi(I64), builder.phi(start.type)
    following = body(builder, r, carried)
    step = builder.add(r, I64(1))
    for phi, first, later in ((r, I64(0), step), (carried, start, following)):
        phi.add_incoming(first, before)
        phi.add_incoming(later, builder.block)
    builder.cbranch(builder.icmp_signed("<", step, rows), loop, done)
    last = builder.block
    builder.position_at_end(done)
    result = builder.phi(start.type)
    result.add_incoming(start, before)
    result.add_incoming(following, last)
    return result


@intrinsic
def scale_and_peak(typingctx, source, source_step, target, target_step, peak, rows, scale):  # type: ignore[no-untyped-def]
    """One vector of columns: `target[r] = source[r] * scale`, `peak = max(peak, target[r])`; steps in bytes."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        source, source_step, target, target_step, peak, rows, scale = args
        vector = ir.VectorType(F32, LANES)
        factor, place = splat(builder, scale), address_of(builder, peak, I64(0), vector)

        def body(builder: ir.IRBuilder, r: ir.Value, top: ir.Value) -> ir.Value:
            value = builder.load(address_of(builder, source, builder.mul(r, source_step), vector), align=4)
            value = builder.fmul(value, factor)
            builder.store(value, address_of(builder, target, builder.mul(r, target_step), vector), align=4)
            return builder.select(builder.fcmp_ordered(">", value, top), value, top)

        builder.store(_column_loop(builder, rows, builder.load(place, align=4), body), place, align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 6), types.float32), codegen


@intrinsic
def exp_and_sum(typingctx, target, target_step, peak, total, rows):  # type: ignore[no-untyped-def]
    """One vector of columns: `target[r] = exp(target[r] - peak)`, `total += target[r]`, rows in order."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        target, target_step, peak, total, rows = args
        vector = ir.VectorType(F32, LANES)
        top = builder.load(address_of(builder, peak, I64(0), vector), align=4)
        place = address_of(builder, total, I64(0), vector)

        def body(builder: ir.IRBuilder, r: ir.Value, sums: ir.Value) -> ir.Value:
            address = address_of(builder, target, builder.mul(r, target_step), vector)
            value = _build_exp(builder, builder.fsub(builder.load(address, align=4), top))
            builder.store(value, address, align=4)
            return builder.fadd(sums, value)

        builder.store(_column_loop(builder, rows, builder.load(place, align=4), body), place, align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 5)), codegen


def _build_e4m3_decode(builder: ir.IRBuilder, code: ir.Value) -> ir.Value:
    """e4m3 byte to fp32: the 7 magnitude bits as the top of an fp32 magnitude, times 2^120. Exact, subnormals too."""
    wide = builder.zext(code, I32)
    sign = builder.shl(builder.and_(wide, I32(0x80)), I32(24))
    magnitude = builder.shl(builder.and_(wide, I32(0x7F)), I32(20))
    return builder.fmul(builder.bitcast(builder.or_(sign, magnitude), F32), ir.Constant(F32, 2.0**120))


def _build_e4m3_encode(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """fp32 to e4m3 byte: nearest even, saturating at 448."""
    bits = builder.bitcast(x, I32)
    sign = builder.and_(builder.lshr(bits, I32(24)), I32(0x80))
    magnitude = builder.and_(bits, I32(0x7FFFFFFF))
    limit = I32(0x43E00000)  # 448.0
    magnitude = builder.select(builder.icmp_unsigned(">", magnitude, limit), limit, magnitude)
    odd = builder.and_(builder.lshr(magnitude, I32(20)), I32(1))
    rounded = builder.add(builder.add(magnitude, I32(0x7FFFF)), odd)
    normal = builder.sub(builder.lshr(rounded, I32(20)), I32(120 << 3))
    # Below 2^-6 codes are multiples of 2^-9, which is one unit in the last place of 2^14.
    pushed = builder.fadd(builder.bitcast(magnitude, F32), ir.Constant(F32, 16384.0))
    small = builder.sub(builder.bitcast(pushed, I32), I32(0x46800000))
    tiny = builder.icmp_unsigned("<", magnitude, I32(0x3C800000))
    return builder.trunc(builder.or_(builder.select(tiny, small, normal), sign), I8)


def _build_bf16_encode(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """fp32 to bf16 bits, nearest even (finite input)."""
    bits = builder.bitcast(x, I32)
    odd = builder.and_(builder.lshr(bits, I32(16)), I32(1))
    return builder.trunc(builder.lshr(builder.add(builder.add(bits, I32(0x7FFF)), odd), I32(16)), I16)


def _build_bf16_decode(builder: ir.IRBuilder, code: ir.Value) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(code, I32), I32(16)), F32)


def _build_scale_byte(builder: ir.IRBuilder, ratio: ir.Value) -> ir.Value:
    """e8m0 byte of the power of two at or above a positive normal fp32."""
    bits = builder.bitcast(ratio, I32)
    inexact = builder.icmp_unsigned("!=", builder.and_(bits, I32(0x7FFFFF)), I32(0))
    return builder.trunc(builder.add(builder.lshr(bits, I32(23)), builder.zext(inexact, I32)), I8)


def _build_scale_value(builder: ir.IRBuilder, byte: ir.Value) -> ir.Value:
    return builder.bitcast(builder.shl(builder.zext(byte, I32), I32(23)), F32)


def _build_order(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """int32 that orders like the float (-0.0 counts as 0.0)."""
    bits = builder.bitcast(builder.fadd(x, ir.Constant(F32, 0.0)), I32)
    negative = builder.icmp_signed("<", bits, I32(0))
    return builder.select(negative, builder.xor(bits, I32(0x7FFFFFFF)), bits)


exp = _scalar(types.float32, types.float32, _build_exp)
e4m3_decode = _scalar(types.float32, types.uint8, _build_e4m3_decode)
e4m3_encode = _scalar(types.uint8, types.float32, _build_e4m3_encode)
bf16_decode = _scalar(types.float32, types.uint16, _build_bf16_decode)
bf16_encode = _scalar(types.uint16, types.float32, _build_bf16_encode)
scale_byte = _scalar(types.uint8, types.float32, _build_scale_byte)
scale_value = _scalar(types.float32, types.uint8, _build_scale_value)
float_order = _scalar(types.int32, types.float32, _build_order)
