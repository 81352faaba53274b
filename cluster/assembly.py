"""Builds the parts that actors run: a served worker from its spec, a router over its backends.

Owns: the translation from deployment settings to each part's own config, and the worker statistics that the router's
`/metrics` adds. Does not own: the parts. This module imports torch, grpc or aiohttp only inside the function whose
process needs it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.backends import Client, ReplaceableBackend, WorkerAddress
from cluster.config import Effort
from cluster.metrics import Member, render
from kvstore.tiers.config import TiersConfig
from workers.config import WorkerConfig
from workers.errors import RequestError
from workers.experts.config import ExpertConfig
from workers.messages import WorkerRole, WorkerStats
from workers.retract.config import RetractConfig

if TYPE_CHECKING:
    from cluster.actors import RouterSpec, WorkerSpec
    from router.model_info import EffortStyle
    from router.server import RunningRouter
    from workers.checkpoint.progress import OnProgress
    from workers.engine import Engine
    from workers.service.server import RunningWorker

STATS_S = 1.0
"""Wait for one worker's statistics when `/metrics` is read; a worker that is late is left out."""

OFFICIAL_VOCABULARY = 129280
"""Rows of the official checkpoints' embedding (config.json of DeepSeek-V4-Flash and -Pro)."""


def worker_config(spec: WorkerSpec, advertise_host: str) -> WorkerConfig:
    """The worker's own config."""
    return WorkerConfig(
        role=spec.role,
        name=spec.name,
        model_dir=str(spec.model),
        model_name=spec.model_name,
        precision=spec.precision,
        device=spec.device,
        num_threads=spec.threads,
        host=spec.host,
        port=spec.port,
        advertise_host=advertise_host,
        kv_budget_bytes=spec.kv_budget_bytes,
        max_running=spec.max_running,
        max_waiting=spec.max_waiting,
        max_context=spec.max_context,
        chunk_tokens=spec.chunk_tokens,
        request_timeout_s=spec.request_deadline_s,
        lease_s=spec.lease_s,
        retract=retract_config(spec),
        experts=expert_config(spec),
        allow_retract_control=spec.allow_retract_control,
        **dict(spec.pool_units),
    )


def retract_config(spec: WorkerSpec) -> RetractConfig:
    """The worker's own settings of retract and resume; its files carry its name."""
    settings = spec.retract
    tiers = TiersConfig(
        host_budget_bytes=settings.host_budget,
        disk_directory="" if settings.disk_directory is None else str(settings.disk_directory),
        disk_owner=spec.name,
        disk_budget_bytes=settings.disk_budget,
        disk_fsync=settings.disk_fsync,
    )
    return RetractConfig(
        admission=settings.admission.value,
        extra_requests=settings.extra_requests,
        horizon_steps=settings.horizon_steps,
        max_retracts=settings.max_retracts,
        min_run_steps=settings.min_run_steps,
        forecast_quantile=settings.forecast_quantile,
        forecast_safety=settings.forecast_safety,
        forecast_initial=settings.forecast_initial,
        time_slice_steps=settings.time_slice_steps,
        guest_budget_bytes=settings.guest_budget,
        tiers=tiers,
    )


def expert_config(spec: WorkerSpec) -> ExpertConfig:
    """The worker's own settings of its routed experts."""
    settings = spec.experts
    return ExpertConfig(
        hbm_bytes=settings.hbm,
        slots=settings.slots,
        total_gpu_bytes=settings.total_gpu,
        host_bytes=settings.host,
        policy=settings.policy.value,
        source=settings.source.value,
        preload=settings.preload,
        packed="" if settings.packed is None else str(settings.packed),
        verify=settings.verify,
        verbose=settings.verbose,
        worker=spec.name,
        share=spec.share,
        peer=spec.peer,
    )


def effort_style(spec: RouterSpec) -> EffortStyle:
    """The prompt convention of reasoning effort; AUTO looks at vocabulary and folder name."""
    from router.model_info import EffortStyle

    if spec.effort != Effort.AUTO.value:
        return EffortStyle(spec.effort)
    vocabulary = json.loads((spec.model / "config.json").read_text()).get("vocab_size")
    if vocabulary != OFFICIAL_VOCABULARY:
        return EffortStyle.NONE
    is_refresh = any(date in spec.model.name for date in ("0731", "0813"))
    return EffortStyle.REFRESH if is_refresh else EffortStyle.PREVIEW


async def serve_worker_of(spec: WorkerSpec, on_progress: OnProgress | None = None) -> RunningWorker:
    """Loads the checkpoint and serves it; the event loop stays free meanwhile. Raises `WorkerError`, `OSError`.

    `on_progress` is called from the loading thread.
    """
    from workers.model.transformer import Transformer
    from workers.model_bundle import build_engine
    from workers.service.server import SWITCH_S, serve_worker

    # Already while loading: threads that read experts share the interpreter with threads that compile kernels.
    sys.setswitchinterval(SWITCH_S)
    config = worker_config(spec, _advertised_host(spec.host))

    def load() -> Engine:
        engine = build_engine(config, on_progress=on_progress)
        if isinstance(engine.model, Transformer) and engine.model.backend == "cpu":
            from workers.cpu.warm import warm

            warm()  # links the compiled kernels now instead of in the first request
        return engine

    return await serve_worker(config, await asyncio.to_thread(load))


def connect_worker(address: WorkerAddress) -> Client:
    """A gRPC client of one incarnation."""
    from workers.service.client import WorkerClient

    return WorkerClient(address.name, address.role, address.address)


def _advertised_host(host: str) -> str:
    """What other machines are told: the node's address when the worker listens on every interface."""
    if host not in ("0.0.0.0", "::"):
        return ""
    import ray

    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


async def start_router_of(spec: RouterSpec, backends: Sequence[ReplaceableBackend]) -> RunningRouter:
    """A listening router whose `/metrics` also tells the workers' statistics."""
    from router.config import RouterConfig
    from router.model_info import ModelInfo
    from router.server import start_router

    config = RouterConfig(
        host=spec.host,
        port=spec.port,
        api_keys=spec.api_keys,
        max_active_requests=spec.max_concurrent,
        request_timeout_s=spec.request_deadline_s,
        drain_s=spec.drain_s,
    )
    info = ModelInfo.from_dir(
        Path(spec.model), name=spec.model_name, effort=effort_style(spec), max_context=spec.max_context
    )

    async def worker_metrics() -> str:
        members = [Member(backend.name, backend.role, backend.num_restarts) for backend in backends]
        return render(await worker_stats(backends), members)

    decode = [backend for backend in backends if backend.role is WorkerRole.DECODE]
    return await start_router(
        config,
        [backend for backend in backends if backend.role is WorkerRole.PREFILL],
        decode,
        Path(spec.model),
        info,
        worker_metrics,
        decode if spec.allow_retract_control else (),
    )


async def worker_stats(backends: Sequence[ReplaceableBackend]) -> list[WorkerStats]:
    """Statistics of every worker that answers in time."""

    async def ask(backend: ReplaceableBackend) -> WorkerStats | None:
        try:
            async with asyncio.timeout(STATS_S):
                return await backend.stats()
        except (TimeoutError, RequestError):
            return None

    answers = await asyncio.gather(*(ask(backend) for backend in backends))
    return [stats for stats in answers if stats is not None]
