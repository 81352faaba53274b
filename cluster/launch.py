"""Starts a deployment on Ray, waits until it answers, keeps it healthy, and stops every process of it.

Owns: the connection to Ray, actor handles, start and stop order, the record of local processes. Does not own: what the
actors do, which actors there are (`cluster/placement.py`). Invariants: nothing outlives `close`, which verifies it by
pid; a failed start is reported as the worker's own error and leaves nothing behind; a Ray that was running before is
left running.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cluster.actors import PartFailed, RouterActor, RouterSpec, WorkerActor, WorkerSpec
from cluster.backends import WorkerAddress
from cluster.config import DEFAULT_MAX_CONTEXT, ClusterConfig
from cluster.errors import ClusterError
from cluster.health import HealthWatch
from cluster.placement import ActorPlan, NodeResources, plan
from cluster.processes import ProcessRef, adopt_orphans, descendants, end_descendants
from cluster.ray_worker import PROBE_S, RayWorker, first_line
from workers.messages import WorkerRole

logger = logging.getLogger(__name__)

PROGRESS_S = 2.0
"""Time between two lines about a checkpoint that is being read."""

OBJECT_STORE_BYTES = 80 * 2**20
"""Ray's shared-memory store; nothing of ours goes through it, and Ray refuses less than 75 MB."""

Report = Callable[[str], None]


class StartFailed(ClusterError):
    """The deployment did not come up; the message is the reason of the part that failed."""


class Cluster:
    """One running deployment. Made by `start_cluster`; `close` ends it and everything it started."""

    def __init__(self, config: ClusterConfig, report: Report) -> None:
        self._config = dataclasses.replace(config, max_context=context_limit(config))
        self._report = report
        self._workers: dict[str, RayWorker] = {}
        self._share = ""
        """Folder in which workers of one node find each other's experts; empty where none is absent."""
        self._router: Any = None
        self._is_connected = False
        self.addresses: dict[str, WorkerAddress] = {}
        self.url = ""

    @property
    def share(self) -> Path | None:
        """Folder in which workers of one node find each other's experts; None where none is absent."""
        return Path(self._share) if self._share else None

    @property
    def reads_peers(self) -> bool:
        """Whether there are workers that read experts from each other's GPUs."""
        return any(worker.peer is not None for worker in self._workers.values())

    @property
    def local_processes(self) -> tuple[ProcessRef, ...]:
        """Every process on this machine that this one started, now."""
        return descendants(os.getpid())

    def start(self) -> None:
        """Brings everything up. Raises `StartFailed`, `DoesNotFit`."""
        began = time.perf_counter()
        adopt_orphans()
        _connect_ray(self._config)
        self._is_connected = True
        kind = "connected" if self._config.ray.address else "started"
        self._report(f"ray         {kind} in {time.perf_counter() - began:.1f} s, logs in {_log_folder()}")
        plans = plan(self._config, _nodes())
        deadline = time.monotonic() + self._config.ray.start_deadline
        if self._config.experts.is_limited:
            self._share = tempfile.mkdtemp(prefix="dsv4-")
        for item in plans:
            handle = _create_worker(item, self._config, self._share)
            self._workers[item.name] = RayWorker(handle, item.name, self._config.ray.start_deadline)
        for item in plans:
            if item.peer is not None:
                self._workers[item.name].peer = self._workers[item.peer.name]
        self._router = _create_router(self._config)
        self._report("workers     loading the model")
        self._start_workers(deadline)
        self._start_router(deadline)

    def _start_workers(self, deadline: float) -> None:
        """All at once; the first failure ends the wait."""
        import ray

        for name, worker in self._workers.items():
            with _actor_errors(name):
                worker.note_gpus(max(0.0, deadline - time.monotonic()))
        pending = {worker.handle.start.remote(worker.beside): name for name, worker in self._workers.items()}
        while pending:
            done, _ = ray.wait(list(pending), timeout=max(0.0, min(PROGRESS_S, deadline - time.monotonic())))
            if not done and time.monotonic() >= deadline:
                waiting = ", ".join(pending.values())
                raise StartFailed(f"{waiting}: not ready after {self._config.ray.start_deadline:g} s")
            if not done:
                self._report_loading(pending.values())
                continue
            name = pending.pop(done[0])
            with _actor_errors(name):
                address: WorkerAddress = ray.get(done[0])
            self.addresses[name] = address
            self._report(f"{name:<11} ready in {address.start_s:.1f} s at {address.address}")
            if address.note:
                self._report(f"{name:<11} {address.note}")

    def _report_loading(self, names: Iterable[str]) -> None:
        """One line for each worker that is reading its checkpoint."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        for name in names:
            with contextlib.suppress(RayActorError, GetTimeoutError):
                progress = ray.get(self._workers[name].handle.progress.remote(), timeout=PROBE_S)
                if progress is not None and progress.done_bytes < progress.total_bytes:
                    done, total = progress.done_bytes / 1e9, progress.total_bytes / 1e9
                    rate = progress.bytes_per_s / 1e9
                    self._report(f"{name:<11} loaded {done:.1f} of {total:.1f} GB at {rate:.2f} GB/s")

    def _start_router(self, deadline: float) -> None:
        import ray

        with _actor_errors("router"):
            started = self._router.start.remote(tuple(self.addresses.values()), self._config.router.port)
            self.url = ray.get(started, timeout=max(1.0, deadline - time.monotonic()))
        self._report(f"router      {self.url}/v1")

    def watch(self) -> HealthWatch:
        """A watch over the workers of this deployment."""
        return HealthWatch(self._workers, self.addresses, self, self._report)

    def bind(self, address: WorkerAddress) -> None:
        """Tells the router where a worker is now."""
        self.addresses[address.name] = address
        self._call_router("bind", address)

    def unbind(self, name: str) -> None:
        """Tells the router that a worker is down."""
        self._call_router("unbind", name)

    def check_router(self) -> bool:
        """Starts the router again in a process that Ray has replaced; False while there is none."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            if not ray.get(self._router.is_started.remote(), timeout=PROBE_S):
                port = int(self.url.rpartition(":")[2])
                ray.get(self._router.start.remote(tuple(self.addresses.values()), port), timeout=30.0)
                self._report(f"router is back at {self.url}/v1")
        except (RayActorError, GetTimeoutError):
            return False
        except RayTaskError as exc:
            self._report(f"router does not start again: {first_line(exc.cause or exc)}")
            return False
        return True

    def _call_router(self, method: str, argument: object) -> None:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        with contextlib.suppress(RayActorError, GetTimeoutError):
            ray.get(getattr(self._router, method).remote(argument), timeout=PROBE_S)

    def close(self) -> tuple[ProcessRef, ...]:
        """Stops router, workers and a Ray that was started here; returns local processes that survived (none)."""
        if self._share:
            shutil.rmtree(self._share, ignore_errors=True)
        if not self._is_connected:
            return end_descendants((), grace_s=0.0)
        import ray

        started = self.local_processes
        actors = [actor for actor in (self._router, *(worker.handle for worker in self._workers.values())) if actor]
        if self._router is not None:
            _stop(self._router, timeout_s=self._config.router.drain + 2.0)
        stops = [worker.handle.stop.remote() for worker in self._workers.values()]
        if stops:
            ray.wait(stops, num_returns=len(stops), timeout=5.0)
        for actor in actors:
            ray.kill(actor, no_restart=True)
        ray.shutdown()
        self._is_connected = False
        return end_descendants(started, grace_s=5.0)


