"""Three ways to read expert records from files, behind one interface; which one is the user's choice.

    mmap       copy from a mapping: the kernel's page cache keeps what it likes, unasked and uncounted
    residency  the same, but pages of at most a budget stay: the least recently read experts' are dropped, and streamed
               reads drop theirs behind them
    direct     O_DIRECT into aligned buffers: nothing is cached, the footprint is the buffers

Owns: file handles, mappings, buffers, what is kept. Does not own: retries and checks of content (`supply.py`). A short
or shrunken file is `BadCheckpoint`, a failed read `OSError`; neither can come as a signal, because mapped pages are
brought in by a call that reports errors before anything touches them. Any thread may read.
"""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from workers.errors import BadCheckpoint, BadConfig
from workers.experts.drawn import DrawnDisk
from workers.experts.records import ExpertRecords, Run

Bytes = npt.NDArray[np.uint8]

ALIGN = 4096
"""Offsets, lengths and addresses of direct reads: the largest logical block of a disk that we know."""

MADV_POPULATE_READ = 22
"""Linux 5.14: maps pages like a read would, and returns EFAULT where the read would end in SIGBUS."""


WILLNEED_BYTES = 128 << 10
"""Read ahead of one request: the kernel cuts longer ones off at a disk's own limit, and would fault in the rest page by
page (measured: 0.01 GB/s). All requests of an expert are in flight before the first is waited for."""


class ExpertDisk(Protocol):
    """Stored experts."""

    bytes_read: int
    """Bytes asked of files so far."""

    def read(self, pair: int, out: Bytes, *, stream: bool = False) -> None:
        """Fills `out` uint8 [record_bytes]. `stream`: read once, in a sweep over many; nothing should stay behind.

        Raises `BadCheckpoint` when a file ends early, `OSError` when it cannot be read.
        """

    @property
    def held_bytes(self) -> int:
        """Bytes of host memory that this strategy keeps on purpose (buffers, pages within its budget)."""

    def close(self) -> None:
        """Gives everything back; `read` must not be called again."""


def open_disk(records: ExpertRecords, source: str, *, host_bytes: int, num_readers: int) -> ExpertDisk:
    """The strategy named `source`; `num_readers` threads read at once. Raises `BadConfig`, `BadCheckpoint`.

    Experts of a recipe are drawn whatever the strategy.
    """
    if records.drawn is not None:
        return DrawnDisk(records)
    if source == "direct":
        return DirectDisk(records, num_readers)
    if source == "residency":
        return ResidencyDisk(records, host_bytes)
    return MmapDisk(records)


class _Files:
    """Open files by path; every read checks that the file still reaches its end."""

    def __init__(self, flags: int) -> None:
        self._flags = flags
        self._fds: dict[Path, int] = {}
        self._lock = threading.Lock()

    def fd(self, run: Run) -> int:
        """Descriptor of the run's file, long enough now. Raises `BadCheckpoint`, `OSError`."""
        with self._lock:
            fd = self._fds.get(run.path)
            if fd is None:
                fd = self._fds[run.path] = os.open(run.path, self._flags)
        size = os.fstat(fd).st_size
        if size < run.end:
            raise truncated(run, size)
        return fd

    def close(self) -> None:
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()


def truncated(run: Run, size: int) -> BadCheckpoint:
    """The error of a file that ends inside a run."""
    return BadCheckpoint(str(run.path), None, f"an expert's bytes {run.start}..{run.end}", f"{size} bytes (truncated)")


class MmapDisk:
    """Copies from mappings of whole files."""

    def __init__(self, records: ExpertRecords) -> None:
        self._records = records
        self._files = _Files(os.O_RDONLY)
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0

    def read(self, pair: int, out: Bytes, *, stream: bool = False) -> None:
        for run in self._records.runs[pair]:
            view = self._mapped(run)
            for piece in run.pieces:
                part = view[piece.file : piece.file + piece.size]
                out[piece.record : piece.record + piece.size] = np.frombuffer(part, np.uint8)
                part.release()
            view.release()
            self.bytes_read += run.end - run.start

    def _mapped(self, run: Run) -> memoryview:
        """The whole file, with the run's pages present."""
        fd = self._files.fd(run)
        with self._lock:
            mapping = self._maps.get(run.path)
            if mapping is None or len(mapping) < run.end:
                mapping = self._maps[run.path] = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
                mapping.madvise(mmap.MADV_RANDOM)
        start, size = page_range(run)
        size = min(size, len(mapping) - start)
        for at in range(start, start + size, WILLNEED_BYTES):
            mapping.madvise(mmap.MADV_WILLNEED, at, min(WILLNEED_BYTES, start + size - at))
        try:
            mapping.madvise(MADV_POPULATE_READ, start, size)
        except OSError as exc:
            # An older kernel does not know the request: the size check above is then all the warning there is.
            if exc.errno != 22:
                raise OSError(exc.errno, f"cannot read {run.path}: {exc.strerror}") from exc
        return memoryview(mapping)

    def _drop(self, run: Run) -> None:
        """Unmaps the run's pages and lets the page cache forget them."""
        mapping = self._maps.get(run.path)
        if mapping is not None:
            start, size = page_range(run)
            mapping.madvise(mmap.MADV_DONTNEED, start, min(size, len(mapping) - start))
            os.posix_fadvise(self._files.fd(run), run.start, run.end - run.start, os.POSIX_FADV_DONTNEED)

    @property
    def held_bytes(self) -> int:
        return 0

    def close(self) -> None:
        with self._lock:
            for mapping in self._maps.values():
                mapping.close()
            self._maps.clear()
        self._files.close()


