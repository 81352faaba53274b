"""Pools: row addressing, reset, copies through host memory, and the manifest's claim to own every tensor."""

from __future__ import annotations

import gc

import pytest
import torch

from kvstore.errors import IntegrityError
from kvstore.pools.aggregate import KVPools
from kvstore.pools.pool import Pool
from kvstore.spec import PoolName
from tests.kvstore.layouts import (
    SMALL_SIZES,
    allocators,
    fill_random,
    live_state,
    opened,
    poison_everything,
    small_spec,
)

RESIDUES = [1, 3, 4, 127, 128, 255, 256, 257, 1000]


def _reachable_tensors(root: object) -> list[torch.Tensor]:
    """Every tensor that `root` keeps alive, found without knowing its attributes."""
    seen: set[int] = set()
    stack, found = [root], []
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, type) or callable(item) or "module" in type(item).__name__:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
            continue
        stack.extend(gc.get_referents(item))
    return found


def _tensors_outside_the_manifest(pools: KVPools) -> list[torch.Tensor]:
    owned = {pools.pool(row.name).data.untyped_storage().data_ptr() for row in pools.spec.pools if row.layers}
    return [tensor for tensor in _reachable_tensors(pools) if tensor.untyped_storage().data_ptr() not in owned]


def test_every_tensor_of_the_store_is_in_the_manifest() -> None:
    pools = KVPools(small_spec(), SMALL_SIZES)
    assert len(_reachable_tensors(pools)) >= len(pools.spec.pools)
    assert _tensors_outside_the_manifest(pools) == []


def test_a_tensor_that_the_manifest_does_not_name_is_found() -> None:
    pools = KVPools(small_spec(), SMALL_SIZES)
    pools.pool(PoolName.C4).scales_cache = torch.zeros(3)  # type: ignore[attr-defined]
    assert len(_tensors_outside_the_manifest(pools)) == 1


@pytest.mark.parametrize("fmt", ["fp8", "fp32"])
@pytest.mark.parametrize("name", list(PoolName))
def test_rows_read_back_as_written_and_touch_nothing_else(name: PoolName, fmt: str) -> None:
    pool = Pool(small_spec(fmt).pool(name), num_units=5)
    pool.data.fill_(7)
    generator = torch.Generator().manual_seed(1)
    locations = torch.randperm(5 * pool.spec.rows_per_unit, generator=generator)[:4]
    rows = torch.randint(0, 256, (4, pool.spec.row_bytes), dtype=torch.uint8, generator=generator)
    layer = pool.spec.layers[-1]
    pool.write_rows(layer, locations, rows)
    assert torch.equal(pool.read_rows(layer, locations), rows)
    assert torch.equal(pool.read_rows(layer, locations.view(2, 2)), rows.view(2, 2, -1))
    assert int((pool.data != 7).sum()) == int((rows != 7).sum())


def test_a_unit_holds_all_data_rows_and_then_all_scale_rows() -> None:
    pool = Pool(small_spec().pool(PoolName.C4), num_units=2)
    row = torch.arange(200, dtype=torch.uint8)
    pool.write_rows(1, torch.tensor([64 + 3]), row[None])
    page = pool.data[0, 1]
    assert torch.equal(page[192 * 3 : 192 * 4], row[:192])
    assert torch.equal(page[192 * 64 + 8 * 3 : 192 * 64 + 8 * 4], row[192:])


def test_gather_is_every_layer_of_read_rows() -> None:
    pools = KVPools(small_spec(), SMALL_SIZES)
    fill_random(pools, 3)
    for pool in pools.pools:
        locations = torch.tensor([5, 0, 9])
        expected = torch.stack([pool.read_rows(layer, locations) for layer in pool.spec.layers])
        assert torch.equal(pool.gather(locations), expected)


def test_scatter_undoes_gather_at_other_locations() -> None:
    pools = KVPools(small_spec(), SMALL_SIZES)
    fill_random(pools, 4)
    for pool in pools.pools:
        rows = pool.gather(torch.tensor([1, 2, 3]))
        pool.scatter(torch.tensor([14, 10, 12]), rows)
        assert torch.equal(pool.gather(torch.tensor([14, 10, 12])), rows)


