"""How hidden rows of decode's experts on sm_90 get from the first launch to the second while both run, Gluon.

Owns: the rows of a step of one token, and their way into the inputs of `experts_tiles.py`. Does not own: who writes or
reads which row (`experts_sm90.py`), the counter (`arrivals.py`).

The first launch's programs count themselves. At several tokens they do so when the shared expert's rows have been
stored, for that is what the second launch reads of them before they have ended.

At one token nothing is announced: a column is one int32 word, bf16 bits above a tag, and whoever finds the tag has the
value. So a row is multiplied as soon as the 64 programs that write it have done so, not when all programs of the launch
have ended and their writes have been made visible; and no program waits until its stores have been performed.
# measured (H200, 2026-11-22; 8 layers of V4-Flash at one token): 1.0034 ms, with routed rows in words 0.9981, without
# the release of the shared ones 11 us less.
The tags of consecutive launches differ: they say in which half of its round the counter stands. A launch writes all
words, its own rows or zeros, so that no word has the next launch's tag when that begins.

The second launch starts when all programs of the first have their places on the GPU and have waited for what is before
them. They wait for nobody else, so that it may hold any room while it waits for them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from workers.kernels.experts_tiles import WARPS, fill_part

FIRST = gl.constexpr(32)
"""int32 words before the rows: the counter, and alignment to a line."""

PART = gl.constexpr(1024)
"""Columns of all threads, eight a thread."""

THREADS = gl.constexpr(gl.BlockedLayout([1], [32], [WARPS.value], [0]))


def room(choices: int, inner: int) -> int:
    """int32 words of the counter, a token's routed rows and its shared one, in this order."""
    return FIRST.value + (choices + 1) * inner


@gluon.jit
def count_of(counter):
    """What the counter shows. Read it before the program's own arrival, or when all programs have arrived."""
    return gl.inline_asm_elementwise(
        "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [counter], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tag_of(count, programs):
    """The tag of a launch of `programs` programs of which some, but not all, have arrived by this `count`."""
    return gl.where((count >= 0) & (count < programs), 1, 2)


@gluon.jit
def words_of(value, tag):
    """int32 words of bf16 values."""
    return value.to(gl.int16, bitcast=True).to(gl.int32) << 16 | tag


@gluon.jit
def clear(counter, rows, K: gl.constexpr):
    """The program's share of the words of the first rows becomes zero, which is nobody's tag."""
    each = gl.cdiv(rows * K, gl.num_programs(0))
    first = gl.program_id(0) * each
    for done in range(0, each, 32 * WARPS):
        at = first + done + gl.arange(0, 32 * WARPS, layout=THREADS)
        zero = gl.full([32 * WARPS], 0, gl.int32, THREADS)
        gl.store(counter + FIRST + at, zero, mask=at < rows * K)


@gluon.constexpr_function
def _look(parts):
    """PTX: a thread's eight words of each part, read until the lower halves of all are the tag."""
    words = 8 * parts
    loads = [
        f"ld.relaxed.gpu.global.v4.b32 {{{', '.join(f'${first + i}' for i in range(4))}}},"
        f" [${words} + {first // 8 * 4 * PART.value + first % 8 * 4}];"
        for first in range(0, words, 4)
    ]
    wrong = [f"xor.b32 b, ${i}, ${words + 1}; or.b32 a, a, b;" for i in range(words)]
    return (
        "{ .reg .pred p; .reg .b32 a, b; again: " + " ".join(loads) + " mov.b32 a, 0; " + " ".join(wrong)
        + " and.b32 a, a, 0xffff; setp.ne.u32 p, a, 0; @p bra again; }"
    )  # fmt: skip


@gluon.constexpr_function
def _outputs(parts):
    return ",".join(["=&r"] * (8 * parts) + ["l", "r"])


@gluon.constexpr_function
def _types(parts):
    return (gl.int32,) * (8 * parts)


@gluon.jit
def fill_awaited(codes, scales, counter, row, tag, K: gl.constexpr):
    """Quantise a row to the buffers of `experts_tiles.input_buffers`, once all its words have the tag."""
    PARTS: gl.constexpr = K // PART
    thread = gl.arange(0, 32 * WARPS, layout=THREADS)
    words = gl.inline_asm_elementwise(
        _look(PARTS), _outputs(PARTS), [counter + FIRST + row * K + thread * 8, tag], dtype=_types(PARTS),
        is_pure=False, pack=1,
    )  # fmt: skip
    for part in gl.static_range(PARTS):
        even = gl.join(gl.join(words[part * 8], words[part * 8 + 4]), gl.join(words[part * 8 + 2], words[part * 8 + 6]))
        odd = gl.join(
            gl.join(words[part * 8 + 1], words[part * 8 + 5]), gl.join(words[part * 8 + 3], words[part * 8 + 7])
        )
        values = gl.reshape(gl.join(even, odd), [PART // 8, 1, 8]) & -0x10000
        fill_part(codes, scales, values.to(gl.float32, bitcast=True), part, K)
