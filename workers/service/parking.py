"""Parked images in another decode worker's memory: `PeerTier` sends and fetches, `GuestRoom` keeps those of others.

The peer only stores. The request stays with its own worker, which gets the image back to resume it: tokens, stream and
sampling state never leave, and one worker's event stream stays the only one of a request. Both directions are the
ordinary push of a KV image under a grant, verified segment by segment.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch

from kvstore.errors import IntegrityError, KVStoreError
from kvstore.image import ImageHeader, KVImage
from kvstore.spec import KVSpec
from kvstore.tiers.base import ImageKey, TierStats, planned_header
from kvstore.tiers.host import HostTier
from kvstore.transfer.landing import GrantInfo, ReceivedImage
from kvstore.transfer.sender import KVSender
from workers.errors import RequestAborted, RequestError, WorkerFull
from workers.messages import Grant
from workers.service.client import WorkerClient
from workers.service.peers import Peers

logger = logging.getLogger(__name__)

FETCH_S = 60.0
"""Longest wait for a parked image to come back; then it counts as lost."""


async def push_image(sender: KVSender, image: KVImage, grant: Grant) -> int:
    """Sends a whole image under a grant; payload bytes sent. The payload must not change meanwhile."""
    async with sender.open(grant.kv_address, grant.request_id, grant.epoch, image.header.num_tokens) as stream:
        for segment in image.header.segments:
            stream.enqueue(segment.place, image.segment_rows(segment, sender.spec))
        return (await stream.commit(b"")).num_bytes


@dataclass(slots=True, eq=False)
class _Sent:
    """One image at a peer, or on its way there."""

    image_id: str
    header: ImageHeader
    client: WorkerClient | None = None
    gone: bool = False


class PeerTier:
    """The `Tier` of images kept by other decode workers. `put`, `get` and `discard` come from the engine thread."""

    name = "peer"

    def __init__(self, owner: str, peers: Peers, sender: KVSender, loop: asyncio.AbstractEventLoop) -> None:
        """`owner` makes image ids unique among all workers and their restarts."""
        self._owner, self._peers, self._sender, self._loop = owner, peers, sender, loop
        self._sent: dict[ImageKey, _Sent] = {}
        self._tasks: set[asyncio.Task[object]] = set()
        self._num_fetches = 0
        self._closed = False
        self._counts = TierStats("peer", 0)

    def put(self, key: ImageKey, image: KVImage) -> Future[bool] | None:
        if self._closed or not self._peers.num_decode:
            return None
        sent = self._sent[key] = _Sent(f"{self._owner}/{key}", image.header)
        return self._run(self._put(key, sent, image))

    def get(self, key: ImageKey, into: torch.Tensor | None = None) -> Future[KVImage | None]:
        return self._run(self._get(self._sent.get(key), into))

    def discard(self, key: ImageKey) -> bool:
        sent = self._sent.pop(key, None)
        if sent is None:
            return False
        sent.gone = True
        if sent.client is not None and not self._closed:
            self._run(self._forget(sent))
        return True

    def _run(self, work: Coroutine[object, object, object]) -> Future:  # type: ignore[type-arg]
        try:
            return asyncio.run_coroutine_threadsafe(self._tracked(work), self._loop)
        except RuntimeError as exc:
            work.close()
            failed: Future[object] = Future()
            failed.set_exception(exc)
            return failed

    async def _tracked(self, work: Coroutine[object, object, object]) -> object:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await task

    async def _put(self, key: ImageKey, sent: _Sent, image: KVImage) -> bool:
        began_s, header = time.monotonic(), image.header
        for client in self._peers.decode_in_turn():
            try:
                grant = await client.grant_park(sent.image_id, header.num_tokens, header.fingerprint)
                await push_image(self._sender, image, grant)
            except (RequestError, KVStoreError) as exc:
                logger.info("image=%s peer=%s refused: %s", sent.image_id, client.name, exc)
                continue
            sent.client = client
            if sent.gone:
                await self._forget(sent)
            ms = (time.monotonic() - began_s) * 1e3
            c = self._counts
            self._counts = replace(
                c, puts=c.puts + 1, put_bytes=c.put_bytes + header.payload_bytes, put_ms=c.put_ms + ms
            )
            return not sent.gone
        self._counts = replace(self._counts, put_failures=self._counts.put_failures + 1)
        if self._sent.get(key) is sent:
            self._sent.pop(key, None)
        return False

    async def _get(self, sent: _Sent | None, into: torch.Tensor | None) -> KVImage | None:
        if sent is None or sent.client is None:
            self._counts = replace(self._counts, misses=self._counts.misses + 1)
            return None
        began_s, client = time.monotonic(), sent.client
        self._num_fetches += 1
        name = f"return/{sent.image_id}/{self._num_fetches}"

        async def ask(grant: Grant) -> None:
            await client.return_park(sent.image_id, grant)

        try:
            received = await self._peers.fetch(name, sent.header.num_tokens, ask, FETCH_S)
        except RequestError as exc:
            logger.warning("image=%s lost at peer=%s: %s", sent.image_id, client.name, exc)
            self._counts = replace(self._counts, misses=self._counts.misses + 1)
            return None
        with received:
            payload = torch.empty(sent.header.payload_bytes, dtype=torch.uint8) if into is None else into
            await asyncio.to_thread(payload.copy_, received.image.payload)
            header = replace(sent.header, segments=received.image.header.segments)
        ms, c = (time.monotonic() - began_s) * 1e3, self._counts
        self._counts = replace(c, gets=c.gets + 1, get_bytes=c.get_bytes + header.payload_bytes, get_ms=c.get_ms + ms)
        return KVImage(header, payload)

    async def _forget(self, sent: _Sent) -> None:
        assert sent.client is not None
        try:
            await sent.client.forget_park(sent.image_id)
        except RequestError as exc:
            logger.info("image=%s stays at a peer until it expires there: %s", sent.image_id, exc)

    def stats(self) -> TierStats:
        """Another worker's memory has no budget here: it refuses by itself."""
        held = sum(sent.header.payload_bytes for sent in tuple(self._sent.values()))
        return replace(self._counts, used_bytes=held, images=len(self._sent))

    def check_integrity(self) -> None:
        if any(sent.gone for sent in self._sent.values()):
            raise IntegrityError("a forgotten image is still listed at a peer")

    def close(self) -> None:
        """Nothing is kept: images end with their requests. Work under way is cancelled by `end`."""
        self._closed = True

    async def end(self) -> None:
        """On the event loop, after `close`: ends what is under way."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(slots=True, eq=False)
class _Guest:
    reserved: KVImage
    expires_s: float
    complete: bool = False
    readers: int = 0
    gone: bool = False


class GuestRoom:
    """Images of other workers in this one's host memory, under a budget of its own. Event loop only."""

    def __init__(
        self, spec: KVSpec, budget_bytes: int, *, keep_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`keep_s`: longest life of an image here, for those whose owner has died without a word."""
        self._spec, self._keep_s, self._clock = spec, keep_s, clock
        self._store = HostTier(budget_bytes, pinned=False)
        self._guests: dict[str, _Guest] = {}

    def reserve(self, image_id: str, num_tokens: int) -> None:
        """Raises `WorkerFull` when there is no room, `RequestAborted` when the image is here already."""
        self._expire()
        if image_id in self._guests:
            raise RequestAborted(f"image {image_id} is here already")
        header = planned_header(self._spec, num_tokens, request_id=image_id)
        reserved = self._store.reserve(ImageKey(image_id), header)
        if reserved is None:
            raise WorkerFull("no room for parked images of other workers")
        self._guests[image_id] = _Guest(reserved, self._clock() + self._keep_s)

    def takes(self, received: ReceivedImage) -> bool:
        """Keeps an image that was reserved for; the landing memory is free afterwards."""
        guest = self._guests.get(received.request_id)
        if guest is None or guest.complete:
            return False
        with received:
            guest.reserved.payload.copy_(received.image.payload)
            header = replace(guest.reserved.header, segments=received.image.header.segments)
        guest.reserved = KVImage(header, guest.reserved.payload)
        self._store.commit(ImageKey(received.request_id), header)
        guest.complete = True
        return True

    def takes_loss(self, grant: GrantInfo) -> bool:
        """Frees the place of an image that did not arrive."""
        guest = self._guests.get(grant.request_id)
        if guest is None or guest.complete:
            return False
        self.forget(grant.request_id)
        return True

    async def give_back(self, image_id: str, sender: KVSender, grant: Grant) -> None:
        """Pushes an image to its owner. Raises `RequestAborted` when it is not here."""
        guest = self._guests.get(image_id)
        if guest is None or not guest.complete:
            raise RequestAborted(f"image {image_id} is not here")
        guest.readers += 1
        try:
            await push_image(sender, guest.reserved, grant)
        finally:
            guest.readers -= 1
            self._drop_if_gone(image_id, guest)

    def forget(self, image_id: str) -> None:
        """Frees an image, once nobody reads it; unknown ones are no error."""
        guest = self._guests.pop(image_id, None)
        if guest is not None:
            guest.gone = True
            self._drop_if_gone(image_id, guest)

    def _drop_if_gone(self, image_id: str, guest: _Guest) -> None:
        if guest.gone and not guest.readers:
            self._store.discard(ImageKey(image_id))

    def _expire(self) -> None:
        now_s = self._clock()
        for image_id in [i for i, guest in self._guests.items() if guest.expires_s <= now_s]:
            logger.warning("image=%s of another worker was never asked for again", image_id)
            self.forget(image_id)

    @property
    def num_images(self) -> int:
        """Images kept or awaited now."""
        return len(self._guests)

    @property
    def used_bytes(self) -> int:
        """Bytes of the budget in use."""
        return self._store.used_bytes

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless the store holds what is listed, or is still being read."""
        self._store.check_integrity()
        if not set(self._guests) <= set(self._store.held_keys()):
            raise IntegrityError("a listed guest image has no place")
