"""Two models run the same step launch by launch, and every launch starts from the same bytes.

After each launch the buffers and pools of the model under test are compared with the other's and then copied into it,
so an error is reported where it arises and never grows. Buffers whose layout belongs to a family of kernels are not
compared or copied; what the family makes of them is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.gpu.kernel_set import Launch
from workers.gpu.model import GpuModel
from workers.gpu.step import Step

OPAQUE = ("x_quantised", "x_experts", "hidden", "shared_hidden", "comb", "groups")
"""Made and read by one family of kernels, or not at all; only mHC's read `comb`."""

ROOM = ("expert_gate_up", "sub_out")
"""A launch, and the buffer that it may use as it likes."""

UNORDERED = "selected"
"""Rows of entries in an order of the kernel's own."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far one buffer or pool was off after one launch."""

    launch: Launch
    name: str
    error: float
    """Relative error; for pools the share of bytes that differ, for ids the share of entries."""

    def __str__(self) -> str:
        return f"layer {self.launch.layer} {self.launch.op}: {self.name} {self.error:.2e}"


def run_in_lockstep(
    found: GpuModel, expected: GpuModel, launches: tuple[list[Launch], list[Launch]], steps: tuple[Step, Step]
) -> list[Difference]:
    """Calls both lists in turn; what differed after each launch, in order."""
    differences = []
    ours, theirs = _memory(found, steps[0]), _memory(expected, steps[1])
    for name in theirs:
        if not name.startswith("pool"):
            ours[name].zero_()
        theirs[name].copy_(ours[name])
    for one, other in zip(*launches, strict=True):
        assert (one.op, one.layer) == (other.op, other.layer)
        before = {name: tensor.clone() for name, tensor in theirs.items()}
        one.call()
        other.call()
        for name, tensor in theirs.items():
            if name in OPAQUE:
                continue
            if (one.op, name) == ROOM:
                ours[name].copy_(tensor)
                continue
            mine, reference, old = ours[name], tensor, before[name]
            if name == UNORDERED:
                width = steps[0].parts.config.index_topk
                mine, reference, old = (t.view(-1, width).sort(-1).values.flatten() for t in (mine, reference, old))
            written = ~_same(reference, old)
            if written.any() or not _same(mine, old).all():
                error = _error(mine[written], reference[written]) if written.any() else 1.0
                differences.append(Difference(one, name, error))
            tensor.copy_(ours[name])
    return differences


def _memory(model: GpuModel, step: Step) -> dict[str, Tensor]:
    """Every buffer and pool by name, flat."""
    buffers = {name: flat.every for name, flat in step.buffers.flats.items()}
    return buffers | {f"pool {pool.spec.name}": pool.data for pool in model.pools.pools}


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | ((a != a) & (b != b))


def _error(found: Tensor, expected: Tensor) -> float:
    if not found.is_floating_point():
        return float((found != expected).float().mean())
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return float("inf")
    found, expected = found[finite].float(), expected[finite].float()
    return float((found - expected).norm() / expected.norm().clamp(min=1e-20))
