"""`PrefillAgain`: lost KV computed once more by any prefill worker, over the ordinary hand-off.

The tokens so far are the prompt of a request of one output token. That token is already known, so what arrives with the
image is ignored. Called on the engine thread, works on the event loop.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future

from kvstore.transfer.landing import ReceivedImage
from workers.errors import RequestError, WorkerUnavailable
from workers.messages import GenerateRequest, Grant, SamplingParams
from workers.retract.ticket import HeldImage
from workers.service.peers import Peers, as_request_error

_ONE_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)


class PrefillAgain:
    """The `Recomputer` of a served decode worker."""

    def __init__(self, peers: Peers, loop: asyncio.AbstractEventLoop) -> None:
        self._peers, self._loop = peers, loop
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def available(self) -> bool:
        return self._peers.num_prefill > 0

    def start(self, name: str, token_ids: tuple[int, ...], timeout_s: float) -> Future[HeldImage]:
        result: Future[HeldImage] = Future()
        try:
            self._loop.call_soon_threadsafe(self._spawn, f"recompute/{name}", token_ids, timeout_s, result)
        except RuntimeError:
            result.set_exception(WorkerUnavailable("the worker is shutting down"))
        return result

    def cancel(self, name: str) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._cancel, f"recompute/{name}")

    def _cancel(self, name: str) -> None:
        task = self._tasks.get(name)
        if task is not None:
            task.cancel()

    def _spawn(self, name: str, token_ids: tuple[int, ...], timeout_s: float, result: Future[HeldImage]) -> None:
        task = self._tasks[name] = asyncio.ensure_future(self._run(name, token_ids, timeout_s, result))
        task.add_done_callback(lambda _: self._tasks.pop(name, None))

    async def _run(self, name: str, token_ids: tuple[int, ...], timeout_s: float, result: Future[HeldImage]) -> None:
        try:
            received = await self._fetch(name, token_ids, timeout_s)
        except BaseException as exc:
            result.set_exception(as_request_error(exc))
            if isinstance(exc, asyncio.CancelledError):
                raise
            return
        result.set_result(HeldImage(received.image, received.release))

    async def _fetch(self, name: str, token_ids: tuple[int, ...], timeout_s: float) -> ReceivedImage:
        failure: RequestError = WorkerUnavailable("no prefill worker is known")
        for attempt, client in enumerate(self._peers.prefill_in_turn()):
            tried = f"{name}/{attempt}"
            request = GenerateRequest(tried, 0, token_ids, _ONE_TOKEN, deadline_s=timeout_s)

            async def ask(grant: Grant, client=client, request=request) -> object:  # type: ignore[no-untyped-def]
                return await client.prefill(request, grant)

            try:
                return await self._peers.fetch(tried, len(token_ids), ask, timeout_s)
            except RequestError as exc:
                failure = exc
        raise failure

    async def close(self) -> None:
        """Ends what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
