"""`HostBank`: experts in host memory, locked for the device, so that kernels read them in place and copies run alone.

Owns: one mapping of `capacity` experts, which pair lies where, its locking by the driver. Does not own: where the bytes
come from, who is resident elsewhere, who shares it (`shared_bank.py`). A pair's place never changes. The mapping is a
`memfd`, so that the other workers of a node can map the same pages: they exist once however many workers read them, and
for as long as one of them lives.

Locking runs on several threads over pieces that are whole experts and whole pages (a copy may not span two of them).
It makes pages that nobody has touched first, on all threads; the driver would make them one at a time.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import math
import mmap
import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PIECE_BYTES = 1 << 30
"""Bytes locked by one call, about: progress can be shown, and threads share the work evenly."""

LOCK_THREADS = 16

_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of linux/mman.h (Linux 5.14), which Python's mmap does not name."""

Progress = Callable[[int, int], None]
"""(bytes done, bytes in all)."""


class HostBank:
    """Experts of one model in host memory."""

    def __init__(
        self,
        pairs: Sequence[int],
        num_pairs: int,
        expert_bytes: int,
        *,
        places: npt.NDArray[np.int64] | None = None,
        name: str = "dsv4-experts",
    ) -> None:
        """Maps memory for `pairs`, zeros; nothing is touched yet.

        `places` [num_pairs]: where each pair lies, for benchmarks in which several pairs share bytes; `pairs` is then
        only how many places there are.
        """
        self.expert_bytes, self.num_pairs = expert_bytes, num_pairs
        if places is None:
            places = np.full(num_pairs, -1, np.int64)
            places[list(pairs)] = np.arange(len(pairs))
        self.place = places
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        """Names the pages to other processes."""
        os.ftruncate(self.fd, max(mmap.PAGESIZE, len(pairs) * expert_bytes))
        # Another process cannot shorten it under our reads.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self.is_first = True
        """Whether this process made the pages; those who attach count none of them."""
        self._open(len(pairs))

    def _open(self, capacity: int) -> None:
        self.capacity = capacity
        self._memory = mmap.mmap(self.fd, max(mmap.PAGESIZE, capacity * self.expert_bytes))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.memory = torch.frombuffer(self._memory, dtype=torch.uint8)[: capacity * self.expert_bytes]
        self._locked: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the mapping, touched or not."""
        return self.capacity * self.expert_bytes

    @classmethod
    def attach(cls, fd: int, places: npt.NDArray[np.int64], expert_bytes: int) -> HostBank:
        """The pages of another process's bank, and its places. Takes over the descriptor. Raises `OSError`."""
        bank = cls.__new__(cls)
        bank.expert_bytes, bank.num_pairs, bank.place = expert_bytes, len(places), places
        bank.fd, bank.is_first = fd, False
        capacity = int(places.max(initial=-1)) + 1
        if os.fstat(fd).st_size < capacity * expert_bytes:
            raise OSError(f"a bank of {capacity} experts of {expert_bytes} bytes has {os.fstat(fd).st_size} bytes")
        bank._open(capacity)
        return bank

    def holds(self, pair: int) -> bool:
        """Whether the pair has a place here."""
        return bool(self.place[pair] >= 0)

    def expert(self, pair: int) -> Tensor:
        """uint8 [expert_bytes], a view. Raises `OSError` when the pair has no place."""
        index = int(self.place[pair])
        if index < 0:
            raise OSError(f"expert pair {pair} is not in the bank")
        return self.memory[index * self.expert_bytes : (index + 1) * self.expert_bytes]

    def lock(self, on_progress: Progress | None = None) -> None:
        """Locks all pages for the current CUDA device. Raises RuntimeError when the driver refuses.

        What `on_progress` raises ends it; `close` unlocks what was locked until then.
        """
        runtime, device = torch.cuda.cudart(), torch.cuda.current_device()
        unit = math.lcm(self.expert_bytes, mmap.PAGESIZE)
        step = max(1, PIECE_BYTES // unit) * unit
        base, done = self.memory.data_ptr(), 0

        def lock_piece(start: int) -> tuple[int, int]:
            torch.cuda.set_device(device)
            size = min(step, self.nbytes - start)
            _populate(base + start, size)
            torch.cuda.check_error(runtime.cudaHostRegister(base + start, size, 0))
            return base + start, size

        with concurrent.futures.ThreadPoolExecutor(LOCK_THREADS, thread_name_prefix="lock-experts") as pool:
            for address, size in pool.map(lock_piece, range(0, self.nbytes, step)):
                self._locked.append(address)
                done += size
                if on_progress is not None:
                    on_progress(done, self.nbytes)

    def close(self) -> None:
        """Unlocks the pages; views of them must not be used any more. Safe to call again."""
        if self._locked:
            runtime = torch.cuda.cudart()
            for address in self._locked:
                runtime.cudaHostUnregister(address)
        self._locked = []
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _populate(address: int, size: int) -> None:
    """Makes the pages of a whole number of pages. Only the time of what follows depends on it."""
    # Not `mmap.madvise`, which keeps the interpreter's lock meanwhile.
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _POPULATE_WRITE)
