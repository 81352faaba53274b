"""`serve_worker`: one worker behind one gRPC port. What Ray actors and tests start; Ray-free.

Owns: the server, the order of start and stop, statistics of all parts as one `WorkerStats`. Does not own: the model
(`workers/model_bundle.py` builds the engine), requests (`prefill.py`, `decode.py`). All methods run on the event loop
that served the worker.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable

import grpc
import torch

from kvstore.config import KVStoreConfig
from kvstore.host_memory import keep_freed_memory
from kvstore.tiers.cascade import build_cascade
from kvstore.transfer.receiver import KVReceiver
from kvstore.transfer.sender import KVSender
from kvstore.transfer.wire import channel_options
from workers.config import WorkerConfig
from workers.decode import DecodeWorker
from workers.engine import Engine, SharedExperts
from workers.experts.host_memory import page_cache_bytes
from workers.messages import SpaceStats, WorkerRole, WorkerStats
from workers.prefill import PrefillWorker
from workers.service import codec
from workers.service.control import Neighbours
from workers.service.decode import DecodeServicer, EngineOutput
from workers.service.events import EventHub
from workers.service.parking import GuestRoom, PeerTier
from workers.service.peers import Peers
from workers.service.prefill import PrefillServicer
from workers.service.recompute import PrefillAgain
from workers.service.stubs import worker_pb2 as pb
from workers.service.stubs import worker_pb2_grpc

logger = logging.getLogger(__name__)

SWITCH_S = 0.0005
"""Longest hold of the interpreter by one thread while another wants it. Python's default of 5 ms is longer than a
decode step: the engine thread, coming back from a kernel, could wait for the event loop that long."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def server_options(store: KVStoreConfig) -> list[tuple[str, int]]:
    """gRPC options of a worker's server: KV messages fit, idle clients may ping."""
    return [
        *channel_options(store),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
    ]


def store_config(config: WorkerConfig, engine: Engine) -> KVStoreConfig:
    """The transfer's knobs: landing memory for as many whole images as can be granted, but no more than the pools."""
    largest = engine.spec.image_bytes(config.max_context)
    defaults = KVStoreConfig()
    return KVStoreConfig(
        landing_budget_bytes=max(largest, min(config.max_running * largest, engine.pools.nbytes)) + (1 << 20),
        credit_bytes=max(config.credit_bytes, defaults.max_segment_bytes),
        lease_s=config.lease_s,
        max_lease_s=max(config.request_timeout_s, config.lease_s),
    )


