"""From a checkpoint folder and a `WorkerConfig` to a ready `Engine`.

Owns: loading weights once, the choice of pool sizes and stored format. Does not own: reading files
(`workers/checkpoint`), arithmetic of budgets (`workers/sizing.py`), which kernels run (`workers/ops.py`).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kvstore.checksum import checksum
from kvstore.pools.aggregate import KVPools, PoolSizes
from workers.checkpoint.load import load_named
from workers.checkpoint.progress import OnProgress
from workers.config import WorkerConfig
from workers.engine import Engine, ModelFacts
from workers.errors import BadConfig
from workers.messages import WorkerRole
from workers.model.config import ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.transformer import Transformer
from workers.model.weights import ModelWeights
from workers.sizing import plan_pools

logger = logging.getLogger(__name__)

IDENTITY_BYTES = 4096
"""Bytes of each tensor that enter the model's identity: enough to tell two trainings of one shape apart."""


@dataclass(frozen=True, slots=True)
class ModelBundle:
    """One loaded model; engines of one process may share it."""

    config: ModelConfig
    weights: ModelWeights
    name: str
    model_hash: str
    """Identity of the weights: KV images of another model are refused."""

    @classmethod
    def from_named(cls, config: ModelConfig, tensors: dict[str, Tensor], name: str) -> ModelBundle:
        """A bundle of fp32 tensors by official name; draft blocks are left out."""
        trunk = {key: tensor for key, tensor in tensors.items() if not key.startswith("mtp.")}
        return cls(config, ModelWeights.from_named(config, trunk), name, identity_of(trunk))

    @classmethod
    def load(cls, directory: str | Path, *, name: str = "", on_progress: OnProgress | None = None) -> ModelBundle:
        """Reads a checkpoint folder. Raises `BadCheckpoint` or `BadConfig`."""
        began = time.perf_counter()
        config, tensors = load_named(directory, draft_blocks=False, on_progress=on_progress)
        bundle = cls.from_named(config, tensors, name or Path(directory).resolve().name)
        logger.info("model=%s hash=%s load_s=%.1f", bundle.name, bundle.model_hash, time.perf_counter() - began)
        return bundle


def identity_of(tensors: dict[str, Tensor]) -> str:
    """Hex digest of names, shapes and the first bytes of every tensor."""
    parts = []
    for key in sorted(tensors):
        tensor = tensors[key]
        head = tensor.reshape(-1)[: IDENTITY_BYTES // tensor.element_size()].contiguous()
        parts.append(f"{key} {tuple(tensor.shape)} {checksum(head.cpu().view(torch.uint8).numpy().data):x}")
    return f"{checksum(chr(10).join(parts).encode()):016x}"


def precision_of(mode: str) -> Precision:
    """`native` or `fp32`. Raises `BadConfig` for anything else."""
    if mode == "native":
        return Precision.native()
    if mode == "fp32":
        return Precision.fp32()
    raise BadConfig("precision", mode, "'native' or 'fp32'", "worker config")


def make_engine(
    bundle: ModelBundle, precision: Precision, sizes: PoolSizes, *, device: str = "cpu", num_threads: int = 1
) -> Engine:
    """An engine with pools of these sizes."""
    spec = kv_spec(bundle.config, "fp8" if precision.kv_fp8 else "fp32")
    pools = KVPools(spec, sizes, device, model_hash=bundle.model_hash)
    facts = ModelFacts(bundle.name, bundle.config.vocab_size, bundle.config.eos_token_id)
    weights = bundle.weights if pools.device.type == "cpu" else bundle.weights.to(bundle.config, pools.device)
    model = Transformer(bundle.config, weights, precision, pools, num_threads=num_threads)
    return Engine(model, pools, facts)


def build_engine(
    config: WorkerConfig, bundle: ModelBundle | None = None, *, on_progress: OnProgress | None = None
) -> Engine:
    """The engine of one worker: loads `config.model_dir` unless a bundle is given, and sizes pools by the budget.

    Raises `BadCheckpoint`, or `BadConfig` when the budget or the context cannot be had.
    """
    torch.set_num_threads(config.num_threads)
    bundle = bundle or ModelBundle.load(config.model_dir, name=config.model_name, on_progress=on_progress)
    longest = bundle.config.max_position_embeddings
    if config.max_context > longest:
        raise BadConfig("max_context", config.max_context, f"at most {longest}, the model's own limit", "worker config")
    precision = precision_of(config.precision)
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
    return make_engine(bundle, precision, sizes, device=config.device, num_threads=config.num_threads)