def test_no_rows_is_a_valid_read_and_write() -> None:
    pool = Pool(small_spec().pool(PoolName.C128), num_units=2)
    nothing = torch.empty(0, dtype=torch.int64)
    assert pool.read_rows(2, nothing).shape == (0, pool.spec.row_bytes)
    pool.write_rows(2, nothing, torch.empty(0, pool.spec.row_bytes, dtype=torch.uint8))
    assert pool.gather(nothing).shape == (1, 0, pool.spec.row_bytes)


def test_rows_of_another_width_are_refused() -> None:
    pool = Pool(small_spec().pool(PoolName.C4), num_units=2)
    with pytest.raises(ValueError, match="uint8"):
        pool.write_rows(1, torch.tensor([0]), torch.zeros(1, 199, dtype=torch.uint8))


def test_a_layer_without_the_pool_is_refused() -> None:
    pool = Pool(small_spec().pool(PoolName.C4), num_units=2)
    with pytest.raises(KeyError):
        pool.read_rows(2, torch.tensor([0]))


@pytest.mark.parametrize("name", [PoolName.C4_STATE, PoolName.C4_INDEXER_STATE, PoolName.C128_STATE])
def test_fresh_and_reset_state_rows_hold_zero_kv_and_minus_inf_scores(name: PoolName) -> None:
    pool = Pool(small_spec().pool(name), num_units=3)
    for _ in range(2):
        rows = pool.gather(torch.arange(pool.spec.rows_per_unit) + pool.spec.rows_per_unit).view(torch.float32)
        kv, score = rows.chunk(2, dim=-1)
        assert bool((kv == 0).all()) and bool((score == -torch.inf).all())
        pool.poison(torch.tensor([1]))
        assert bool(pool.gather(torch.tensor([pool.spec.rows_per_unit])).view(torch.float32).isnan().all())
        pool.reset(torch.tensor([1]))


def test_reset_leaves_other_units_alone() -> None:
    pools = KVPools(small_spec(), SMALL_SIZES)
    fill_random(pools, 5)
    for pool in pools.pools:
        before = pool.data.clone()
        pool.reset(torch.tensor([1]))
        assert torch.equal(pool.data[:, 0], before[:, 0]) and torch.equal(pool.data[:, 2:], before[:, 2:])
        assert not torch.equal(pool.data[:, 1], before[:, 1])


@pytest.mark.parametrize("name", list(PoolName))
@pytest.mark.parametrize("n", RESIDUES)
def test_one_pool_survives_a_copy_to_other_units(name: PoolName, n: int) -> None:
    allocs = allocators()
    source, target = opened(allocs, n), opened(allocs, n, window_from=max(0, n - 128))
    pools = KVPools(small_spec(), SMALL_SIZES)
    fill_random(pools, n)
    pool = pools.pool(name)
    copy = pool.get_cpu_copy(source.indices())
    poison_everything(pools)
    pool.load_cpu_copy(copy, target.indices())
    assert torch.equal(pool.get_cpu_copy(target.indices()), copy)


def test_loading_one_pool_resets_the_rest_of_its_ring() -> None:
    allocs = allocators()
    source, target = opened(allocs, 130), opened(allocs, 130)
    pools = KVPools(small_spec(), SMALL_SIZES)
    pool = pools.pool(PoolName.C128_STATE)
    fill_random(pools, 2)
    copy = pool.get_cpu_copy(source.indices())
    pool.load_cpu_copy(copy, target.indices())
    dead = torch.tensor([target.slot * 128 + r for r in range(2, 128)])
    score = pool.gather(dead).view(torch.float32).chunk(2, dim=-1)[1]
    assert bool((score == -torch.inf).all())


