"""The stage of a benchmark: synthetic weights, pools full of plausible bytes, and steps at any context.

Owns: how much of a model is built so that it fits the device, and the page tables of made-up sequences. A sequence of a
scene owns its pages, as in serving: no two read the same KV. Its window pages are few and reused in turn, because only
the last 128 tokens are ever read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cluster.bench import floors
from cluster.bench.results import Memory, Setup
from cluster.errors import ClusterError
from kvstore.ids import PageId, SlotId
from kvstore.pools.aggregate import KVPools, PoolSizes
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import IndexSpace, PoolName
from workers.batch import ForwardBatch
from workers.checkpoint.names import Organ, total_by_organ
from workers.checkpoint.synth import cut_layers
from workers.experts.layout import ExpertShape
from workers.gpu.synthetic import synthetic_weights
from workers.model.config import PAGE_TOKENS, ModelConfig
from workers.model.kv_layout import kv_spec
from workers.sizing import unit_bytes

WINDOW_PAGES = 2
"""Window pages of a decoding sequence: the last 128 tokens lie on at most two."""

MAX_PROMPTS = 16
"""Prompts packed into one prefill step."""


class DoesNotFitDevice(ClusterError):
    """The chosen layers, batches and contexts need more memory than the device has."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to build. `batches` x `contexts` are the decode steps, `chunks` the prefill steps of the run."""

    preset: str
    config: ModelConfig
    layers: int
    folded: bool
    """Hold fewer different experts when not all fit; else fail."""
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    long_prompt: int = 0
    seed: int = 0

    @property
    def cut(self) -> ModelConfig:
        """The first `layers` layers."""
        return cut_layers(floors.trunk(self.config), range(self.layers))

    @property
    def chunk_tokens(self) -> int:
        """Largest prefill step."""
        return max((*self.chunks, PAGE_TOKENS))

    @property
    def max_context(self) -> int:
        """Longest sequence."""
        return max(*self.contexts, self.long_prompt + PAGE_TOKENS, self.chunk_tokens, PAGE_TOKENS)

    @property
    def sizes(self) -> PoolSizes:
        """Pages for the largest batch at the longest context that goes with it, or the largest prompt."""
        batch = max((*self.batches, 1))
        full = batch * _pages(max((*self.contexts, 1)))
        # A long prompt lies there twice: where it was computed, and where decode gets it.
        prompt = max(_pages(self.chunk_tokens), 2 * _pages(self.long_prompt + PAGE_TOKENS))
        window = max(batch * WINDOW_PAGES, _pages(self.chunk_tokens) + MAX_PROMPTS)
        return PoolSizes(max(full, prompt), window, max(batch, MAX_PROMPTS))


@dataclass(frozen=True, slots=True)
class _Tables:
    """Page tables of one made-up sequence."""

    full_pages: tuple[int, ...]
    window_pages: tuple[int, ...]
    slot: int


class Scene:
    """A built model. `GpuModel` is imported here, and Triton with it."""

    def __init__(
        self, wanted: Wanted, experts_held: int | None = None, *, device: str = "cuda", **options: Any
    ) -> None:
        """Raises `DoesNotFitDevice` before anything large is allocated.

        Args:
            experts_held: different experts a layer; None for as many as fit.
            options: more of `GpuModel`, such as other kernels.
        """
        from workers.gpu.model import GpuModel

        self.wanted, self.config = wanted, wanted.cut
        self.experts_held = experts_held or experts_that_fit(wanted, torch.cuda.mem_get_info()[0])
        limit = None if self.experts_held == self.config.n_routed_experts else self.experts_held
        self.weights = synthetic_weights(
            self.config, device, seed=wanted.seed, layer_ids=range(wanted.layers), experts_per_layer=limit
        )
        self.pools = KVPools(kv_spec(self.config, "fp8"), wanted.sizes, device)
        fill_plausibly(self.pools, self.config, wanted.seed)
        self.model: Any = GpuModel(
            self.config,
            self.weights,
            self.pools,
            max_running=max((*wanted.batches, 1)),
            max_context=wanted.max_context,
            **options,
        )
        self._generator = torch.Generator().manual_seed(wanted.seed)

    @property
    def setup(self) -> Setup:
        """What was built."""
        w = self.wanted
        return Setup(
            preset=w.preset,
            layers=w.layers,
            all_layers=w.config.num_hidden_layers,
            experts=self.config.n_routed_experts,
            experts_held=self.experts_held,
            max_batch=max((*w.batches, 1)),
            chunk_tokens=w.chunk_tokens,
            seed=w.seed,
        )

    @property
    def memory(self) -> Memory:
        """Device bytes now, and the peak so far; what is neither weights nor pools is the steps' buffers."""
        total, peak = torch.cuda.get_device_properties(0).total_memory, torch.cuda.max_memory_allocated()
        weights, pools = self.weights.nbytes, self.pools.nbytes
        return Memory(weights, pools, max(0, torch.cuda.memory_allocated() - weights - pools), peak, total)

    def reseed(self) -> None:
        """The next steps draw the same token ids as the first ones did."""
        self._generator.manual_seed(self.wanted.seed)

    def decode_batch(self, batch: int, context: int, position: int, *, first: int = 0) -> ForwardBatch:
        """One token at `position` for each of `batch` sequences, from number `first` on, with pages for `context`."""
        if not 0 <= position < context:
            raise ValueError(f"position {position} of {context}")
        tables = [self._tables(first + b, context, WINDOW_PAGES) for b in range(batch)]
        return ForwardBatch.build([(t, position, ids) for t, ids in zip(tables, self._ids(batch, 1), strict=True)])

    def indices(self, number: int, context: int, committed: int) -> SequenceIndices:
        """Where `committed` tokens of sequence `number` lie, which has pages for `context`: live rows only."""
        tables, pages = self._tables(number, context, WINDOW_PAGES), _pages(committed)
        dead = max(0, committed - self.config.sliding_window) // PAGE_TOKENS
        return SequenceIndices(
            tuple(PageId(page) for page in tables.full_pages[:pages]),
            tuple(None if i < dead else PageId(tables.window_pages[i]) for i in range(pages)),
            SlotId(tables.slot),
            committed,
        )

    def prompt_batch(self, tokens: int, *, sequences: int = 1, start: int = 0) -> ForwardBatch:
        """`tokens` prompt tokens in `sequences` prompts of equal length, each after `start` others."""
        each = tokens // sequences
        ids, own_pages = self._ids(sequences, each), _pages(each) + 1
        items = [(self._tables(b, start + each, own_pages), start, ids[b]) for b in range(sequences)]
        return ForwardBatch.build(items)

    def _ids(self, sequences: int, tokens: int) -> list[list[int]]:
        ids = torch.randint(2, self.config.vocab_size, (sequences, tokens), generator=self._generator)
        return [[int(token) for token in row] for row in ids.tolist()]

    def _tables(self, number: int, tokens: int, window_pages: int) -> _Tables:
        """Pages of sequence `number` of a step whose sequences all have `tokens` tokens and so many window pages."""
        sizes, pages = self.wanted.sizes, _pages(tokens)
        full = tuple((number * pages + i) % sizes.full_pages for i in range(pages))
        window = tuple((number * window_pages + i) % sizes.window_pages for i in range(pages))
        return _Tables(full, window, number)


