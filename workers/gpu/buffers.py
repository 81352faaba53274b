"""Memory of a step: metadata on the device, activations, and where each layer's pools are.

Owns: every buffer that kernels write besides the pools, allocated once for the largest step and cut to the step at hand
by views, so that a captured graph finds the same addresses at every replay. Does not own: the order of launches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools
from kvstore.spec import PoolName
from workers.batch import NO_PAGE, ForwardBatch
from workers.gpu.weights import Compressor, GpuLayer, x_bf16_columns
from workers.model.config import PAGE_TOKENS, LayerKind, ModelConfig

PADDING = -1
"""Position (and token id) of a padding token: kernels write no KV for it."""

ACTIVATION = torch.bfloat16
"""What ops hand to each other, streams included."""

ALIGN_INTS = 16
"""Every int32 array starts at a multiple of 64 bytes: Triton compiles a kernel anew for pointers of less alignment."""


@dataclass(frozen=True, slots=True)
class StepMeta:
    """What kernels know of a step, int32 on the device. Decode has one token a sequence: T = B."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T] PADDING for a padding token
    sequence_of_token: Tensor  # [T]
    full_pages: Tensor  # [B, S] NO_PAGE where there is none
    window_pages: Tensor  # [B, S]
    slots: Tensor  # [B]
    start: Tensor  # [B] tokens before this step
    cu_starts: Tensor  # [B + 1]

    def tokens(self, lo: int, hi: int) -> StepMeta:
        """The same step seen by tokens [lo, hi) alone: for ops that treat each token by itself."""
        return StepMeta(
            self.token_ids[lo:hi],
            self.positions[lo:hi],
            self.sequence_of_token[lo:hi],
            self.full_pages,
            self.window_pages,
            self.slots,
            self.start,
            self.cu_starts,
        )


class Groups(NamedTuple):
    """(token, choice) pairs by expert, int32: pair = token * k + choice. Padding tokens belong to no group."""

    num_active: Tensor  # [1]
    active_experts: Tensor  # [min(T * k, E)] ascending
    active_begin: Tensor  # [min(T * k, E) + 1]
    pair_order: Tensor  # [T * k]


class CompressorTensors(NamedTuple):
    """One compressor of one layer: its weights, and the layer's bytes of the two pools it writes."""

    ape: Tensor
    norm: Tensor
    state: Tensor  # uint8 [slots, ring bytes]
    entries: Tensor  # uint8 [pages, stride]: entries, or indexer keys


@dataclass(frozen=True, slots=True)
class LayerPools:
    """Memory of one layer, uint8 [units, unit stride], and what compression writes there."""

    window: Tensor
    main: CompressorTensors | None
    index: CompressorTensors | None

    @property
    def entries(self) -> Tensor | None:
        """Compressed entries that attention reads."""
        return None if self.main is None else self.main.entries

    @classmethod
    def of(cls, pools: KVPools, index: int, layer: GpuLayer) -> LayerPools:
        """Views of the pools that layer `index` has."""

        def data(name: PoolName) -> Tensor:
            pool = pools.pool(name)
            return pool.data[pool.layer_index(index)]

        def tensors(compressor: Compressor | None, state: PoolName, entries: PoolName) -> CompressorTensors | None:
            return None if compressor is None else CompressorTensors(*compressor, data(state), data(entries))

        four = layer.kind is LayerKind.C4
        state, entries = (PoolName.C4_STATE, PoolName.C4) if four else (PoolName.C128_STATE, PoolName.C128)
        return cls(
            data(PoolName.WINDOW),
            tensors(layer.compressor, state, entries),
            tensors(layer.index_compressor, PoolName.C4_INDEXER_STATE, PoolName.C4_INDEXER),
        )


def steps_inside_pages(batch: ForwardBatch) -> int:
    """Decode steps that may follow this one before some sequence needs a page that its tables do not name."""
    full, window = batch.full_pages.numpy(), batch.window_pages.numpy()
    last = batch.start.numpy() // PAGE_TOKENS
    column = np.arange(full.shape[1])
    ahead = ((full >= 0) & (window >= 0)) | (column <= last[:, None])
    pages = np.where(ahead.all(axis=1), full.shape[1], ahead.argmin(axis=1))
    return int((pages * PAGE_TOKENS - batch.start.numpy()).min()) - 1


PAGE_STEP = 16
"""Columns of a prefill step's page tables are a multiple of this: few different sizes reach the compiler."""


