"""The cascade: who moves when, what stays, what is refused and why, and that nothing leaks on any path."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from kvstore.image import KVImage
from kvstore.tiers.base import ImageKey, Tier, TierStats, finished, planned_header
from kvstore.tiers.cascade import Cascade, build_cascade
from kvstore.tiers.config import TiersConfig
from kvstore.tiers.host import HostTier
from kvstore.tiers.placement import Cause, Lost, Parked, Place, Refusal, choose_demotions
from tests.kvstore.tiers.parts import TINY, TINY_SEGMENT_BYTES, fill, key, make_image
from tests.kvstore.tiers.test_disk import Disk

N = 600
IMAGE_BYTES = TINY.image_bytes(N)
EXTENT_BYTES = 12288
"""One image of `N` tokens in the host tier, rounded up."""


class PeerTier:
    """Another worker's memory behind the `Tier` protocol: takes everything at once, or refuses."""

    name = "peer"

    def __init__(self, *, takes: bool = True) -> None:
        self.takes, self.held = takes, dict[ImageKey, KVImage]()

    def put(self, key: ImageKey, image: KVImage) -> Future[bool] | None:
        if not self.takes:
            return None
        self.held[key] = KVImage(image.header, image.payload.clone())
        return finished(True)

    def get(self, key: ImageKey, into: torch.Tensor | None = None) -> Future[KVImage | None]:
        image = self.held.get(key)
        if image is None or into is None:
            return finished(image)
        into.copy_(image.payload)
        return finished(KVImage(image.header, into))

    def discard(self, key: ImageKey) -> bool:
        return self.held.pop(key, None) is not None

    def stats(self) -> TierStats:
        return TierStats(self.name, 1 << 30, images=len(self.held))

    def check_integrity(self) -> None:
        """Nothing to check."""

    def close(self) -> None:
        self.held.clear()


class Rig:
    """A cascade over a host tier of `images` images, a stepped disk tier and more, with a clock that is set by hand."""

    def __init__(self, folder: Path, *, images: int = 2, disk_images: int = 8, extra: tuple[Tier, ...] = ()) -> None:
        self.disk = Disk(folder, budget_bytes=disk_images * 16384)
        self.now = 0.0
        self.host = HostTier(images * EXTENT_BYTES, pinned=False)
        self.cascade = Cascade(
            self.host, [self.disk.tier, *extra], high=1.0, low=0.5, retry_after_s=10, clock=lambda: self.now
        )

    def reserve(self, name: str) -> KVImage | Refusal:
        header = planned_header(TINY, N, request_id=name, model_hash="weights", segment_bytes=TINY_SEGMENT_BYTES)
        return self.cascade.reserve(key(name), header)

    def park(self, name: str) -> None:
        image = self.reserve(name)
        assert isinstance(image, KVImage), image
        fill(image, ord(name))
        self.cascade.commit(key(name))

    def step(self) -> tuple[Lost, ...]:
        self.disk.run()
        lost = self.cascade.poll()
        self.cascade.check_integrity()
        return lost

    def places(self) -> dict[str, Place]:
        return {name: place for name in "abcdef" if (place := self.cascade.place(key(name))) is not None}

    def resume(self, name: str) -> None:
        image = self.cascade.lend(key(name))
        assert image is not None
        assert torch.equal(image.payload, make_image(N, ord(name)).payload)
        self.cascade.discard(key(name))

    def fallbacks(self) -> dict[Cause, int]:
        return dict(self.cascade.stats().fallbacks)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    for name in "abcdef":
        made.cascade.discard(key(name))
    made.step()
    made.disk.checked()
    assert made.host.used_bytes == made.disk.tier.stats().used_bytes == made.disk.files.total_bytes == 0
    made.cascade.close()