@contextlib.contextmanager
def start_cluster(config: ClusterConfig, report: Report) -> Iterator[Cluster]:
    """A running deployment for the length of the block. Raises `StartFailed`, `DoesNotFit`."""
    cluster = Cluster(config, report)
    try:
        cluster.start()
        yield cluster
    finally:
        survivors = cluster.close()
        if survivors:
            logger.error("survivors pids=%s", [ref.pid for ref in survivors])


def _connect_ray(config: ClusterConfig) -> None:
    """Starts a local Ray without dashboard, bound to this machine, or joins the one at `config.ray.address`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if not config.ray.address:
        # Ray replaces 127.0.0.1 by an outside address except under this switch, which is read on import. It is what
        # keeps a laptop's Ray, which runs any code it is sent, off the network.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        # Ray kills a worker when 95 % of the machine's memory is in use. Ours have budgets of their own, and a bank of
        # experts may well be most of a machine, or of a virtual one that grows as it is used.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    import ray

    settings: dict[str, Any] = {
        "namespace": config.ray.namespace,
        "logging_level": logging.ERROR,
        "log_to_driver": False,
    }
    if config.ray.address:
        settings["address"] = config.ray.address
    else:
        num_actors = config.prefill.count + config.decode.count + 1
        settings |= {
            "address": "local",
            "include_dashboard": False,
            "num_cpus": max(num_actors, os.cpu_count() or 1),
            "object_store_memory": OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
        }
    try:
        with _own_signals():
            ray.init(**settings)
    except (ConnectionError, ValueError, RuntimeError) as exc:
        where = f"Ray at {config.ray.address}" if config.ray.address else "a local Ray"
        raise StartFailed(f"{where}: {first_line(exc)}") from exc


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Puts the caller's handlers back after the block.

    Ray's own prints a stack and ends the process on the spot: a SIGTERM while models load would leave its processes to
    find out by themselves that nobody wants them.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                if callable(handler):
                    signal.signal(number, handler)


def _log_folder() -> str:
    """Where Ray keeps the output of every process."""
    import ray

    context = ray.get_runtime_context()
    return os.path.join(context.get_temp_dir(), context.get_session_name(), "logs")


def _nodes() -> list[NodeResources]:
    import ray

    return [
        NodeResources(node["NodeManagerAddress"], node["Resources"].get("GPU", 0.0), node["Resources"].get("CPU", 0.0))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]


def _create_worker(item: ActorPlan, config: ClusterConfig, share: str) -> Any:
    import ray

    actor = ray.remote(WorkerActor).options(
        name=item.name,
        num_cpus=item.num_cpus,
        num_gpus=item.num_gpus,
        max_restarts=config.ray.max_restarts,
        max_task_retries=0,
        max_concurrency=64,
    )
    return actor.remote(worker_spec(item, config, share))


def _create_router(config: ClusterConfig) -> Any:
    import ray

    actor = ray.remote(RouterActor).options(
        name="router",
        num_cpus=0,
        max_restarts=config.ray.max_restarts,
        max_task_retries=0,
        max_concurrency=64,
    )
    return actor.remote(router_spec(config))


def context_limit(config: ClusterConfig) -> int:
    """The configured limit, or the model's own. Raises `StartFailed` when its config.json is unreadable."""
    if config.max_context is not None:
        return config.max_context
    path = config.model / "config.json"
    try:
        return min(DEFAULT_MAX_CONTEXT, int(json.loads(path.read_text())["max_position_embeddings"]))
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise StartFailed(f"{path}: max_position_embeddings: {exc!r}") from exc


