"""`Parking`: the way of a request's KV out of the pools, through the tiers, and back. Engine thread only.

Owns: tickets of requests out of the batch, the resume queue, copies under way, the cascade of tiers. Does not own: who
leaves and when (`RetractController`), what fits (`Room`), bytes in tiers (`kvstore.tiers`), prefill elsewhere
(`Recomputer`). Whatever goes wrong with one request's image ends or recomputes that request alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable

from kvstore.arena import EXTENT_ALIGN_BYTES
from kvstore.errors import IntegrityError
from kvstore.image import KVImage, Segment
from kvstore.sequence_kv import SequenceKV
from kvstore.tiers.base import ImageKey, planned_header
from kvstore.tiers.cascade import Cascade
from kvstore.tiers.placement import Place, Refusal
from workers.engine import Engine
from workers.errors import KVLost, RequestError
from workers.retract.copying import CopyFailed, FailedCopy, is_done, start_copy_in, start_copy_out
from workers.retract.forced import ForcedRetracts
from workers.retract.meter import RetractMeter
from workers.retract.mutation import apply_mutation
from workers.retract.room import History, Room
from workers.retract.ticket import HeldImage, ImageState, Recomputer, Ticket, Unsettled, shares_memory
from workers.scheduler.queue import AdmissionQueue
from workers.sequence import SeqState, Sequence

logger = logging.getLogger(__name__)

COPY_ATTEMPTS = 2
"""The pages are still there when a copy out of them fails: once more costs nothing but time."""


class Parking:
    """Requests of one decode worker that are out of the batch."""

    def __init__(
        self,
        engine: Engine,
        room: Room,
        cascade: Cascade,
        *,
        clock: Callable[[], float],
        fail: Callable[[Sequence, RequestError], None],
    ) -> None:
        """`fail` ends a request with an error; it calls `forget`."""
        self.config = room.config
        self.cascade = cascade
        self.meter = RetractMeter()
        self.forced = ForcedRetracts()
        self.recomputer: Recomputer | None = None
        self.queue = AdmissionQueue()
        self.room, self.scheduler = room, room.scheduler
        self._engine = engine
        self._clock, self._fail_request = clock, fail
        self._tickets: dict[tuple[str, int], Ticket] = {}
        self._unsettled: list[Unsettled] = []
        self._num_keys = 0

    @property
    def num_out(self) -> int:
        """Requests out of the batch, in any state."""
        return len(self._tickets)

    @property
    def pending(self) -> bool:
        """Whether something here may change without a command."""
        return bool(self._tickets or self._unsettled) or self.cascade.busy

    @property
    def parked_bytes(self) -> int:
        """Payload bytes of images in the cascade."""
        held = [t for t in self._tickets.values() if t.image is ImageState.IN_CASCADE]
        return sum(self._engine.spec.image_bytes(t.num_tokens) for t in held)

    # -- out ----------------------------------------------------------------------------------------------------------

    def take_out(self, sequence: Sequence, cause: str, *, forced: bool = False) -> None:
        """Takes a running request, or a victim of the plan, out of the batch."""
        assert sequence.kv is not None
        n = sequence.num_computed
        sequence.kv.reclaim_window(n)
        self.scheduler.set_aside(sequence)
        sequence.to(SeqState.DRAINING)
        ticket = self._open_ticket(sequence, n, cause)
        ticket.indices = sequence.kv.indices(n)
        ticket.forced_tier = self.forced.control.tier if forced else "auto"
        if ticket.forced_tier == "recompute":
            self._lose(ticket, "forced_recompute")
        else:
            self._begin_copy(ticket)
            self._settle_copy(ticket)

    def park_arrival(self, sequence: Sequence, arrived: HeldImage) -> None:
        """A hand-off has arrived and there is no room: its image waits in a tier, or where it landed."""
        n = arrived.image.header.num_tokens
        cause = "slots" if self.room.free().slots == 0 else "landing"
        self.scheduler.set_aside(sequence)
        sequence.num_computed = n
        ticket = self._open_ticket(sequence, n, cause)
        ticket.held, ticket.image, ticket.tier = arrived, ImageState.HELD, "landing"
        self._leave_landing(ticket)
        self._park(ticket)

    def _leave_landing(self, ticket: Ticket) -> None:
        """Moves a held image into the tiers, which frees landing memory for the next hand-off."""
        assert ticket.held is not None
        image = ticket.held.image
        # The payload keeps the order of the hand-off, a segment a chunk, so it needs the hand-off's segments.
        place = self._reserve(ticket, image.header.segments)
        ticket.awaits_room = isinstance(place, Refusal) and place.retry
        if isinstance(place, Refusal):
            return
        place.payload.copy_(image.payload)
        self.cascade.commit(ticket.key)
        ticket.image, ticket.tier = ImageState.IN_CASCADE, "pinned"
        held, ticket.held = ticket.held, None
        held.release()

    def _open_ticket(self, sequence: Sequence, n: int, cause: str) -> Ticket:
        history = self.room.history.setdefault(sequence.key, History())
        history.num_retracts += 1
        self.meter.event(cause, n, history.num_retracts)
        if self.room.predicted:
            self.scheduler.ledger.withdraw(sequence.key)
        self._num_keys += 1
        # Numbered: the image of an ended attempt may outlive it by a copy, and a request is parked many times.
        key = ImageKey(f"{sequence.request.request_id}~{sequence.request.epoch}~{self._num_keys}")
        ticket = self._tickets[sequence.key] = Ticket(sequence, key, n, cause, time.monotonic(), None)
        return ticket

    def _reserve(self, ticket: Ticket, segments: tuple[Segment, ...] | None = None) -> KVImage | Refusal:
        request = ticket.sequence.request
        header = planned_header(
            self._engine.spec,
            ticket.num_tokens,
            request_id=request.request_id,
            epoch=request.epoch,
            model_hash=self._engine.pools.model_hash,
        )
        if segments is not None:
            header = dataclasses.replace(header, segments=tuple(Segment(segment.place) for segment in segments))
        return self.cascade.reserve(ticket.key, header)

    def _begin_copy(self, ticket: Ticket) -> None:
        """Reserves host memory and starts the copy; leaves `copy` None while the tiers make room."""
        if ticket.reserved is None:
            place = self._reserve(ticket)
            if isinstance(place, Refusal):
                if not place.retry:
                    self._lose(ticket, "")
                return
            ticket.reserved = place
        ticket.num_copies += 1
        ticket.copy_began_s = time.monotonic()
        assert ticket.indices is not None
        try:
            if self.forced.copy_fails():
                raise CopyFailed("planned failure")
            ticket.copy = start_copy_out(self._engine.pools, ticket.indices, ticket.reserved)
        except IntegrityError:
            raise
        except Exception as exc:
            ticket.copy = FailedCopy(exc)

    def _settle_copy(self, ticket: Ticket) -> None:
        """Frees the pages of a ticket whose copy is done; tries a failed copy once more, then gives the image up."""
        while ticket.copy is not None:
            try:
                if not ticket.copy.done():
                    return
                break
            except Exception as exc:
                logger.warning("request=%s copy out failed: %s", ticket.sequence.request.request_id, exc)
                self.meter.fallbacks["copy_failed"] += 1
                ticket.copy = None
                if ticket.num_copies < COPY_ATTEMPTS:
                    self._begin_copy(ticket)
                else:
                    self._lose(ticket, "copy_given_up")
        if ticket.copy is None:
            return
        ticket.copy = ticket.reserved = None
        self.cascade.commit(ticket.key)
        ticket.image = ImageState.IN_CASCADE
        self.meter.bytes_out += self._engine.spec.image_bytes(ticket.num_tokens)
        self.meter.phase("copy_out", time.monotonic() - ticket.copy_began_s)
        self._free_pages(ticket.sequence)
        self._park(ticket)

    def _lose(self, ticket: Ticket, why: str) -> None:
        """There is no image. A forced victim that nobody can recompute goes on where it is instead."""
        if why:
            self.meter.fallbacks[why] += 1
        self.cascade.discard(ticket.key)
        ticket.reserved, ticket.image = None, ImageState.LOST
        sequence = ticket.sequence
        can_recompute = self.recomputer is not None and self.recomputer.available
        if ticket.cause == "forced" and sequence.kv is not None and not can_recompute:
            self.meter.fallbacks["spared"] += 1
            self._tickets.pop(sequence.key)
            self._rejoin(sequence, ticket.num_tokens)
            return
        self._free_pages(sequence)
        self._park(ticket)

    def _park(self, ticket: Ticket) -> None:
        sequence = ticket.sequence
        if sequence.state is not SeqState.PARKED:
            sequence.to(SeqState.PARKED)
        ticket.parked_s = time.monotonic()
        self.queue.push(sequence)
        tier = ticket.forced_tier
        if ticket.image is ImageState.IN_CASCADE and tier in ("disk", "peer"):
            ticket.must_sink = self.cascade.push_down(ticket.key, tier)
            if not ticket.must_sink:
                self.meter.fallbacks[f"{tier}_refused"] += 1

    def _free_pages(self, sequence: Sequence) -> None:
        kv, sequence.kv = sequence.kv, None
        if kv is not None:
            self._poison(kv)
            kv.free()

    def _poison(self, kv: SequenceKV) -> None:
        if self.forced.control.poison_freed:
            self._engine.pools.poison(kv.indices())

    # -- back ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Looks at every copy, load, recomputation and tier move under way."""
        for unsettled in [u for u in self._unsettled if is_done(u.copy)]:
            self._unsettled.remove(unsettled)
            unsettled.free()
        for ticket in tuple(self._tickets.values()):
            match ticket.sequence.state:
                case SeqState.DRAINING:
                    if ticket.copy is None:
                        self._begin_copy(ticket)
                    self._settle_copy(ticket)
                case SeqState.PARKED if ticket.awaits_room:
                    self._leave_landing(ticket)
                case SeqState.RESTORING:
                    self._settle_recompute(ticket)
                    self._settle_load(ticket)
        lost = {loss.key: loss for loss in self.cascade.poll()}
        for ticket in self._tickets.values():
            if ticket.image is not ImageState.IN_CASCADE:
                continue
            if ticket.key in lost:
                logger.warning("request=%s image lost in tier %s", *ticket.sequence.key[:1], lost[ticket.key].tier)
                ticket.image, ticket.must_sink = ImageState.LOST, False
                continue
            ticket.tier = self.cascade.tier_of(ticket.key) or ticket.tier
            if ticket.must_sink and self.cascade.place(ticket.key) is not Place.DEMOTING:
                ticket.must_sink = False
                if self.cascade.place(ticket.key) is Place.HOST:
                    self.meter.fallbacks[f"{ticket.forced_tier}_failed"] += 1
                    ticket.tier = "pinned"

    def resume(self) -> None:
        """Brings parked requests back in order, smaller ones past a blocked one for a bounded number of times."""
        hopeless: list[Sequence] = []

        def accept(sequence: Sequence) -> bool:
            ticket = self._tickets[sequence.key]
            if ticket.image is ImageState.LOST and not (self.recomputer is not None and self.recomputer.available):
                hopeless.append(sequence)
                return False
            return not ticket.must_sink and self._try_resume(ticket)

        for sequence in self.queue.take(accept):
            self._settle_load(self._tickets[sequence.key])
        if self.config.extra_requests and len(self.queue) and self.room.free().slots == 0:
            holder = self.room.slot_holder()
            # Nobody is put in danger of a lost image for a fairer share of time.
            if holder is not None and self._host_has_room(holder):
                self.take_out(holder, "slots")
        for sequence in hopeless:
            self.meter.fallbacks["failed"] += 1
            self._fail_request(sequence, KVLost("the request's memory was lost and no prefill worker is known"))

    def _host_has_room(self, sequence: Sequence) -> bool:
        needed = self._engine.spec.image_bytes(sequence.num_computed) + EXTENT_ALIGN_BYTES
        return self.cascade.host.largest_free_bytes >= needed

    def _try_resume(self, ticket: Ticket) -> bool:
        """Gives a parked request pages and starts to fill them; False and no change when it must wait."""
        sequence = ticket.sequence
        if ticket.wanted_s is None:
            ticket.wanted_s = time.monotonic()
        if not self.room.fits(sequence, ticket.num_tokens):
            # An image that stays wanted could not make way for others in the host tier.
            self.cascade.want(ticket.key, soon=False)
            return False
        if ticket.image is ImageState.LOST:
            return self._begin_recompute(ticket)
        if ticket.held is not None:
            return self._resume_held(ticket, ticket.held)
        if not self.cascade.want(ticket.key):
            return False
        image = self.cascade.lend(ticket.key)
        if image is None:
            return False
        if not self._give_pages(ticket):
            self.cascade.take_back(ticket.key)
            return False
        sequence.to(SeqState.RESTORING)
        self._begin_load(ticket, image)
        return True

    def _resume_held(self, ticket: Ticket, held: HeldImage) -> bool:
        if not self._give_pages(ticket):
            return False
        ticket.sequence.to(SeqState.RESTORING)
        self._begin_load(ticket, held.image)
        return True

    def _give_pages(self, ticket: Ticket) -> bool:
        """Pages, a slot and a promise; all or nothing."""
        sequence, ledger = ticket.sequence, self.scheduler.ledger
        if self.room.predicted and not ledger.promise(sequence.key, self.room.resume_need(sequence)):
            return False
        kv = self.scheduler.place(sequence, ticket.num_tokens)
        if kv is None:
            if self.room.predicted:
                ledger.withdraw(sequence.key)
            return False
        if self.forced.control.other_pages and ticket.indices is not None:
            self._move_elsewhere(ticket, kv)
        return True

    def _move_elsewhere(self, ticket: Ticket, kv: SequenceKV) -> None:
        """Takes other pages while these are among the request's old ones, as long as others are free."""
        sequence, spares = ticket.sequence, []
        while shares_memory(kv, ticket.indices):
            other = self.scheduler.place(sequence, ticket.num_tokens)
            if other is None:
                self.meter.fallbacks["same_pages"] += 1
                break
            spares.append(kv)
            kv = other
        sequence.kv = kv
        for spare in spares:
            spare.free()

    def _begin_load(self, ticket: Ticket, image: KVImage) -> None:
        kv = ticket.sequence.kv
        assert kv is not None
        ticket.load_began_s = time.monotonic()
        try:
            ticket.load = start_copy_in(self._engine.pools, image, kv.indices(ticket.num_tokens))
        except IntegrityError:
            raise
        except Exception as exc:
            ticket.load = FailedCopy(exc)

    def _settle_load(self, ticket: Ticket) -> None:
        if ticket.load is None:
            return
        try:
            if not ticket.load.done():
                return
        except Exception as exc:
            logger.warning("request=%s image refused: %s", ticket.sequence.request.request_id, exc)
            self.meter.checksum_failures += 1
            self._back_to_queue(ticket)
            return
        sequence, now_s = ticket.sequence, time.monotonic()
        assert sequence.kv is not None
        if self.forced.control.mutate is not None:
            indices = sequence.kv.indices(ticket.num_tokens)
            apply_mutation(self.forced.control.mutate, self._engine.pools, indices, sequence)
        self._drop_image(ticket)
        del self._tickets[sequence.key]
        meter = self.meter
        meter.bytes_in += self._engine.spec.image_bytes(ticket.num_tokens)
        meter.resumed_from[ticket.tier] += 1
        meter.phase("copy_in", now_s - ticket.load_began_s)
        meter.phase("parked", now_s - ticket.parked_s)
        meter.phase("resume_wait", now_s - (ticket.wanted_s or now_s))
        self._rejoin(sequence, ticket.num_tokens)

    def _rejoin(self, sequence: Sequence, num_tokens: int) -> None:
        self.room.history[sequence.key].resumed_at_step = self.room.step
        self.scheduler.join(sequence, num_tokens)

    def _drop_image(self, ticket: Ticket) -> None:
        if ticket.held is not None:
            held, ticket.held = ticket.held, None
            held.release()
        self.cascade.discard(ticket.key)

    def _back_to_queue(self, ticket: Ticket) -> None:
        """A restore came to nothing: pages and image go, the request waits to be recomputed."""
        self._drop_image(ticket)
        if self.room.predicted:
            self.scheduler.ledger.withdraw(ticket.sequence.key)
        self._free_pages(ticket.sequence)
        ticket.load = ticket.recompute = None
        ticket.image = ImageState.LOST
        self._park(ticket)

    # -- recomputation ------------------------------------------------------------------------------------------------

    def _begin_recompute(self, ticket: Ticket) -> bool:
        assert self.recomputer is not None
        if not self._give_pages(ticket):
            return False
        sequence = ticket.sequence
        sequence.to(SeqState.RESTORING)
        ticket.num_recomputes += 1
        ticket.recompute_name = f"{ticket.key}~{ticket.num_recomputes}"
        ticket.load_began_s = time.monotonic()
        ticket.tier = "recompute"
        tokens = (*sequence.request.prompt_ids, *sequence.output_ids)[: ticket.num_tokens]
        timeout_s = min(self.config.recompute_timeout_s, max(1.0, sequence.deadline_s - self._clock()))
        ticket.recompute = self.recomputer.start(ticket.recompute_name, tokens, timeout_s)
        return True

    def _settle_recompute(self, ticket: Ticket) -> None:
        future = ticket.recompute
        if future is None or not future.done():
            return
        ticket.recompute = None
        error = future.exception()
        if error is None:
            self.meter.phase("recompute", time.monotonic() - ticket.load_began_s)
            ticket.held = future.result()
            self._begin_load(ticket, ticket.held.image)
            return
        logger.warning("request=%s recompute failed: %s", ticket.sequence.request.request_id, error)
        self.meter.fallbacks["recompute_failed"] += 1
        if ticket.num_recomputes < self.config.recompute_attempts:
            self._back_to_queue(ticket)
        else:
            self.meter.fallbacks["failed"] += 1
            self._fail_request(ticket.sequence, KVLost(f"the request's memory was lost: {error}"))

    # -- ends ---------------------------------------------------------------------------------------------------------

    def forget(self, sequence: Sequence) -> bool:
        """The request ends, in whatever state; whether it was out of the batch.

        The caller drops it from the scheduler afterwards.
        """
        key = sequence.key
        self.forced.forget(sequence)
        ticket = self._tickets.pop(key, None)
        if ticket is None:
            if sequence.kv is not None:
                self._poison(sequence.kv)
            return False
        self.queue.remove(sequence)
        if ticket.recompute is not None and self.recomputer is not None:
            self.recomputer.cancel(ticket.recompute_name)
            ticket.recompute.add_done_callback(lambda f: None if f.exception() else f.result().release())
        copy = ticket.load or ticket.copy
        if copy is None or is_done(copy):
            self._drop_image(ticket)
            return True
        # Bytes still move: pages and image stay until they have arrived, though the request is gone.
        kv, sequence.kv = sequence.kv, None
        assert kv is not None
        self.scheduler.lent.append(kv)
        self._unsettled.append(Unsettled(copy, lambda: self._free_lent(ticket, kv)))
        return True

    def _free_lent(self, ticket: Ticket, kv: SequenceKV) -> None:
        self.scheduler.lent.remove(kv)
        self._drop_image(ticket)
        kv.free()

    def close(self) -> None:
        """After every request has ended: waits for what still moves, closes the tiers."""
        for unsettled in self._unsettled:
            unsettled.copy.wait()
            unsettled.free()
        self._unsettled.clear()
        self.cascade.close()

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless tickets, queue and tiers agree."""
        self.cascade.check_integrity()
        if {s.key for s in self.queue} != {k for k, t in self._tickets.items() if t.sequence.state is SeqState.PARKED}:
            raise IntegrityError("the resume queue is not the parked requests")
        for ticket in self._tickets.values():
            holds = ticket.sequence.kv is not None
            if holds == (ticket.sequence.state is SeqState.PARKED):
                raise IntegrityError(f"{ticket.sequence}: pages held: {holds}")
        parked = self.cascade.stats().parked_images
        owners = sum(self.cascade.place(t.key) is not None for t in self._tickets.values())
        if parked > owners + len(self._unsettled):
            raise IntegrityError(f"{parked} images are parked, {owners} requests own one")
