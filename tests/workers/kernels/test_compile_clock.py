"""The compile clock tells what was compiled from what was found on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.kernels.compiling import ROOT

pytest.importorskip("triton")

SCRIPT = """
import json, triton, triton.language as tl
from tests.workers.kernels.compiling import Case, compile_case
from workers.kernels.compile_clock import CompileClock

@triton.jit
def double(x):
    tl.store(x, 2 * tl.load(x))

case = Case("module", "double", 90, double, {"x": "*fp32"}, {}, {})
with CompileClock() as clock:
    assert not compile_case(case).error
with CompileClock() as idle:
    pass
print(json.dumps([clock.kernels, clock.compiled, clock.seconds, idle.kernels]))
"""


def test_a_second_process_finds_the_kernel_on_disk(tmp_path: Path) -> None:
    script = tmp_path / "double.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout))
    (kernels, compiled, seconds, idle), (again, second, no_seconds, _) = found
    assert (kernels, compiled, idle) == (1, 1, 0) and 0 < seconds < 60
    assert (again, second, no_seconds) == (1, 0, 0.0)
