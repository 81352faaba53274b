"""Sequences over pools with shuffled, poisoned pages: what the paged model is tested on without a scheduler."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools, PoolSizes
from workers.batch import ForwardBatch
from workers.model.config import PAGE_TOKENS, ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.weights import ModelWeights
from workers.ops import LogitsFor


@dataclass
class Tables:
    """Page tables of one test sequence; satisfies `workers.batch.PageTables`."""

    full_pages: tuple[int, ...]
    window_pages: tuple[int | None, ...]
    slot: int
    num_tokens: int = 0


def poisoned_pools(config: ModelConfig, precision: Precision, num_pages: int, num_slots: int) -> KVPools:
    """Pools whose every byte is 0xFF (NaN in each format): any read of a row that was not written shows."""
    spec = kv_spec(config, "fp8" if precision.kv_fp8 else "fp32")
    pools = KVPools(spec, PoolSizes(num_pages, num_pages, num_slots))
    for pool in pools.pools:
        pool.data.fill_(0xFF)
    return pools


class PagedRun:
    """A model over poisoned pools with `len(prompts)` sequences, advanced by `step`.

    `make_model(config, weights, precision, pools)` builds the model under test.
    """

    def __init__(
        self,
        make_model: Callable[..., object],
        config: ModelConfig,
        weights: ModelWeights,
        precision: Precision,
        prompts: Sequence[Sequence[int]],
        seed: int = 0,
    ) -> None:
        counts = [-(-len(prompt) // PAGE_TOKENS) for prompt in prompts]
        num_pages = sum(counts) + 3
        self.pools = poisoned_pools(config, precision, num_pages, len(prompts) + 2)
        self.model = make_model(config, weights, precision, self.pools)
        shuffle = random.Random(seed)
        full, window = ([*range(num_pages)] for _ in range(2))
        slots = [*range(len(prompts) + 2)]
        for pages in (full, window, slots):
            shuffle.shuffle(pages)
        self.tables = [
            Tables(tuple(full.pop() for _ in range(n)), tuple(window.pop() for _ in range(n)), slots.pop())
            for n in counts
        ]
        for tables in self.tables:
            self.pools.reset_slot(tables.slot)
        self.prompts = [list(prompt) for prompt in prompts]

    def step(self, counts: dict[int, int], logits_for: LogitsFor = "all") -> Tensor:
        """Advance sequence b by `counts[b]` tokens of its prompt, all in one batch; logits of the step."""
        items = []
        for b, count in counts.items():
            start = self.tables[b].num_tokens
            items.append((self.tables[b], start, self.prompts[b][start : start + count]))
        logits = self.model.forward(ForwardBatch.build(items), logits_for=logits_for)
        for b, count in counts.items():
            self.tables[b].num_tokens += count
            assert self.tables[b].num_tokens <= len(self.prompts[b])
        return logits

    def chunks(self, b: int, sizes: Sequence[int]) -> Tensor:
        """Logits [T, V] of sequence b alone, in chunks of the given sizes."""
        return torch.cat([self.step({b: size}) for size in sizes])


def chunk_sizes(total: int, sizes: Sequence[int]) -> list[int]:
    """`sizes` repeated until they sum to `total`, the last one cut."""
    out: list[int] = []
    while sum(out) < total:
        out.append(min(sizes[len(out) % len(sizes)], total - sum(out)))
    return out


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value; infinite when anything is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())
