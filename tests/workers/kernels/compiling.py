"""Compiles every kernel for every supported architecture without a GPU. `python -m tests.workers.kernels.compiling`.

Each module of `workers/kernels` with a function `compile_cases(arch)` takes part: it returns the compilations that
V4-Flash needs as (name, jit function, signature, constexprs, options). Prints a line a case, or JSON for the test:

    python -m tests.workers.kernels.compiling linear_decode 90      # one module, one architecture
    python -m tests.workers.kernels.compiling --share 0/2 --json    # half of everything

Must run in a process of its own: under Triton's interpreter, which other tests switch on, nothing is compiled.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
ARCHITECTURES = (80, 89, 90, 100, 120)
ACCESS = re.compile(r"\b(ld|st)\.(?:relaxed\.|volatile\.)?global[.\w:]*?((?:\.v[248])?\.b(?:8|16|32|64|128))\b")
ASYNC_COPY = re.compile(r"\bcp\.async\.c[ag]\.shared\.global[.\w:]* [^;]*?, (0x[0-9a-f]+|\d+)")
BULK_COPY = re.compile(r"\bcp\.(?:async|reduce\.async)\.bulk(?:\.tensor\.\dd)?\.(shared|global)")
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)[.\w]*")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One compilation: a kernel with types and constants of one use."""

    module: str
    name: str
    arch: int
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What the compiler made of a case. `error` is its last line when it failed; bytes are per thread or per block."""

    module: str
    name: str
    arch: int
    seconds: float
    error: str = ""
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    threads: int = 0
    global_accesses: dict[str, int] = dataclasses.field(default_factory=dict)
    tensor_core: dict[str, int] = dataclasses.field(default_factory=dict)


def kernel_modules() -> list[str]:
    """Names under `workers.kernels` that define compile cases; read as text, so that nothing is imported."""
    files = sorted((ROOT / "workers" / "kernels").glob("*.py"))
    return [path.stem for path in files if "def compile_cases(" in path.read_text()]


def cases_of(module: str, arch: int) -> Iterator[Case]:
    """The cases of one module for one architecture."""
    for case in importlib.import_module(f"workers.kernels.{module}").compile_cases(arch):
        yield Case(module, case[0], arch, *case[1:])


def compile_case(case: Case) -> Outcome:
    """Compile to machine code. A failure is an outcome, so that one bad kernel does not hide the others."""
    began = time.perf_counter()
    try:
        kernel = _compile(case)
    except Exception as error:  # the compiler raises RuntimeError, CompilationError and more
        lines = [line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
        text = " | ".join([lines[0], *lines[-2:]])[:600]
        return Outcome(case.module, case.name, case.arch, time.perf_counter() - began, error=text)
    registers, stack = _usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    accesses = collections.Counter(f"{op}{width}" for op, width in ACCESS.findall(ptx))
    accesses.update(f"cp.async.{int(size, 0)}B" for size in ASYNC_COPY.findall(ptx))
    accesses.update(f"bulk.{kind}" for kind in BULK_COPY.findall(ptx))
    if not accesses:
        text = "compiled to a kernel that neither reads nor writes memory"
        return Outcome(case.module, case.name, case.arch, time.perf_counter() - began, error=text)
    return Outcome(
        module=case.module,
        name=case.name,
        arch=case.arch,
        seconds=time.perf_counter() - began,
        registers=registers,
        stack_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        threads=32 * kernel.metadata.num_warps,
        global_accesses=dict(accesses),
        tensor_core=dict(collections.Counter(TENSOR_CORE.findall(ptx))),
    )


def _compile(case: Case) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    fn = case.fn
    while not hasattr(fn, "arg_names"):
        fn = fn.fn
    unknown = (set(case.signature) | set(case.constexprs)) - set(fn.arg_names)
    missing = set(fn.arg_names) - set(case.signature) - set(case.constexprs)
    if unknown or missing:
        raise ValueError(f"arguments unknown {sorted(unknown)}, missing {sorted(missing)}")
    signature = {
        name: "constexpr" if name in case.constexprs else case.signature[name] for name in fn.arg_names
    }  # in the kernel's order
    aligned = [["tt.divisibility", 16]]
    attrs = {(i,): aligned for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    language = GluonASTSource if fn.is_gluon() else ASTSource
    source = language(fn=fn, signature=signature, constexprs=dict(case.constexprs), attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=dict(case.options))


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes per thread, the largest of the functions in the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = [tuple(map(int, match)) for match in USAGE.findall(text)]
    return max(row[0] for row in found), max(row[1] for row in found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", nargs="?", help="one module of workers/kernels; all when not given")
    parser.add_argument("arch", nargs="*", type=int, help="architectures; all when not given")
    parser.add_argument("--share", default="0/1", help="i/n: every n-th case, beginning with the i-th")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    options = parser.parse_args()
    index, count = map(int, options.share.split("/"))
    modules = [options.module] if options.module else kernel_modules()
    number = 0
    for arch in options.arch or ARCHITECTURES:
        for module in modules:
            for case in cases_of(module, arch):
                number += 1
                if number % count == index % count:
                    _show(compile_case(case), as_json=options.json)


def _show(done: Outcome, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(done)), flush=True)
        return
    head = f"{done.module + '.' + done.name:44s} sm_{done.arch:<4d}{done.seconds:6.1f} s"
    if done.error:
        print(f"{head}  FAILED {done.error}", flush=True)
        return
    accesses = " ".join(f"{kind}:{n}" for kind, n in sorted(done.global_accesses.items()))
    cores = " ".join(f"{kind}:{n}" for kind, n in done.tensor_core.items())
    print(
        f"{head}  {done.registers:3d} registers x {done.threads} threads, stack {done.stack_bytes} B, "
        f"shared {done.shared_bytes} B  {accesses}  {cores}",
        flush=True,
    )


if __name__ == "__main__":
    main()
