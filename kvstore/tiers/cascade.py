"""`Cascade`: where parked images wait. Host memory first, then the lower tiers in order: disk, then what is added.

Owns: the place of every parked key, demotion when the host runs short, promotion when a resume is near, and the count
of every fallback by cause. Pure policy over `Tier`: it moves no byte itself. A request whose image is refused or lost
is for the caller to recompute; the cascade never raises for a full or failing tier.

Single owner, like the scheduler that calls it: nothing here blocks, and futures are looked at in `poll`, once a step.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence

from kvstore.errors import IntegrityError
from kvstore.image import ImageHeader, KVImage
from kvstore.spec import KVSpec
from kvstore.tiers.base import ImageKey, Tier
from kvstore.tiers.config import TiersConfig
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.placement import (
    NEXT_PLACES,
    CascadeStats,
    Cause,
    Lost,
    Move,
    Parked,
    Place,
    Refusal,
    choose_demotions,
    host_bytes,
)

logger = logging.getLogger(__name__)


class Cascade:
    """Host tier over lower tiers."""

    def __init__(
        self,
        host: HostTier,
        lower: Sequence[Tier] = (),
        *,
        high: float = 0.85,
        low: float = 0.6,
        retry_after_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See `TiersConfig` for `high`, `low` and `retry_after_s`. `close` closes the tiers as well."""
        self.host, self.lower = host, tuple(lower)
        self._high, self._low = int(high * host.budget_bytes), int(low * host.budget_bytes)
        self._retry_after_s, self._clock = retry_after_s, clock
        self._parked: dict[ImageKey, Parked] = {}
        self._ending: list[tuple[Move, int]] = []  # moves nobody waits for, and the host bytes that each gives free
        self._failed_until: dict[str, float] = {}
        self._full_until: dict[str, float] = {}
        self._next_order = 0
        self._fallbacks: Counter[Cause] = Counter()
        self._down: Counter[str] = Counter()
        self._down_bytes: Counter[str] = Counter()
        self._up: Counter[str] = Counter()
        self._up_bytes: Counter[str] = Counter()

    # ---- parking ----

    def reserve(self, key: ImageKey, header: ImageHeader) -> KVImage | Refusal:
        """Promise space for an image before its request is chosen as a victim.

        Returns:
            An image whose payload the caller fills; then `commit`, or `discard` when the request is spared.

        Raises:
            ValueError: the key is parked already.
        """
        if key in self._parked:
            raise ValueError(f"image {key} is parked already")
        if host_bytes(header) > self.host.budget_bytes:
            return self._refuse(Cause.HOST_TOO_SMALL)
        image = self.host.reserve(key, header)
        if image is None:
            makes_room = self._make_room(host_bytes(header), urgent=True)
            return self._refuse(Cause.MAKING_ROOM if makes_room else Cause.NO_ROOM)
        self._parked[key] = Parked(key, header, self._next_order)
        self._next_order += 1
        return image

    def commit(self, key: ImageKey) -> None:
        """The reserved payload is complete."""
        self.host.commit(key)
        self._go(self._parked[key], Place.HOST)

    def _refuse(self, cause: Cause) -> Refusal:
        if cause is not Cause.MAKING_ROOM:
            self._fallbacks[cause] += 1
        return Refusal(cause)

    def _leaving_bytes(self) -> int:
        """Host bytes that moves under way, or the caller, will give free."""
        soon = (Place.DEMOTING, Place.LENT)
        parked = sum(p.host_bytes for p in self._parked.values() if p.place in soon and not self._stays(p))
        return parked + sum(size for _, size in self._ending)

    @staticmethod
    def _stays(parked: Parked) -> bool:
        return parked.place is Place.DEMOTING and parked.wanted

    def _make_room(self, size: int, *, urgent: bool = False) -> bool:
        """Start the demotions that `size` more bytes in the host need. `False` when they would not be enough."""
        leaving = self._leaving_bytes()
        free = self.host.budget_bytes - self.host.used_bytes
        if leaving and size <= free + leaving:
            return True
        needed = size - free - leaving
        # Enough free bytes but no free range: only moving others out joins ranges.
        chosen = choose_demotions(self._parked.values(), needed if needed > 0 else size)
        started = sum(p.host_bytes for p in chosen if self._demote(p, urgent=urgent))
        # What is being filled or promoted cannot make way yet, but will be resumed, or can be moved down, soon.
        later = sum(p.host_bytes for p in self._parked.values() if p.place in (Place.RESERVED, Place.PROMOTING))
        soon = leaving + started + (later if self.lower else 0)
        return soon > 0 and size <= free + soon

    def _demote(self, parked: Parked, *, urgent: bool = False) -> bool:
        """Start moving an image to the first lower tier that takes it. `urgent` asks tiers known to be full again."""
        image, now = self.host.image(parked.key), self._clock()
        assert image is not None, parked.key
        for depth, tier in enumerate(self.lower):
            full = not urgent and now < self._full_until.get(tier.name, now)
            if full or now < self._failed_until.get(tier.name, now):
                continue
            unpin = self.host.pin(parked.key)
            saved = tier.put(parked.key, image)
            if saved is not None:
                if depth:
                    self._fallbacks[Cause.TIER_PASSED] += 1
                parked.tier, parked.move = tier, Move(saved, unpin)
                self._go(parked, Place.DEMOTING)
                return True
            unpin()
            self._full_until[tier.name] = now + self._retry_after_s
        return False

    # ---- coming back ----

    def want(self, key: ImageKey, *, soon: bool = True) -> bool:
        """Say whether the request is to resume soon: its image then comes to the host tier and stays there.

        Returns:
            Whether it is in the host tier now.
        """
        parked = self._parked.get(key)
        if parked is None:
            return False
        newly, parked.wanted = soon and not parked.wanted, soon
        if newly and parked.place is Place.LOWER:
            self._promote(parked)
        return parked.place in (Place.HOST, Place.DEMOTING, Place.LENT)

    def lend(self, key: ImageKey) -> KVImage | None:
        """The image where it lies in the host tier, or `None` while it is elsewhere or still being filled.

        It stays until `discard` (resumed) or `take_back` (the restore did not happen).
        """
        parked = self._parked.get(key)
        if parked is None or parked.place not in (Place.HOST, Place.DEMOTING):
            return None
        if parked.place is Place.DEMOTING:
            self._stay(parked)
        image = self.host.image(key)
        assert image is not None, key
        self._go(parked, Place.LENT)
        return image

    def take_back(self, key: ImageKey) -> None:
        """A lent image was not used after all."""
        self._go(self._parked[key], Place.HOST)

    def _stay(self, parked: Parked) -> None:
        """Give a demotion up: the host copy is whole. The tier's own work goes on until it sees the discard."""
        assert parked.tier is not None and parked.move is not None
        self._ending.append((parked.move, 0))
        self._leave_tier(parked)
        parked.move = None
        self._go(parked, Place.HOST)

    def _leave_tier(self, parked: Parked) -> None:
        assert parked.tier is not None
        parked.tier.discard(parked.key)
        self._full_until.pop(parked.tier.name, None)
        parked.tier = None

    def _promote(self, parked: Parked) -> None:
        assert parked.tier is not None
        image = self.host.reserve(parked.key, parked.header)
        if image is None:
            self._make_room(parked.host_bytes)
            return
        unpin = self.host.pin(parked.key)
        parked.move = Move(parked.tier.get(parked.key, image.payload), unpin)
        self._go(parked, Place.PROMOTING)

    # ---- each step ----

    def poll(self) -> tuple[Lost, ...]:
        """Take note of finished moves, start wanted promotions and due demotions. Returns the images lost since."""
        for ending in [e for e in self._ending if e[0].future.done()]:
            self._ending.remove(ending)
            _result_of(ending[0])
        done = [p for p in self._parked.values() if p.move is not None and p.move.future.done()]
        lost = tuple(loss for p in done if (loss := self._finish(p)) is not None)
        for parked in sorted(self._parked.values(), key=lambda p: p.order):
            if parked.wanted and parked.place is Place.LOWER:
                self._promote(parked)
        if self.lower and self.host.used_bytes > self._high:
            surplus = self.host.used_bytes - self._leaving_bytes() - self._low
            for parked in choose_demotions(self._parked.values(), surplus):
                if not self._demote(parked):
                    break
        return lost

    def _finish(self, parked: Parked) -> Lost | None:
        assert parked.move is not None
        result = _result_of(parked.move)
        parked.move = None
        if parked.place is Place.DEMOTING:
            self._end_demotion(parked, saved=result is True)
            return None
        return self._end_promotion(parked, result)

    def _end_demotion(self, parked: Parked, *, saved: bool) -> None:
        tier = parked.tier
        assert tier is not None
        if saved and not parked.wanted:
            self.host.discard(parked.key)
            self._down[tier.name] += 1
            self._down_bytes[tier.name] += parked.payload_bytes
            self._go(parked, Place.LOWER)
            return
        if saved:
            self._leave_tier(parked)
        else:
            self._fallbacks[Cause.SAVE_FAILED] += 1
            self._failed_until[tier.name] = self._clock() + self._retry_after_s
            parked.tier = None
        self._go(parked, Place.HOST)

    def _end_promotion(self, parked: Parked, image: object) -> Lost | None:
        tier = parked.tier
        assert tier is not None
        self._leave_tier(parked)
        if not isinstance(image, KVImage) or image.header.num_tokens != parked.header.num_tokens:
            self._fallbacks[Cause.LOST] += 1
            self.host.discard(parked.key)
            del self._parked[parked.key]
            return Lost(parked.key, tier.name)
        self.host.commit(parked.key, image.header)
        self._up[tier.name] += 1
        self._up_bytes[tier.name] += parked.payload_bytes
        self._go(parked, Place.HOST)
        return None

    # ---- the rest ----

    def discard(self, key: ImageKey) -> bool:
        """Forget an image in any state: resumed, aborted, or never filled. Whether it was parked.

        A reserved or lent payload must not be in use by a copy any more.
        """
        parked = self._parked.pop(key, None)
        if parked is None:
            return False
        if parked.tier is not None:
            self._leave_tier(parked)
        if parked.move is not None:
            self._ending.append((parked.move, parked.host_bytes))
        self.host.discard(key)
        return True

    def place(self, key: ImageKey) -> Place | None:
        """Where an image is, or `None` when it is not parked."""
        parked = self._parked.get(key)
        return None if parked is None else parked.place

    def _go(self, parked: Parked, place: Place) -> None:
        if place not in NEXT_PLACES[parked.place]:
            raise ValueError(f"image {parked.key}: {parked.place.value} cannot become {place.value}")
        parked.place = place

    def stats(self) -> CascadeStats:
        """A snapshot."""
        images: Counter[Place] = Counter(p.place for p in self._parked.values())
        sizes: Counter[Place] = Counter()
        for parked in self._parked.values():
            sizes[parked.place] += parked.payload_bytes
        return CascadeStats(
            parked_images=len(self._parked),
            parked_bytes=sum(sizes.values()),
            parked=tuple((place, images[place], sizes[place]) for place in Place if images[place]),
            demoted_to=tuple((name, self._down[name], self._down_bytes[name]) for name in self._down),
            promoted_from=tuple((name, self._up[name], self._up_bytes[name]) for name in self._up),
            fallbacks=tuple(sorted(self._fallbacks.items())),
            tiers=tuple(tier.stats() for tier in (self.host, *self.lower)),
        )

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless every parked image is where its place says and nothing else is held."""
        for tier in (self.host, *self.lower):
            tier.check_integrity()
        in_host = {p.key for p in self._parked.values() if p.place is not Place.LOWER}
        if in_host != set(self.host.held_keys()):
            raise IntegrityError(f"host tier holds {sorted(self.host.held_keys())}, parked there are {sorted(in_host)}")
        for parked in self._parked.values():
            moving = parked.place in (Place.DEMOTING, Place.PROMOTING)
            below = moving or parked.place is Place.LOWER
            if moving != (parked.move is not None) or below != (parked.tier is not None):
                raise IntegrityError(f"image {parked.key} is {parked.place.value}: tier {parked.tier}, {parked.move}")

    def close(self) -> None:
        """Close the lower tiers and end every move."""
        for tier in (*self.lower, self.host):
            tier.close()
        self.poll()


def _result_of(move: Move) -> object:
    """Outcome of a finished move, `None` when it raised; the host bytes are free to go."""
    move.unpin()
    exc = move.future.exception()
    if exc is not None:
        logger.error("a tier broke its protocol", exc_info=exc)
        return None
    return move.future.result()


def build_cascade(
    config: TiersConfig, spec: KVSpec, *, model_hash: str = "", extra: Sequence[Tier] = (), pinned: bool | None = None
) -> Cascade:
    """The tiers of one worker: host, disk when configured, then `extra` (a peer).

    Raises:
        FolderInUse, OSError: see `DiskTier`.
    """
    lower: list[Tier] = []
    if config.disk_directory and config.disk_budget_bytes:
        lower.append(
            DiskTier(
                config.disk_directory,
                config.disk_owner,
                spec=spec,
                budget_bytes=config.disk_budget_bytes,
                model_hash=model_hash,
                sync=config.disk_fsync,
                direct_io=config.disk_direct_io,
                recovery=config.disk_recovery,
                evict=config.disk_eviction,
            )
        )
    return Cascade(
        HostTier(config.host_budget_bytes, pinned=pinned),
        [*lower, *extra],
        high=config.host_high,
        low=config.host_low,
        retry_after_s=config.retry_after_s,
    )