class ResidencyDisk(MmapDisk):
    """Mapped pages of at most `host_bytes`; least recently read leaves first."""

    def __init__(self, records: ExpertRecords, host_bytes: int) -> None:
        super().__init__(records)
        largest = max(sum(page_range(run)[1] for run in runs) for runs in records.runs)
        if host_bytes < largest:
            expected = f"at least {largest} bytes, one expert's pages"
            raise BadConfig("experts.host", host_bytes, expected, "worker config")
        self._budget = host_bytes
        self._kept: OrderedDict[int, int] = OrderedDict()
        self._held = 0
        self._order = threading.Lock()

    def read(self, pair: int, out: Bytes, *, stream: bool = False) -> None:
        size = sum(page_range(run)[1] for run in self._records.runs[pair])
        with self._order:
            known = pair in self._kept
            if known:
                self._kept.move_to_end(pair)
            elif not stream:
                # Room first: with this expert's pages the budget still holds.
                while self._held + size > self._budget:
                    oldest, freed = self._kept.popitem(last=False)
                    self._held -= freed
                    self._forget(oldest)
                self._kept[pair] = size
                self._held += size
        super().read(pair, out)
        if stream and not known:
            self._forget(pair)

    def _forget(self, pair: int) -> None:
        for run in self._records.runs[pair]:
            self._drop(run)

    @property
    def held_bytes(self) -> int:
        return self._held


class DirectDisk:
    """O_DIRECT reads through `num_readers` aligned buffers of the longest run."""

    def __init__(self, records: ExpertRecords, num_readers: int) -> None:
        self._records = records
        self._files = _Files(os.O_RDONLY | os.O_DIRECT)
        longest = max(run.end - run.start for runs in records.runs for run in runs)
        self._buffer_bytes = -(-longest // ALIGN) * ALIGN + ALIGN
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._num_readers = num_readers
        for _ in range(num_readers):
            self._buffers.put(mmap.mmap(-1, self._buffer_bytes))
        self.bytes_read = 0
        self._try_first(records.runs[0][0])

    def _try_first(self, run: Run) -> None:
        """One block now, so that a file system without O_DIRECT is refused at start."""
        buffer = self._buffers.get()
        try:
            os.preadv(self._files.fd(run), [memoryview(buffer)[:ALIGN]], 0)
        except OSError as exc:
            problem = "mmap or residency: this file system cannot read past the page cache"
            raise BadConfig("experts.source", "direct", f"{problem} ({exc.strerror})", "worker config") from exc
        finally:
            self._buffers.put(buffer)

    def read(self, pair: int, out: Bytes, *, stream: bool = False) -> None:
        buffer = self._buffers.get()
        try:
            for run in self._records.runs[pair]:
                self._read_run(run, buffer, out)
        finally:
            self._buffers.put(buffer)

    def _read_run(self, run: Run, buffer: mmap.mmap, out: Bytes) -> None:
        fd = self._files.fd(run)
        first = run.start // ALIGN * ALIGN
        wanted = -(-run.end // ALIGN) * ALIGN - first
        view, done = memoryview(buffer), 0
        while first + done < run.end:
            got = os.preadv(fd, [view[done:wanted]], first + done)
            if got <= 0:
                raise truncated(run, first + done)
            done += got
            if first + done < run.end and done % ALIGN:
                raise truncated(run, first + done)
        self.bytes_read += done
        data = np.frombuffer(buffer, np.uint8)
        for piece in run.pieces:
            at = piece.file - first
            out[piece.record : piece.record + piece.size] = data[at : at + piece.size]

    @property
    def held_bytes(self) -> int:
        return self._num_readers * self._buffer_bytes

    def close(self) -> None:
        self._files.close()


def page_range(run: Run) -> tuple[int, int]:
    """(start, size) of the whole pages that hold a run."""
    start = run.start // mmap.PAGESIZE * mmap.PAGESIZE
    return start, -(-run.end // mmap.PAGESIZE) * mmap.PAGESIZE - start
