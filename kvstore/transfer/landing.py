"""`LandingTable`: grants, and the host memory in which granted KV lands. No sockets here.

Owns the landing arena, the life of every grant and all rules of admission: current epoch, lease, credit, exact place of
each row range, duplicates, completeness at commit. Bytes are only ever written to memory that belongs to an OPEN grant
with that write in flight, so a late segment cannot touch memory that moved on. Thread-safe: the event loop admits, a
copy thread lands, the engine thread releases.
"""

from __future__ import annotations

import enum
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from kvstore.arena import Extent, HostArena
from kvstore.checksum import CHECKSUM_NAME, checksum
from kvstore.errors import IntegrityError, TransferRefused
from kvstore.image import ImageHeader, KVImage, Segment, first_gap
from kvstore.spec import KVSpec, PoolName, RowRange
from kvstore.transfer.stubs.kv_transfer_pb2 import Refused

MAX_REMEMBERED_EPOCHS = 4096
"""Requests whose last epoch is remembered after their grant ended; older ones answer NO_GRANT, not STALE_EPOCH."""


class LandingState(enum.Enum):
    """Life of a grant."""

    GRANTED = "granted"
    OPEN = "open"
    DELIVERED = "delivered"
    GONE = "gone"


_NEXT = {
    LandingState.GRANTED: {LandingState.OPEN, LandingState.GONE},
    LandingState.OPEN: {LandingState.DELIVERED, LandingState.GONE},
    LandingState.DELIVERED: {LandingState.GONE},
    LandingState.GONE: set(),
}


@dataclass(frozen=True, slots=True)
class GrantInfo:
    """Permission to send one attempt's KV. What the router passes on to the prefill worker."""

    request_id: str
    epoch: int
    num_tokens: int
    lease_s: float
    credit_bytes: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class LandingStats:
    """Counters since start, and what is held now."""

    grants: int = 0
    grants_refused: int = 0
    images: int = 0
    segments: int = 0
    landed_bytes: int = 0
    duplicates: int = 0
    late: int = 0
    refused: int = 0
    checksum_failures: int = 0
    leases_expired: int = 0
    revoked: int = 0
    open_grants: int = 0
    held_bytes: int = 0
    budget_bytes: int = 0


@dataclass(slots=True, eq=False)
class Landing:
    """One attempt. Fields belong to `LandingTable`; others read `request_id` and `epoch` only."""

    grant: GrantInfo
    extent: Extent
    expires_at: float
    ends_at: float
    state: LandingState = LandingState.GRANTED
    in_flight: int = 0
    in_flight_bytes: int = 0
    claimed: dict[tuple[PoolName, int], RowRange] = field(default_factory=dict)
    landed: list[Segment] = field(default_factory=list)
    close_code: Refused.Code | None = None
    close_reason: str = ""
    wake: Callable[[], None] | None = None


class ReceivedImage:
    """A verified image in landing memory. The holder calls `release` once the rows are in the pools (or not wanted)."""

    def __init__(self, table: LandingTable, landing: Landing, image: KVImage, tail: bytes) -> None:
        """Made by `LandingTable.commit`."""
        self._table, self._landing = table, landing
        self.image = image
        self.tail = tail

    @property
    def request_id(self) -> str:
        """The request."""
        return self.image.header.request_id

    @property
    def epoch(self) -> int:
        """The attempt."""
        return self.image.header.epoch

    @property
    def is_current(self) -> bool:
        """Whether no newer attempt was granted and nobody revoked this one. Check before scattering."""
        return self._table.is_current(self._landing)

    def release(self) -> None:
        """Give the landing memory back; the image must not be read afterwards. Raises `IntegrityError` if repeated."""
        self._table.release(self._landing)

    def __enter__(self) -> ReceivedImage:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()


