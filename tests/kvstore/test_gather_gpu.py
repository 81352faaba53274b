"""The one-launch copies on a CUDA device: V4-Flash pools beyond 2^31 bytes, exact pinned memory, copies beside work."""

from __future__ import annotations

import random

import pytest
import torch

from kvstore.arena import HostArena
from kvstore.ids import PageId, SlotId
from kvstore.pools.aggregate import KVPools, PoolSizes
from kvstore.sequence_kv import SequenceIndices
from tests.kvstore.layouts import flash_spec

pytestmark = pytest.mark.gpu

SIZES = PoolSizes(full_pages=2800, window_pages=340, slots=40)
"""C4 2.2 GB, window 2.2 GB: the last pages lie beyond 2^31 bytes."""


@pytest.fixture(scope="module")
def pools() -> KVPools:
    pools = KVPools(flash_spec(), SIZES, "cuda")
    generator = torch.Generator("cuda").manual_seed(1)
    for pool in pools.pools:
        pool.data.random_(generator=generator)
    assert pools.pool(pools.pools[0].spec.name).nbytes > 1 << 31
    return pools


def _indices(n: int, parity: int) -> SequenceIndices:
    """Scattered units of one parity, the pools' last ones among them."""
    chance = random.Random(n)
    pages, first = -(-n // 256), max(0, n - 128) // 256

    def units(count: int, total: int) -> list[int]:
        own = range(parity, total, 2)
        chosen = chance.sample(own[:-1], count)
        chosen[-1] = own[-1]
        return chosen

    window: list[PageId | None] = [None] * first
    window += [PageId(unit) for unit in units(pages - first, SIZES.window_pages)]
    full = tuple(PageId(unit) for unit in units(pages, SIZES.full_pages))
    return SequenceIndices(full, tuple(window), SlotId(SIZES.slots - 2 + parity), n)


@pytest.mark.parametrize("n", [1, 127, 128, 256, 257, 5003, 32768 + 77])
def test_a_round_trip_to_other_places_keeps_every_live_byte(pools: KVPools, n: int) -> None:
    source, target = _indices(n, 0), _indices(n, 1)
    before = {pool.spec.name: pool.get_cpu_copy(source) for pool in pools.pools}
    image = pools.start_cpu_copy(source).image()
    for segment in image.header.segments:
        assert torch.equal(image.segment_rows(segment, pools.spec), pools.export_rows(segment.place, source))
    pools.poison(target)
    pools.start_load(image, target).wait()
    for pool in pools.pools:
        assert torch.equal(pool.get_cpu_copy(target), before[pool.spec.name]), pool.spec.name


def test_a_copy_takes_the_bytes_of_the_moment_although_the_stream_goes_on(pools: KVPools) -> None:
    source = _indices(4096 + 5, 0)
    expected = {pool.spec.name: pool.get_cpu_copy(source) for pool in pools.pools}
    filler = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        filler.random_()
    pending = pools.start_cpu_copy(source)
    image = pending.image()
    target = _indices(4096 + 5, 1)
    pools.load_cpu_copy(image, target)
    assert all(torch.equal(pool.get_cpu_copy(target), expected[pool.spec.name]) for pool in pools.pools)


def test_a_pinned_arena_locks_its_budget_and_not_more() -> None:
    budget = (3 << 20) + 4096
    arena = HostArena(budget, pinned=True)
    extent = arena.allocate(budget)
    assert extent is not None
    slab = arena.tensor(extent)
    assert slab.is_pinned() and slab.data_ptr() % 4096 == 0
    slab.fill_(7)
    assert bool((slab.cuda() == 7).all())
