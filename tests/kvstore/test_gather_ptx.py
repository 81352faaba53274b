"""What the compiler makes of the gather for V4-Flash on Hopper: wide accesses only. Needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]

COMPILE = """
import collections, json, re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvstore.pools import kernels
from kvstore.pools.pieces import Planner
from tests.kvstore.layouts import flash_spec

shapes = Planner(flash_spec(), [360, 3000, 3000, 3000, 220, 220, 220]).shapes
constants, words = kernels.static_shapes(shapes)
count, aligned, found = len(shapes), [["tt.divisibility", 16]], {}
for to_pool in (False, True):
    source = ASTSource(
        fn=kernels.move_rows,
        signature={"pools": ("*i64",) * count, "staging": "*i64", "table": "*i64", "TO_POOL": "constexpr",
                   "SHAPES": "constexpr", "SHAPE_WORDS": "constexpr", "NUM_POOLS": "constexpr"},
        constexprs={(3,): to_pool, (4,): constants, (5,): words, (6,): count},
        attrs={**{(0, i): aligned for i in range(count)}, (1,): aligned, (2,): aligned},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    accesses = re.findall(r"(?:ld|st)[.]global(?:[.]v[24])?[.]b[0-9]+", ptx)
    found[str(to_pool)] = collections.Counter(accesses)
print(json.dumps(found))
"""
"""A process of its own: under Triton's interpreter, which other tests switch on, nothing is compiled."""


def test_pool_rows_are_read_and_written_16_bytes_at_a_time() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    gather, scatter = json.loads(done.stdout)["False"], json.loads(done.stdout)["True"]
    for found in (gather, scatter):
        assert not [kind for kind in found if kind.endswith(("b8", "b16"))], found
    assert gather["ld.global.v2.b64"] and gather["ld.global.v4.b32"], gather
    assert scatter["st.global.v2.b64"] and scatter["st.global.v4.b32"], scatter