def _pages(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def experts_that_fit(wanted: Wanted, free_bytes: int) -> int:
    """Different experts a layer for which weights, pools, activations and scratch fit into `free_bytes`.

    Raises `DoesNotFitDevice`, with what would help, unless all fit or folding is wanted.
    """
    config = wanted.cut
    organs = total_by_organ(config)
    other = sum(total.bytes for organ, total in organs.items() if organ is not Organ.ROUTED_EXPERTS)
    spec, sizes = kv_spec(config, "fp8"), wanted.sizes
    pools = sum(unit_bytes(spec, space) * sizes.units(space) for space in IndexSpace)
    activations = activation_estimate(config, wanted.chunk_tokens)
    left = free_bytes - other - pools - activations - (2 << 30)
    each = ExpertShape(config.hidden_size, config.moe_intermediate_size).expert_bytes * wanted.layers
    fitting = min(config.n_routed_experts, left // each)
    if fitting < config.n_routed_experts and not wanted.folded:
        raise DoesNotFitDevice(
            f"{wanted.layers} layers with all experts need {(other + pools + activations) / 1e9:.1f} GB and "
            f"{each * config.n_routed_experts / 1e9:.1f} GB of experts; {free_bytes / 1e9:.1f} GB are free. "
            "Take fewer layers, smaller batches or contexts, or --experts folded."
        )
    if fitting < 2 * config.num_experts_per_tok:
        raise DoesNotFitDevice(f"room for {max(0, fitting)} experts a layer beside the rest; take fewer layers")
    return int(fitting)


def activation_estimate(config: ModelConfig, tokens: int) -> int:
    """Bytes that a step of `tokens` is given; the model's own buffers stay below."""
    widest = (config.num_experts_per_tok + 1) * config.hidden_size * 2
    widest += config.num_experts_per_tok * config.moe_intermediate_size * 2
    widest += (config.hc_mult + 2) * config.hidden_size * 4 + 4 * config.n_routed_experts
    return tokens * widest + (6 << 30)


def fill_plausibly(pools: KVPools, config: ModelConfig, seed: int) -> None:
    """Valid stored values everywhere: entries of about unit size, scales of one, Gaussian compressor rows."""
    generator = torch.Generator(device=pools.device).manual_seed(seed)
    nope = config.head_dim - config.qk_rope_head_dim
    for pool in pools.pools:
        if not pool.data.numel():
            continue
        if pool.spec.space is IndexSpace.SLOT:
            pool.data.view(torch.float32).normal_(generator=generator)
            continue
        # e4m3 codes with bit 6 clear: magnitudes below 2, never NaN. A later fill repairs the other planes.
        words = pool.data.view(torch.int32)
        words.random_(-(1 << 31), (1 << 31) - 1, generator=generator).bitwise_and_(-0x40404041)
        if pool.spec.name is PoolName.C4_INDEXER:
            pool.plane(1).view(torch.float32).fill_(1.0)
        else:
            pool.plane(0)[..., nope:].view(torch.bfloat16).normal_(generator=generator)
            pool.plane(1).fill_(127)
