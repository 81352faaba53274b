"""`GpuExperts`: the routed experts of a GPU worker whose memory holds only some of them.

Owns: what the budget buys, the slab, the host bank behind it, the cache and how steps reach both, statistics. Does not
own: kernels, policies, the order of table changes and copies (`workers/experts/cache.py`), the other GPU's slab
(`expert_peer.py`). Absent experts are read by the kernels themselves, from pinned host memory or the other slab, or
copied right before them, so that every step gives the same bits at any residency, and no step waits for the host.
Engine thread, except `stats_fields`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.checkpoint.progress import OnProgress, Progress
from workers.errors import BadConfig, WorkerStopping
from workers.experts.bank import HostBank
from workers.experts.cache import ExpertCache
from workers.experts.config import PRELOADS, SOURCE, pays_little
from workers.experts.host_memory import available_bytes
from workers.experts.layout import TIER_SHIFT, ExpertShape, ExpertSlab, Tier
from workers.experts.peer_link import EngineCall
from workers.experts.places import ALLOCATION_BYTES, SHARED_BYTES, ExpertSizes, plan_places
from workers.experts.policy import POLICIES, STATIC, Ids, Values, highest
from workers.experts.profile import read_profile
from workers.experts.prompt_uses import encode_uses, shares_of
from workers.experts.residency import Residency
from workers.experts.share import Share
from workers.experts.shared_bank import open_bank
from workers.experts.supply import ExpertSupply
from workers.gpu.cached_experts import ExpertMemory, uses_scratch
from workers.gpu.expert_peer import ExpertPeer
from workers.gpu.expert_source import Bringer, ExpertSource
from workers.gpu.expert_stream import ExpertsInPlace, ExpertStream
from workers.gpu.step import LayerExperts
from workers.gpu.weights import GpuWeights
from workers.model.config import ModelConfig

logger = logging.getLogger(__name__)

HOST_SHARE = 0.9
"""Part of the host memory that is free now that an unasked bank may take: the rest of the node needs some too."""


@dataclass(frozen=True, slots=True)
class ExpertDuties:
    """What a worker's steps are."""

    decodes: bool = True
    prefills: bool = True
    max_running: int = 16
    """Sequences of the largest decode step."""


class _Later:
    """`LayerExperts` of a slab that is allocated after the buffers of the model's steps."""

    def __init__(self) -> None:
        self.inner: LayerExperts | None = None

    def begin(self, num_tokens: int) -> None:
        assert self.inner is not None, "the experts' memory was never allocated"
        self.inner.begin(num_tokens)

    def layer(self, index: int, groups: Any) -> ExpertSlab:
        assert self.inner is not None
        return self.inner.layer(index, groups)

    def done(self, index: int) -> None:
        assert self.inner is not None
        self.inner.done(index)


