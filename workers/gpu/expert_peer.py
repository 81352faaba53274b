"""`ExpertPeer`: one GPU worker's half of a pair that reads experts from each other's slabs.

Owns: the slab's memory, the window on the other slab, which experts are promised, the link between the two. Does not
own: table, slots, bank (`serving_experts.py`). Made before the slab is filled, started when the worker serves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from workers.experts.complement import promised
from workers.experts.config import PeerPlace
from workers.experts.peer_link import SLAB, EngineCall, Holder, PeerLink, offer_slab
from workers.experts.places import ExpertSizes
from workers.experts.policy import Ids, Values
from workers.experts.share import Share
from workers.gpu.peer_slab import PeerWindow, SharedSlab

logger = logging.getLogger(__name__)

PEER_WAIT_S = 120.0
"""Longest wait for the other worker to say how many slots it has: both load the same model at the same time."""

NUM_SLOTS = "slots"


class ExpertPeer:
    """Memory and promises of one worker. Raises `DriverRefused` when the device has less memory than the slab."""

    def __init__(
        self, share: Share, place: PeerPlace, sizes: ExpertSizes, num_slots: int, slab_bytes: int, device: torch.device
    ) -> None:
        self._share, self._place = share, place
        share.post(NUM_SLOTS, num_slots)
        self._slab, self._window = SharedSlab(slab_bytes, device), PeerWindow(device)
        self.slab: Tensor = self._slab.memory
        self.window: Tensor = self._window.memory
        """Kernels' view of the other slab; its address never changes."""
        self._sizes, self._num_slots = sizes, num_slots
        self._link: PeerLink | None = None

    @property
    def device_bytes(self) -> int:
        """Device memory of the slab, and of what stands in for the other one."""
        return self._slab.block_bytes + self._window.own_bytes

    @property
    def is_met(self) -> bool:
        """Whether the other slab is in use now."""
        return self._link is not None and self._link.is_met.is_set()

    def promises(self, profile: Values | None) -> Ids:
        """Pairs that this worker is to keep for the other; none when that does not turn up. Waits for it.

        `profile` [L * E]: use of each pair in a recorded run that both workers know.
        """
        other = self._share.wait(self._place.name, NUM_SLOTS, PEER_WAIT_S)
        if other is None:
            logger.warning("peer=%s has not turned up: experts stay in the host bank", self._place.name)
            return np.empty(0, np.int64)
        slots = (self._num_slots, int(other)) if self._place.side == 0 else (int(other), self._num_slots)
        sizes, place = self._sizes, self._place
        return promised(place.side, slots, sizes.layers, sizes.experts, is_even=place.is_even, profile=profile)

    def start(self, kept: Sequence[int], holder: Holder, call: EngineCall, *, key: str) -> None:
        """Offers the slab, whose slot i holds `kept[i]` for good, and looks for the other's."""
        if len(kept):
            offer_slab(self._share, self._slab, kept, key=key, expert_bytes=self._sizes.expert_bytes)
        self._link = PeerLink(
            self._share,
            self._place.name,
            self._window,
            holder,
            call,
            key=key,
            expert_bytes=self._sizes.expert_bytes,
        )
        self._link.start()

    def stop(self) -> None:
        """Takes the offer back and stops looking; memory stays. Before the engine's last step. Safe to call again."""
        self._share.withdraw(SLAB)
        if self._link is not None:
            self._link.close()

    def close(self) -> None:
        """Gives the memory back; no step may run any more."""
        self.stop()
        self._window.close()
        self._slab.close()
