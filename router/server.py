"""Starts and stops one router: fleet, dispatcher, application, listening socket.

Owns: the order of start and stop. Used by the cluster, which decides where a router runs and what its workers are.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from router.admin import RetractAdmin
from router.app import ExtraMetrics, RouterApp
from router.backend import DecodeBackend, PrefillBackend, RetractBackend
from router.chat.tokenizer import ChatTokenizer
from router.config import RouterConfig
from router.fleet import Fleet
from router.lifecycle import Dispatcher
from router.metrics import RouterMetrics
from router.model_info import ModelInfo
from router.plan import Planner

_DRAIN_POLL_S = 0.02


class RunningRouter:
    """A router that listens. Close it on the loop that started it."""

    def __init__(
        self, config: RouterConfig, app: RouterApp, runner: web.AppRunner, dispatcher: Dispatcher, fleet: Fleet
    ) -> None:
        self._config = config
        self._app = app
        self._runner = runner
        self._dispatcher = dispatcher
        self._fleet = fleet

    @property
    def port(self) -> int:
        """The TCP port it listens on."""
        port: int = self._runner.addresses[0][1]
        return port

    @property
    def url(self) -> str:
        """Base URL for clients on this host."""
        return f"http://{self._runner.addresses[0][0]}:{self.port}"

    @property
    def active_requests(self) -> int:
        """Generation requests in flight."""
        return self._app.active

    async def probe(self, name: str) -> None:
        """Asks a worker that came back whether it answers, ahead of its next probe."""
        await self._fleet.probe(name)

    async def close(self) -> None:
        """Refuses new requests, lets running ones finish for `drain_s`, aborts the rest, and releases the port."""
        self._app.draining = True
        loop = asyncio.get_running_loop()
        end = loop.time() + self._config.drain_s
        while self._app.active and loop.time() < end:
            await asyncio.sleep(_DRAIN_POLL_S)
        await self._dispatcher.close()
        await self._runner.cleanup()
        await self._fleet.close()


async def start_router(
    config: RouterConfig,
    prefill: Sequence[PrefillBackend],
    decode: Sequence[DecodeBackend],
    tokenizer_dir: Path,
    model: ModelInfo,
    extra_metrics: ExtraMetrics | None = None,
    admin_workers: Sequence[RetractBackend] = (),
) -> RunningRouter:
    """Listens on `config.host:config.port`. Returns once every worker was probed, whatever the answer.

    Raises `BadTokenizer` or `OSError`. `extra_metrics` returns Prometheus text that /metrics appends to the router's.
    `admin_workers` are those whose retracts /admin/retract may force; without any the path does not exist.
    """
    tokenizer = ChatTokenizer.from_dir(Path(tokenizer_dir))
    metrics = RouterMetrics()
    router_id = f"router-{uuid.uuid4().hex[:12]}"
    fleet = Fleet(config, router_id, prefill, decode)
    await fleet.probe_all()
    dispatcher = Dispatcher(config, router_id, fleet, metrics)
    admin = RetractAdmin(admin_workers) if admin_workers else None
    app = RouterApp(config, model, Planner(config, tokenizer, model), dispatcher, fleet, metrics, extra_metrics, admin)
    # Without cancellation a handler that waits for tokens would not notice that its client has gone.
    runner = web.AppRunner(app.build(), handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    try:
        await runner.setup()
        await web.TCPSite(runner, config.host, config.port, backlog=1024).start()
    except BaseException:
        await dispatcher.close()
        await runner.cleanup()
        await fleet.close()
        raise
    return RunningRouter(config, app, runner, dispatcher, fleet)
