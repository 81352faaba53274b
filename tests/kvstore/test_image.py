"""KV images as bytes: header round trip, checksums, and refusal of anything foreign, damaged or incomplete."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvstore.errors import CorruptImage, IntegrityError, SpecMismatch
from kvstore.image import ImageHeader, KVImage, Segment, check_header, first_gap
from kvstore.pools.aggregate import KVPools
from tests.kvstore.layouts import SMALL_SIZES, allocators, fill_random, opened, small_spec


def _image(n: int = 700, *, model_hash: str = "") -> tuple[KVPools, KVImage]:
    pools = KVPools(small_spec(), SMALL_SIZES, model_hash=model_hash)
    fill_random(pools, n)
    sequence = opened(allocators(), n)
    return pools, pools.get_cpu_copy(sequence.indices(), request_id="r1", epoch=3, segment_bytes=20_000)


def _with_segments(header: ImageHeader, segments: list[Segment]) -> ImageHeader:
    return dataclasses.replace(header, segments=tuple(segments))


@pytest.mark.parametrize("n", [0, 1, 3, 4, 127, 128, 255, 256, 257, 700])
def test_header_survives_serialisation(n: int) -> None:
    _, image = _image(n)
    header = image.sealed().header
    raw = header.to_bytes()
    assert ImageHeader.from_bytes(raw + b"payload follows") == (header, len(raw))


@pytest.mark.parametrize("cut", [0, 5, 15, 100, -1])
def test_a_truncated_header_is_corrupt(cut: int) -> None:
    raw = _image()[1].header.to_bytes()
    with pytest.raises(CorruptImage, match="truncated"):
        ImageHeader.from_bytes(raw[:cut])


def test_a_flipped_header_bit_is_corrupt() -> None:
    raw = bytearray(_image()[1].header.to_bytes())
    raw[40] ^= 1
    with pytest.raises(CorruptImage, match="checksum"):
        ImageHeader.from_bytes(bytes(raw))


def test_another_file_or_version_is_refused_by_name() -> None:
    raw = bytearray(_image()[1].header.to_bytes())
    with pytest.raises(CorruptImage, match="magic"):
        ImageHeader.from_bytes(b"x" * 64)
    raw[8] = 99
    with pytest.raises(CorruptImage, match="version 99"):
        ImageHeader.from_bytes(bytes(raw))


def test_a_sealed_image_verifies_and_a_flipped_payload_bit_does_not() -> None:
    image = _image()[1].sealed()
    image.verify()
    place = image.header.segments[3].place
    image.payload[place.offset + place.length - 1] ^= 0x10
    with pytest.raises(CorruptImage, match=place.pool.value):
        image.verify()


def test_an_unsealed_image_does_not_verify() -> None:
    with pytest.raises(CorruptImage, match="None"):
        _image()[1].verify()


def test_the_same_request_gives_the_same_payload_twice() -> None:
    first, second = _image(301)[1].sealed(), _image(301)[1].sealed()
    assert torch.equal(first.payload, second.payload)
    assert first.header == second.header


def test_an_image_of_another_layout_names_both_fingerprints() -> None:
    _, image = _image()
    other = KVPools(small_spec("fp32"), SMALL_SIZES)
    with pytest.raises(SpecMismatch) as info:
        other.load_cpu_copy(image, opened(allocators(), 700).indices())
    assert image.header.fingerprint in str(info.value) and other.spec.fingerprint in str(info.value)


def test_an_image_of_other_weights_is_refused() -> None:
    _, image = _image(model_hash="weights-a")
    other = KVPools(small_spec(), SMALL_SIZES, model_hash="weights-b")
    with pytest.raises(SpecMismatch, match="weights-a"):
        other.load_cpu_copy(image, opened(allocators(), 700).indices())


def test_an_image_of_another_length_is_refused() -> None:
    pools, image = _image(700)
    with pytest.raises(IntegrityError, match="700"):
        pools.load_cpu_copy(image, opened(allocators(), 701).indices())


def test_a_missing_segment_is_named_with_its_rows() -> None:
    pools, image = _image()
    for index, segment in enumerate(image.header.segments):
        rest = [s for i, s in enumerate(image.header.segments) if i != index]
        place = segment.place
        with pytest.raises(CorruptImage, match="missing") as info:
            check_header(_with_segments(image.header, rest), pools.spec)
        assert place.pool.value in str(info.value) and f"[{place.row_start}, {place.row_end})" in str(info.value)


def test_a_doubled_segment_is_refused() -> None:
    pools, image = _image()
    segments = list(image.header.segments)
    with pytest.raises(CorruptImage, match="doubled"):
        check_header(_with_segments(image.header, [*segments, segments[2]]), pools.spec)


def test_a_misplaced_segment_is_refused() -> None:
    pools, image = _image()
    segments = list(image.header.segments)
    moved = dataclasses.replace(segments[1].place, offset=segments[1].place.offset + 64)
    segments[1] = Segment(moved)
    with pytest.raises(CorruptImage, match="should be"):
        check_header(_with_segments(image.header, segments), pools.spec)


def test_a_payload_of_the_wrong_length_is_refused() -> None:
    pools, image = _image()
    with pytest.raises(CorruptImage, match="payload"):
        check_header(dataclasses.replace(image.header, payload_bytes=10), pools.spec)


def test_refused_images_change_no_pool() -> None:
    pools, image = _image(300)
    before = {pool.spec.name: pool.data.clone() for pool in pools.pools}
    bad = KVImage(_with_segments(image.header, list(image.header.segments[:-1])), image.payload)
    with pytest.raises(CorruptImage):
        pools.load_cpu_copy(bad, opened(allocators(), 300).indices())
    assert all(torch.equal(pool.data, before[pool.spec.name]) for pool in pools.pools)


def test_no_tokens_means_no_gap() -> None:
    assert first_gap([], small_spec(), 0) is None
    assert "window" in (first_gap([], small_spec(), 1) or "")
