"""Device memory that another process can map: blocks that can be handed over, and windows at a fixed address.

Owns: the driver calls of virtual memory management (CUDA driver API, section 6.14), through ctypes, and their lifetime.
Does not own: who hands what to whom (`peer_slab.py`). A block is named by a file descriptor, so it lives until the last
process that holds or maps it is done: an owner that dies leaves its readers' addresses valid. A window is a stretch of
addresses reserved for good, so that kernels captured in graphs keep their pointer while what is mapped there changes.

`cudaIpcOpenMemHandle` does neither: it chooses the address itself, and an owner's end leaves the mapping undefined.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import Any

import torch
from torch import Tensor

from workers.errors import WorkerError

_PINNED, _FD_HANDLE, _ON_DEVICE, _READ, _READ_WRITE = 1, 1, 1, 1, 3
"""CU_MEM_ALLOCATION_TYPE_PINNED, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, CU_MEM_LOCATION_TYPE_DEVICE,
CU_MEM_ACCESS_FLAGS_PROT_READ and _READWRITE."""


class DriverRefused(WorkerError):
    """A driver call failed; names the call and the driver's reason."""


class _Location(ctypes.Structure):
    """CUmemLocation."""

    _fields_ = [("type", ctypes.c_int), ("id", ctypes.c_int)]


class _Properties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("handle_types", ctypes.c_int),
        ("location", _Location),
        ("windows", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    ]


class _Access(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = [("location", _Location), ("flags", ctypes.c_int)]


@functools.cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


_size, _word = ctypes.c_size_t, ctypes.c_uint64


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(text))
        raise DriverRefused(f"{name}: {(text.value or str(code).encode()).decode()}")


def _properties(device: int) -> _Properties:
    return _Properties(type=_PINNED, handle_types=_FD_HANDLE, location=_Location(_ON_DEVICE, device))


def _rounded(num_bytes: int, device: int) -> int:
    unit = _size()
    _call("cuMemGetAllocationGranularity", ctypes.byref(unit), ctypes.byref(_properties(device)), 0)
    return -(-num_bytes // unit.value) * unit.value


def _index_of(device: torch.device | str) -> int:
    """The device's ordinal; its context exists afterwards, which the driver calls want."""
    found = torch.device(device)
    index = torch.cuda.current_device() if found.index is None else found.index
    torch.cuda.synchronize(index)
    return index


def tensor_at(address: int, num_bytes: int, device: torch.device | str) -> Tensor:
    """uint8 [num_bytes] at an address that `device` can read, as an ordinary tensor of that device.

    Owns nothing. The bytes may lie on another GPU: what counts is who reaches them, not where they are.
    """
    storage = torch._C._construct_storage_from_data_pointer(address, torch.device(device), num_bytes)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (num_bytes,), (1,))


class Addresses:
    """Reserved addresses of one device, mapped to one block of memory at a time."""

    def __init__(self, num_bytes: int, device: torch.device | str, *, is_writable: bool) -> None:
        """Reserves at least `num_bytes`; takes no memory. Raises `DriverRefused`."""
        self.device, self._access = _index_of(device), _READ_WRITE if is_writable else _READ
        self.num_bytes = _rounded(num_bytes, self.device)
        start = _word()
        _call("cuMemAddressReserve", ctypes.byref(start), _size(self.num_bytes), _size(0), _word(0), _word(0))
        self.start = start.value
        self._mapped = 0

    def map(self, handle: int, num_bytes: int) -> None:
        """Maps a whole block of `num_bytes` at the start. Nothing may be mapped. Raises `DriverRefused`."""
        if self._mapped or num_bytes > self.num_bytes:
            raise ValueError(f"{num_bytes} bytes into {self.num_bytes} addresses, {self._mapped} of them mapped")
        _call("cuMemMap", _word(self.start), _size(num_bytes), _size(0), _word(handle), _word(0))
        self._mapped = num_bytes
        access = _Access(_Location(_ON_DEVICE, self.device), self._access)
        _call("cuMemSetAccess", _word(self.start), _size(num_bytes), ctypes.byref(access), _size(1))

    def unmap(self) -> None:
        """Takes away what is mapped. No kernel or copy that reads it may be under way."""
        if self._mapped:
            _call("cuMemUnmap", _word(self.start), _size(self._mapped))
            self._mapped = 0

    def close(self) -> None:
        """Unmaps and gives the addresses back. Safe to call again."""
        self.unmap()
        if self.num_bytes:
            _call("cuMemAddressFree", _word(self.start), _size(self.num_bytes))
            self.num_bytes = 0


class Block:
    """Physical memory of one device."""

    def __init__(self, handle: int, num_bytes: int) -> None:
        self._handle, self.num_bytes = handle, num_bytes
        self._held = True

    @classmethod
    def allocate(cls, num_bytes: int, device: torch.device | str) -> Block:
        """At least `num_bytes`, uninitialised. Raises `DriverRefused`, for one when the device has less."""
        index = _index_of(device)
        size, handle = _rounded(num_bytes, index), _word()
        _call("cuMemCreate", ctypes.byref(handle), _size(size), ctypes.byref(_properties(index)), _word(0))
        return cls(handle.value, size)

    @classmethod
    def received(cls, fd: int, num_bytes: int) -> Block:
        """The block behind a descriptor of `export`, in another process. The descriptor stays the caller's."""
        handle = _word()
        _call("cuMemImportFromShareableHandle", ctypes.byref(handle), ctypes.c_void_p(fd), _FD_HANDLE)
        return cls(handle.value, num_bytes)

    def export(self) -> int:
        """A file descriptor that names the block; the caller closes it."""
        fd = ctypes.c_int(-1)
        _call("cuMemExportToShareableHandle", ctypes.byref(fd), _word(self._handle), _FD_HANDLE, _word(0))
        os.set_inheritable(fd.value, False)
        return fd.value

    def map_at(self, addresses: Addresses) -> None:
        """Maps the whole block there; the mapping keeps the memory alive by itself."""
        addresses.map(self._handle, self.num_bytes)

    def release(self) -> None:
        """Gives up this process's handle; the memory ends with its last handle, descriptor and mapping."""
        if self._held:
            _call("cuMemRelease", _word(self._handle))
            self._held = False