@pytest.mark.parametrize("fmt", ["fp8", "fp32"])
@pytest.mark.parametrize("n", [0, *RESIDUES])
def test_an_image_lands_in_other_pages_and_slots_with_the_same_bytes(n: int, fmt: str) -> None:
    allocs = allocators()
    source, target = opened(allocs, n), opened(allocs, n, window_from=max(0, n - 128))
    assert source.slot != target.slot and not set(source.full_pages) & set(target.full_pages)
    here, there = KVPools(small_spec(fmt), SMALL_SIZES), KVPools(small_spec(fmt), SMALL_SIZES)
    fill_random(here, n)
    poison_everything(there)
    expected = live_state(here, source.indices())
    image = here.get_cpu_copy(source.indices(), segment_bytes=4000)
    here.poison(source.indices())
    there.load_cpu_copy(image, target.indices())
    for name, rows in live_state(there, target.indices()).items():
        assert torch.equal(rows, expected[name]), name


def test_loading_an_image_writes_only_its_own_pages_and_slot() -> None:
    allocs = allocators()
    source, target = opened(allocs, 300), opened(allocs, 300, window_from=300 - 128)
    pools = KVPools(small_spec(), SMALL_SIZES)
    fill_random(pools, 9)
    image = pools.get_cpu_copy(source.indices())
    before = {pool.spec.name: pool.data.clone() for pool in pools.pools}
    pools.load_cpu_copy(image, target.indices())
    window = [page for page in target.window_pages if page is not None]
    touched = {"full_page": target.full_pages, "window_page": window, "slot": [target.slot]}
    for pool in pools.pools:
        others = [u for u in range(pool.num_units) if u not in touched[pool.spec.space.value]]
        assert torch.equal(pool.data[:, others], before[pool.spec.name][:, others])


def test_rows_of_a_reclaimed_window_page_cannot_be_located() -> None:
    allocs = allocators()
    sequence = opened(allocs, 700)
    sequence.reclaim_window(700)
    pools = KVPools(small_spec(), SMALL_SIZES)
    with pytest.raises(IntegrityError, match="unmapped"):
        pools.pool(PoolName.WINDOW).locations(range(100, 140), sequence.indices())
    assert len(pools.get_cpu_copy(sequence.indices()).payload) == pools.spec.image_bytes(700)


def test_a_model_without_compressed_layers_has_empty_pools() -> None:
    allocs = allocators()
    pools = KVPools(small_spec(kinds=(0, 0)), SMALL_SIZES)
    fill_random(pools, 1)
    source, target = opened(allocs, 300), opened(allocs, 300)
    image = pools.get_cpu_copy(source.indices())
    pools.load_cpu_copy(image, target.indices())
    assert {segment.place.pool for segment in image.header.segments} == {PoolName.WINDOW}
    pools.check_integrity()


def test_a_replaced_tensor_fails_the_integrity_check() -> None:
    pools = KVPools(small_spec(), SMALL_SIZES)
    pools.check_integrity()
    pools.pool(PoolName.C4).data = torch.zeros(1, 1, 1, dtype=torch.uint8)
    with pytest.raises(IntegrityError, match="c4"):
        pools.check_integrity()


def test_loading_an_image_resets_the_rest_of_the_slots_rings() -> None:
    allocs = allocators()
    source, target = opened(allocs, 130), opened(allocs, 130)
    pools = KVPools(small_spec(), SMALL_SIZES)
    image = pools.get_cpu_copy(source.indices())
    pools.poison(target.indices())
    pools.load_cpu_copy(image, target.indices())
    for name, dead in ((PoolName.C128_STATE, range(2, 128)), (PoolName.C4_STATE, range(2, 4))):
        rows = pools.pool(name).gather(
            torch.tensor([target.slot * pools.pool(name).spec.rows_per_unit + r for r in dead])
        )
        assert bool((rows.view(torch.float32).chunk(2, dim=-1)[1] == -torch.inf).all()), name


@pytest.mark.parametrize("name", list(PoolName))
def test_rows_from_any_byte_of_a_buffer_can_be_stored(name: PoolName) -> None:
    pool = Pool(small_spec().pool(name), num_units=2)
    size = 2 * pool.spec.row_bytes
    buffer = torch.arange(3 + size).to(torch.uint8)
    rows = buffer[3:].view(2, -1)
    pool.write_rows(pool.spec.layers[0], torch.tensor([3, 1]), rows)
    assert torch.equal(pool.read_rows(pool.spec.layers[0], torch.tensor([3, 1])), rows)
