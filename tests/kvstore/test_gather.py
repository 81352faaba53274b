"""The one-launch copies against the plain ones, bit for bit, on Triton's interpreter."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from kvstore.errors import IntegrityError
from kvstore.image import KVImage
from kvstore.pools.aggregate import KVPools
from kvstore.pools.pieces import Planner, cut_blocks
from kvstore.tiers.base import planned_header
from tests.kvstore.layouts import (
    SMALL_SIZES,
    allocators,
    fill_random,
    flash_spec,
    live_state,
    opened,
    poison_everything,
    small_spec,
)

pytest.importorskip("triton")

RESIDUES = [0, 1, 3, 127, 128, 255, 256, 257, *random.Random(5).sample(range(258, 1200), 3)]


@pytest.fixture(autouse=True, scope="module")
def interpreter() -> Iterator[None]:
    """Triton reads the switch when a kernel is defined, at the first import of the module."""
    if "TRITON_INTERPRET" in os.environ:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield


def _pools(fmt: str = "fp8", **options: int) -> KVPools:
    return KVPools(small_spec(fmt), SMALL_SIZES, one_launch=True, **options)  # type: ignore[arg-type]


def _plain(fmt: str = "fp8") -> KVPools:
    return KVPools(small_spec(fmt), SMALL_SIZES)


@pytest.mark.parametrize("fmt", ["fp8", "fp32"])
@pytest.mark.parametrize("n", RESIDUES)
def test_one_launch_gives_the_bytes_of_the_plain_copy(n: int, fmt: str) -> None:
    sequence = opened(allocators(), n)
    pools, plain = _pools(fmt), _plain(fmt)
    fill_random(pools, n)
    fill_random(plain, n)
    into = torch.full((pools.spec.image_bytes(n),), 0xFF, dtype=torch.uint8)
    copy = pools.start_cpu_copy(sequence.indices(), into)
    assert copy.done()
    assert copy.image().payload.data_ptr() == into.data_ptr()
    expected = plain.get_cpu_copy(sequence.indices())
    assert copy.image().header == expected.header
    assert torch.equal(into, expected.payload)


@pytest.mark.parametrize("fmt", ["fp8", "fp32"])
@pytest.mark.parametrize("n", RESIDUES)
def test_one_launch_loads_into_other_places_and_resets_the_slot(n: int, fmt: str) -> None:
    allocs = allocators()
    source, target = opened(allocs, n), opened(allocs, n, window_from=max(0, n - 128))
    here, there, plain = _plain(fmt), _pools(fmt), _plain(fmt)
    fill_random(here, n)
    poison_everything(there)
    poison_everything(plain)
    image = here.get_cpu_copy(source.indices())
    load = there.start_load(image, target.indices())
    assert load.done()
    plain.load_cpu_copy(image, target.indices())
    for moved, expected in zip(there.pools, plain.pools, strict=True):
        assert torch.equal(moved.data, expected.data), moved.spec.name


@pytest.mark.parametrize("n", [700, 1499])
def test_images_larger_than_staging_pass_in_pieces(n: int) -> None:
    allocs = allocators()
    source, target = opened(allocs, n), opened(allocs, n, window_from=n - 128)
    pools, plain = _pools(staging_bytes=160 << 10), _plain()
    fill_random(pools, n)
    fill_random(plain, n)
    spec = pools.spec
    places = spec.split_image(n, 20_000)
    assert len(cut_blocks(spec, n, places, (80 << 10) - 64)) > 2
    image = pools.get_cpu_copy(source.indices(), segment_bytes=20_000)
    assert torch.equal(image.payload, plain.get_cpu_copy(source.indices(), segment_bytes=20_000).payload)
    expected = live_state(plain, source.indices())
    poison_everything(pools)
    pools.load_cpu_copy(image, target.indices())
    for name, rows in live_state(pools, target.indices()).items():
        assert torch.equal(rows, expected[name]), name


def test_segments_larger_than_staging_are_cut_at_layers() -> None:
    sequence = opened(allocators(), 2000)
    pools, plain = _pools(staging_bytes=256 << 10), _plain()
    fill_random(pools, 1)
    fill_random(plain, 1)
    assert max(p.length for p in pools.spec.split_image(2000, 1 << 30)) > 128 << 10
    copies = [p.get_cpu_copy(sequence.indices(), segment_bytes=1 << 30) for p in (pools, plain)]
    assert torch.equal(copies[0].payload, copies[1].payload)


def test_a_layer_larger_than_staging_is_refused() -> None:
    with pytest.raises(ValueError, match="exceed staging"):
        cut_blocks(small_spec(), 2000, small_spec().split_image(2000, 1 << 30), 64 << 10)


def test_a_reserved_image_is_filled_by_its_own_segments() -> None:
    sequence = opened(allocators(), 600)
    pools, plain = _pools(), _plain()
    fill_random(pools, 2)
    fill_random(plain, 2)
    header = planned_header(pools.spec, 600, request_id="r", segment_bytes=9000)
    image = KVImage(header, torch.empty(header.payload_bytes, dtype=torch.uint8))
    assert pools.start_cpu_copy(sequence.indices(), image).image() is image
    assert torch.equal(image.payload, plain.get_cpu_copy(sequence.indices(), segment_bytes=9000).payload)


@pytest.mark.parametrize("one_launch", [True, False])
def test_a_payload_of_another_size_is_refused(one_launch: bool) -> None:
    pools = KVPools(small_spec(), SMALL_SIZES, one_launch=one_launch)
    with pytest.raises(ValueError, match="payload"):
        pools.start_cpu_copy(opened(allocators(), 300).indices(), torch.empty(64, dtype=torch.uint8))


def test_unmapped_rows_are_refused_before_anything_moves() -> None:
    sequence, pools = opened(allocators(), 700), _pools()
    image = _plain().get_cpu_copy(sequence.indices())
    sequence.reclaim_window(1100)
    before = [pool.data.clone() for pool in pools.pools]
    with pytest.raises(IntegrityError, match="unmapped"):
        pools.start_load(image, sequence.indices())
    with pytest.raises(IntegrityError, match="unmapped"):
        pools.start_cpu_copy(sequence.indices())
    assert all(torch.equal(a, pool.data) for a, pool in zip(before, pools.pools, strict=True))


def test_a_model_without_compressed_layers_moves_its_window() -> None:
    spec, sequence = small_spec(kinds=(0, 0)), opened(allocators(), 300)
    pools, plain = KVPools(spec, SMALL_SIZES, one_launch=True), KVPools(spec, SMALL_SIZES)
    fill_random(pools, 1)
    fill_random(plain, 1)
    assert torch.equal(pools.get_cpu_copy(sequence.indices()).payload, plain.get_cpu_copy(sequence.indices()).payload)


def test_shapes_of_v4_flash_move_in_whole_wide_words() -> None:
    planner = Planner(flash_spec(), [100] * 7)
    shapes = dict(zip(planner.names, planner.shapes, strict=True))
    assert [shapes[name].word_bytes for name in ("window", "c4", "c128", "c4_state")] == [8, 8, 8, 8]  # type: ignore[index]
    assert [shapes[name].align_bytes for name in ("c4", "c4_indexer", "c128_state")] == [8, 4, 16]  # type: ignore[index]