class RunningWorker(ABC):
    """A listening worker."""

    worker: PrefillWorker | DecodeWorker

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        self.config = config
        self.engine = engine
        self.incarnation = uuid.uuid4().hex[:12]
        self.address = ""
        """`host:port` that others reach, once started."""
        self._store = store_config(config, engine)
        self._server = grpc.aio.server(options=server_options(self._store))
        self._started_s = time.monotonic()
        self._stopping = False

    async def start(self) -> None:
        """Binds the port and serves. Raises `OSError` when the port is taken."""
        host = self.config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{self.config.port}")
        except RuntimeError as exc:
            raise OSError(f"cannot listen on {host}:{self.config.port}: {exc}") from exc
        shown = self.config.advertise_host or ("127.0.0.1" if host in ("0.0.0.0", "::", "") else host)
        self.address = f"{shown}:{port}"
        self._open()
        await self._server.start()
        if (sharing := self._sharing) is not None:
            sharing.start_sharing(self.worker.loop.call)
        logger.info("worker=%s role=%s address=%s", self.config.name, self.config.role.value, self.address)

    async def stop(self) -> None:
        """Ends every request with an error event, frees all, closes the port and every thread. Safe to call again.

        A step that does not come back keeps its experts' memory.
        """
        if self._stopping:
            return
        self._stopping = True
        if (sharing := self._sharing) is not None:
            await asyncio.to_thread(sharing.stop_sharing)
        await asyncio.to_thread(self._close_worker)
        await self._end_streams()
        await self._server.stop(self.config.drain_s)
        await self._close_transfer()
        if sharing is not None and self.worker.loop.has_ended:
            await asyncio.to_thread(sharing.close)

    close = stop

    @property
    def _sharing(self) -> SharedExperts | None:
        """The model's experts, where they can be read by another worker."""
        experts = self.engine.experts
        return experts if isinstance(experts, SharedExperts) else None

    async def Stats(self, call: pb.StatsCall, context: grpc.aio.ServicerContext) -> pb.StatsReply:  # noqa: N802
        """The `Stats` call of either service."""
        return codec.stats_to_wire(self.snapshot())

    async def stats(self) -> WorkerStats:
        """Counters and gauges now."""
        return self.snapshot()

    @abstractmethod
    def snapshot(self) -> WorkerStats:
        """Counters and gauges now. Never waits for the engine thread."""

    @abstractmethod
    def _open(self) -> None:
        """Everything between a known address and the first call."""

    @abstractmethod
    def _close_worker(self) -> None:
        """Ends requests and joins the engine thread; runs on another thread."""

    @abstractmethod
    async def _end_streams(self) -> None:
        """Lets long calls end, after the worker's last events."""

    @abstractmethod
    async def _close_transfer(self) -> None:
        """Closes the KV end after the server."""

    def _common(self, *, alive: bool, failure: str) -> dict[str, object]:
        engine, times = self.engine, self.engine.times
        allocators = engine.allocators
        return {
            "name": self.config.name,
            "role": self.config.role,
            "incarnation": self.incarnation,
            "address": self.address,
            "uptime_s": time.monotonic() - self._started_s,
            "ready": alive and not self._stopping,
            "failure": failure,
            "model_name": self.config.model_name or engine.facts.name,
            "fingerprint": engine.spec.fingerprint,
            "max_context": self.config.max_context,
            "max_running": self.config.max_running,
            "full_pages": SpaceStats(allocators.full.num_pages, allocators.full.num_free),
            "window_pages": SpaceStats(allocators.window.num_pages, allocators.window.num_free),
            "slots": SpaceStats(allocators.slots.num_slots, allocators.slots.num_free),
            "steps": times.count,
            "step_s_total": times.total_s,
            "step_ms_last": times.last_s * 1e3,
            "step_ms_mean": times.mean_s * 1e3,
            "rss_bytes": _rss_bytes(),
            "page_cache_bytes": page_cache_bytes(),
            "kv_bytes_total": engine.pools.nbytes,
            **({} if engine.experts is None else engine.experts.stats_fields()),
        }


class ServedPrefill(RunningWorker):
    """A prefill worker behind its port."""

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        super().__init__(config, engine)
        self.worker = PrefillWorker(config, engine, on_thread_start=_thread_setup(config))
        self.sender = KVSender(engine.spec, self._store, model_hash=engine.pools.model_hash)
        self.servicer = PrefillServicer(self.worker, self.sender)

    def _open(self) -> None:
        self.servicer.Stats = self.Stats  # type: ignore[method-assign]
        worker_pb2_grpc.add_PrefillServiceServicer_to_server(self.servicer, self._server)  # type: ignore[no-untyped-call]

    def _close_worker(self) -> None:
        self.worker.close()

    async def _end_streams(self) -> None:
        """Prefill calls end with their prompts."""

    async def _close_transfer(self) -> None:
        await self.sender.close()

    def snapshot(self) -> WorkerStats:
        worker, sent = self.worker, self.servicer.counters
        scheduler, counters = worker.scheduler, worker.counters
        promised = scheduler.ledger.promised
        held = self.engine.allocators.full.num_held
        return WorkerStats(
            **self._common(alive=worker.loop.alive, failure=worker.loop.failure),  # type: ignore[arg-type]
            running=scheduler.num_computing,
            waiting=scheduler.num_waiting,
            draining=scheduler.num_draining,
            reserved_full_pages=max(0, promised.full_pages - held),
            leaked_pages=counters.leaked,
            requests_admitted=counters.admitted,
            requests_finished=counters.finished,
            requests_failed=counters.failed,
            requests_aborted=counters.aborted,
            requests_refused=counters.refused,
            tokens_generated=0,
            prefill_tokens=counters.tokens,
            kv_bytes_sent=sent.num_bytes,
            kv_segments_sent=sent.num_segments,
            kv_send_s_total=sent.send_s,
            kv_hidden_s_total=sent.hidden_s,
        )


