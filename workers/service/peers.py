"""`Peers`: the other workers that a decode worker knows, and images on their way to it that no router handed off.

Owns: clients by address, the grants this worker gives itself for recomputed and returning images. Runs on the event
loop, except `num_prefill` and `num_decode`, which any thread may read.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence

from kvstore.transfer.landing import GrantInfo, ReceivedImage
from kvstore.transfer.receiver import KVReceiver
from workers.errors import RequestError, WorkerFull, WorkerUnavailable
from workers.messages import Grant, WorkerRole
from workers.service.client import WorkerClient

LANDING_RETRY_S = 0.02
"""Wait between two tries for landing memory, which hand-offs of routers take too."""


class Peers:
    """Addresses, clients, and images that were asked for."""

    receiver: KVReceiver
    """Set before the server starts, as `kv_address` is."""
    kv_address: str

    def __init__(self, incarnation: str) -> None:
        self._incarnation = incarnation
        self._prefill: tuple[str, ...] = ()
        self._decode: tuple[str, ...] = ()
        self._clients: dict[tuple[WorkerRole, str], WorkerClient] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._turn = itertools.count()
        self._expected: dict[str, asyncio.Future[ReceivedImage]] = {}

    @property
    def num_prefill(self) -> int:
        """Prefill workers known."""
        return len(self._prefill)

    @property
    def num_decode(self) -> int:
        """Other decode workers known."""
        return len(self._decode)

    def set(self, prefill: Sequence[str], decode: Sequence[str]) -> None:
        """Replaces what is known; clients of addresses that are gone close."""
        self._prefill = tuple(dict.fromkeys(prefill))
        self._decode = tuple(address for address in dict.fromkeys(decode) if address != self.kv_address)
        known = {(WorkerRole.PREFILL, a) for a in self._prefill} | {(WorkerRole.DECODE, a) for a in self._decode}
        for key in self._clients.keys() - known:
            task = asyncio.ensure_future(self._clients.pop(key).close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def prefill_in_turn(self) -> list[WorkerClient]:
        """Every prefill worker, beginning with another one at each call."""
        return self._in_turn(WorkerRole.PREFILL, self._prefill)

    def decode_in_turn(self) -> list[WorkerClient]:
        """As `prefill_in_turn`, for the other decode workers."""
        return self._in_turn(WorkerRole.DECODE, self._decode)

    def _in_turn(self, role: WorkerRole, addresses: tuple[str, ...]) -> list[WorkerClient]:
        first = next(self._turn) % max(1, len(addresses))
        return [self.client(role, address) for address in (*addresses[first:], *addresses[:first])]

    def client(self, role: WorkerRole, address: str) -> WorkerClient:
        """The client of one address."""
        if (role, address) not in self._clients:
            self._clients[role, address] = WorkerClient(address, role, address)
        return self._clients[role, address]

    # -- images on their way here -------------------------------------------------------------------------------------

    async def fetch(self, name: str, num_tokens: int, ask: Callable[[Grant], object], limit_s: float) -> ReceivedImage:
        """An image that `ask(grant)`, a coroutine function, makes someone push here; the caller releases it.

        Raises `RequestError`; nothing is held then. `name` must be new.
        """
        arrived: asyncio.Future[ReceivedImage] = asyncio.get_running_loop().create_future()
        self._expected[name] = arrived
        try:
            async with asyncio.timeout(limit_s):
                asking = asyncio.ensure_future(ask(await self._grant(name, num_tokens)))  # type: ignore[call-overload]
                try:
                    # Whoever pushes answers after the image was committed here, so its answer can only be late.
                    await asyncio.wait((asking, arrived), return_when=asyncio.FIRST_COMPLETED)
                    if not arrived.done():
                        await asking
                    return await arrived
                finally:
                    if not arrived.done():
                        asking.cancel()
                    if not asking.done():
                        asking.add_done_callback(lambda task: task.cancelled() or task.exception())
                    elif not asking.cancelled():
                        asking.exception()
        except TimeoutError as exc:
            raise WorkerUnavailable(f"image {name}: not here after {limit_s:g} s") from exc
        finally:
            self._expected.pop(name, None)
            if not arrived.done():
                arrived.cancel()
                self.receiver.revoke(name, 0)

    async def _grant(self, name: str, num_tokens: int) -> Grant:
        if not self.receiver.can_ever_grant(num_tokens):
            raise WorkerFull(f"landing memory cannot hold {num_tokens} tokens")
        while (info := self.receiver.grant(name, 0, num_tokens)) is None:
            await asyncio.sleep(LANDING_RETRY_S)
        return self.grant_of(info)

    def grant_of(self, info: GrantInfo) -> Grant:
        """A receiver's grant as the message that travels."""
        return Grant(
            request_id=info.request_id,
            epoch=info.epoch,
            lease_s=info.lease_s,
            credit_bytes=info.credit_bytes,
            kv_address=self.kv_address,
            fingerprint=info.fingerprint,
            incarnation=self._incarnation,
        )

    def takes(self, received: ReceivedImage) -> bool:
        """Whether the image was asked for here; it then belongs to whoever asked."""
        arrived = self._expected.get(received.request_id)
        if arrived is None or arrived.done():
            return False
        arrived.set_result(received)
        return True

    def takes_loss(self, grant: GrantInfo, reason: str) -> bool:
        """Whether the lost transfer was asked for here; it then fails."""
        arrived = self._expected.get(grant.request_id)
        if arrived is None:
            return False
        if not arrived.done():
            arrived.set_exception(WorkerUnavailable(f"image {grant.request_id}: {reason}"))
        return True

    async def close(self) -> None:
        """Closes every client; calls under way fail."""
        clients, self._clients = list(self._clients.values()), {}
        await asyncio.gather(*(client.close() for client in clients), *self._closing, return_exceptions=True)


def as_request_error(exc: BaseException) -> RequestError:
    """What a caller outside is told of a failure here."""
    return exc if isinstance(exc, RequestError) else WorkerUnavailable(f"{type(exc).__name__}: {exc}")
