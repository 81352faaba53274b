"""From a checkpoint folder and a `WorkerConfig` to a ready `Engine`.

Owns: loading weights once, the choice of pool sizes and stored format. Does not own: reading files
(`workers/checkpoint`), arithmetic of budgets (`workers/sizing.py`), which kernels run (`workers/ops.py`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvstore.checksum import checksum
from kvstore.pools.aggregate import KVPools, PoolSizes
from workers import ops
from workers.checkpoint.check import check_directory
from workers.checkpoint.load import HEAD_BYTES, TensorHead, load_named, load_without_experts
from workers.checkpoint.progress import OnProgress
from workers.config import WorkerConfig
from workers.engine import Engine, ModelFacts
from workers.errors import BadConfig, InexactWeights
from workers.experts.config import ExpertConfig
from workers.experts.records import ExpertRecords
from workers.experts.repack import read_packed
from workers.experts.supply import ExpertSupply
from workers.messages import WorkerRole
from workers.model.config import PAGE_TOKENS, LayerKind, ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.transformer import Transformer
from workers.model.weights import ModelWeights
from workers.sizing import plan_pools

if TYPE_CHECKING:
    from workers.gpu.model import GpuModel
    from workers.gpu.weights import GpuWeights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ModelBundle:
    """One loaded model; engines of one process may share it."""

    config: ModelConfig
    weights: ModelWeights | GpuWeights
    """fp32 in host memory, or operands of the GPU kernels on their device."""
    name: str
    model_hash: str
    """Identity of the weights, however they are held: KV images of another model are refused."""
    supply: ExpertSupply | None = None
    """Where routed experts come from when `weights` have none in memory."""

    @classmethod
    def from_named(cls, config: ModelConfig, tensors: dict[str, Tensor], name: str) -> ModelBundle:
        """A bundle of fp32 tensors by official name; draft blocks are left out."""
        trunk = {key: tensor for key, tensor in tensors.items() if not key.startswith("mtp.")}
        return cls(config, ModelWeights.from_named(config, trunk), name, identity_of(trunk))

    @classmethod
    def load(cls, directory: str | Path, *, name: str = "", on_progress: OnProgress | None = None) -> ModelBundle:
        """Reads a checkpoint folder into fp32. Raises `BadCheckpoint` or `BadConfig`."""
        began = time.perf_counter()
        config, tensors = load_named(directory, draft_blocks=False, on_progress=on_progress)
        bundle = cls.from_named(config, tensors, name or Path(directory).resolve().name)
        logger.info("model=%s hash=%s load_s=%.1f", bundle.name, bundle.model_hash, time.perf_counter() - began)
        return bundle

    @classmethod
    def load_limited(
        cls,
        directory: str | Path,
        experts: ExpertConfig,
        *,
        num_readers: int = 1,
        name: str = "",
        on_progress: OnProgress | None = None,
    ) -> ModelBundle:
        """As `load`, without the routed experts: those are read when they are needed, by up to `num_readers` threads.

        Raises `BadCheckpoint`, `BadConfig`, or `OSError` for a repacked file that cannot be opened.
        """
        began = time.perf_counter()
        checked, tensors, heads = load_without_experts(directory, on_progress=on_progress)
        records = ExpertRecords.of_checkpoint(checked)
        if experts.packed:
            records = read_packed(experts.packed, records)
        supply = ExpertSupply(records, experts, num_readers=num_readers)
        identity = identity_of_heads(heads | {key: head_of_values(tensor) for key, tensor in tensors.items()})
        absent = {key: torch.empty(head.shape, device="meta") for key, head in heads.items()}
        weights = ModelWeights.from_named(checked.config, tensors | absent)
        name = name or Path(directory).resolve().name
        logger.info("model=%s hash=%s load_s=%.1f, experts elsewhere", name, identity, time.perf_counter() - began)
        return cls(checked.config, weights, name, identity, supply)

    @classmethod
    def load_limited_for(
        cls,
        directory: str | Path,
        device: torch.device | str,
        precision: Precision,
        experts: ExpertConfig,
        *,
        num_readers: int = 1,
        name: str = "",
        on_progress: OnProgress | None = None,
    ) -> ModelBundle:
        """As `load_limited` for a GPU: everything but the routed experts, as operands on `device`.

        Raises `BadConfig` also where the Triton kernels cannot run the model: nothing else reads experts elsewhere.
        """
        from workers.gpu.loading import load_checkpoint

        reason = ops.no_triton_reason(check_directory(directory).require_sound().config, precision)
        if reason is not None:
            raise BadConfig("experts", "a budget", f"none on this GPU: {reason}", "worker config")
        checked, weights, heads = load_checkpoint(directory, device, routed_experts=False, on_progress=on_progress)
        records = ExpertRecords.of_checkpoint(checked)
        if experts.packed:
            records = read_packed(experts.packed, records)
        supply = ExpertSupply(records, experts, num_readers=num_readers)
        name = name or Path(directory).resolve().name
        return cls(checked.config, weights, name, identity_of_heads(heads), supply)

    @classmethod
    def load_for(
        cls,
        directory: str | Path,
        device: torch.device | str,
        precision: Precision,
        *,
        name: str = "",
        on_progress: OnProgress | None = None,
    ) -> ModelBundle:
        """As `load`, but where the Triton kernels will run the model, straight into their operands on `device`.

        Host memory then holds one stored tensor at a time, and no fp32 form of a matrix exists anywhere.
        """
        if torch.device(device).type == "cuda":
            from workers.gpu.loading import load_checkpoint

            reason = ops.no_triton_reason(check_directory(directory).require_sound().config, precision)
            if reason is None:
                try:
                    checked, weights, heads = load_checkpoint(directory, device, on_progress=on_progress)
                    name = name or Path(directory).resolve().name
                    return cls(checked.config, weights, name, identity_of_heads(heads))
                except InexactWeights as error:
                    reason = str(error)
            logger.info("model=%s is loaded in fp32: %s", directory, reason)
        return cls.load(directory, name=name, on_progress=on_progress)


def identity_of(tensors: dict[str, Tensor]) -> str:
    """Hex digest of names, shapes and the first bytes of every tensor."""
    return identity_of_heads({key: head_of_values(tensor) for key, tensor in tensors.items()})


def head_of_values(tensor: Tensor) -> TensorHead:
    """Shape and first bytes of a decoded tensor."""
    head = tensor.reshape(-1)[: HEAD_BYTES // tensor.element_size()].contiguous()
    return TensorHead(tuple(tensor.shape), head.cpu())


def identity_of_heads(heads: Mapping[str, TensorHead]) -> str:
    """`identity_of` the tensors that begin so."""
    parts = []
    for key in sorted(heads):
        head = heads[key]
        parts.append(f"{key} {head.shape} {checksum(head.values.view(torch.uint8).numpy().data):x}")
    return f"{checksum(chr(10).join(parts).encode()):016x}"


def precision_of(mode: str) -> Precision:
    """`native` or `fp32`. Raises `BadConfig` for anything else."""
    if mode == "native":
        return Precision.native()
    if mode == "fp32":
        return Precision.fp32()
    raise BadConfig("precision", mode, "'native' or 'fp32'", "worker config")


def make_engine(
    bundle: ModelBundle,
    precision: Precision,
    sizes: PoolSizes,
    *,
    device: str = "cpu",
    num_threads: int = 1,
    max_context: int | None = None,
    role: WorkerRole | None = None,
    total: TotalGpu | None = None,
    on_progress: OnProgress | None = None,
) -> Engine:
    """An engine with pools of these sizes, for sequences of up to `max_context` tokens (default: what fits).

    `role`: the only kind of steps it will run, which saves memory for the other kind where experts are limited.
    `total`: of a worker whose experts get what the rest leaves of a GPU.
    """
    spec = kv_spec(bundle.config, "fp8" if precision.kv_fp8 else "fp32")
    pools = KVPools(spec, sizes, device, model_hash=bundle.model_hash)
    facts = ModelFacts(bundle.name, bundle.config.vocab_size, bundle.config.eos_token_id)
    on_gpu = None
    if bundle.supply is not None and pools.device.type == "cuda":
        from workers.gpu.serving_experts import ExpertDuties, GpuExperts

        duties = ExpertDuties(role is not WorkerRole.PREFILL, role is not WorkerRole.DECODE, sizes.slots)
        key = bundle.model_hash
        on_gpu = GpuExperts(bundle.config, bundle.supply, duties, pools.device, num_readers=num_threads, key=key)
    model = Transformer(
        bundle.config,
        bundle.weights,
        precision,
        pools,
        num_threads=num_threads,
        max_context=max_context,
        supply=bundle.supply,
        gpu_experts=on_gpu,
    )
    if on_gpu is not None:
        assert model.ahead is not None
        spare = None if total is None else total.left_beside(model.ahead, role)
        try:
            on_gpu.begin(spare_bytes=spare, on_progress=on_progress)
            model.ahead.compile(decode=role is not WorkerRole.PREFILL, prefill=role is not WorkerRole.DECODE)
            on_gpu.finish(on_progress=on_progress)
        except BaseException:
            # Or the bank is filled on beside a start that has failed.
            on_gpu.close()
            raise
    return Engine(model, pools, facts)


class TotalGpu:
    """A worker's promise about all of its GPU memory; made before anything is loaded."""

    def __init__(self, config: WorkerConfig, total_bytes: int) -> None:
        from workers.gpu.device_budget import DeviceBudget

        self._config, self._budget = config, DeviceBudget(config.device, total_bytes)

    def left_beside(self, model: GpuModel, role: WorkerRole | None) -> int:
        """Bytes for experts, once everything that steps of the largest size need has been allocated."""
        config = self._config
        if role is not WorkerRole.PREFILL:
            model.reserve_decode()
        if role is not WorkerRole.DECODE:
            tokens = min(config.max_running * config.max_context, model.pools.sizes.full_pages * PAGE_TOKENS)
            entries = tokens // LayerKind.C4.value
            model.reserve_prefill(config.chunk_tokens, num_sequences=config.max_running, num_entries=entries)
        return self._budget.spare_bytes()

    def seal(self) -> None:
        """Nothing more is taken from here on. Raises `BadConfig` when the total is exceeded already."""
        self._budget.seal()