def test_an_image_stays_in_the_host_while_there_is_room(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    rig.step()
    assert rig.places() == {"a": Place.HOST, "b": Place.HOST}
    rig.resume("a")
    assert rig.places() == {"b": Place.HOST} and rig.fallbacks() == {}


def test_a_full_host_moves_the_latest_down_and_then_grants(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    refusal = rig.reserve("c")
    assert isinstance(refusal, Refusal) and refusal.retry
    assert rig.places() == {"a": Place.HOST, "b": Place.DEMOTING}
    rig.step()
    rig.park("c")
    assert rig.places() == {"a": Place.HOST, "b": Place.LOWER, "c": Place.HOST}
    assert rig.fallbacks() == {}
    stats = rig.cascade.stats()
    assert stats.demoted_to == (("disk", 1, IMAGE_BYTES),)
    assert stats.parked == ((Place.HOST, 2, 2 * IMAGE_BYTES), (Place.LOWER, 1, IMAGE_BYTES))


def test_asking_again_while_room_is_being_made_starts_nothing_more(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    for _ in range(3):
        refusal = rig.reserve("c")
        assert isinstance(refusal, Refusal) and refusal.retry
    assert rig.places() == {"a": Place.HOST, "b": Place.DEMOTING}


def _moved_down(rig: Rig) -> None:
    """a in the host, b on disk, c in the host."""
    rig.park("a")
    rig.park("b")
    rig.reserve("c")
    rig.step()
    rig.park("c")


def test_a_wanted_image_comes_back_bit_for_bit(rig: Rig) -> None:
    _moved_down(rig)
    rig.resume("a")
    assert not rig.cascade.want(key("b"))
    assert rig.places()["b"] is Place.PROMOTING and rig.cascade.lend(key("b")) is None
    rig.step()
    assert rig.cascade.want(key("b"))
    rig.resume("b")
    assert rig.cascade.stats().promoted_from == (("disk", 1, IMAGE_BYTES),)


def test_a_wanted_image_makes_others_move_down(rig: Rig) -> None:
    _moved_down(rig)
    rig.cascade.want(key("b"))
    assert rig.places() == {"a": Place.HOST, "b": Place.LOWER, "c": Place.DEMOTING}
    rig.step()
    rig.step()
    assert rig.places() == {"a": Place.HOST, "b": Place.HOST, "c": Place.LOWER}


def test_wanted_images_are_not_moved_down(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    rig.cascade.want(key("b"))
    rig.reserve("c")
    assert rig.places() == {"a": Place.DEMOTING, "b": Place.HOST}
    rig.cascade.want(key("b"), soon=False)


def test_an_image_wanted_while_it_moves_down_stays(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    rig.reserve("c")
    assert rig.cascade.want(key("b"))
    rig.step()
    rig.step()
    assert rig.places()["b"] is Place.HOST
    rig.disk.checked()
    assert rig.disk.names() == []


def test_an_image_is_lent_while_it_moves_down(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    rig.reserve("c")
    rig.resume("b")
    assert rig.host.used_bytes == 2 * EXTENT_BYTES, "bytes that a move still reads were given away"
    rig.step()
    assert rig.host.used_bytes == EXTENT_BYTES and rig.places() == {"a": Place.HOST}


def test_a_lent_image_can_be_taken_back(rig: Rig) -> None:
    rig.park("a")
    assert rig.cascade.lend(key("a")) is not None
    rig.cascade.take_back(key("a"))
    rig.resume("a")


@pytest.mark.parametrize("name", ["reserved", "host", "demoting", "lower", "promoting", "lent"])
def test_a_discard_in_any_place_leaves_nothing_and_the_key_is_free(rig: Rig, name: str) -> None:
    place = Place(name)
    if place is Place.RESERVED:
        rig.reserve("b")
    elif place in (Place.LOWER, Place.PROMOTING):
        _moved_down(rig)
        rig.resume("a")
        if place is Place.PROMOTING:
            rig.cascade.want(key("b"))
    else:
        rig.park("a")
        rig.park("b")
        if place is Place.DEMOTING:
            rig.reserve("c")
        if place is Place.LENT:
            rig.cascade.lend(key("b"))
    assert rig.cascade.place(key("b")) is place
    assert rig.cascade.discard(key("b")) and not rig.cascade.discard(key("b"))
    rig.cascade.check_integrity()
    rig.step()
    rig.park("b")
    rig.resume("b")


def test_a_disk_that_fills_in_the_middle_keeps_the_image_in_the_host(rig: Rig) -> None:
    rig.park("a")
    rig.park("b")
    rig.reserve("c")
    rig.disk.files.fail("write_at", code=errno.ENOSPC)
    rig.step()
    assert rig.places() == {"a": Place.HOST, "b": Place.HOST}
    assert rig.fallbacks() == {Cause.SAVE_FAILED: 1}
    refused = rig.reserve("c")
    assert isinstance(refused, Refusal) and refused.cause is Cause.NO_ROOM  # the disk is passed over for a while
    rig.now = 10.0
    again = rig.reserve("c")
    assert isinstance(again, Refusal) and again.retry
    rig.resume("b")


def test_a_damaged_image_is_lost_and_counted(rig: Rig) -> None:
    _moved_down(rig)
    rig.resume("a")
    path = rig.disk.folder / "0000000000.kv"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    rig.cascade.want(key("b"))
    assert rig.step() == (Lost(key("b"), "disk"),)
    assert rig.cascade.place(key("b")) is None and rig.fallbacks() == {Cause.LOST: 1}


def test_an_image_larger_than_the_host_is_refused_for_good(rig: Rig) -> None:
    refusal = rig.cascade.reserve(key("a"), planned_header(TINY, 6000, request_id="a"))
    assert isinstance(refusal, Refusal) and refusal.cause is Cause.HOST_TOO_SMALL and not refusal.retry
    assert rig.fallbacks() == {Cause.HOST_TOO_SMALL: 1}


def test_full_tiers_refuse_and_a_discard_opens_them_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path, images=1, disk_images=1)
    rig.park("a")
    rig.reserve("b")
    rig.step()
    rig.park("b")
    refusal = rig.reserve("c")
    assert isinstance(refusal, Refusal) and refusal.cause is Cause.NO_ROOM
    rig.cascade.discard(key("a"))
    refusal = rig.reserve("c")
    assert isinstance(refusal, Refusal) and refusal.retry
    rig.step()
    rig.park("c")
    rig.cascade.close()


def test_the_next_tier_takes_what_a_full_disk_refuses(tmp_path: Path) -> None:
    peer = PeerTier()
    rig = Rig(tmp_path, images=1, disk_images=1, extra=(peer,))
    rig.park("a")
    for name in "bc":
        rig.reserve(name)
        rig.step()
        rig.park(name)
    assert list(peer.held) == [key("b")] and rig.fallbacks() == {Cause.TIER_PASSED: 1}
    rig.cascade.discard(key("c"))
    rig.cascade.want(key("b"))
    rig.step()
    rig.resume("b")
    assert not peer.held
    rig.cascade.close()


def test_a_peer_that_refuses_leaves_no_room(tmp_path: Path) -> None:
    rig = Rig(tmp_path, images=1, disk_images=0, extra=(PeerTier(takes=False),))
    rig.park("a")
    refusal = rig.reserve("b")
    assert isinstance(refusal, Refusal) and refusal.cause is Cause.NO_ROOM
    rig.resume("a")
    rig.cascade.close()


def test_a_victim_being_filled_is_worth_waiting_for(tmp_path: Path) -> None:
    rig = Rig(tmp_path, images=1)
    assert isinstance(rig.reserve("a"), KVImage)
    refusal = rig.reserve("b")
    assert isinstance(refusal, Refusal) and refusal.retry
    rig.cascade.close()


def test_the_high_mark_starts_moves_and_the_low_mark_ends_them(tmp_path: Path) -> None:
    rig = Rig(tmp_path, images=6)
    rig.cascade = Cascade(rig.host, [rig.disk.tier], high=0.7, low=0.5)
    for name in "abcd":
        rig.park(name)
        rig.step()
    assert set(rig.places().values()) == {Place.HOST}
    rig.park("e")
    rig.step()
    rig.step()
    assert [name for name, place in rig.places().items() if place is Place.LOWER] == ["d", "e"]
    rig.cascade.close()


def test_a_key_is_parked_once(rig: Rig) -> None:
    rig.park("a")
    with pytest.raises(ValueError, match="already"):
        rig.reserve("a")


def test_an_illegal_change_of_place_is_refused(rig: Rig) -> None:
    rig.park("a")
    with pytest.raises(ValueError, match="cannot become"):
        rig.cascade.take_back(key("a"))


def test_demotions_are_latest_first_and_no_more_than_needed() -> None:
    header = planned_header(TINY, N, request_id="r")
    parked = [Parked(key(name), header, order, Place.HOST) for order, name in enumerate("abcd")]
    parked[3].wanted = True
    parked[1].place = Place.LENT
    assert [p.key for p in choose_demotions(parked, 1)] == ["c"]
    assert [p.key for p in choose_demotions(parked, EXTENT_BYTES + 1)] == ["c", "a"]
    assert [p.key for p in choose_demotions(parked, 10 * EXTENT_BYTES)] == ["c", "a"]
    assert choose_demotions(parked, 0) == []


def test_a_configured_cascade_saves_and_loads_with_its_own_threads(tmp_path: Path) -> None:
    config = TiersConfig(host_budget_bytes=EXTENT_BYTES, disk_directory=str(tmp_path), disk_budget_bytes=1 << 20)
    cascade = build_cascade(config, TINY, pinned=False)
    header = planned_header(TINY, N, request_id="a")
    for name in "ab":
        image = cascade.reserve(key(name), header)
        if isinstance(image, Refusal):
            moving = cascade._parked[key("a")].move
            assert moving is not None and moving.future.result(timeout=10)
            cascade.poll()
            image = cascade.reserve(key(name), header)
        assert isinstance(image, KVImage)
        fill(image, ord(name))
        cascade.commit(key(name))
    assert cascade.place(key("a")) is Place.LOWER
    cascade.discard(key("b"))
    cascade.want(key("a"))
    moving = cascade._parked[key("a")].move
    assert moving is not None and moving.future.result(timeout=10)
    cascade.poll()
    back = cascade.lend(key("a"))
    assert back is not None and torch.equal(back.payload, make_image(N, ord("a")).payload)
    cascade.discard(key("a"))
    cascade.close()
    assert [path.name for path in (tmp_path / "worker").iterdir()] == ["owner.lock"]


@pytest.mark.parametrize(
    "bad",
    [
        {"host_budget_bytes": -1},
        {"host_high": 0.5},
        {"host_low": 0.0},
        {"disk_owner": "../up"},
        {"disk_recovery": "keep"},
        {"retry_after_s": -1.0},
    ],
)
def test_a_config_that_cannot_work_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        TiersConfig(**bad)
