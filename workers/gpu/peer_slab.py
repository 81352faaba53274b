"""Slabs of experts that two GPU workers of one host read from each other: `SharedSlab` and `PeerWindow`.

Owns: the memory of a slab that can be handed out, and the addresses at which the other worker's slab appears. Does not
own: who holds which expert (`workers/experts/complement.py`), the conversation (`workers/experts/peer_link.py`).
Kernels and copies read the window like memory of their own device; over NVLink when it lies on another GPU. While there
is no peer the window's first bytes are mapped to a little memory of its own, because launches check their pointers, and
no table may point into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.gpu.device_memory import Addresses, Block, tensor_at


class SharedSlab:
    """One slab. `memory` uint8 [num_bytes] on its device, uninitialised; torch's own statistics do not count it."""

    def __init__(self, num_bytes: int, device: torch.device | str) -> None:
        """Raises `DriverRefused` when the device has less memory."""
        self._block = Block.allocate(num_bytes, device)
        self._addresses = Addresses(num_bytes, device, is_writable=True)
        self._block.map_at(self._addresses)
        self.memory: Tensor = tensor_at(self._addresses.start, num_bytes, torch.device("cuda", self._addresses.device))

    @property
    def block_bytes(self) -> int:
        """Device memory that it takes, and what a reader maps."""
        return self._block.num_bytes

    def export(self) -> int:
        """A file descriptor that `PeerWindow.open` takes in another process; the caller closes it."""
        return self._block.export()

    def close(self) -> None:
        """Ends this process's use; a reader that has it mapped still finds the bytes."""
        self._addresses.close()
        self._block.release()


class PeerWindow:
    """Where the other worker's slab appears, to be read. `memory` uint8 keeps its address while peers come and go."""

    def __init__(self, device: torch.device | str) -> None:
        """Reserves addresses for the largest slab that any GPU in sight can hold."""
        sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
        self._addresses = Addresses(max(sizes), device, is_writable=False)
        self._nothing = Block.allocate(1, device)
        self._nothing.map_at(self._addresses)
        own = torch.device("cuda", self._addresses.device)
        self.memory: Tensor = tensor_at(self._addresses.start, self._addresses.num_bytes, own)
        self.is_open = False

    @property
    def own_bytes(self) -> int:
        """Device memory of this process that it takes."""
        return self._nothing.num_bytes

    def open(self, fd: int, block_bytes: int) -> None:
        """Maps the slab behind a descriptor of `SharedSlab.export`. Raises `DriverRefused`; the window is closed then.

        Nothing that reads the window may be under way.
        """
        self.shut()
        block = Block.received(fd, block_bytes)
        try:
            self._addresses.unmap()
            block.map_at(self._addresses)
            self.is_open = True
        finally:
            block.release()
            if not self.is_open:
                self._addresses.unmap()
                self._nothing.map_at(self._addresses)

    def shut(self) -> None:
        """Unmaps the slab. Nothing that reads it may be under way."""
        if self.is_open:
            self.is_open = False
            self._addresses.unmap()
            self._nothing.map_at(self._addresses)

    def close(self) -> None:
        """Gives the addresses back."""
        self._addresses.close()
        self._nothing.release()
