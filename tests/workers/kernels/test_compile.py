"""Every kernel becomes machine code for every supported architecture, fits its shared memory and does not spill."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.kernels.compiling import ARCHITECTURES, ROOT, Outcome, kernel_modules
from workers.kernels.tiles import SHARED_BYTES

pytest.importorskip("triton")

PROCESSES = max(2, min(8, os.cpu_count() or 1))
MAX_STACK_BYTES = 96
"""Per thread on sm_90: more is a kernel that keeps its accumulators in local memory."""


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """All cases, compiled in processes of their own, which Triton's cache makes quick from the second time on."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.workers.kernels.compiling", "--json", "--share"]
    running = [
        subprocess.Popen([*command, f"{i}/{PROCESSES}"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        for i in range(PROCESSES)
    ]
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    assert not any(process.returncode for process in running)
    return [Outcome(**json.loads(line)) for line in lines]


@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_every_architecture(outcomes: list[Outcome]) -> None:
    failed = [f"{o.module}.{o.name} sm_{o.arch}: {o.error}" for o in outcomes if o.error]
    assert not failed, "\n".join(failed)
    assert {(o.module, o.arch) for o in outcomes} == {(m, a) for m in kernel_modules() for a in ARCHITECTURES}


@pytest.mark.timeout(600)
def test_every_kernel_fits_the_shared_memory(outcomes: list[Outcome]) -> None:
    large = {f"{o.module}.{o.name} sm_{o.arch}": o.shared_bytes for o in outcomes if _too_large(o)}
    assert not large


@pytest.mark.timeout(600)
def test_no_kernel_spills_on_hopper(outcomes: list[Outcome]) -> None:
    spilled = {f"{o.module}.{o.name}": o.stack_bytes for o in outcomes if _spills(o)}
    assert not spilled


@pytest.mark.timeout(600)
def test_decode_linears_copy_weights_asynchronously(outcomes: list[Outcome]) -> None:
    """A loop that Triton does not pipeline still computes the right sums, and waits for every load."""
    linears = [o for o in outcomes if o.module == "linear_decode" and o.tensor_core]
    assert len(linears) >= 10 * len(ARCHITECTURES)
    assert not [f"{o.name} sm_{o.arch}" for o in linears if "cp.async.16B" not in o.global_accesses]


def test_a_fault_would_be_seen() -> None:
    good = Outcome("module", "kernel", 90, 0.1, stack_bytes=MAX_STACK_BYTES, shared_bytes=SHARED_BYTES[90])
    assert not _spills(good) and not _too_large(good)
    assert _spills(dataclasses.replace(good, stack_bytes=MAX_STACK_BYTES + 1))
    assert _too_large(dataclasses.replace(good, shared_bytes=SHARED_BYTES[90] + 1))
    assert _too_large(dataclasses.replace(good, arch=89))


EMPTY = """
import triton
from tests.workers.kernels.compiling import Case, compile_case

@triton.jit
def nothing(x):
    pass

print(compile_case(Case("module", "nothing", 90, nothing, {"x": "*fp32"}, {}, {})).error)
"""


def test_a_kernel_that_the_compiler_emptied_is_a_failure(tmp_path: Path) -> None:
    """Triton has compiled a body to `unreachable` without an error."""
    script = tmp_path / "empty.py"
    script.write_text(EMPTY)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert "neither reads nor writes memory" in done.stdout, done.stderr[-2000:]


def _spills(outcome: Outcome) -> bool:
    return outcome.arch == 90 and outcome.stack_bytes > MAX_STACK_BYTES


def _too_large(outcome: Outcome) -> bool:
    return outcome.shared_bytes > SHARED_BYTES[outcome.arch]