def worker_spec(item: ActorPlan, config: ClusterConfig, share: str = "") -> WorkerSpec:
    """The settings of one worker process. `share`: folder of this deployment on each node."""
    role = config.prefill if item.role is WorkerRole.PREFILL else config.decode
    return WorkerSpec(
        name=item.name,
        role=item.role,
        model=config.model,
        model_name=config.served_name,
        device=item.device,
        precision=config.precision.value,
        threads=item.threads,
        max_context=context_limit(config),
        kv_budget_bytes=role.kv_budget,
        chunk_tokens=config.prefill.chunk_tokens,
        max_running=role.max_running,
        max_waiting=config.decode.max_waiting,
        lease_s=config.decode.lease,
        request_deadline_s=config.router.request_deadline,
        host=config.ray.worker_host,
        port=item.port,
        pool_units=pool_units(config, item.role),
        retract=config.retract,
        experts=config.experts,
        share=share,
        peer=item.peer,
        allow_retract_control=config.admin.allow_retract_control,
    )


def pool_units(config: ClusterConfig, role: WorkerRole) -> tuple[tuple[str, int], ...]:
    """(field of `WorkerConfig`, units) of the pools whose size the config names."""
    if role is not WorkerRole.DECODE:
        return ()
    named = {key: getattr(config.decode, key) for key in ("full_pages", "window_pages", "slots")}
    return tuple((key, units) for key, units in named.items() if units is not None)


def router_spec(config: ClusterConfig) -> RouterSpec:
    """The settings of the router process."""
    return RouterSpec(
        host=config.router.host,
        port=config.router.port,
        api_keys=config.router.api_keys,
        model=config.model,
        model_name=config.served_name,
        effort=config.effort.value,
        max_context=context_limit(config),
        max_concurrent=config.router.max_concurrent,
        request_deadline_s=config.router.request_deadline,
        drain_s=config.router.drain,
        allow_retract_control=config.admin.allow_retract_control,
    )


@contextlib.contextmanager
def _actor_errors(name: str) -> Iterator[None]:
    """Ray's wrappers become `StartFailed` with the error that the actor itself raised."""
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        yield
    except RayTaskError as exc:
        cause = exc.cause or exc
        logger.debug("start_failed name=%s", name, exc_info=exc)
        kind = "" if isinstance(cause, PartFailed) else f"{type(cause).__name__}: "
        raise StartFailed(f"{name}: {kind}{first_line(cause)}") from exc
    except RayActorError as exc:
        raise StartFailed(f"{name}: its process died: {first_line(exc)}") from exc
    except GetTimeoutError as exc:
        raise StartFailed(f"{name}: not ready in time") from exc


def _stop(actor: Any, timeout_s: float) -> None:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    with contextlib.suppress(RayError, GetTimeoutError):
        ray.get(actor.stop.remote(), timeout=timeout_s)
