"""`RetractController`: takes requests out of the batch, keeps their KV elsewhere, brings them back. Engine thread only.

Owns: the order of a step's retract work, forced retracts, the report. Does not own: who fits (`Room`), the way of the
KV (`Parking`), the batch (`DecodeScheduler`).

A step of this engine is synchronous: between two steps every token is committed, so a snapshot taken there holds
exactly the tokens [0, n), and the one known token after them is computed first on resume. All else of a request
(sampling state, penalties, stop rule, stream offset, log-probabilities) lives in its `Sequence` and never leaves.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq

from kvstore.tiers.cascade import Cascade
from workers.engine import Engine
from workers.errors import RequestError
from workers.messages import RetractControl, RetractReport
from workers.retract.config import RetractConfig
from workers.retract.forced import ForcedRetracts
from workers.retract.meter import RetractMeter, RetractTotals
from workers.retract.parking import Parking
from workers.retract.room import Room
from workers.retract.victims import choose_victims
from workers.scheduler.admission import Need
from workers.scheduler.decode import DecodeLimits, DecodeScheduler
from workers.sequence import Sequence

POLL_S = 0.002
"""How often copies and tiers are looked at while nothing runs."""


class RetractController:
    """Retract and resume of one decode worker."""

    def __init__(
        self,
        config: RetractConfig,
        engine: Engine,
        limits: DecodeLimits,
        cascade: Cascade,
        *,
        clock: Callable[[], float],
        fail: Callable[[Sequence, RequestError], None],
    ) -> None:
        """`fail` ends a request with an error; it calls `forget`."""
        self._engine = engine
        self.room = Room(config, engine.allocators, engine.spec, clock)
        self.scheduler = DecodeScheduler(engine.allocators, limits, need=self.room.need, shortage=self.room)
        self.room.scheduler = self.scheduler
        self.parking = Parking(engine, self.room, cascade, clock=clock, fail=fail)
        self.cascade = cascade
        self._cascade_stats = cascade.stats()
        self._totals_before = RetractTotals()

    @property
    def pending(self) -> bool:
        """Whether something here may change without a command."""
        return self.parking.pending

    def may_admit(self, sequence: Sequence, need: Need) -> bool:
        """Whether a new request is let in now: after those that wait to resume."""
        return self.room.may_admit(sequence, need, next(iter(self.parking.queue), None))

    def before_step(self) -> bool:
        """Notes finished copies, resumes who fits, takes out who is due. Whether anything changed."""
        self.room.step += 1
        parking = self.parking
        if not (parking.pending or parking.forced.active):
            return False
        began_s, before = time.monotonic(), self._progress()
        if parking.pending:
            parking.settle()
            parking.resume()
        if parking.forced.active:
            for sequence in parking.forced.due(self.scheduler.running, self._policy_choice):
                parking.take_out(sequence, "forced", forced=True)
        if before == self._progress():
            return False
        self._cascade_stats = self.cascade.stats()
        parking.meter.added.add((time.monotonic() - began_s) * 1e3)
        return True

    def take_out_victims(self, victims: Seq[Sequence]) -> None:
        """Retracts whom the plan named: a pool is short."""
        began_s = time.monotonic()
        for victim in victims:
            self.parking.take_out(victim, self.room.shortage_cause)
        if victims:
            self._cascade_stats = self.cascade.stats()
            self.parking.meter.added.add((time.monotonic() - began_s) * 1e3)

    def _progress(self) -> tuple[int, int, int]:
        meter = self.parking.meter
        return sum(meter.causes.values()), sum(meter.resumed_from.values()), self.parking.num_out

    def _policy_choice(self, running: Seq[Sequence]) -> Sequence:
        by_key = {s.key: s for s in running}
        batch = [self.room.candidate(s) for s in running]
        chosen = choose_victims(batch, Need(0, 0, 0), self.room.limits)
        return by_key[chosen[0].key if chosen else batch[0].key]

    def forget(self, sequence: Sequence) -> None:
        """The request ends, in whatever state; the caller drops it from the scheduler afterwards."""
        self.room.forget(sequence)
        if self.parking.forget(sequence):
            self._cascade_stats = self.cascade.stats()

    def close(self) -> None:
        """After every request has ended: ends what still moves, closes the tiers."""
        self.parking.close()

    def set_control(self, control: RetractControl) -> None:
        """Forces retracts from the next step on."""
        self.parking.forced = ForcedRetracts(control)

    def report(self, *, reset: bool = False) -> RetractReport:
        """Counts since the start or the last `reset`."""
        parking = self.parking
        report = parking.meter.report(
            parked_requests=parking.num_out,
            parked_bytes=parking.parked_bytes,
            leaked_pages=self.num_leaked(),
            tiers=self.cascade.stats(),
        )
        if reset:
            self._totals_before += parking.meter.totals()
            parking.meter = RetractMeter(self.cascade.stats())
        return report

    def stats_fields(self) -> dict[str, object]:
        """This part's fields of `WorkerStats`. Any thread; gauges are as of the last step with retract work."""
        totals = self._totals_before + self.parking.meter.totals()
        tiers = [tier.stats() for tier in self.cascade.lower]
        moved = {f"out/{t.name}": t.put_bytes for t in tiers} | {f"in/{t.name}": t.get_bytes for t in tiers}
        took = {f"out/{t.name}": t.put_ms for t in tiers} | {f"in/{t.name}": t.get_ms for t in tiers}
        cascade = Counter({cause.value: count for cause, count in self._cascade_stats.fallbacks})
        damaged = sum(t.corrupt + t.foreign + t.read_errors for t in tiers)
        return {
            "parked": self.parking.num_out,
            "parked_bytes": self._cascade_stats.parked_bytes,
            "retracts": dict(totals.causes),
            "retract_bytes": dict(totals.moved_bytes) | moved,
            "retract_ms": dict(totals.moved_ms) | took,
            "retract_fallbacks": dict(totals.fallbacks + cascade),
            "retract_repeats": totals.numbers["repeats"],
            "retract_checksum_failures": totals.numbers["checksum_failures"] + damaged,
            "resumes": totals.numbers["resumes"],
            "resume_wait_s_total": totals.numbers["resume_wait_ms"] / 1e3,
        }

    def num_leaked(self) -> int:
        """Units that the allocators gave out and nobody holds."""
        kvs = [kv for kv in (*self.scheduler.lent, *(s.kv for s in self.scheduler.sequences)) if kv is not None]
        held = sum(kv.num_full_pages + kv.num_window_pages + 1 for kv in kvs)
        return self._engine.allocators.num_held - held

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless tickets, scheduler and tiers agree."""
        self.scheduler.check_integrity()
        self.parking.check_integrity()
