"""Stored records of experts as the kernels want them: read, put in order, brought to bank or slots by many threads.

Owns: the order of an expert's parts on the GPU against that of a record, the threads of a bulk read, its progress. Does
not own: files, retries and checksums (`workers/experts/supply.py`), who goes where.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from workers.checkpoint.progress import OnProgress, ProgressCounter
from workers.errors import BadConfig
from workers.experts.bank import HostBank
from workers.experts.cache import FILLED_AT_ONCE
from workers.experts.host_memory import available_bytes
from workers.experts.layout import ExpertShape
from workers.experts.supply import ExpertSupply

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

MOST_READERS = 32
"""Threads of a bulk read, at most: memory takes no more."""

LOOK_BYTES = 1 << 30
"""Bytes brought in between two looks at what the host has left: a look is a small file, a filled host a dead one."""

LEAST_FREE_BYTES = 256 << 20
"""Where filling stops. Hosts whose memory grows as it is used may come near this and still have more to give."""

PACKED = ("I8", "U8")
"""Stored types of two e2m1 codes a byte."""


class ExpertSource:
    """Experts of one checkpoint in the kernels' order of bytes. Any thread may read."""

    def __init__(self, supply: ExpertSupply, shape: ExpertShape, num_readers: int) -> None:
        """Raises `BadConfig` for a checkpoint whose experts are not stored in FP4."""
        form = supply.records.form
        for stored in (form.gate, form.down):
            if stored.dtype not in PACKED or supply.record_bytes != shape.expert_bytes:
                raise BadConfig("experts", str(stored), "experts stored in FP4, for a budget on a GPU", "worker config")
        self.supply, self.expert_bytes = supply, shape.expert_bytes
        self._moves: list[tuple[slice, slice]] = []
        for name, starts in shape.offsets().items():
            for part, start in zip((f"{name}.weight", f"{name}.scale"), starts, strict=True):
                first, end = form.offsets[part]
                self._moves.append((slice(first, end), slice(start, start + end - first)))
        self.num_readers = min(num_readers, MOST_READERS)
        self._own = threading.local()
        """A reader's buffer: fresh memory for each expert would cost as much as the copy out of it."""
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def read(self, pair: int, out: Bytes) -> None:
        """Fills `out` uint8 [expert_bytes]. Raises `ExpertUnavailable`."""
        record = getattr(self._own, "record", None)
        if record is None:
            record = self._own.record = np.empty(self.supply.record_bytes, np.uint8)
        self.supply.read(pair, record, stream=True)
        for source, target in self._moves:
            out[target] = record[source]

    def read_all(self, pairs: Sequence[int], outs: Callable[[int], Bytes], done: Callable[[], None]) -> None:
        """Reads pairs on all threads, the i-th into `outs(i)`; `done` after each, on the caller's thread.

        One caller at a time. What `done` or a read raises ends it, once nobody writes into `outs` any more.
        """
        if self._pool is None:
            self._pool = concurrent.futures.ThreadPoolExecutor(self.num_readers, thread_name_prefix="read-experts")
        waiting = [self._pool.submit(self.read, pair, outs(index)) for index, pair in enumerate(pairs)]
        try:
            for future in concurrent.futures.as_completed(waiting):
                future.result()
                done()
        except BaseException:
            for future in waiting:
                future.cancel()
            concurrent.futures.wait(waiting)
            raise

    def rest(self) -> None:
        """Ends the threads of bulk reads and frees their buffers; the next bulk read starts others."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()

    def fill(self, bank: HostBank, on_progress: OnProgress | None = None) -> None:
        """Every pair that has a place in the bank, in order of pairs.

        Raises `ExpertUnavailable`, and `BadConfig` when the host's memory comes to its end, whoever has taken it.
        """
        pairs = np.flatnonzero(bank.place >= 0).tolist()
        counter = ProgressCounter(len(pairs) * self.expert_bytes, on_progress)
        began, looked = time.monotonic(), 0

        def done() -> None:
            nonlocal looked
            counter.add(self.expert_bytes, "experts in host memory")
            if counter.done_bytes - looked >= LOOK_BYTES:
                looked = counter.done_bytes
                if (free := available_bytes()) < LEAST_FREE_BYTES:
                    found = f"{bank.nbytes} bytes, {free} left on the host after {looked}"
                    raise BadConfig("experts.host", found, "a size that the host has free", "worker config")

        self.read_all(pairs, lambda index: bank.expert(pairs[index]).numpy(), done)
        seconds = time.monotonic() - began
        rate = counter.done_bytes / 1e9 / max(seconds, 1e-9)
        logger.info("experts: bank=%d filled_s=%.1f GB_per_s=%.2f", len(pairs), seconds, rate)


class Bringer:
    """Bytes of any pair for the first filling of slots: from the bank when it has them, else read into buffers."""

    def __init__(
        self, source: ExpertSource, bank: HostBank | None, total: int, *, pinned: bool, on_progress: OnProgress | None
    ) -> None:
        """`total`: pairs that will be asked for. `pinned`: the buffers are for a GPU."""
        self._source, self._bank = source, bank
        self._buffers: Tensor | None = None
        self._pinned = pinned
        self._counter = ProgressCounter(total * source.expert_bytes, on_progress)

    def __call__(self, pairs: Sequence[int]) -> list[Tensor]:
        """uint8 [expert_bytes] of each pair, valid until the next call. Raises `ExpertUnavailable`."""
        bank = self._bank
        absent = [pair for pair in pairs if bank is None or not bank.holds(pair)]
        buffers = self._buffers_for(absent)
        self._source.read_all(absent, lambda index: buffers[index].numpy(), lambda: None)
        read = dict(zip(absent, buffers, strict=False))
        self._counter.add(len(pairs) * self._source.expert_bytes, "experts in slots")
        return [read[pair] if pair in read else self._held(pair) for pair in pairs]

    def _held(self, pair: int) -> Tensor:
        assert self._bank is not None
        return self._bank.expert(pair)

    def _buffers_for(self, absent: Sequence[int]) -> Sequence[Tensor]:
        if not absent:
            return ()
        if self._buffers is None:
            shape = (FILLED_AT_ONCE, self._source.expert_bytes)
            self._buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pinned)
        return list(self._buffers)
