"""Byte arithmetic of the manifest against the tables of the V4 layout (dsv4_spec.md 4.2, 4.4, 4.5)."""

from __future__ import annotations

import pytest

from kvstore.spec import IndexSpace, PoolName, build_kv_spec
from tests.kvstore.layouts import FLASH_KINDS, flash_spec, small_spec


@pytest.mark.parametrize(
    ("name", "rows", "row_bytes", "stride"),
    [
        (PoolName.WINDOW, 256, 584, 149_760),
        (PoolName.C4, 64, 584, 37_440),
        (PoolName.C128, 2, 584, 1_728),
        (PoolName.C4_INDEXER, 64, 132, 8_448),
        (PoolName.C4_STATE, 8, 8_192, 8 * 8_192),
        (PoolName.C4_INDEXER_STATE, 8, 2_048, 8 * 2_048),
        (PoolName.C128_STATE, 128, 4_096, 128 * 4_096),
    ],
)
def test_flash_units_have_the_published_sizes(name: PoolName, rows: int, row_bytes: int, stride: int) -> None:
    pool = flash_spec().pool(name)
    assert (pool.rows_per_unit, pool.row_bytes, pool.unit_stride_bytes) == (rows, row_bytes, stride)


def test_flash_pools_cover_the_right_layers() -> None:
    spec = flash_spec()
    assert [len(pool.layers) for pool in spec.pools] == [43, 21, 21, 20, 21, 21, 20]
    assert spec.pool(PoolName.C4).layers[:2] == (2, 4)
    assert spec.pool(PoolName.C128).layers[:2] == (3, 5)


def test_flash_growth_per_context_token() -> None:
    spec = flash_spec()
    per_token = {pool.name: pool.row_all_layers_bytes / pool.tokens_per_row for pool in spec.growing_pools}
    assert per_token == {PoolName.C4: 3_066.0, PoolName.C4_INDEXER: 693.0, PoolName.C128: 91.25}
    assert sum(per_token.values()) == 3_850.25


def test_flash_page_padding_per_context_token() -> None:
    spec = flash_spec()
    page = sum(len(pool.layers) * pool.unit_stride_bytes for pool in spec.growing_pools)
    assert page / spec.page_tokens == 3_899.25


@pytest.mark.parametrize(("context", "growing"), [(4_096, 15_770_624), (131_072, 504_659_968)])
def test_flash_growing_bytes_at_a_context(context: int, growing: int) -> None:
    spec = flash_spec()
    assert sum(len(p.live_rows(context)) * p.row_all_layers_bytes for p in spec.growing_pools) == growing


def test_flash_fixed_bytes_per_sequence() -> None:
    spec = flash_spec()
    window = spec.pool(PoolName.WINDOW)
    assert len(window.live_rows(4_096)) * window.row_all_layers_bytes == 3_214_336
    rings = {p.name: p.rows_per_unit * p.row_all_layers_bytes for p in spec.pools if p.space is IndexSpace.SLOT}
    assert rings[PoolName.C4_STATE] + rings[PoolName.C4_INDEXER_STATE] == 1_720_320
    assert rings[PoolName.C128_STATE] == 10_485_760


def test_live_bytes_of_a_flash_image_count_only_live_rows() -> None:
    spec = flash_spec()
    states = 4 * 21 * (8_192 + 2_048)
    assert spec.live_bytes(4_096) == 15_770_624 + 3_214_336 + states
    assert spec.live_bytes(4_096 + 127) - spec.live_bytes(4_096) == (
        31 * 21 * (584 + 132) + 3 * 21 * (8_192 + 2_048) + 127 * 20 * 4_096
    )