def _aligned(count: int) -> int:
    return -(-count // ALIGN_INTS) * ALIGN_INTS


class PackedMeta:
    """One int32 buffer on the device and its pinned twin on the host, so that a step's metadata is one copy.

    Call `writable` before writing the host side (numpy) again: the last copy may still wait behind earlier steps.
    """

    def __init__(self, sizes: dict[str, tuple[int, ...]], device: torch.device) -> None:
        """`sizes`: name -> shape, in the order of the buffer."""
        total = sum(_aligned(int(np.prod(shape))) for shape in sizes.values())
        pinned = device.type == "cuda"
        self._host = torch.empty(total, dtype=torch.int32, pin_memory=pinned)
        self._device = torch.empty(total, dtype=torch.int32, device=device)
        self.host: dict[str, np.ndarray] = {}
        self.device: dict[str, Tensor] = {}
        self._ends: dict[str, int] = {}
        self._copied = torch.cuda.Event() if pinned else None
        start = 0
        for name, shape in sizes.items():
            end = start + int(np.prod(shape))
            self.host[name] = self._host[start:end].numpy().reshape(shape)
            self.device[name] = self._device[start:end].view(shape)
            self._ends[name] = end
            start = _aligned(end)

    def writable(self) -> dict[str, np.ndarray]:
        """The host side, once no copy reads it any more."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.host

    def send(self, last: str | None = None) -> None:
        """Copy to the device, up to and including region `last` (all when None). Returns before it is there."""
        end = len(self._host) if last is None else self._ends[last]
        self._device[:end].copy_(self._host[:end], non_blocking=True)
        if self._copied is not None:
            self._copied.record()


class DecodeMeta:
    """Metadata of decode steps in buckets of up to `max_batch` sequences."""

    def __init__(self, max_batch: int, num_pages: int, device: torch.device) -> None:
        heads = dict.fromkeys(("token_ids", "positions", "slots"), (max_batch,))
        tables = dict.fromkeys(("full_pages", "window_pages"), (max_batch, num_pages))
        self._packed = PackedMeta(heads | tables, device)
        self._arange = torch.arange(max_batch + 1, dtype=torch.int32, device=device)

    def bucket(self, size: int) -> StepMeta:
        """Views of the first `size` rows."""
        d = self._packed.device
        return StepMeta(
            token_ids=d["token_ids"][:size],
            positions=d["positions"][:size],
            sequence_of_token=self._arange[:size],
            full_pages=d["full_pages"][:size],
            window_pages=d["window_pages"][:size],
            slots=d["slots"][:size],
            start=d["positions"][:size],
            cu_starts=self._arange[: size + 1],
        )

    def load(self, batch: ForwardBatch) -> None:
        """Send a new composition: one token for each sequence of a CPU batch."""
        host, count = self._packed.writable(), batch.num_sequences
        for name, values in (("token_ids", batch.token_ids), ("positions", batch.positions), ("slots", batch.slots)):
            host[name][:count] = values.numpy()
            host[name][count:] = 0 if name == "slots" else PADDING
        for name, table in (("full_pages", batch.full_pages), ("window_pages", batch.window_pages)):
            host[name][...] = NO_PAGE
            host[name][:count, : table.shape[1]] = table.numpy()
        self._packed.send()

    def clear(self) -> None:
        """Send padding alone: a step over it writes no KV."""
        for name, values in self._packed.writable().items():
            values[...] = 0 if name == "slots" else PADDING
        self._packed.send()

    def load_tokens(self, token_ids: np.ndarray) -> None:
        """Send token ids [B] alone: the step before has moved everything else on."""
        self._packed.writable()["token_ids"][: len(token_ids)] = token_ids
        self._packed.send("token_ids")


class PrefillMeta:
    """Metadata of one prefill step; built anew for each, padded to `padded` tokens."""

    def __init__(self, batch: ForwardBatch, padded: int, device: torch.device) -> None:
        """`batch` is in host memory."""
        self._allocate(padded, batch.num_sequences, batch.full_pages.shape[1], device)
        host, tokens = self._packed.host, batch.num_tokens
        host["token_ids"][:tokens], host["positions"][:tokens] = batch.token_ids.numpy(), batch.positions.numpy()
        host["sequence"][:tokens], host["rows"][:] = batch.sequence_of_token.numpy(), batch.last_token_rows.numpy()
        for name in ("slots", "start", "cu_starts"):
            host[name][...] = getattr(batch, name).numpy()
        for name, table in (("full_pages", batch.full_pages), ("window_pages", batch.window_pages)):
            host[name][:, : table.shape[1]] = table.numpy()
        self._packed.send()

    @classmethod
    def padding(cls, padded: int, device: torch.device, num_sequences: int = 1, num_pages: int = 1) -> PrefillMeta:
        """A step of sequences without any token, whose tables have room for so many pages."""
        meta = cls.__new__(cls)
        meta._allocate(padded, num_sequences, num_pages, device)
        meta._packed.send()
        return meta

    def _allocate(self, padded: int, sequences: int, num_pages: int, device: torch.device) -> None:
        """Device and host memory; the host side describes padding alone."""
        pages = -(-num_pages // PAGE_STEP) * PAGE_STEP
        sizes: dict[str, tuple[int, ...]] = dict.fromkeys(("token_ids", "positions", "sequence"), (padded,))
        sizes |= dict.fromkeys(("slots", "start", "rows"), (sequences,)) | {"cu_starts": (sequences + 1,)}
        sizes |= dict.fromkeys(("full_pages", "window_pages"), (sequences, pages))
        self._packed = PackedMeta(sizes, device)
        fill = {"token_ids": PADDING, "positions": PADDING, "full_pages": NO_PAGE, "window_pages": NO_PAGE}
        for name, values in self._packed.host.items():
            values[...] = fill.get(name, 0)
        d = self._packed.device
        self.rows = d["rows"]
        """Row of each sequence's last token."""
        self.step = StepMeta(
            token_ids=d["token_ids"],
            positions=d["positions"],
            sequence_of_token=d["sequence"],
            full_pages=d["full_pages"],
            window_pages=d["window_pages"],
            slots=d["slots"],
            start=d["start"],
            cu_starts=d["cu_starts"],
        )


def group_views(flat: Tensor, num_tokens: int, num_chosen: int, num_experts: int) -> Groups:
    """`Groups` of T tokens inside a flat int32 buffer of `group_words` words."""
    pairs = num_tokens * num_chosen
    active = min(pairs, num_experts)
    views, start = [], 0
    for count in (1, active, active + 1, pairs):
        views.append(flat[start : start + count])
        start += _aligned(count)
    return Groups(*views)


def group_words(num_tokens: int, num_chosen: int, num_experts: int) -> int:
    """int32 words that `group_views` needs."""
    return 3 * ALIGN_INTS + 2 * _aligned(num_experts + 1) + _aligned(num_tokens * num_chosen)


class Flat:
    """One allocation, viewed as contiguous tensors of the sizes that a step needs."""

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(max(1, count), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self._flat.numel() * self._flat.element_size()

    @property
    def every(self) -> Tensor:
        """All of it, one axis."""
        return self._flat

    def view(self, *shape: int) -> Tensor:
        """The first elements as `shape`."""
        count = 1
        for n in shape:
            count *= n
        return self._flat[:count].view(shape)


class Activations:
    """Buffers of a step of up to `num_tokens` tokens, of which `block` go through attention at a time.

    `num_rows`: rows that get logits.
    """

    def __init__(
        self, config: ModelConfig, *, num_tokens: int, block: int, num_rows: int, device: torch.device
    ) -> None:
        c = config
        self.config, self.num_tokens, self.block, self.num_rows = config, num_tokens, block, num_rows
        hidden, heads, index = c.hidden_size, c.num_attention_heads * c.head_dim, c.index_n_heads * c.index_head_dim
        columns = max((end for k in LayerKind for _, end in x_bf16_columns(c, k).values()), default=0)
        bf16, fp32, i32 = ACTIVATION, torch.float32, torch.int32
        sizes: dict[str, tuple[int, torch.dtype]] = {
            "streams": (num_tokens * c.hc_mult * hidden, bf16),
            "x": (num_tokens * hidden, bf16),
            "x_quantised": (num_tokens * hidden, bf16),
            "x_experts": (num_tokens * hidden, bf16),
            "post": (num_tokens * c.hc_mult, fp32),
            "comb": (num_tokens * c.hc_mult**2, fp32),
            "out_fp8": (num_tokens * (c.q_lora_rank + c.head_dim), bf16),
            "out_bf16": (num_tokens * columns, fp32),
            "latent": (num_tokens * c.q_lora_rank, bf16),
            "q": (block * (heads + index), bf16),
            "heads": (block * heads, bf16),
            "selected": (block * c.index_topk, i32),
            "o_latent": (block * c.o_groups * c.o_lora_rank, bf16),
            "sub_out": (num_tokens * hidden * (c.num_experts_per_tok + 1), bf16),
            "gate_logits": (num_tokens * c.n_routed_experts, fp32),
            "shared_hidden": (num_tokens * c.moe_intermediate_size, bf16),
            "ids": (num_tokens * c.num_experts_per_tok, i32),
            "routing": (num_tokens * c.num_experts_per_tok, fp32),
            "groups": (group_words(num_tokens, c.num_experts_per_tok, c.n_routed_experts), i32),
            "hidden": (num_tokens * c.num_experts_per_tok * c.moe_intermediate_size, bf16),
            "x_rows": (num_rows * hidden, bf16),
            "logits": (num_rows * c.vocab_size, fp32),
            "results": (num_rows * 2, i32),
        }
        self.flats = {name: Flat(count, dtype, device) for name, (count, dtype) in sizes.items()}

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        return sum(flat.nbytes for flat in self.flats.values())

    def view(self, name: str, *shape: int) -> Tensor:
        """The start of one buffer as a contiguous tensor."""
        return self.flats[name].view(*shape)

    def groups(self, num_tokens: int) -> Groups:
        """Routing groups of T tokens."""
        c = self.config
        flat = self.view("groups", group_words(num_tokens, c.num_experts_per_tok, c.n_routed_experts))
        return group_views(flat, num_tokens, c.num_experts_per_tok, c.n_routed_experts)
