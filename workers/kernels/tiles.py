"""Tile shapes of every kernel per GPU architecture: one small table, so that nothing is tuned when a worker starts.

Owns: which block sizes, warps and stages a kernel uses on which architecture, and how a device finds its column. Does
not own: kernels. A launcher asks `tile("linear_decode.linear", device)` once and keeps the answer.

Columns are sm_80, 89, 90, 100 and 120. A kernel needs sm_90 at least; a missing column falls back as `FALLBACK` says.
sm_90 values are measured on an H200; other columns are chosen so that shared memory fits (`SHARED_BYTES`, checked by
tests/workers/kernels/test_compile.py), not for speed, unless their comment says otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = (80, 89, 90, 100, 120)
"""Columns of the table, and the targets that every kernel is compiled for without a GPU."""

SHARED_BYTES = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Most shared memory of one block, bytes (CUDA programming guide, compute capabilities, 'per thread block' opt-in)."""

FALLBACK = {80: (80, 90), 89: (89, 120, 80, 90), 90: (90,), 100: (100, 90), 120: (120, 89, 80, 90)}
"""Columns to look at in order: first those whose shared memory is no larger."""

INTERPRETED = 90
"""Column used where there is no GPU: the interpreter then runs the shapes that serve on Hopper."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One choice. `m` tokens, `n` output columns (or entries, experts' rows), `k` depth of one step of the loop."""

    n: int = 0
    k: int = 0
    m: int = 16
    warps: int = 4
    stages: int = 3
    group: int = 1
    """Tiles of the token axis that are walked together, so that a weight tile is read from L2 (prefill)."""
    registers: int | None = None
    """Upper limit per thread (`maxnreg`); None leaves it to the compiler."""

    def fitted(self, *, n: int | None = None, k: int | None = None) -> Tile:
        """The same tile with `n` and `k` halved until they divide the given sizes: dsv4-nano is smaller than a tile."""
        return dataclasses.replace(self, n=_halved(self.n, n), k=_halved(self.k, k))

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of a Triton launch."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


