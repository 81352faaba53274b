"""Ray actors: the processes of a deployment, each a thin shell over one part that knows nothing of Ray.

Owns: process set-up (threads, device), building the part from its settings, its address and incarnation. Does not own:
placement, start order, restarts (`cluster/launch.py`, `cluster/health.py`). A constructor only stores its settings, so
that a process that Ray restarts is up at once and says "not started"; loading happens in `start`, whose failure reaches
the caller as the exception it was. No method is ever retried by Ray: a silent second prefill would be a second answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.backends import ReplaceableBackend, WorkerAddress, introduce
from cluster.config import ExpertSettings, RetractSettings
from workers.checkpoint.progress import Progress
from workers.errors import WorkerError
from workers.experts.config import PeerPlace
from workers.messages import WorkerRole, WorkerStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """What one worker process needs to know; picklable."""

    name: str
    role: WorkerRole
    model: Path
    model_name: str
    device: str
    """`cpu` or `cuda`."""
    precision: str
    """`native` or `fp32`."""
    threads: int
    max_context: int
    kv_budget_bytes: int
    chunk_tokens: int
    """Prefill only."""
    max_running: int
    max_waiting: int
    """Decode only."""
    lease_s: float
    """Decode only."""
    request_deadline_s: float
    host: str
    """Address to listen on; `0.0.0.0` is every interface, of which other machines are told the node's."""
    port: int
    pool_units: tuple[tuple[str, int], ...] = ()
    """(field of `WorkerConfig`, units) of pools that are not sized by the budget."""
    retract: RetractSettings = RetractSettings()
    """Decode only."""
    experts: ExpertSettings = ExpertSettings()
    share: str = ""
    """Folder in which the deployment's workers on one node find each other's memory; empty shares nothing."""
    peer: PeerPlace | None = None
    allow_retract_control: bool = False
    """Decode only."""


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """What the router process needs to know; picklable."""

    host: str
    port: int
    api_keys: tuple[str, ...]
    model: Path
    model_name: str
    effort: str
    """Value of `config.Effort`."""
    max_context: int
    max_concurrent: int
    request_deadline_s: float
    drain_s: float
    allow_retract_control: bool = False
    """Serves /admin/retract."""


class PartFailed(Exception):
    """A part did not start. Carries text only: exceptions with their own constructors do not survive pickling."""


@contextlib.contextmanager
def _as_part_failure() -> Iterator[None]:
    try:
        yield
    except WorkerError as exc:
        raise PartFailed(str(exc)) from exc
    except OSError as exc:
        raise PartFailed(f"{exc.strerror or exc}") from exc
    except Exception as exc:
        logger.exception("start failed")
        raise PartFailed(f"{type(exc).__name__}: {exc}") from exc


class WorkerActor:
    """One prefill or decode worker in its own process."""

    def __init__(self, spec: WorkerSpec) -> None:
        # Thread counts are read once, when the libraries load: nothing here may have imported torch or numba yet.
        for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[variable] = str(spec.threads)
        _log_to_ray()
        self._spec = spec
        self._address: WorkerAddress | None = None
        self._service: Any = None
        self._progress: Progress | None = None
        self._starting = asyncio.Lock()

    async def gpus(self) -> tuple[str, ...]:
        """The GPUs that Ray gave to this process, as `CUDA_VISIBLE_DEVICES` names them."""
        import ray

        return tuple(str(gpu) for gpu in ray.get_gpu_ids())

    async def start(self, beside: tuple[str, ...] = ()) -> WorkerAddress:
        """Loads the model and listens; a second call, also a concurrent one, returns the same address.

        `beside`: GPUs of other workers whose memory this one maps. Its own comes first, so that it stays the default.
        """
        async with self._starting:
            if self._address is None:
                self._address = await self._load(beside)
            return self._address

    async def _load(self, beside: tuple[str, ...]) -> WorkerAddress:
        if beside:
            own = await self.gpus()
            # CUDA reads this when it starts, in the import below.
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dict.fromkeys((*own, *beside)))
        from cluster.assembly import serve_worker_of

        began = time.perf_counter()
        with _as_part_failure():
            self._service = await serve_worker_of(self._spec, self._note_progress)
        return WorkerAddress(
            name=self._spec.name,
            role=self._spec.role,
            address=self._service.address,
            incarnation=self._service.incarnation,
            pid=os.getpid(),
            node=_node_id(),
            start_s=time.perf_counter() - began,
            note="" if (experts := self._service.engine.experts) is None else experts.note,
        )

    async def address(self) -> WorkerAddress | None:
        """Where it listens; None until `start` has returned. A worker that has stopped by itself ends its process."""
        if self._service is not None and (failure := (await self._service.stats()).failure):
            logger.error("worker=%s failed: %s; ending the process for a fresh one", self._spec.name, failure)
            logging.shutdown()
            os._exit(1)
        return self._address

    def _note_progress(self, progress: Progress) -> None:
        self._progress = progress

    async def progress(self) -> Progress | None:
        """How far loading has come; None before the first tensor."""
        return self._progress

    async def stats(self) -> WorkerStats:
        """Counters and gauges now."""
        stats: WorkerStats = await self._service.stats()
        return stats

    async def stop(self) -> None:
        """Ends the worker: running requests end with an error event, pages are freed."""
        if self._service is not None:
            service, self._service, self._address = self._service, None, None
            await service.stop()


class RouterActor:
    """The HTTP front door in its own process."""

    def __init__(self, spec: RouterSpec) -> None:
        _log_to_ray()
        self._spec = spec
        self._backends: dict[str, ReplaceableBackend] = {}
        self._router: Any = None

    async def start(self, workers: tuple[WorkerAddress, ...], port: int) -> str:
        """Connects to the workers and listens on `port` (0: a free one); returns the base URL."""
        if self._router is None:
            from cluster.assembly import connect_worker, start_router_of

            for address in workers:
                backend = ReplaceableBackend(address.name, address.role, connect_worker)
                await backend.bind(address)
                self._backends[address.name] = backend
            await introduce(tuple(self._backends.values()))
            with _as_part_failure():
                self._router = await start_router_of(
                    dataclasses.replace(self._spec, port=port), tuple(self._backends.values())
                )
        host = "127.0.0.1" if self._spec.host in ("0.0.0.0", "::") else self._spec.host
        return f"http://{host}:{self._router.port}"

    async def bind(self, address: WorkerAddress) -> None:
        """A worker came back under a new incarnation. A fresh process knows nobody: `start` will tell it of all."""
        if (backend := self._backends.get(address.name)) is not None:
            await backend.bind(address)
            await introduce(tuple(self._backends.values()))
            if self._router is not None:
                await self._router.probe(address.name)

    async def unbind(self, name: str) -> None:
        """A worker is known to be down."""
        if (backend := self._backends.get(name)) is not None:
            await backend.unbind()

    async def is_started(self) -> bool:
        """False in a process that Ray has restarted."""
        return self._router is not None

    async def stop(self) -> None:
        """Drains running requests, then closes every connection."""
        if self._router is not None:
            router, self._router = self._router, None
            await router.close()
        for backend in self._backends.values():
            await backend.unbind()


def _log_to_ray() -> None:
    """Our log lines go to the files that Ray keeps per process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())
