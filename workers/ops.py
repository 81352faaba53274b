"""The one switch between the plain torch reference and the fast paths, decided once per model and logged with a reason.

`cpu` is the numba path for CPU pools (`workers/cpu`): taken whenever numba imports and the model's shape and precision
have kernels. `triton` is the GPU path for CUDA pools (`workers/gpu`), likewise. Everything else runs on `reference`.
There is no per-call fallback: a path that starts also finishes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers.batch import ForwardBatch
from workers.model.config import ModelConfig
from workers.model.precision import Precision

if TYPE_CHECKING:
    from workers.cpu.model import CpuModel
    from workers.experts.supply import ExpertSupply
    from workers.gpu.model import GpuModel
    from workers.gpu.serving_experts import GpuExperts
    from workers.gpu.weights import GpuWeights
    from workers.model.weights import ModelWeights

Backend = Literal["reference", "cpu", "triton"]
LogitsFor = Literal["last", "all"]
"""Rows that get logits: the last new token of each sequence, or every token of the step."""


class PagedModel(Protocol):
    """Steps over paged KV; what every backend implements."""

    def forward(self, batch: ForwardBatch, logits_for: LogitsFor = "last") -> Tensor:
        """fp32 logits [B, V] ("last") or [T, V] ("all"); writes the batch's KV."""

    def decode(self, batch: ForwardBatch) -> Tensor:
        """`forward(batch)` for batches of one new token a sequence; the logits are valid until the next call."""


def choose_backend(config: ModelConfig, precision: Precision, pools: KVPools) -> tuple[Backend, str]:
    """The backend for a model over these pools, and why."""
    if pools.device.type == "cuda":
        reason = no_triton_reason(config, precision)
        return ("reference", reason) if reason is not None else ("triton", "Triton kernels cover this model")
    if pools.device.type != "cpu":
        return "reference", f"pools are on {pools.device} and no kernels exist for it yet"
    try:
        from workers.cpu.model import unsupported_reason
    except ImportError as error:
        return "reference", f"numba cannot be used: {error}"
    reason = unsupported_reason(config, precision, pools)
    return ("reference", reason) if reason is not None else ("cpu", "numba kernels cover this model")


def no_triton_reason(config: ModelConfig, precision: Precision) -> str | None:
    """Why a model on a CUDA device does not run on the Triton kernels; None when it does."""
    from workers.gpu.weights import unsupported_shape

    if precision != Precision.native():
        return f"the Triton kernels compute native precision, not {precision}"
    reason = unsupported_shape(config)
    if reason is not None:
        return reason
    try:
        import workers.kernels.formats  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be used: {error}"
    return None


def build_cpu_model(
    config: ModelConfig,
    weights: ModelWeights,
    precision: Precision,
    pools: KVPools,
    num_threads: int | None,
    supply: ExpertSupply | None = None,
) -> CpuModel:
    """The numba path. Raises ValueError when it has no kernels for the model, ImportError without numba.

    `supply`: where routed experts come from that `weights` leave out.
    """
    from workers.cpu.model import CpuModel

    return CpuModel(config, weights, precision, pools, num_threads, supply=supply)


def build_gpu_model(
    config: ModelConfig,
    weights: ModelWeights | GpuWeights,
    pools: KVPools,
    *,
    max_context: int | None,
    experts: GpuExperts | None = None,
) -> GpuModel:
    """The Triton path; fp32 weights are converted without rounding.

    `experts`: where routed experts are that `weights` leave out; not open yet.

    Raises `InexactWeights` when that is not possible, and ValueError for a shape without kernels.
    """
    from workers.gpu.loading import convert
    from workers.gpu.model import GpuModel
    from workers.gpu.weights import GpuWeights

    operands = weights if isinstance(weights, GpuWeights) else convert(config, weights, pools.device)
    if experts is None:
        return GpuModel(config, operands, pools, max_context=max_context)
    return GpuModel(config, experts.attach(operands), pools, max_context=max_context, **experts.model_options())
