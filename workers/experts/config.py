"""`ExpertConfig`: how much of the routed experts one worker keeps in fast memory, and where the rest comes from.

Owns: fields, units, defaults, cross-checks. Torch- and numpy-free. What a budget buys is decided where a slot's size is
known (`plan_slots`).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from workers.errors import BadConfig

logger = logging.getLogger(__name__)

POLICIES = ("lru", "lfu", "heat", "lfru", "static")
SOURCES = ("mmap", "residency", "direct")
PRELOADS = ("none", "prefix")
SOURCE = "worker config"


@dataclass(frozen=True, slots=True)
class PeerPlace:
    """The other of two GPU workers on one host that read each other's experts."""

    name: str
    """Its worker name."""
    side: int
    """0 or 1: this worker's own place in the division of experts (`complement.py`)."""
    is_even: bool
    """Whether both promise each other the same number; else side 0 promises what it has, and side 1 the rest."""


@dataclass(frozen=True, slots=True)
class ExpertConfig:
    """One worker's experts. Raises `BadConfig` when values contradict each other."""

    hbm_bytes: int | None = None
    """Bytes of fast memory for experts (GPU memory; packed panels on a CPU worker); None keeps all of them there."""
    slots: int | None = None
    """Experts in fast memory, instead of what `hbm_bytes` buys."""
    total_gpu_bytes: int | None = None
    """GPU memory of the whole worker; experts get what weights, KV and buffers leave of it. GPU workers only."""
    host_bytes: int | None = None
    """Bytes of host memory for experts that are absent from fast memory; None takes none on a CPU worker, and what
    absent experts need on a GPU worker, whose kernels read them there."""
    policy: str = "lfru"
    """Who deserves a slot: lru, lfu, heat, lfru, or static (needs a recorded profile)."""
    source: str = "mmap"
    """How absent experts are read: mmap (the kernel's page cache keeps what it likes), residency (mapped pages of at
    most `host_bytes`, dropped again in LRU order), direct (O_DIRECT, nothing is cached beside `host_bytes`)."""
    preload: str = "none"
    """Who is in the slots before the first step: none, prefix (the first experts of every layer), or the path of a
    routing trace, whose most used experts come first."""
    packed: str = ""
    """File of `dsv4 experts repack`, read instead of the checkpoint's shards; empty reads the shards."""
    verify: bool = False
    """Compare every read of an expert with a checksum of its first read, and slots with what was read."""
    verbose: bool = False
    """Log every move and what the pairs are worth."""
    worker: str = ""
    """This worker's name among those of its host."""
    share: str = ""
    """Folder in which the deployment's workers on this host find each other's memory; empty shares nothing."""
    peer: PeerPlace | None = None
    """Whose GPU memory this worker reads absent experts from, and the other way round; needs `share`."""

    def __post_init__(self) -> None:
        self._require("hbm", self.hbm_bytes is None or self.hbm_bytes >= 1, self.hbm_bytes, "at least 1 byte")
        self._require("slots", self.slots is None or self.slots >= 1, self.slots, "at least 1")
        total = self.total_gpu_bytes
        self._require("total_gpu", total is None or total >= 1, total, "at least 1 byte")
        self._require("host", (self.host_bytes or 0) >= 0, self.host_bytes, "at least 0 bytes")
        self._require("policy", self.policy in POLICIES, self.policy, f"one of {', '.join(POLICIES)}")
        self._require("source", self.source in SOURCES, self.source, f"one of {', '.join(SOURCES)}")
        self._require("preload", bool(self.preload), self.preload, "none, prefix or a file")
        recorded = self.preload not in PRELOADS
        self._require("policy", self.policy != "static" or recorded, "static", "a routing trace in experts.preload")
        bounded = self.source != "residency" or (self.host_bytes or 0) > 0 or not self.is_limited
        self._require("host", bounded, self.host_bytes, "more than 0 bytes with source: residency")
        self._require("peer", self.peer is None or bool(self.share), self.peer, "None without a shared folder")
        budgets = [name for name, value in self.budgets.items() if value is not None]
        self._require(budgets[-1] if budgets else "hbm", len(budgets) < 2, budgets, "one budget")

    @property
    def is_limited(self) -> bool:
        """Whether some experts may be absent."""
        return any(value is not None for value in self.budgets.values())

    @property
    def budgets(self) -> dict[str, int | None]:
        """The ways to say how much fast memory experts get, by key; at most one is set."""
        return {"hbm": self.hbm_bytes, "slots": self.slots, "total_gpu": self.total_gpu_bytes}

    def _require(self, key: str, ok: bool, found: object, expected: str) -> None:
        if not ok:
            raise BadConfig(f"experts.{key}", found, expected, SOURCE)


@dataclass(frozen=True, slots=True)
class SlotPlan:
    """What a budget buys."""

    num_slots: int
    slot_bytes: int
    num_places: int
    """Scratch places of one expert each, counted into the budget: absent experts are unpacked there inside a step."""

    @property
    def total_bytes(self) -> int:
        """Slots and places; never more than the budget."""
        return (self.num_slots + self.num_places) * self.slot_bytes


def plan_slots(
    config: ExpertConfig, slot_bytes: int, num_places: int, *, layers: int, experts: int, top_k: int
) -> SlotPlan:
    """Slots of a limited budget. Raises `BadConfig` naming the smallest one that works; logs where it pays little."""
    if config.slots is not None:
        wanted = config.slots
    else:
        assert config.hbm_bytes is not None
        wanted = config.hbm_bytes // slot_bytes - num_places
    if wanted < top_k:
        key, unit = ("slots", "slots") if config.slots is not None else ("hbm", "bytes")
        found = config.slots if config.slots is not None else config.hbm_bytes
        least = top_k if config.slots is not None else (top_k + num_places) * slot_bytes
        detail = f"{top_k} slots for one token's choices of a layer and {num_places} scratch, {slot_bytes} bytes each"
        raise BadConfig(f"experts.{key}", f"{found} {unit}", f"at least {least} {unit}: {detail}", SOURCE)
    plan = SlotPlan(min(wanted, layers * experts), slot_bytes, num_places)
    if (note := pays_little(plan.num_slots, layers, top_k)) is not None and plan.num_slots < layers * experts:
        logger.warning("experts: %s", note)
    return plan


def pays_little(num_slots: int, layers: int, top_k: int) -> str | None:
    """Why so few slots hardly help, or None. Source: reports of V4 caches, below 3 x top-k a layer worse than none."""
    if num_slots >= 3 * top_k * layers:
        return None
    return (
        f"{num_slots} slots are {num_slots / layers:.1f} a layer, below 3 x top-k = {3 * top_k}: caching no longer "
        f"pays, it only saves memory; {3 * top_k * layers} slots would be worth having"
    )