def _load(config: WorkerConfig, precision: Precision, on_progress: OnProgress | None) -> ModelBundle:
    """The worker's checkpoint, as its device and its experts' budget want it."""
    named: dict[str, Any] = {"name": config.model_name, "on_progress": on_progress}
    if not config.experts.is_limited:
        return ModelBundle.load_for(config.model_dir, config.device, precision, **named)
    named["num_readers"] = config.num_threads
    if torch.device(config.device).type == "cuda":
        return ModelBundle.load_limited_for(config.model_dir, config.device, precision, config.experts, **named)
    if config.experts.total_gpu_bytes is not None:
        found, expected = config.experts.total_gpu_bytes, "experts.hbm or experts.slots on a CPU worker"
        raise BadConfig("experts.total_gpu", found, expected, "worker config")
    return ModelBundle.load_limited(config.model_dir, config.experts, **named)


def build_engine(
    config: WorkerConfig, bundle: ModelBundle | None = None, *, on_progress: OnProgress | None = None
) -> Engine:
    """The engine of one worker: loads `config.model_dir` unless a bundle is given, and sizes pools by the budget.

    Raises `BadCheckpoint`, or `BadConfig` when the budget or the context cannot be had.
    """
    torch.set_num_threads(config.num_threads)
    precision = precision_of(config.precision)
    total = None
    if config.experts.total_gpu_bytes is not None and torch.device(config.device).type == "cuda":
        total = TotalGpu(config, config.experts.total_gpu_bytes)
    bundle = bundle or _load(config, precision, on_progress)
    longest = bundle.config.max_position_embeddings
    if config.max_context > longest:
        raise BadConfig("max_context", config.max_context, f"at most {longest}, the model's own limit", "worker config")
    plan = plan_pools(
        kv_spec(bundle.config, "fp8" if precision.kv_fp8 else "fp32"),
        budget_bytes=config.kv_budget_bytes,
        max_running=config.max_running,
        max_context=config.max_context,
        chunk_tokens=config.chunk_tokens if config.role is WorkerRole.PREFILL else 1,
    )
    sizes = PoolSizes(
        config.full_pages or plan.full_pages, config.window_pages or plan.window_pages, config.slots or plan.slots
    )
    logger.info("worker=%s pools=%s kv_bytes=%d", config.name, sizes, plan.total_bytes)
    engine = make_engine(
        bundle,
        precision,
        sizes,
        device=config.device,
        num_threads=config.num_threads,
        max_context=config.max_context,
        role=config.role,
        total=total,
        on_progress=on_progress,
    )
    engine.warm_up(decode=config.role is WorkerRole.DECODE)
    if total is not None:
        total.seal()
    return engine
