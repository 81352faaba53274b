"""Specs, filled pools and page tables that the KV store's tests share."""

from __future__ import annotations

import torch

from kvstore.allocator import KVAllocators
from kvstore.pools.aggregate import KVPools, PoolSizes
from kvstore.sequence_kv import SequenceIndices, SequenceKV
from kvstore.spec import KVFormat, KVSpec, build_kv_spec

FLASH_KINDS = (0, 0, *(4 if i % 2 == 0 else 128 for i in range(41)))
"""43 trunk layers of V4-Flash: 2 sliding-only, 21 C4, 20 C128 (dsv4_spec.md 1.2)."""

SMALL_KINDS = (0, 4, 128, 4)


def flash_spec() -> KVSpec:
    """The stored layout of V4-Flash."""
    return build_kv_spec(FLASH_KINDS, head_dim=512, rope_dim=64, index_head_dim=128, window=128, fmt="fp8")


def small_spec(fmt: KVFormat = "fp8", kinds: tuple[int, ...] = SMALL_KINDS) -> KVSpec:
    """A layout with every pool, small enough to fill a thousand tokens in a test."""
    return build_kv_spec(kinds, head_dim=128, rope_dim=64, index_head_dim=32, window=128, fmt=fmt)


SMALL_SIZES = PoolSizes(full_pages=12, window_pages=10, slots=4)


def allocators(sizes: PoolSizes = SMALL_SIZES) -> KVAllocators:
    """Allocators that match `sizes`."""
    return KVAllocators.of_sizes(full_pages=sizes.full_pages, window_pages=sizes.window_pages, slots=sizes.slots)


def opened(allocs: KVAllocators, num_tokens: int, *, window_from: int = 0) -> SequenceKV:
    """A sequence with place for `num_tokens`."""
    sequence = SequenceKV.open(allocs, window_tokens=128)
    assert sequence is not None
    assert sequence.grow_to(num_tokens, window_from=window_from)
    return sequence


def fill_random(pools: KVPools, seed: int) -> None:
    """Every byte of every pool, padding included, from a seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    for pool in pools.pools:
        pool.data.copy_(torch.randint(0, 256, pool.data.shape, dtype=torch.uint8, generator=generator))


def poison_everything(pools: KVPools) -> None:
    """0xFF in every byte of every pool."""
    for pool in pools.pools:
        pool.data.fill_(0xFF)


def live_state(pools: KVPools, indices: SequenceIndices) -> dict[str, torch.Tensor]:
    """Live rows of every pool, by name: uint8 [layers, rows, row_bytes]."""
    return {pool.spec.name.value: pool.get_cpu_copy(indices) for pool in pools.pools}
