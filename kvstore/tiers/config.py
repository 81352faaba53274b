"""`TiersConfig`: budgets and habits of the tiers that hold parked images. Torch-free.

Every field has its unit in its name or in its line below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class TiersConfig:
    """Where retracted requests may wait. Raises `ValueError` for values that cannot work together.

    Attributes:
        host_budget_bytes: host memory for parked images, one slab, pinned where there is a GPU (default 1 GiB).
        host_high: fill of the host tier, as a fraction, at which demotion begins (default 0.85).
        host_low: fill at which demotion stops (default 0.6).
        disk_directory: folder of the disk tier; "" for none (default).
        disk_owner: name of this worker under `disk_directory`; one live worker per name (default "worker").
        disk_budget_bytes: largest sum of all files of this owner, temporary ones included (default 16 GiB).
        disk_fsync: whether an image is on stable storage before it counts as saved (default true).
        disk_direct_io: whether to go around the page cache where the file system allows it (default true).
        disk_recovery: complete images of an earlier run of this owner: "discard" (default) or "index".
        disk_eviction: whether a full disk tier drops its least recently used image for a new one. Off by default:
            a parked image has exactly one reader, so dropping one only moves the recompute to another request.
        retry_after_s: how long a tier is passed over after a failed save (default 10).
    """

    host_budget_bytes: int = 1 << 30
    host_high: float = 0.85
    host_low: float = 0.6
    disk_directory: str = ""
    disk_owner: str = "worker"
    disk_budget_bytes: int = 16 << 30
    disk_fsync: bool = True
    disk_direct_io: bool = True
    disk_recovery: Literal["discard", "index"] = "discard"
    disk_eviction: bool = False
    retry_after_s: float = 10.0

    def __post_init__(self) -> None:
        if self.host_budget_bytes < 0 or self.disk_budget_bytes < 0:
            raise ValueError(f"budgets must not be negative: {self.host_budget_bytes}, {self.disk_budget_bytes}")
        if not 0 < self.host_low <= self.host_high <= 1:
            raise ValueError(f"need 0 < host_low <= host_high <= 1: {self.host_low}, {self.host_high}")
        if not _OWNER.fullmatch(self.disk_owner):
            raise ValueError(f"disk_owner must be a plain file name: {self.disk_owner!r}")
        if self.disk_recovery not in ("discard", "index"):
            raise ValueError(f"disk_recovery must be discard or index: {self.disk_recovery!r}")
        if self.retry_after_s < 0:
            raise ValueError(f"retry_after_s must not be negative: {self.retry_after_s}")
