"""Device code of the router's products: a few experts' gate rows times a few tokens over some columns.

Owns: how partial products are computed, for every number of tokens the same. Does not own: who computes which, and
their sum (`routing_gate.py`, `routing_one.py`). A product over 128 columns has a sum of its own; those of up to four
such blocks are added here.
"""

from __future__ import annotations

import triton
import triton.language as tl

from workers.kernels.row_products import spread

EXPERTS = 16
"""Experts of a program: rows of a tensor-core instruction."""

TOKENS = 8
"""Tokens of a product: columns of a tensor-core instruction."""

BLOCK = 128
"""Columns of a product with a sum of its own."""


def blocks_of_program(hidden: int) -> int:
    """Blocks of columns of a program."""
    blocks = hidden // BLOCK
    return min(4, blocks & -blocks)


def splits(hidden: int) -> int:
    """Programs that share the columns of a product."""
    return hidden // (BLOCK * blocks_of_program(hidden))


@triton.jit
def gate_rows(gate, program, D: tl.constexpr, KW: tl.constexpr, BE: tl.constexpr, E: tl.constexpr):
    """What a program multiplies: its part of the columns, its experts `[BE]`, their gate rows `[KW, BE, 128]`, and the
    columns `[KW, 1, 128]`."""
    SPLITS: tl.constexpr = D // (KW * 128)
    split = program % SPLITS
    expert = program // SPLITS * BE + tl.arange(0, BE)
    column = split * (KW * 128) + tl.arange(0, KW)[:, None, None] * 128 + tl.arange(0, 128)[None, None, :]
    rows = tl.load(gate + expert[None, :, None] * D + column, mask=(expert < E)[None, :, None], other=0.0)
    return split, expert, rows, column


@triton.jit
def gate_product(rows, value, BT: tl.constexpr, WIDEN: tl.constexpr):
    """fp32 `[BE, BT]`, or `[BE, 1]`: gate rows `[KW, BE, 128]` times `value [KW, BT or 1, 128]` of tokens. The
    sum of the blocks is spelled out: the order of a reduction would follow the number of warps."""
    if WIDEN:  # the interpreter's `tl.dot` takes bf16 for integers
        sums = tl.dot(rows.to(tl.float32), spread(value.to(tl.float32), BT), input_precision="ieee")
    else:
        sums = tl.dot(rows, spread(value, BT))
    if value.shape[1] == 1:  # equal columns: one of them
        sums = tl.reshape(tl.max(sums, 2), (sums.shape[0], sums.shape[1], 1))
    KW: tl.constexpr = sums.shape[0]
    BE: tl.constexpr = sums.shape[1]
    COLUMNS: tl.constexpr = sums.shape[2]
    if KW == 4:
        first, second = tl.split(tl.permute(tl.reshape(sums, (2, 2, BE, COLUMNS)), (1, 2, 3, 0)))
        sums = first + second
    if KW >= 2:
        first, second = tl.split(tl.permute(sums, (1, 2, 0)))
        sums = first + second
    return tl.reshape(sums, (BE, COLUMNS))