class LandingTable:
    """Every grant of one decode worker."""

    def __init__(
        self,
        spec: KVSpec,
        *,
        model_hash: str,
        budget_bytes: int,
        credit_bytes: int,
        max_lease_s: float,
        clock: Callable[[], float],
        pinned: bool = False,
    ) -> None:
        """`clock` gives seconds and only its differences matter."""
        self.spec = spec
        self.model_hash = model_hash
        self._credit_bytes, self._max_lease_s, self._clock = credit_bytes, max_lease_s, clock
        self._arena = HostArena(budget_bytes, pinned=pinned)
        self._lock = threading.Lock()
        self._current: dict[str, Landing] = {}
        self._draining: set[Landing] = set()  # gone or superseded, memory still in use
        self._epochs: OrderedDict[str, int] = OrderedDict()
        self._counts = dict.fromkeys(LandingStats.__dataclass_fields__, 0)

    def grant(self, request_id: str, epoch: int, num_tokens: int, lease_s: float) -> GrantInfo | None:
        """Reserve landing memory for an attempt; `None` (counted) when the budget has no room now.

        A newer epoch ends the older attempt of the same request. Asking again for the same attempt renews its lease.

        Raises:
            TransferRefused: STALE_EPOCH, the epoch is not newer than one that was granted before.
        """
        with self._lock:
            current = self._current.get(request_id)
            if current is not None and current.grant.epoch == epoch and current.state is LandingState.GRANTED:
                self._renew(current)
                return current.grant
            if epoch <= self._epochs.get(request_id, -1):
                last = self._epochs[request_id]
                raise _refusal(Refused.STALE_EPOCH, request_id, epoch, f"epoch {last} was granted before")
            if current is not None:
                self._close(current, Refused.STALE_EPOCH, f"epoch {epoch} was granted")
            extent = self._arena.allocate(self.spec.image_bytes(num_tokens))
            if extent is None:
                self._counts["grants_refused"] += 1
                return None
            grant = GrantInfo(request_id, epoch, num_tokens, lease_s, self._credit_bytes, self.spec.fingerprint)
            now = self._clock()
            landing = Landing(grant, extent, expires_at=now + lease_s, ends_at=now + self._max_lease_s)
            self._current[request_id] = landing
            self._epochs[request_id] = epoch
            self._epochs.move_to_end(request_id)
            while len(self._epochs) > MAX_REMEMBERED_EPOCHS:
                self._epochs.popitem(last=False)
            self._counts["grants"] += 1
            return grant

    def revoke(self, request_id: str, epoch: int) -> bool:
        """End an attempt; `False` when it is not the current one. Delivered images stay with their holder."""
        with self._lock:
            landing = self._current.get(request_id)
            if landing is None or landing.grant.epoch != epoch:
                return False
            self._counts["revoked"] += 1
            self._close(landing, Refused.REVOKED, "the receiver gave the request up")
            return True

    def expire(self) -> list[GrantInfo]:
        """End every attempt whose lease ran out; returns them."""
        with self._lock:
            now = self._clock()
            dead = [
                landing
                for landing in self._current.values()
                if landing.state is not LandingState.DELIVERED and now >= min(landing.expires_at, landing.ends_at)
            ]
            for landing in dead:
                self._counts["leases_expired"] += 1
                self._close(landing, Refused.LEASE_EXPIRED, f"no sign of the sender for {landing.grant.lease_s} s")
            return [landing.grant for landing in dead]

    def open(
        self, request_id: str, epoch: int, *, num_tokens: int, fingerprint: str, model_hash: str, checksum_name: str
    ) -> Landing:
        """Begin an attempt's stream.

        Raises:
            TransferRefused: SPEC_MISMATCH (with both values), NO_GRANT, STALE_EPOCH, BUSY or PROTOCOL.
        """
        with self._lock:
            pairs = [("layout fingerprint", self.spec.fingerprint, fingerprint)]
            pairs.append(("checksum name", CHECKSUM_NAME, checksum_name))
            if self.model_hash and model_hash:
                pairs.append(("model hash", self.model_hash, model_hash))
            for what, ours, theirs in pairs:
                if ours != theirs:
                    text = f"{what} differs: receiver {ours}, sender {theirs}"
                    raise self._refuse(Refused.SPEC_MISMATCH, request_id, epoch, text)
            landing = self._current.get(request_id)
            if landing is None or landing.grant.epoch != epoch:
                last = self._epochs.get(request_id)
                code = Refused.NO_GRANT if last is None or epoch > last else Refused.STALE_EPOCH
                raise self._refuse(code, request_id, epoch, f"no such grant (last epoch: {last})")
            if landing.state is not LandingState.GRANTED:
                raise self._refuse(Refused.BUSY, request_id, epoch, f"grant is already {landing.state.value}")
            if landing.grant.num_tokens != num_tokens:
                text = f"grant is for {landing.grant.num_tokens} tokens, stream for {num_tokens}"
                raise self._refuse(Refused.PROTOCOL, request_id, epoch, text)
            self._move(landing, LandingState.OPEN)
            self._renew(landing)
            return landing

    def renew(self, landing: Landing) -> None:
        """Any sign of the sender: the lease starts again."""
        with self._lock:
            self._renew(landing)

    def accept(self, landing: Landing, place: RowRange, num_bytes: int) -> bool:
        """Admit a segment of `num_bytes`; the caller then lands it. `False`: a duplicate, or too late; drop it.

        Raises:
            TransferRefused: MISPLACED or CREDIT_EXCEEDED; the attempt is over.
        """
        with self._lock:
            if landing.state is not LandingState.OPEN:
                self._counts["late"] += 1
                return False
            self._renew(landing)
            if landing.claimed.get((place.pool, place.row_start)) == place and num_bytes == place.length:
                self._counts["duplicates"] += 1
                return False
            self._check_place(landing, place, num_bytes)
            if landing.in_flight_bytes + num_bytes > landing.grant.credit_bytes:
                text = f"{landing.in_flight_bytes} + {num_bytes} bytes in flight, credit {landing.grant.credit_bytes}"
                raise self._fail(landing, Refused.CREDIT_EXCEEDED, text)
            landing.claimed[place.pool, place.row_start] = place
            landing.in_flight += 1
            landing.in_flight_bytes += num_bytes
            return True

    def _check_place(self, landing: Landing, place: RowRange, num_bytes: int) -> None:
        try:
            expected = self.spec.place(place.pool, place.row_start, place.row_end, landing.grant.num_tokens)
        except (KeyError, ValueError) as exc:
            raise self._fail(landing, Refused.MISPLACED, str(exc)) from exc
        if place != expected or num_bytes != place.length:
            raise self._fail(landing, Refused.MISPLACED, f"{place} with {num_bytes} bytes should be {expected}")
        for other in landing.claimed.values():
            if other.pool is place.pool and other.row_start < place.row_end and place.row_start < other.row_end:
                raise self._fail(landing, Refused.MISPLACED, f"{place} overlaps {other}")

    def land(self, landing: Landing, place: RowRange, payload: bytes | memoryview, expected: int) -> None:
        """Verify an accepted segment and copy it to its place. Runs on any thread; may take milliseconds.

        Raises:
            TransferRefused: CHECKSUM; the attempt is over and nothing was written.
        """
        found = checksum(payload)
        intact = found == expected
        if intact and landing.state is LandingState.OPEN:
            target = self._arena.tensor(landing.extent).numpy()[place.offset : place.offset + place.length]
            np.copyto(target, np.frombuffer(payload, dtype=np.uint8))
        with self._lock:
            landing.in_flight -= 1
            landing.in_flight_bytes -= place.length
            if landing.state is not LandingState.OPEN:
                self._counts["late"] += 1
                self._free_if_idle(landing)
                return
            if not intact:
                self._counts["checksum_failures"] += 1
                text = f"{place}: checksum {found:#018x}, header says {expected:#018x}"
                raise self._fail(landing, Refused.CHECKSUM, text)
            landing.landed.append(Segment(place, expected))
            self._counts["segments"] += 1
            self._counts["landed_bytes"] += place.length

    def commit(self, landing: Landing, *, num_segments: int, num_bytes: int, tail: bytes) -> ReceivedImage:
        """Close a complete attempt. Call after every accepted segment has landed.

        Raises:
            TransferRefused: GAP, naming pool and rows; PROTOCOL when totals differ; or why the attempt ended before.
        """
        with self._lock:
            grant = landing.grant
            if landing.state is not LandingState.OPEN:
                raise self.closed(landing)
            if landing.in_flight:
                raise IntegrityError(f"request={grant.request_id}: commit with {landing.in_flight} segments in flight")
            landed = sorted(landing.landed, key=lambda segment: segment.place.offset)
            gap = first_gap([segment.place for segment in landed], self.spec, grant.num_tokens)
            if gap is not None:
                raise self._fail(landing, Refused.GAP, gap)
            totals = (len(landed), sum(segment.place.length for segment in landed))
            if totals != (num_segments, num_bytes):
                text = f"commit says {num_segments} segments, {num_bytes} bytes; landed {totals[0]}, {totals[1]}"
                raise self._fail(landing, Refused.PROTOCOL, text)
            self._move(landing, LandingState.DELIVERED)
            landing.wake = None
            self._counts["images"] += 1
        payload = self._arena.tensor(landing.extent)
        _zero_padding(payload, landed)
        header = ImageHeader(
            request_id=grant.request_id,
            epoch=grant.epoch,
            num_tokens=grant.num_tokens,
            fingerprint=self.spec.fingerprint,
            model_hash=self.model_hash,
            payload_bytes=payload.numel(),
            segments=tuple(landed),
        )
        return ReceivedImage(self, landing, KVImage(header, payload), tail)

    def abort(self, landing: Landing, reason: str) -> None:
        """The sender is gone or gave up; frees the attempt unless it was delivered. Harmless when repeated."""
        with self._lock:
            if landing.state in (LandingState.GRANTED, LandingState.OPEN):
                self._close(landing, Refused.UNSPECIFIED, reason)

    def drop(self, landing: Landing, place: RowRange) -> None:
        """Give up an accepted segment that will not be landed (its stream ended first)."""
        with self._lock:
            landing.in_flight -= 1
            landing.in_flight_bytes -= place.length
            self._free_if_idle(landing)

    def is_current(self, landing: Landing) -> bool:
        """Whether this attempt is still its request's newest and not ended."""
        with self._lock:
            return self._current.get(landing.grant.request_id) is landing

    def release(self, landing: Landing) -> None:
        """Free a delivered attempt's memory; see `ReceivedImage.release`."""
        with self._lock:
            if landing.state is not LandingState.DELIVERED:
                raise IntegrityError(f"request={landing.grant.request_id}: image released while {landing.state}")
            if self._current.get(landing.grant.request_id) is landing:
                del self._current[landing.grant.request_id]
            self._draining.discard(landing)
            self._move(landing, LandingState.GONE)
            self._arena.free(landing.extent)

    def closed(self, landing: Landing) -> TransferRefused:
        """Why an attempt ended, as the error its sender gets."""
        code = Refused.PROTOCOL if landing.close_code is None else landing.close_code
        return _refusal(code, landing.grant.request_id, landing.grant.epoch, landing.close_reason or "stream is over")

    def stats(self) -> LandingStats:
        """Counters and current use."""
        with self._lock:
            now = {
                "open_grants": len(self._current),
                "held_bytes": self._arena.used_bytes,
                "budget_bytes": self._arena.budget_bytes,
            }
            return LandingStats(**{**self._counts, **now})

    def check_integrity(self) -> None:
        """Raise `IntegrityError` unless each extent of the arena has exactly one living owner."""
        with self._lock:
            self._arena.check_integrity()
            owners = [*self._current.values(), *self._draining]
            if len({landing.extent.offset for landing in owners}) != len(owners) or len(owners) != self._arena.num_held:
                raise IntegrityError(f"{len(owners)} attempts hold {self._arena.num_held} extents")

    def _renew(self, landing: Landing) -> None:
        landing.expires_at = self._clock() + landing.grant.lease_s

    def _move(self, landing: Landing, state: LandingState) -> None:
        if state not in _NEXT[landing.state]:
            raise IntegrityError(f"request={landing.grant.request_id}: {landing.state} -> {state}")
        landing.state = state

    def _refuse(self, code: Refused.Code, request_id: str, epoch: int, message: str) -> TransferRefused:
        self._counts["refused"] += 1
        return _refusal(code, request_id, epoch, message)

    def _fail(self, landing: Landing, code: Refused.Code, message: str) -> TransferRefused:
        self._close(landing, code, message)
        return self._refuse(code, landing.grant.request_id, landing.grant.epoch, message)

    def _close(self, landing: Landing, code: Refused.Code, reason: str) -> None:
        """End an attempt under the lock. Memory goes when no copy thread and no image holder uses it."""
        del self._current[landing.grant.request_id]
        landing.close_code, landing.close_reason = code, reason
        self._draining.add(landing)
        if landing.state is not LandingState.DELIVERED:
            self._move(landing, LandingState.GONE)
            self._free_if_idle(landing)
        if landing.wake is not None:
            landing.wake()

    def _free_if_idle(self, landing: Landing) -> None:
        if landing.in_flight == 0 and landing in self._draining:
            self._draining.remove(landing)
            self._arena.free(landing.extent)


def _refusal(code: Refused.Code, request_id: str, epoch: int, message: str) -> TransferRefused:
    return TransferRefused(message, request_id=request_id, epoch=epoch, code=Refused.Code.Name(code))


def _zero_padding(payload: torch.Tensor, landed: list[Segment]) -> None:
    """Clear the alignment gaps between pools: they hold bytes of whoever had this memory before."""
    end = 0
    for segment in landed:
        payload[end : segment.place.offset] = 0
        end = segment.place.offset + segment.place.length
    payload[end:] = 0
