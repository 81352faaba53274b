"""`ExpertSupply`: the records of absent experts, from the host bank when it has them, else from disk.

Owns: the order of the slower tiers, counted retries, checks of content, what was read and how long it took. Does not
own: files (`disk.py`), who is resident. Never hands out a wrong record: a failed or damaged read is tried again, and
raised when that does not help. Any thread may read.
"""

from __future__ import annotations

import logging
import mmap
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.checksum import checksum
from workers.errors import BadCheckpoint, WorkerError
from workers.experts.bank import HostBank, Progress
from workers.experts.config import ExpertConfig
from workers.experts.disk import Bytes, ExpertDisk, open_disk
from workers.experts.records import ExpertRecords

logger = logging.getLogger(__name__)

TRIES = 3
"""Reads of one record before its failure is the step's."""


class ExpertUnavailable(WorkerError):
    """An expert that a step needs cannot be read. The step's requests fail; the worker goes on."""


@dataclass(slots=True)
class SupplyCounters:
    """Since start. Readable from anywhere."""

    bank_reads: int = 0
    disk_reads: int = 0
    disk_bytes: int = 0
    bank_bytes: int = 0
    read_s: float = 0.0
    """Seconds inside reads, over all threads."""
    io_errors: int = 0
    """Reads that failed or brought other bytes than before, each try counted."""


class ExpertSupply:
    """Slower tiers of one worker."""

    def __init__(self, records: ExpertRecords, config: ExpertConfig, *, num_readers: int) -> None:
        """Opens files, reads nothing. Raises `BadConfig`, `BadCheckpoint`, `OSError`."""
        self.records, self.config = records, config
        if config.verbose:
            logging.getLogger("workers.experts").setLevel(logging.DEBUG)
        self.counters = SupplyCounters()
        self.disk: ExpertDisk = open_disk(
            records, config.source, host_bytes=config.host_bytes or 0, num_readers=num_readers
        )
        self.bank: HostBank | None = None
        known = records.checksums
        self._sums = np.zeros(records.num_pairs, np.uint64) if known is None else np.array(known, np.uint64)
        self._has_sums = known is not None
        self._lock = threading.Lock()

    @property
    def record_bytes(self) -> int:
        """Bytes of one record."""
        return self.records.record_bytes

    def fill_bank(self, order: Sequence[int], on_progress: Progress | None = None) -> int:
        """Reads as many of `order` as the host budget holds into the bank, in file order; how many. Raises as `read`.

        With source `residency` the budget belongs to mapped pages instead, and nothing is done.
        """
        stride = -(-self.record_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        capacity = min(len(order), (self.config.host_bytes or 0) // stride)
        if capacity == 0 or self.config.source == "residency":
            return 0
        bank = HostBank(order[:capacity], self.records.num_pairs, stride)
        began = time.monotonic()
        for done, pair in enumerate(sorted(order[:capacity])):
            self.read(pair, bank.expert(pair).numpy()[: self.record_bytes], stream=True)
            if on_progress is not None:
                on_progress((done + 1) * self.record_bytes, capacity * self.record_bytes)
        seconds = time.monotonic() - began
        rate = capacity * self.record_bytes / 1e9 / max(seconds, 1e-9)
        logger.info("experts: bank of %d experts filled in %.1f s, %.2f GB/s", capacity, seconds, rate)
        self.bank = bank
        return capacity

    def path_of(self, pair: int) -> str:
        """Where a read of the pair goes: `host` (the bank) or `disk`."""
        return "host" if self.bank is not None and self.bank.holds(pair) else "disk"

    def read(self, pair: int, out: Bytes, *, stream: bool = False) -> None:
        """Fills `out` uint8 [record_bytes] with the pair's record. Raises `ExpertUnavailable`."""
        began = time.perf_counter()
        problem = ""
        for _ in range(TRIES):
            try:
                self._read_once(pair, out, stream)
            except (OSError, BadCheckpoint) as exc:
                problem = str(exc)
            else:
                if self._is_right(pair, out):
                    break
                problem = "its bytes changed since they were first read"
            with self._lock:
                self.counters.io_errors += 1
            logger.warning("experts: pair=%d read failed: %s", pair, problem)
        else:
            raise ExpertUnavailable(f"expert pair {pair} cannot be read, tried {TRIES} times: {problem}")
        with self._lock:
            self.counters.read_s += time.perf_counter() - began

    def _read_once(self, pair: int, out: Bytes, stream: bool) -> None:
        if self.bank is not None and self.bank.holds(pair):
            out[:] = self.bank.expert(pair).numpy()[: self.record_bytes]
            with self._lock:
                self.counters.bank_reads += 1
                self.counters.bank_bytes += self.record_bytes
            return
        self.disk.read(pair, out, stream=stream)
        with self._lock:
            self.counters.disk_reads += 1
            self.counters.disk_bytes += self.record_bytes

    def _is_right(self, pair: int, out: Bytes) -> bool:
        if not (self._has_sums or self.config.verify):
            return True
        found = checksum(out.data)
        if not self._has_sums and self._sums[pair] == 0:
            self._sums[pair] = found
        return int(self._sums[pair]) == found

    @property
    def bank_bytes(self) -> int:
        """Host memory of the bank."""
        return 0 if self.bank is None else self.bank.nbytes

    def close(self) -> None:
        """Closes files and bank."""
        self.disk.close()
        if self.bank is not None:
            self.bank.close()
