"""Programs that count themselves in memory, for others that wait until they have come somewhere, Gluon.

Owns: an int32 counter's arrivals and waits. It goes round at twice the number of programs, so that it never has to be
set back: it ends at zero where every program arrives twice, or two launches take turns. Does not own: who may wait for
whom (`experts_sm90.py`, `sparse_attention_decode_sm90.py`); who is waited for must find room while others wait.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _counting(order):
    return (
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;"
        f" @p red.{order}.gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0; }}"
    )


@gluon.jit
def arrive(counter, programs, TELL: gl.constexpr):
    """One of `programs` programs has come here, all its threads. TELL: what they have stored is visible to who sees
    that."""
    gl.thread_barrier()
    gl.inline_asm_elementwise(
        _counting("release" if TELL else "relaxed"), "=r,l,r", [counter, 2 * programs - 1], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_all(counter, programs):
    """Every thread waits until all `programs` programs of a launch have arrived.

    For kernels that begin only after all have, so that this is an acquire more than a wait: a count at which the launch
    before ended looks the same. What an arrival announces is visible before the arrival is.
    """
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 v; again: ld.acquire.gpu.global.b32 v, [$1]; setp.ne.s32 p, v, 0;"
        " setp.ne.and.s32 p, v, $2, p; @p bra again; mov.b32 $0, 0; }",
        "=r,l,r", [counter, programs], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def await_first_half(counter, programs):
    """Every thread waits until all `programs` programs, each of which arrives twice, have arrived once."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .u32 v; again: ld.acquire.gpu.global.u32 v, [$1]; setp.lt.u32 p, v, $2; @p bra again;"
        " mov.u32 $0, v; }",
        "=r,l,r", [counter, programs], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
