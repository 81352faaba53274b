"""`DeviceBudget`: what one worker takes of its GPU, and what is left of a total that it must not exceed.

Owns: the count of this process's device memory, the limit of torch's allocator. Does not own: who gets what. Everything
but experts is allocated first; experts get what is left, less `LATER_BYTES` for what only running brings (compiled
kernels, graphs). `seal` then makes the total a limit that torch cannot pass. Others on the same GPU that take memory
while a worker starts are counted as its own: it then holds fewer experts than it could, never more than it may.
"""

from __future__ import annotations

import logging

import torch

from workers.errors import BadConfig
from workers.experts.config import SOURCE

logger = logging.getLogger(__name__)

CONTEXT_BYTES = 520 << 20
"""What the driver takes for a process before its first allocation. # measured: H200, 2026-11: 518 MiB"""

LATER_BYTES = 3 << 29
"""What comes after the experts: kernels' code, captured graphs, and what sampling makes of the logits (0.6 GB when 128
requests of 129,280 words want their most likely part). # measured: V4-Flash on two H200s, 2026-11-21: 0.37 GB of it are
used when a prefill worker is ready, 0.39 GB by a decode worker for 128 sequences."""


class DeviceBudget:
    """Count of one process on one GPU, from here on: made before anything is allocated."""

    def __init__(self, device: torch.device | str, total_bytes: int) -> None:
        index = torch.device(device).index
        self._device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
        self._total = total_bytes
        self._free_then = torch.cuda.mem_get_info(self._device)[0]

    def used_bytes(self) -> int:
        """Device memory taken since the start, by torch or the driver, and the context."""
        torch.cuda.synchronize(self._device)
        return CONTEXT_BYTES + max(0, self._free_then - torch.cuda.mem_get_info(self._device)[0])

    def spare_bytes(self) -> int:
        """What experts may take now; negative when the rest has already used up the total."""
        used = self.used_bytes()
        spare = self._total - used - LATER_BYTES
        logger.info("gpu total_bytes=%d used_before_experts=%d spare_bytes=%d", self._total, used, spare)
        return spare

    def seal(self) -> None:
        """Everything has been allocated and has run once: no more than the total from here on.

        Raises `BadConfig` when it is exceeded already.
        """
        used = self.used_bytes()
        if used > self._total:
            raise BadConfig("experts.total_gpu", self._total, f"at least {used} bytes, what the worker uses", SOURCE)
        whole = torch.cuda.get_device_properties(self._device).total_memory
        allowed = torch.cuda.memory_reserved(self._device) + self._total - used
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / whole), self._device)
        logger.info("gpu total_bytes=%d used_bytes=%d torch_limit_bytes=%d", self._total, used, allowed)
