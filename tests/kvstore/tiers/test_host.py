"""The host tier: space before bytes, a budget that holds, pins that outlive a discard."""

from __future__ import annotations

import random

import pytest
import torch

from kvstore.arena import EXTENT_ALIGN_BYTES
from kvstore.errors import IntegrityError
from kvstore.tiers.base import planned_header
from kvstore.tiers.host import HostTier
from tests.kvstore.tiers.parts import TINY, fill, key, make_image


def test_a_reserved_image_is_readable_only_after_commit() -> None:
    tier = HostTier(1 << 20, pinned=False)
    place = tier.reserve(key("a"), planned_header(TINY, 300, request_id="a"))
    assert place is not None
    assert tier.image(key("a")) is None
    fill(place, 7)
    tier.commit(key("a"))
    image = tier.image(key("a"))
    assert image is not None
    assert image.payload.data_ptr() == place.payload.data_ptr()
    tier.check_integrity()


def test_put_and_get_give_the_same_bytes() -> None:
    tier = HostTier(1 << 20, pinned=False)
    image = make_image(600, 1)
    saved = tier.put(key("a"), image)
    assert saved is not None and saved.result()
    into = torch.empty_like(image.payload)
    loaded = tier.get(key("a"), into).result()
    assert loaded is not None and torch.equal(into, image.payload) and loaded.payload is into
    assert tier.get(key("b")).result() is None
    stats = tier.stats()
    assert (stats.puts, stats.gets, stats.misses, stats.put_bytes) == (1, 1, 1, image.payload.numel())


def test_no_room_is_none_and_counted() -> None:
    image = make_image(600)
    tier = HostTier(image.payload.numel() + EXTENT_ALIGN_BYTES, pinned=False)
    assert tier.put(key("a"), image) is not None
    assert tier.put(key("b"), image) is None
    assert tier.stats().refused == 1
    assert tier.discard(key("a")) and not tier.discard(key("a"))
    assert tier.put(key("b"), image) is not None


def test_a_key_is_held_once() -> None:
    tier = HostTier(1 << 20, pinned=False)
    tier.put(key("a"), make_image(10))
    with pytest.raises(ValueError, match="already"):
        tier.put(key("a"), make_image(10))


def test_discarded_bytes_stay_while_pinned() -> None:
    tier = HostTier(1 << 20, pinned=False)
    tier.put(key("a"), make_image(600, 5))
    image = tier.image(key("a"))
    assert image is not None
    used, before = tier.used_bytes, image.payload.clone()
    unpin = tier.pin(key("a"))
    tier.discard(key("a"))
    tier.put(key("a"), make_image(600, 6))
    assert torch.equal(image.payload, before)
    assert tier.used_bytes == 2 * used
    unpin()
    assert tier.used_bytes == used
    tier.check_integrity()
    with pytest.raises(IntegrityError):
        unpin()


def test_commit_refuses_a_header_of_another_size() -> None:
    tier = HostTier(1 << 20, pinned=False)
    tier.reserve(key("a"), planned_header(TINY, 300, request_id="a"))
    with pytest.raises(ValueError, match="bytes"):
        tier.commit(key("a"), planned_header(TINY, 301, request_id="a"))


def test_budget_holds_under_random_use(seed: int) -> None:
    rng = random.Random(seed)
    budget = 50_000
    tier = HostTier(budget, pinned=False)
    for _ in range(400):
        name = key(rng.choice("abcdefgh"))
        if name in tier:
            tier.discard(name)
        else:
            tier.put(name, make_image(rng.randrange(1, 700)))
        tier.check_integrity()
        assert tier.used_bytes <= budget
    assert tier.stats().refused and tier.stats().peak_bytes <= budget
    for name in tier.held_keys():
        tier.discard(name)
    assert tier.used_bytes == 0