TILES: dict[str, dict[int, Tile]] = {
    # One token: project, linear, grouped, gate, head. few: up to 8, few_fp8: without bf16 rows; some: linear, 9 to 16.
    # many_rows: grouped beyond 8, project beyond 16, linear beyond 32. `group` of wide: programs per multiprocessor.
    "linear_decode.project": {80: Tile(n=16, stages=3), 89: Tile(n=16, stages=3), 90: Tile(n=16, stages=4)},
    "linear_decode.linear": {80: Tile(n=16, stages=3), 89: Tile(n=16, stages=3), 90: Tile(n=32, stages=4)},
    "linear_decode.grouped": {80: Tile(n=16, stages=3), 89: Tile(n=16, stages=3), 90: Tile(n=16, stages=3)},
    "linear_decode.gate": {80: Tile(n=16, stages=3), 89: Tile(n=16, stages=3), 90: Tile(n=32, stages=3)},
    "linear_decode.head": {80: Tile(n=16, stages=4), 89: Tile(n=16, stages=3), 90: Tile(n=16, stages=5)},
    "linear_decode.few": {80: Tile(n=16, stages=4), 89: Tile(n=16, stages=3), 90: Tile(n=16, stages=4)},
    "linear_decode.few_fp8": {80: Tile(n=16, stages=4), 89: Tile(n=16, stages=3), 90: Tile(n=32, stages=4)},
    "linear_decode.many": {
        80: Tile(m=64, n=16, stages=2),
        89: Tile(m=64, n=16, stages=2),
        90: Tile(m=64, n=16, stages=3),
    },
    "linear_decode.many_rows": {
        80: Tile(m=64, n=16, stages=2),
        89: Tile(m=64, n=16, stages=2),
        90: Tile(m=32, n=32, stages=3),
    },
    "linear_decode.some": {80: Tile(n=16, stages=2), 89: Tile(n=16, stages=2), 90: Tile(n=16, stages=4)},
    "linear_decode.wide": {80: Tile(n=16, stages=3, group=2), 90: Tile(n=32, stages=3, group=2)},
    # k: columns of a step, group: programs per multiprocessor. A ring admits no more: the GPU crowds those of an early
    # launch. project_less: fewer tiles than multiprocessors. short: K up to 1,536, for 1 token, 2 to 16, and more;
    # short_less: all bytes in shared memory of the GPU, with room beside for a launch of `short`.
    "linear_stream.grouped": {90: Tile(n=32, k=1024, stages=4, group=1)},
    "linear_stream.long": {90: Tile(n=16, k=2048, stages=4, group=1)},
    "linear_stream.project": {90: Tile(n=16, k=1024, stages=6, group=2)},
    "linear_stream.project_less": {90: Tile(n=16, k=1024, stages=8, group=1)},
    "linear_stream.short": {90: Tile(n=64, k=512, stages=4, group=1)},
    "linear_stream.short_few": {90: Tile(n=32, k=1024, stages=4, group=1)},
    "linear_stream.short_less": {90: Tile(n=64, k=512, stages=3, group=1)},
    "linear_stream.short_many": {90: Tile(n=64, k=512, stages=3, group=1)},
    "experts_prefill.experts": {
        80: Tile(m=128, n=128, k=128, warps=4, stages=2),
        89: Tile(m=64, n=128, k=128, warps=4, stages=2),
        90: Tile(m=128, n=128, k=128, warps=4, stages=3),
        100: Tile(m=64, n=128, k=128, warps=4, stages=3),  # 128 tokens compile to an empty kernel (Triton 3.6)
    },
    "linear_prefill.bf16_narrow": {
        80: Tile(m=128, n=64, k=64, warps=4, stages=3, group=8),
        90: Tile(m=128, n=64, k=64, warps=4, stages=4, group=8),
    },
    "linear_prefill.bf16_wide": {
        80: Tile(m=128, n=128, k=64, warps=8, stages=3, group=8),
        90: Tile(m=128, n=256, k=64, warps=8, stages=4, group=8),
    },
    "linear_prefill.fp8_product": {
        89: Tile(m=128, n=128, k=128, warps=8, stages=2, group=8),
        90: Tile(m=64, n=128, k=128, warps=4, stages=3, group=32),
    },
    "quantise_rows.quantise": {
        80: Tile(m=16, n=512, warps=4, stages=1),
        90: Tile(m=16, n=512, warps=4, stages=1),
    },
    # n: heads, k: keys of a chunk; one warp for 64 dimensions.
    "sparse_attention.decode": {90: Tile(n=16, k=32, stages=1, registers=128)},
    "sparse_attention.prefill": {
        80: Tile(n=16, k=32, warps=4, stages=2),
        89: Tile(n=16, k=32, warps=4, stages=1),
        90: Tile(n=64, k=64, warps=8, stages=2),
        100: Tile(n=16, k=32, warps=4, stages=2),  # with 64 heads Triton 3.6 compiles an empty kernel
    },
    "mhc.mix": {90: Tile(warps=4, stages=1)},
    "mhc_prefill.collapse": {90: Tile(n=1024, warps=1)},
    "mhc_prefill.mix": {
        80: Tile(m=64, k=32, warps=8, stages=2),
        89: Tile(m=64, k=32, warps=8, stages=1),
        90: Tile(m=64, k=64, warps=8, stages=2),
    },
}
"""kernel -> architecture -> tile. Kernel names are `module.function`; keep the modules in alphabetical order."""


def tile(kernel: str, device: Any = None) -> Tile:
    """The tile of one kernel. `device`: a `torch.device`, an architecture number, or None for the current device."""
    return tile_for(kernel, device if isinstance(device, int) else architecture(device))


@functools.cache
def tile_for(kernel: str, arch: int) -> Tile:
    """The tile for a column of the table; KeyError names a kernel without a row."""
    row = TILES[kernel]
    return next(row[column] for column in FALLBACK[arch] if column in row)


def architecture(device: Any = None) -> int:
    """The column for a device; `INTERPRETED` for a CPU. Raises `ValueError` for GPUs before sm_80."""
    import torch

    if (device is not None and torch.device(device).type != "cuda") or not torch.cuda.is_available():
        return INTERPRETED
    return architecture_of(*torch.cuda.get_device_capability(device))


def architecture_of(major: int, minor: int) -> int:
    """Column for a compute capability: sm_86 has sm_89's shared memory; sm_87 has sm_80's; sm_103 is an sm_100."""
    match major, minor:
        case 8, 6 | 9:
            return 89
        case 8, _:
            return 80
        case 9, _:
            return 90
        case 10 | 11, _:
            return 100
        case _ if major >= 12:
            return 120
    raise ValueError(f"compute capability {major}.{minor} is older than the oldest supported, 8.0")


def _halved(block: int, size: int | None) -> int:
    while size is not None and block > 1 and size % block:
        block //= 2
    return block