class GpuExperts:
    """Residency of one model's experts. `attach` before the model is made, `begin` and `finish` before its first
    step, `close` after its last or when the start fails."""

    def __init__(
        self,
        config: ModelConfig,
        supply: ExpertSupply,
        duties: ExpertDuties,
        device: torch.device,
        *,
        num_readers: int,
        key: str = "",
    ) -> None:
        """Takes counters on the device, nothing else. Raises `BadConfig` when the experts are not stored in FP4.

        `key` names the weights: workers of a host share bank and slabs of one key only.
        """
        self._config, self._supply, self._duties, self._device = config, supply, duties, device
        self._shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
        self._source = ExpertSource(supply, self._shape, num_readers)
        self._share = Share.open(supply.config.share, supply.config.worker)
        self._place = None if self._share is None else supply.config.peer
        self.sizes = ExpertSizes(
            config.num_hidden_layers,
            config.n_routed_experts,
            config.num_experts_per_tok,
            self._shape.expert_bytes,
            duties.max_running if duties.decodes else 0,
            duties.prefills,
            ALLOCATION_BYTES if self._place is None else SHARED_BYTES,
            uses_scratch(config, device),
        )
        self._heat = torch.zeros(self.sizes.pairs, dtype=torch.int32, device=device)
        self._decode, self._prefill = _Later(), _Later()
        self.note = ""
        self._cache: ExpertCache | None = None
        self._memory: ExpertMemory | None = None
        self._stream: ExpertStream | None = None
        self._key = key
        self._peer: ExpertPeer | None = None
        self._profile: Values | None = None
        self._beside: ThreadPoolExecutor | None = None
        self._coming: Future[HostBank | None] | None = None
        self._closing = threading.Event()
        self._kept: Ids = np.empty(0, np.int64)
        """Pairs in the first slots, in order, for good."""
        self._told = np.zeros(self.sizes.pairs, np.int32)
        """Uses that `prompt_uses` has handed out."""

    def attach(self, weights: GpuWeights) -> GpuWeights:
        """The same weights, whose routers count uses here; `model_options` say where experts are."""
        layers, experts = [], self.sizes.experts
        for index, layer in enumerate(weights.layers):
            heat = self._heat[index * experts : (index + 1) * experts]
            layers.append(dataclasses.replace(layer, experts=dataclasses.replace(layer.experts, heat=heat)))
        return dataclasses.replace(weights, layers=tuple(layers))

    def model_options(self) -> dict[str, Any]:
        """Arguments of the `GpuModel` whose experts these are."""
        return {
            "before_decode": self.before_decode,
            "expert_stream": self._prefill,
            "decode_experts": self._decode,
        }

    def open(self, *, spare_bytes: int | None = None, on_progress: OnProgress | None = None) -> None:
        """`begin` and `finish`, for whoever has nothing to do between them."""
        self.begin(spare_bytes=spare_bytes, on_progress=on_progress)
        self.finish(on_progress=on_progress)

    def begin(self, *, spare_bytes: int | None = None, on_progress: OnProgress | None = None) -> None:
        """Allocates the slab and starts to fill and lock the bank beside the caller. `spare_bytes`: what `total_gpu`
        leaves for experts. Until `finish`, steps of padding alone may run, to compile kernels.

        Raises `BadConfig` below the smallest budget.
        """
        config = self._supply.config
        self.places = plan_places(config, self.sizes, spare_bytes=spare_bytes)
        self._spare_bytes = spare_bytes
        if config.preload not in PRELOADS:
            self._profile = read_profile(config.preload, self.sizes.layers, self.sizes.experts)
        slab = self._meet_peer()
        stand_in = None
        if self.places.slots < self.sizes.pairs:
            stand_in = HostBank([0], self.sizes.pairs, self.sizes.expert_bytes)
            self._lock(stand_in)
        self._memory = ExpertMemory.allocate(
            self._config,
            self.places,
            stand_in,
            self._device,
            heat=self._heat,
            slab=slab,
            peer=None if self._peer is None else self._peer.window,
        )
        self._decode.inner = self._prefill.inner = ExpertsInPlace(self._memory)
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="expert-bank")
        self._coming = self._beside.submit(self._open_bank, on_progress)

    def finish(self, *, on_progress: OnProgress | None = None) -> None:
        """Waits for the bank, fills the slots. Steps may run from here on.

        Raises `BadConfig` when slots and bank cannot hold every expert, `ExpertUnavailable` when one cannot be read.
        """
        assert self._memory is not None and self._coming is not None and self._beside is not None
        began = time.monotonic()
        try:
            bank = self._coming.result()
        finally:
            self._beside.shutdown()
        config, stand_in = self._supply.config, self._memory.bank
        self._memory = dataclasses.replace(self._memory, bank=bank)
        self._kept = self._keep(bank)
        moving = self._duties.decodes and self.places.slots > len(self._kept)
        # Nothing ever comes into slots that no decode step looks at: they are filled at once.
        filled = config.preload != "none" or not moving
        count = self.places.slots if filled else len(self._kept)
        cuda = self._device.type == "cuda"
        cache = self._memory.cache(
            policy=POLICIES[config.policy] if moving else STATIC,
            profile=self._profile,
            pinned=self._kept.tolist(),
            filled=filled,
            bring=Bringer(self._source, bank, count, pinned=cuda, on_progress=on_progress),
            verify=config.verify,
        )
        self._cache = cache
        self._stream = ExpertStream(self._memory, lambda: cache.slots.codes) if self.places.half else None
        in_place = ExpertsInPlace(self._memory)
        self._decode.inner, self._prefill.inner = in_place, self._stream or in_place
        self._source.rest()
        if stand_in is not None:
            stand_in.close()
        self._say(len(self._kept), time.monotonic() - began)

    def _lock(self, bank: HostBank) -> None:
        """Raises `WorkerStopping` once `close` is called; the bank is closed then."""
        if self._device.type == "cuda":
            try:
                with torch.cuda.device(self._device):
                    bank.lock(lambda done, total: self._go_on())
            except BaseException:
                bank.close()
                raise

    def _go_on(self) -> None:
        """Raises `WorkerStopping` once `close` is called."""
        if self._closing.is_set():
            raise WorkerStopping("experts are not wanted any more")

    def _say(self, num_pinned: int, seconds: float) -> None:
        sizes, places = self.sizes, self.places
        few = places.slots < sizes.pairs and pays_little(places.slots, sizes.layers, sizes.top_k)
        if few and self._duties.decodes:
            self.note = f"experts: {few}"
            logger.warning(self.note)
        logger.info(
            "experts: %d pairs, slots=%d pinned=%d scratch=%d staging=2x%d of %d bytes, slab_bytes=%d bank_bytes=%d "
            "policy=%s source=%s waited_and_filled_s=%.1f",
            sizes.pairs, places.slots, num_pinned, places.scratch, places.half, sizes.expert_bytes,
            self.nbytes, self.bank_bytes, self._supply.config.policy, self._supply.config.source, seconds,
        )  # fmt: skip

    def _meet_peer(self) -> Tensor | None:
        """Memory of a slab that the other GPU may read, when there is to be another: also when this one lacks none."""
        if self._share is None or self._place is None:
            return None
        size = self.places.total * self.sizes.expert_bytes
        self._peer = ExpertPeer(self._share, self._place, self.sizes, self.places.slots, size, self._device)
        return self._peer.slab[:size]

    def _open_bank(self, on_progress: OnProgress | None) -> HostBank | None:
        """The pairs that may be absent, in host memory, locked for the device; None when none may."""
        if self.places.slots >= self.sizes.pairs:
            return None

        def fill(bank: HostBank, note: Callable[[int, int], None]) -> None:
            def tell(progress: Progress) -> None:
                self._go_on()
                note(progress.done_bytes, progress.total_bytes)
                if on_progress is not None:
                    on_progress(progress)

            self._source.fill(bank, tell)

        began = time.monotonic()

        def waited(done: int, total: int) -> None:
            self._go_on()
            if on_progress is not None:
                on_progress(Progress(done, total, time.monotonic() - began, "experts, by another worker"))

        sizes = (self.sizes.pairs, self.sizes.expert_bytes)
        bank = open_bank(self._share, self._key, self._banked, *sizes, fill, waited)
        filled_s = time.monotonic() - began
        self._lock(bank)
        locked_s = time.monotonic() - began - filled_s
        logger.info("experts: bank_bytes=%d filled_s=%.1f locked_s=%.1f", bank.nbytes, filled_s, locked_s)
        return bank

    def _banked(self) -> list[int]:
        """Whom a new bank holds: all, or all but the most useful, which must stay in slots for good then.

        Raises `BadConfig` when slots and bank together cannot hold every pair.
        """
        pairs, size, slots = self.sizes.pairs, self.sizes.expert_bytes, self.places.slots
        asked = self._supply.config.host_bytes
        free = available_bytes()
        capacity = min(pairs, (int(HOST_SHARE * free) if asked is None else asked) // size)
        if capacity < pairs - slots:
            found = f"{asked} bytes" if asked is not None else f"unset, {free} bytes of host memory free"
            least = f"at least {(pairs - slots) * size} bytes for the {pairs - slots} experts that {slots} slots leave"
            raise BadConfig("experts.host", found, f"{least} (or a larger budget of GPU memory)", SOURCE)
        if asked is not None and capacity * size > free:
            # Not refused: a virtual host may get more as it is used. Filling stops before the last memory is gone.
            logger.warning("experts: host=%d bytes, the host has %d free now", capacity * size, free)
        if capacity == pairs:
            return list(range(pairs))
        shape = (self.sizes.layers, self.sizes.experts, self.sizes.top_k)
        first = Residency(*shape, STATIC, self._profile).first_residents(pairs - capacity)
        kept = first if self._profile is None else highest(self._profile, first, pairs - capacity)
        return np.setdiff1d(np.arange(pairs), kept).tolist()

    def _keep(self, bank: HostBank | None) -> Ids:
        """Pairs for the first slots, in this order and for good: without a place in the bank, or promised to the peer.

        Raises `BadConfig` when this worker's slots cannot hold those that another's bank leaves out.
        """
        if bank is None:
            return np.arange(self.sizes.pairs)
        homeless = np.flatnonzero(bank.place < 0)
        if len(homeless) > self.places.slots:
            found = f"a bank without {len(homeless)} experts"
            raise BadConfig("experts.host", found, f"at most the {self.places.slots} that fit the slots", SOURCE)
        promised = np.empty(0, np.int64) if self._peer is None else self._peer.promises(self._profile)
        return np.concatenate([homeless, np.setdiff1d(promised, homeless)])[: self.places.slots]

    # -- the other GPU ------------------------------------------------------------------------------------------------

    def start_sharing(self, call: EngineCall) -> None:
        """Begins to offer the slab and to look for the other one. `call` runs things between steps."""
        if self._peer is not None:
            self._peer.start(self._kept.tolist(), self, call, key=self._key)

    def stop_sharing(self) -> None:
        """Ends both; call it before the last step. Safe to call again."""
        if self._peer is not None:
            self._peer.stop()

    def peer_came(self, pairs: Ids) -> None:
        """Place i of the other slab holds `pairs[i]`: whoever of them is absent is read there from now on."""
        assert self._memory is not None
        self.cache.rehome(self._memory.homes(pairs.tolist()))

    def peer_left(self) -> None:
        """Back to the bank. Nothing that was launched reads the other slab any more when this returns."""
        assert self._memory is not None
        self.cache.rehome(self._memory.homes())
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def before_decode(self) -> None:
        """Right before each decode step is launched: looks at what has moved, starts what follows. Waits for nothing.

        Raises `IntegrityError` when a verifying cache finds wrong bytes in a slot.
        """
        assert self._cache is not None
        self._cache.before_step()

    @property
    def cache(self) -> ExpertCache:
        """Residency, after `open`."""
        assert self._cache is not None
        return self._cache

    @property
    def nbytes(self) -> int:
        """Device memory that counts as experts': slab, table, counters."""
        if self._memory is None:
            return self._heat.numel() * self._heat.element_size()
        own = self._memory.slab.numel()
        return self._memory.nbytes + (0 if self._peer is None else self._peer.device_bytes - own)

    @property
    def bank_bytes(self) -> int:
        """Host memory of the bank, where this worker made it: of those who share one, one counts it."""
        bank = None if self._memory is None else self._memory.bank
        return bank.nbytes if bank is not None and bank.is_first else 0

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless slots and codes agree."""
        self.cache.check_integrity()

    def prompt_uses(self) -> bytes:
        """Uses by all tokens since the last call, for the worker that will decode. After a step whose results came."""
        counts = self._heat.cpu().numpy().copy()
        # Differences are right even when the counters of 32 bits have turned over.
        uses, self._told = counts - self._told, counts
        return encode_uses(uses.astype(np.int64))

    def note_prompt(self, uses: bytes) -> None:
        """Brings in what a prompt used whose decode steps are about to come."""
        shares = shares_of(uses, self.sizes.pairs, layers=self.sizes.layers, top_k=self.sizes.top_k)
        if shares is not None:
            self.cache.note_prompt(shares)

    def stats_fields(self) -> dict[str, object]:
        """This part's fields of `WorkerStats`. Any thread; gauges may be a step apart."""
        if self._cache is None:
            return {}
        cache, stream, sizes = self._cache, self._stream, self.sizes
        counters, reads = cache.counters, self._supply.counters
        shape = (sizes.layers, sizes.experts)
        resident = (cache.slots.codes >= 0) & (cache.slots.codes < 1 << 24)
        used = cache.residency.usage.count
        best = np.sort(used)[::-1][: self.places.slots].sum()
        num_resident = int(resident.sum())
        streamed = 0 if stream is None else stream.copied_experts
        return {
            "expert_lookups": counters.lookups,
            "expert_hits": counters.hits,
            "expert_misses": {
                "cold": counters.cold_misses,
                "capacity": counters.capacity_misses,
                "prefill": streamed,
            },
            "expert_evictions": counters.evicted,
            "expert_moves": counters.moved_in,
            "expert_prefetch": {"useful": counters.useful, "wasted": counters.wasted},
            "expert_heat_share": cache.residency.heat_share(resident),
            "expert_bytes": {
                "disk": reads.disk_bytes,
                "host": (counters.cold_misses + counters.capacity_misses - counters.peer_misses) * sizes.expert_bytes,
                "peer": counters.peer_misses * sizes.expert_bytes,
                "moves": counters.moved_bytes,
                "prefill": 0 if stream is None else stream.copied_bytes,
            },
            "expert_read_s_total": reads.read_s,
            "expert_io_errors": reads.io_errors + counters.io_errors,
            "expert_slots": {
                "used": num_resident,
                "free": self.places.slots - num_resident,
                "peer": int((cache.slots.codes >> TIER_SHIFT == Tier.PEER).sum()),
            },
            "expert_budget_bytes": {
                "requested": self.requested_bytes,
                "effective": self.effective_bytes,
                "measured": self.nbytes,
            },
            "expert_host_bytes": {"bank": self.bank_bytes},
            "expert_oracle_hit_ratio": float(best / max(1.0, used.sum())),
            **self._decode_fields(),
            "expert_layer_lookups": _by_layer(cache.pair_lookups.reshape(shape)),
            "expert_layer_hits": _by_layer(cache.pair_hits.reshape(shape)),
            "expert_layer_resident": _by_layer(resident.reshape(shape)),
        }

    def _decode_fields(self) -> dict[str, object]:
        """By phase, where all that the routers count is decode's: one counter serves both kinds of steps."""
        if self._duties.prefills:
            return {}
        counters = self.cache.counters
        return {
            "expert_phase_lookups": {"decode": counters.lookups},
            "expert_phase_hits": {"decode": counters.hits},
            "expert_distinct": counters.distinct.fields("decode"),
        }

    @property
    def effective_bytes(self) -> int:
        """What was planned out of the budget."""
        return self.sizes.slab_bytes(self.places) + self.sizes.table_bytes

    @property
    def requested_bytes(self) -> int:
        """The budget as it was given, or what the rest of the worker left of its total; slots as bytes."""
        return self._supply.config.hbm_bytes or self._spare_bytes or self.effective_bytes

    def close(self) -> None:
        """Ends what `begin` started, gives banks, slab and files back; no step may run any more. Safe to call again."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._peer is not None:
            self._peer.stop()
        banks = [None if self._memory is None else self._memory.bank]
        if self._beside is not None and self._coming is not None:
            self._beside.shutdown()
            banks.append(None if self._coming.exception() else self._coming.result())
        self._source.rest()
        if self._device.type == "cuda":
            # A step that was launched last may still read. A device that is lost reads no more.
            with contextlib.suppress(RuntimeError):
                torch.cuda.synchronize(self._device)
        for bank in banks:
            if bank is not None:
                bank.close()
        if self._peer is not None:
            self._peer.close()
        if self._share is not None:
            self._share.close()
        self._supply.close()


def _by_layer(values: np.ndarray) -> dict[str, int]:
    """Sums of [L, E] over a layer's experts."""
    return {str(layer): int(value) for layer, value in enumerate(values.sum(axis=1))}
