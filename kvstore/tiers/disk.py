"""`DiskTier`: one file per parked image in the folder of one owner, under a budget of bytes.

Owns: the folder, the index, the budget, the writer and the reader thread. Does not own: the format (`image_file.py`).
Every save, rename and removal runs on the one writer thread in the order of the calls. That order is what keeps the
promise: space that an earlier call gives up can be granted to a later one at once, because the removal runs before the
write that uses it. An image exists from the moment its file has its final name; a reader never sees a partial file.

Thread-safe. No call waits for the device, apart from `close` and the constructor, which cleans the folder up.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from kvstore.errors import CorruptImage, IntegrityError, KVStoreError, SpecMismatch
from kvstore.image import ImageHeader, KVImage, check_header
from kvstore.spec import KVSpec
from kvstore.tiers.base import ImageKey, TierStats, finished
from kvstore.tiers.file_ops import FileOps
from kvstore.tiers.image_file import BlockBuffer, layout_of, read_head, read_image, write_direct, write_staged

logger = logging.getLogger(__name__)

_FINAL, _TEMPORARY, _STAGING = ".kv", ".part", ".stage"
_LOCK_NAME = "owner.lock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FolderInUse(KVStoreError):
    """Another live process owns this folder of the disk tier."""


class _OverBudget(Exception):
    """A stream of unknown size has reached the budget."""


class FileState(enum.Enum):
    """Life of an entry. GONE: forgotten; its file is removed by the writer thread once nobody reads it."""

    WRITING = "writing"
    READY = "ready"
    GONE = "gone"


@dataclass(slots=True, eq=False)
class _Entry:
    key: ImageKey
    path: Path
    charged: int
    payload_bytes: int
    state: FileState = FileState.WRITING
    readers: int = 0


class DiskTier:
    """Images of one layout and model, in `directory / owner`."""

    name = "disk"

    def __init__(
        self,
        directory: Path | str,
        owner: str,
        *,
        spec: KVSpec,
        budget_bytes: int,
        model_hash: str = "",
        sync: bool = True,
        direct_io: bool = True,
        recovery: Literal["discard", "index"] = "discard",
        evict: bool = False,
        ops: FileOps | None = None,
        writer: Executor | None = None,
        reader: Executor | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Take the folder over and clean it up.

        Args:
            writer, reader: where slow work runs, one thread each; tests pass their own.

        Raises:
            FolderInUse: another process holds the folder.
            OSError: the folder cannot be made or listed.
        """
        self.budget_bytes = budget_bytes
        self._folder = Path(directory) / owner
        self._spec, self._model_hash = spec, model_hash
        self._sync, self._direct, self._evict = sync, direct_io, evict
        self._ops = ops or FileOps()
        self._clock = clock
        self._mutex = threading.Lock()
        self._entries: OrderedDict[ImageKey, _Entry] = OrderedDict()  # least recently used first
        self._leaving: set[_Entry] = set()
        self._used = 0
        self._orphan_bytes = 0
        self._counts = TierStats("disk", budget_bytes)
        self._write_buffer = BlockBuffer(self._ops, direct=direct_io)
        self._read_buffer = BlockBuffer(self._ops, direct=direct_io)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock_fd = self._take_folder()
        self._next_number = self._recover(keep=recovery == "index")
        self._writer = writer or ThreadPoolExecutor(1, thread_name_prefix="kv-disk-write")
        self._reader = reader or ThreadPoolExecutor(1, thread_name_prefix="kv-disk-read")

    def _take_folder(self) -> int:
        fd = os.open(self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(fd)
            raise FolderInUse(f"{self._folder} belongs to another live process") from exc
        return fd

    # ---- start ----

    def _recover(self, *, keep: bool) -> int:
        """Remove what an earlier run left half done (or all of it); returns the first unused file number."""
        number = 0
        for path in sorted(self._folder.iterdir()):
            if path.suffix not in (_FINAL, _TEMPORARY, _STAGING) or not path.stem.isdigit():
                continue
            number = max(number, int(path.stem) + 1)
            if path.suffix != _FINAL or not keep or not self._index(path):
                self._remove_file(path)
        return number

    def _index(self, path: Path) -> bool:
        try:
            fd = self._ops.open(path, direct=self._direct)
            try:
                head = read_head(self._read_buffer, fd)
            finally:
                self._ops.close(fd)
            check_header(head.header, self._spec, model_hash=self._model_hash)
        except (OSError, CorruptImage, SpecMismatch) as exc:
            self._count_bad(exc)
            logger.warning("file=%s not indexed: %s", path.name, exc)
            return False
        size = head.layout.total_bytes
        if head.key in self._entries or self._used + size > self.budget_bytes:
            return False
        self._charge(size)
        self._entries[head.key] = _Entry(head.key, path, size, head.layout.payload_bytes, FileState.READY)
        return True

    # ---- budget; call with the mutex held ----

    def _charge(self, size: int) -> None:
        self._used += size
        self._counts = replace(self._counts, peak_bytes=max(self._counts.peak_bytes, self._used))

    def _make_room(self, size: int) -> bool:
        """Charge `size`, evicting by use where allowed. `False` and no change when there is no room."""
        short = self._used + size - self.budget_bytes
        victims: list[_Entry] = []
        if short > 0 and self._evict:
            for entry in self._entries.values():
                if entry.state is FileState.READY and not entry.readers:
                    victims.append(entry)
                    short -= entry.charged
                    if short <= 0:
                        break
        if short > 0:
            self._counts = replace(self._counts, refused=self._counts.refused + 1)
            return False
        for entry in victims:
            self._forget(entry)
        self._counts = replace(self._counts, evictions=self._counts.evictions + len(victims))
        self._charge(size)
        return True

    def _forget(self, entry: _Entry) -> None:
        """Take a READY or WRITING entry out of the index and give its space up as early as the order of work allows."""
        del self._entries[entry.key]
        was, entry.state = entry.state, FileState.GONE
        if was is FileState.READY and not entry.readers:
            self._leave(entry)
        else:
            self._leaving.add(entry)  # its writer or last reader goes on from here

    def _leave(self, entry: _Entry) -> None:
        self._used -= entry.charged
        self._writer.submit(self._remove_file, entry.path, entry.charged)

    def _remove_file(self, path: Path, charged: int = 0) -> None:
        try:
            for suffix in (_TEMPORARY, _STAGING, _FINAL):
                self._ops.unlink(path.with_suffix(suffix))
        except OSError:
            logger.exception("file=%s could not be removed", path.name)
            with self._mutex:
                self._charge(charged)
                self._orphan_bytes += charged
                self._counts = replace(self._counts, orphans=self._counts.orphans + 1)

    # ---- saves ----

    def put(self, key: ImageKey, image: KVImage) -> Future[bool] | None:
        """Save an image, every byte once; see `Tier.put`. Missing checksums are computed on the way."""
        entry = self._admit(key, layout_of(key, image.header).total_bytes, image.header.payload_bytes)
        if entry is None:
            return None

        def write(path: Path) -> int:
            return write_direct(self._write_buffer, path, key, image, sync=self._sync).payload_bytes

        return self._writer.submit(self._save, entry, write)

    def put_stream(
        self, key: ImageKey, parts: Iterable[memoryview | bytes], finish: Callable[[], ImageHeader]
    ) -> Future[bool]:
        """Save a payload whose size nobody knows yet, through a staging file: every byte is written twice.

        Args:
            parts: the payload in any pieces, pulled by the writer thread.
            finish: gives the header after the last part.
        """
        entry = self._admit(key, 0, 0)
        assert entry is not None, "nothing was asked for"

        def reserve(size: int) -> None:
            with self._mutex:
                if not self._make_room(size):
                    raise _OverBudget(f"image {key} outgrew the budget at {entry.charged} bytes")
                entry.charged += size

        def write(path: Path) -> int:
            staging, buffer = path.with_suffix(_STAGING), self._write_buffer
            header = write_staged(buffer, staging, path, key, parts, finish, reserve, sync=self._sync)
            with self._mutex:
                final = layout_of(key, header).total_bytes
                self._used -= entry.charged - final
                entry.charged = final
            return header.payload_bytes

        return self._writer.submit(self._save, entry, write)

    def _admit(self, key: ImageKey, size: int, payload_bytes: int) -> _Entry | None:
        with self._mutex:
            if key in self._entries:
                raise ValueError(f"image {key} is in the disk tier already")
            if not self._make_room(size):
                return None
            entry = _Entry(key, self._folder / f"{self._next_number:010d}{_FINAL}", size, payload_bytes)
            self._next_number += 1
            self._entries[key] = entry
            return entry

    def _save(self, entry: _Entry, write: Callable[[Path], int]) -> bool:
        """Writer thread: write the temporary file, give it its final name, settle the books."""
        start, temporary = self._clock(), entry.path.with_suffix(_TEMPORARY)
        failure: Exception | None = None
        complete = False
        try:
            if entry.state is FileState.WRITING:
                entry.payload_bytes = write(temporary)
                self._publish(temporary, entry.path)
                complete = True
        except (OSError, CorruptImage, _OverBudget) as exc:
            failure = exc
            logger.warning("key=%s not saved: %s", entry.key, exc)
        finally:
            ok = self._settle(entry, complete=complete)
        self._count_save(failure, ok=ok, num_bytes=entry.payload_bytes, ms=(self._clock() - start) * 1e3)
        return ok

    def _publish(self, temporary: Path, final: Path) -> None:
        self._ops.rename(temporary, final)
        if self._sync:
            self._ops.sync_folder(self._folder)

    def _settle(self, entry: _Entry, *, complete: bool) -> bool:
        with self._mutex:
            if complete and entry.state is FileState.WRITING:
                entry.state = FileState.READY
                return True
            if entry.state is FileState.WRITING:
                del self._entries[entry.key]
            self._leaving.discard(entry)
            entry.state = FileState.GONE
            self._used -= entry.charged
        self._remove_file(entry.path, entry.charged)
        return False

    def _count_save(self, failure: Exception | None, *, ok: bool, num_bytes: int, ms: float) -> None:
        with self._mutex:
            counts = self._counts
            if ok:
                counts = replace(
                    counts, puts=counts.puts + 1, put_bytes=counts.put_bytes + num_bytes, put_ms=counts.put_ms + ms
                )
            if failure is not None:
                full = isinstance(failure, _OverBudget) or getattr(failure, "errno", None) in _FULL
                counts = replace(
                    counts, put_failures=counts.put_failures + 1, out_of_space=counts.out_of_space + int(full)
                )
            self._counts = counts

    # ---- loads ----

    def get(self, key: ImageKey, into: torch.Tensor | None = None) -> Future[KVImage | None]:
        """Load and verify an image. A damaged, foreign or unreadable file is a miss and is removed."""
        with self._mutex:
            entry = self._entries.get(key)
            if entry is None or entry.state is not FileState.READY:
                self._counts = replace(self._counts, misses=self._counts.misses + 1)
                return finished(None)
            if into is not None and into.numel() != entry.payload_bytes:
                raise ValueError(f"image {key} of {entry.payload_bytes} bytes into a place of {into.numel()}")
            entry.readers += 1
            self._entries.move_to_end(key)
        return self._reader.submit(self._load, entry, into)

    def _load(self, entry: _Entry, into: torch.Tensor | None) -> KVImage | None:
        """Reader thread."""
        start = self._clock()
        image: KVImage | None = None
        try:
            image = read_image(self._read_buffer, entry.path, entry.key, into, self._check)
        except (OSError, CorruptImage, SpecMismatch) as exc:
            logger.warning("key=%s file=%s lost: %s", entry.key, entry.path.name, exc)
            with self._mutex:
                self._count_bad(exc)
        finally:
            with self._mutex:
                self._end_read(entry, lost=image is None)
                if image is not None:
                    counts, size = self._counts, image.header.payload_bytes
                    ms = counts.get_ms + (self._clock() - start) * 1e3
                    self._counts = replace(counts, gets=counts.gets + 1, get_bytes=counts.get_bytes + size, get_ms=ms)
        return image

    def _check(self, header: ImageHeader) -> None:
        check_header(header, self._spec, model_hash=self._model_hash)

    def _end_read(self, entry: _Entry, *, lost: bool) -> None:
        entry.readers -= 1
        if lost and entry.state is FileState.READY:
            self._forget(entry)
        elif entry.state is FileState.GONE and not entry.readers and entry in self._leaving:
            self._leaving.remove(entry)
            self._leave(entry)

    def _count_bad(self, exc: Exception) -> None:
        counts = self._counts
        if isinstance(exc, CorruptImage):
            self._counts = replace(counts, corrupt=counts.corrupt + 1)
        elif isinstance(exc, SpecMismatch):
            self._counts = replace(counts, foreign=counts.foreign + 1)
        else:
            self._counts = replace(counts, read_errors=counts.read_errors + 1)

    # ---- the rest ----

    def discard(self, key: ImageKey) -> bool:
        """Forget an image in any state.

        Its space can be granted again at once, or when the file's writer or last reader is done.
        """
        with self._mutex:
            entry = self._entries.get(key)
            if entry is not None:
                self._forget(entry)
            return entry is not None

    def __contains__(self, key: ImageKey) -> bool:
        with self._mutex:
            entry = self._entries.get(key)
            return entry is not None and entry.state is FileState.READY

    def keys(self) -> tuple[ImageKey, ...]:
        """Complete images, least recently used first."""
        with self._mutex:
            return tuple(key for key, entry in self._entries.items() if entry.state is FileState.READY)

    def stats(self) -> TierStats:
        """A snapshot."""
        with self._mutex:
            return replace(self._counts, used_bytes=self._used, images=len(self._entries))

    def check_integrity(self, *, files: bool = False) -> None:
        """Raise `IntegrityError` unless index and budget agree; with `files`, also the folder. Only when idle."""
        with self._mutex:
            held = [*self._entries.values(), *self._leaving]
            charged = sum(entry.charged for entry in held) + self._orphan_bytes
            if charged != self._used or not 0 <= self._used - self._orphan_bytes <= self.budget_bytes:
                raise IntegrityError(f"disk tier: charged {charged}, used {self._used} of {self.budget_bytes}")
            if any(entry.state is FileState.GONE for entry in self._entries.values()):
                raise IntegrityError("disk tier: a forgotten image is in the index")
            if any(entry.state is not FileState.GONE for entry in self._leaving):
                raise IntegrityError("disk tier: a live image is leaving")
            expected = {entry.path.name: entry.charged for entry in held}
        if files and not self._orphan_bytes:
            found = {path.name: path.stat().st_size for path in self._folder.iterdir() if path.name != _LOCK_NAME}
            if found != expected:
                raise IntegrityError(f"disk tier: folder holds {found}, index says {expected}")

    def close(self) -> None:
        """Wait for running work, stop the threads, let the folder go. Files stay for the next run's recovery."""
        self._reader.shutdown(wait=True)
        self._writer.shutdown(wait=True)
        os.close(self._lock_fd)