@pytest.mark.parametrize(
    ("n", "window", "c4", "c128", "c4_state", "c128_state"),
    [
        (0, (0, 0), 0, 0, (0, 0), (0, 0)),
        (1, (0, 1), 0, 0, (0, 1), (0, 1)),
        (3, (0, 3), 0, 0, (0, 3), (0, 3)),
        (4, (0, 4), 1, 0, (0, 4), (0, 4)),
        (7, (0, 7), 1, 0, (0, 7), (0, 7)),
        (8, (0, 8), 2, 0, (4, 8), (0, 8)),
        (127, (0, 127), 31, 0, (120, 127), (0, 127)),
        (128, (0, 128), 32, 1, (124, 128), (128, 128)),
        (257, (129, 257), 64, 2, (252, 257), (256, 257)),
    ],
)
def test_live_rows_at_the_edges(
    n: int, window: tuple[int, int], c4: int, c128: int, c4_state: tuple[int, int], c128_state: tuple[int, int]
) -> None:
    spec = small_spec()
    assert spec.pool(PoolName.WINDOW).live_rows(n) == range(*window)
    assert spec.pool(PoolName.C4).live_rows(n) == range(c4)
    assert spec.pool(PoolName.C4_INDEXER).live_rows(n) == range(c4)
    assert spec.pool(PoolName.C128).live_rows(n) == range(c128)
    assert spec.pool(PoolName.C4_STATE).live_rows(n) == range(*c4_state)
    assert spec.pool(PoolName.C4_INDEXER_STATE).live_rows(n) == range(*c4_state)
    assert spec.pool(PoolName.C128_STATE).live_rows(n) == range(*c128_state)


@pytest.mark.parametrize("n", range(0, 1100, 7))
def test_live_rows_never_outgrow_their_ring(n: int) -> None:
    for pool in small_spec().pools:
        if pool.space is IndexSpace.SLOT:
            assert len(pool.live_rows(n)) <= pool.rows_per_unit


@pytest.mark.parametrize("n", [1, 3, 128, 1000])
@pytest.mark.parametrize("target", [1, 1000, 50_000])
def test_segments_tile_the_image_without_overlap(n: int, target: int) -> None:
    spec = small_spec()
    places = spec.split_image(n, target)
    ends = 0
    for place in places:
        assert 0 <= place.offset - ends < 64
        ends = place.offset + place.length
    assert sum(place.length for place in places) == spec.live_bytes(n)
    assert ends <= spec.image_bytes(n) < spec.live_bytes(n) + 64 * len(spec.pools)


def test_segments_of_a_large_pool_stay_between_one_mebibyte_and_the_target() -> None:
    spec, target = flash_spec(), 2 << 20
    places = [p for p in spec.split_image(8_192, target) if p.pool is PoolName.C4]
    assert len(places) > 8
    assert all(1 << 20 <= place.length <= target for place in places)


def test_finished_rows_of_a_chunk_join_up_with_the_next_chunk() -> None:
    pool = small_spec().pool(PoolName.C4)
    edges = [0, 5, 6, 64, 255, 256]
    rows = [row for a, b in zip(edges, edges[1:], strict=False) for row in pool.finished_rows(a, b)]
    assert rows == list(pool.live_rows(256))


def test_tail_pools_have_no_finished_rows() -> None:
    with pytest.raises(ValueError, match="window"):
        small_spec().pool(PoolName.WINDOW).finished_rows(0, 10)


def test_fingerprint_changes_with_anything_that_changes_bytes() -> None:
    base = {"head_dim": 128, "rope_dim": 64, "index_head_dim": 32, "window": 128, "fmt": "fp8"}
    prints = {build_kv_spec((0, 4, 128), **base).fingerprint}
    for change in ({"head_dim": 192}, {"rope_dim": 0}, {"index_head_dim": 64}, {"window": 64}, {"fmt": "fp32"}):
        prints.add(build_kv_spec((0, 4, 128), **{**base, **change}).fingerprint)
    prints.add(build_kv_spec((0, 128, 4), **base).fingerprint)
    assert len(prints) == 7
    assert build_kv_spec((0, 4, 128), **base).fingerprint in prints


def test_fp32_rows_are_plain_floats() -> None:
    spec = small_spec("fp32")
    assert spec.pool(PoolName.WINDOW).row_bytes == 4 * 128
    assert spec.pool(PoolName.C4_INDEXER).row_bytes == 4 * 32
    assert spec.pool(PoolName.C4).unit_stride_bytes == 64 * 4 * 128


@pytest.mark.parametrize(
    "change", [{"fmt": "bf16"}, {"head_dim": 100}, {"window": 0}, {"window": 257}, {"layer_kinds": (0, 8)}]
)
def test_unknown_layouts_are_refused(change: dict[str, object]) -> None:
    arguments = {"head_dim": 512, "rope_dim": 64, "index_head_dim": 128, "window": 128, "fmt": "fp8"}
    kinds = change.pop("layer_kinds", FLASH_KINDS)
    with pytest.raises(ValueError, match="no KV layout"):
        build_kv_spec(kinds, **{**arguments, **change})
