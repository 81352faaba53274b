"""`Landings`: hand-offs whose KV is on its way from landing memory into the pools of a decode worker.

Owns: the loads under way, their pages until the last byte has moved, the landing memory behind them. Does not own: the
first token and every event (`DecodeWorker`). A load runs beside the model, so the batch decodes on meanwhile; on a CPU
it is done at once. A request that ends under way leaves its pages here until they are quiet. Engine thread only.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.pools.aggregate import KVPools
from kvstore.sequence_kv import SequenceKV
from workers.messages import TokenLogprob
from workers.retract.copying import is_done, start_copy_in
from workers.retract.ticket import Copy, HeldImage
from workers.scheduler.decode import DecodeScheduler
from workers.sequence import SeqState, Sequence


@dataclass(slots=True, eq=False)
class Landing:
    """One hand-off under way, and the first token that goes with it."""

    sequence: Sequence
    kv: SequenceKV
    arrived: HeldImage
    load: Copy
    token_id: int
    logprob: TokenLogprob | None
    ended: bool = False
    """The request is gone; pages and image wait for the last byte."""


class Landings:
    """The loads of one decode worker."""

    def __init__(self, pools: KVPools, scheduler: DecodeScheduler) -> None:
        self._pools, self._scheduler = pools, scheduler
        self._under_way: list[Landing] = []

    @property
    def pending(self) -> bool:
        """Whether any load is under way."""
        return bool(self._under_way)

    def begin(
        self, sequence: Sequence, kv: SequenceKV, arrived: HeldImage, token_id: int, logprob: TokenLogprob | None
    ) -> Landing:
        """Starts to fill the pages that the sequence holds. Raises what the pools raise; nothing is under way then."""
        load = start_copy_in(self._pools, arrived.image, kv.indices(arrived.image.header.num_tokens))
        sequence.to(SeqState.RESTORING)
        landing = Landing(sequence, kv, arrived, load, token_id, logprob)
        self._under_way.append(landing)
        return landing

    def take_done(self) -> list[Landing]:
        """Loads whose request still waits and no byte moves any more, in order of arrival; the caller settles them.

        What belonged to ended requests is freed here.
        """
        quiet = [landing for landing in self._under_way if is_done(landing.load)]
        for landing in quiet:
            self._under_way.remove(landing)
            if landing.ended:
                self._free(landing)
        return [landing for landing in quiet if not landing.ended]

    def forget(self, sequence: Sequence) -> None:
        """The request ends. Pages of a load under way leave it here, to be freed when the load is done."""
        for landing in self._under_way:
            if landing.sequence is sequence and not landing.ended:
                landing.ended = True
                sequence.kv = None
                self._scheduler.lent.append(landing.kv)

    def close(self) -> None:
        """After every request has ended: waits for what still moves."""
        for landing in self._under_way:
            landing.load.wait()
            self._free(landing)
        self._under_way.clear()

    def _free(self, landing: Landing) -> None:
        self._scheduler.lent.remove(landing.kv)
        landing.kv.free()
        landing.arrived.release()