class ServedDecode(RunningWorker):
    """A decode worker, its event streams and its KV receiver behind one port."""

    def __init__(self, config: WorkerConfig, engine: Engine) -> None:
        super().__init__(config, engine)
        self.hub = EventHub(config.router_grace_s, self._routers_lost)
        self._output = EngineOutput(self.hub)
        self.neighbours = self._meet_neighbours()
        tiers = config.retract.tiers
        cascade = build_cascade(
            tiers, engine.spec, model_hash=engine.pools.model_hash, extra=[self.neighbours.tier], pinned=self._pinned
        )
        self.worker = DecodeWorker(config, engine, self._output, cascade=cascade, on_thread_start=_thread_setup(config))
        self.worker.retract.parking.recomputer = self.neighbours.again
        self.servicer = DecodeServicer(self.worker, self.hub, self.neighbours)
        self.receiver = KVReceiver(
            engine.spec,
            self._store,
            on_image=self.servicer.on_image,
            on_lost=self.servicer.on_lost,
            model_hash=engine.pools.model_hash,
            pinned=self._pinned,
        )

    @property
    def _pinned(self) -> bool:
        return self.engine.pools.device.type == "cuda"

    def _meet_neighbours(self) -> Neighbours:
        config, engine, loop = self.config, self.engine, asyncio.get_running_loop()
        sender = KVSender(engine.spec, self._store, model_hash=engine.pools.model_hash)
        peers = Peers(self.incarnation)
        guests = GuestRoom(engine.spec, config.retract.guest_budget_bytes, keep_s=config.request_timeout_s)
        tier = PeerTier(f"{config.name}/{self.incarnation}", peers, sender, loop)
        return Neighbours(peers, guests, tier, PrefillAgain(peers, loop), sender)

    def _routers_lost(self, keys: list[tuple[str, int]]) -> None:
        self.servicer.on_routers_lost(keys)

    def _open(self) -> None:
        self._output.receiver = self.servicer.receiver = self.receiver
        self.neighbours.attach(self.receiver, self.address)
        self.servicer.Stats = self.Stats  # type: ignore[method-assign]
        worker_pb2_grpc.add_DecodeServiceServicer_to_server(self.servicer, self._server)  # type: ignore[no-untyped-call]
        self.receiver.add_to_server(self._server)
        self.receiver.start()

    def _close_worker(self) -> None:
        self.worker.close()

    async def _end_streams(self) -> None:
        self.hub.close()

    async def _close_transfer(self) -> None:
        await self.neighbours.close()
        await self.receiver.close()

    def snapshot(self) -> WorkerStats:
        worker, landed = self.worker, self.receiver.stats()
        scheduler, counters = worker.scheduler, worker.counters
        promised = scheduler.ledger.promised
        held = self.engine.allocators.full.num_held
        return WorkerStats(
            **self._common(alive=worker.loop.alive, failure=worker.loop.failure),  # type: ignore[arg-type]
            running=scheduler.num_running,
            waiting=scheduler.num_waiting + scheduler.num_granted,
            reserved_full_pages=max(0, promised.full_pages - held),
            leaked_pages=counters.leaked,
            requests_admitted=counters.admitted,
            requests_finished=counters.finished,
            requests_failed=counters.failed,
            requests_aborted=counters.aborted,
            requests_refused=counters.refused,
            tokens_generated=counters.tokens,
            prefill_tokens=0,
            kv_bytes_received=landed.landed_bytes,
            kv_segments_received=landed.segments,
            kv_segments_dropped=landed.late + landed.duplicates + landed.refused,
            kv_checksum_failures=landed.checksum_failures,
            kv_images_committed=landed.images,
            leases_expired=landed.leases_expired,
            routers=self.hub.num_streams,
            **worker.retract.stats_fields(),  # type: ignore[arg-type]
        )


async def serve_worker(config: WorkerConfig, engine: Engine) -> RunningWorker:
    """Starts a worker of `config.role` over `engine` on this event loop; also tunes the process for it."""
    keep_freed_memory()
    sys.setswitchinterval(SWITCH_S)
    worker: RunningWorker = (ServedPrefill if config.role is WorkerRole.PREFILL else ServedDecode)(config, engine)
    try:
        await worker.start()
    except BaseException:
        await worker.stop()
        raise
    return worker


def _thread_setup(config: WorkerConfig) -> Callable[[], None]:
    def setup() -> None:
        # OpenMP keeps this number per thread: setting it on another thread would not reach the engine's.
        torch.set_num_threads(config.num_threads)

    return setup


def _rss_bytes() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * _PAGE_BYTES
    except OSError:
        return 0
