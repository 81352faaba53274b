"""The one switch between the plain torch reference and the fast paths, decided once per model and logged with a reason.

`cpu` is the numba path for CPU pools (`workers/cpu`): taken whenever numba imports and the model's shape and precision
have kernels. Everything else runs on `reference`. There is no per-call fallback: a path that starts also finishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers.batch import ForwardBatch
from workers.model.config import ModelConfig
from workers.model.precision import Precision

if TYPE_CHECKING:
    from workers.model.weights import ModelWeights

Backend = Literal["reference", "cpu"]
LogitsFor = Literal["last", "all"]
"""Rows that get logits: the last new token of each sequence, or every token of the step."""


class PagedModel(Protocol):
    """One step over paged KV; what every backend implements."""

    def forward(self, batch: ForwardBatch, logits_for: LogitsFor = "last") -> Tensor:
        """fp32 logits [B, V] ("last") or [T, V] ("all"); writes the batch's KV."""


def choose_backend(config: ModelConfig, precision: Precision, pools: KVPools) -> tuple[Backend, str]:
    """The backend for a model over these pools, and why."""
    if pools.device.type != "cpu":
        return "reference", f"pools are on {pools.device} and no kernels exist for it yet"
    try:
        from workers.cpu.model import unsupported_reason
    except ImportError as error:
        return "reference", f"numba cannot be used: {error}"
    reason = unsupported_reason(config, precision, pools)
    return ("reference", reason) if reason is not None else ("cpu", "numba kernels cover this model")


def build_cpu_model(
    config: ModelConfig, weights: ModelWeights, precision: Precision, pools: KVPools, num_threads: int | None
) -> PagedModel:
    """The numba path. Raises ValueError when it has no kernels for the model, ImportError without numba."""
    from workers.cpu.model import CpuModel

    return CpuModel(config, weights, precision, pools, num_threads)
