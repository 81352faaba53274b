"""The quickened interpreter computes what Triton's own does."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled here", allow_module_level=True)

import triton.language as tl  # noqa: E402

from tests.support.quick_interpreter import VERSION, quicken_interpreter  # noqa: E402


@triton.jit
def largest(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def halved(x, floor):
    """A device function, itself a caller of one and of Triton's own library."""
    return largest(x / 2, floor) + tl.sum(x, axis=1)[:, None]


@triton.jit
def many_things(floats, whole, out, sums, rows, N: tl.constexpr, HALF: tl.constexpr):
    """Integers that overflow, casts of every stored form, broadcasts, reshapes, reductions, masks and atomics."""
    row = tl.program_id(0) + tl.arange(0, 4)[:, None]
    offsets = row * N + tl.arange(0, N)[None, :]
    live = row < rows
    x = tl.load(floats + offsets, mask=live, other=-1.0)
    w = tl.load(whole + offsets, mask=live, other=7)
    mixed = (w * 1_000_003 + 2147483647) ^ (w >> 3)
    codes = (x * 16).to(tl.float8e4nv).to(tl.float32) + (x * 3).to(tl.bfloat16).to(tl.float32)
    pairs = tl.reshape(codes, (4, HALF, 2))
    low, high = tl.split(pairs)
    joined = tl.reshape(tl.join(high, low), (4, N))
    product = tl.dot(joined.to(tl.bfloat16), tl.trans(x.to(tl.bfloat16)))
    value = halved(joined, 0.25) + tl.max(product, axis=1)[:, None] + mixed.to(tl.float32)
    tl.store(out + offsets, value + mixed.to(tl.uint8, bitcast=False).to(tl.float32), mask=live)
    tl.atomic_add(sums + row, tl.sum(mixed.to(tl.int64), axis=1)[:, None], mask=live)


def _run() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    floats = torch.randn(6, 32, generator=generator)
    whole = torch.randint(-(2**31), 2**31 - 1, (6, 32), generator=generator, dtype=torch.int32)
    out, sums = torch.zeros(6, 32), torch.zeros(6, dtype=torch.int64)
    many_things[(3,)](floats, whole, out, sums, 5, N=32, HALF=16)
    return [out, sums]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_quick_interpreter_gives_the_bytes_of_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = quicken_interpreter()
    assert replaced or not triton.__version__.startswith(VERSION)
    quick = _run()
    for owner, name, original in replaced:
        monkeypatch.setattr(owner, name, original)
    for found, expected in zip(quick, _run(), strict=True):
        assert torch.equal(found, expected) and expected.any()


def test_a_shape_that_triton_refuses_is_refused_beside_its_equal() -> None:
    tl.block_type(tl.float32, [16])
    with pytest.raises(TypeError, match="Shape element"):
        tl.block_type(tl.float32, [16.0])
    with pytest.raises(ValueError, match="power of 2"):
        tl.block_type(tl.float32, [24])
