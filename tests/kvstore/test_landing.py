"""Rules of admission to landing memory, without sockets: epochs, leases, credit, places, duplicates, completeness."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

from kvstore.checksum import CHECKSUM_NAME, checksum
from kvstore.errors import IntegrityError, TransferRefused
from kvstore.image import KVImage
from kvstore.pools.aggregate import KVPools
from kvstore.spec import RowRange
from kvstore.transfer.landing import Landing, LandingTable, ReceivedImage
from tests.kvstore.clocks import ManualClock
from tests.kvstore.layouts import SMALL_SIZES, allocators, fill_random, live_state, opened, small_spec

N = 300
SEGMENT = 8_000


class Desk:
    """A landing table with a manual clock, and the image that senders have."""

    def __init__(self, *, images: float = 2.2, credit_bytes: int = 1 << 20, num_tokens: int = N) -> None:
        self.spec = small_spec()
        self.clock = ManualClock()
        self.num_tokens = num_tokens
        self.pools = KVPools(self.spec, SMALL_SIZES)
        fill_random(self.pools, 11)
        self.source = opened(allocators(), num_tokens).indices()
        self.image: KVImage = self.pools.get_cpu_copy(self.source, segment_bytes=SEGMENT).sealed()
        budget = int(images * self.spec.image_bytes(num_tokens)) // 4096 * 4096
        self.table = LandingTable(
            self.spec,
            model_hash="weights",
            budget_bytes=budget,
            credit_bytes=credit_bytes,
            max_lease_s=100.0,
            clock=self.clock,
        )

    def open(self, request_id: str = "r", epoch: int = 0, **changes: object) -> Landing:
        arguments: dict[str, object] = {
            "num_tokens": self.num_tokens,
            "fingerprint": self.spec.fingerprint,
            "model_hash": "weights",
            "checksum_name": CHECKSUM_NAME,
        }
        return self.table.open(request_id, epoch, **{**arguments, **changes})  # type: ignore[arg-type]

    def granted(self, request_id: str = "r", epoch: int = 0) -> Landing:
        assert self.table.grant(request_id, epoch, self.num_tokens, 10.0) is not None
        return self.open(request_id, epoch)

    def push(self, landing: Landing, index: int) -> bool:
        segment = self.image.header.segments[index]
        payload = bytes(self.image.segment_bytes(segment))
        if not self.table.accept(landing, segment.place, len(payload)):
            return False
        self.table.land(landing, segment.place, payload, checksum(payload))
        return True

    def commit(self, landing: Landing, **changes: int) -> ReceivedImage:
        segments = self.image.header.segments
        totals = {"num_segments": len(segments), "num_bytes": sum(s.place.length for s in segments)}
        return self.table.commit(landing, **{**totals, **changes}, tail=b"tail")

    @property
    def count(self) -> int:
        return len(self.image.header.segments)


def _refused(code: str) -> pytest.RaisesExc[TransferRefused]:
    return pytest.raises(TransferRefused, match=f"{code}: ")


@pytest.mark.parametrize("order_seed", range(4))
def test_segments_in_any_order_make_the_senders_image(order_seed: int) -> None:
    desk = Desk()
    landing = desk.granted()
    order = list(range(desk.count))
    random.Random(order_seed).shuffle(order)
    assert all(desk.push(landing, i) for i in order)
    received = desk.commit(landing)
    received.image.verify()
    assert received.tail == b"tail" and received.is_current
    assert torch.equal(received.image.payload, desk.image.payload)
    target = opened(allocators(), desk.num_tokens, window_from=desk.num_tokens - 128).indices()
    other = KVPools(desk.spec, SMALL_SIZES)
    other.load_cpu_copy(received.image, target)
    expected = live_state(desk.pools, desk.source)
    assert all(torch.equal(rows, expected[name]) for name, rows in live_state(other, target).items())
    received.release()
    assert desk.table.stats().held_bytes == 0


def test_duplicates_are_dropped_and_counted() -> None:
    desk = Desk()
    landing = desk.granted()
    for i in range(desk.count):
        assert desk.push(landing, i)
        assert not desk.push(landing, i // 2)
    assert desk.table.stats().duplicates == desk.count
    with desk.commit(landing) as received:
        received.image.verify()
    assert desk.table.stats().held_bytes == 0


def test_a_segment_after_delivery_is_late_and_changes_nothing() -> None:
    desk = Desk()
    landing = desk.granted()
    for i in range(desk.count):
        desk.push(landing, i)
    received = desk.commit(landing)
    before = received.image.payload.clone()
    assert not desk.push(landing, 0)
    assert torch.equal(received.image.payload, before)
    assert desk.table.stats().late == 1
    received.release()


def test_a_segment_of_an_ended_attempt_never_reaches_the_next_owner_of_its_memory() -> None:
    desk = Desk(images=1.1)
    old = desk.granted(epoch=0)
    segment = desk.image.header.segments[0]
    payload = bytes(segment.place.length)
    assert desk.table.accept(old, segment.place, len(payload))
    assert desk.table.grant("r", 1, N, 10.0) is None, "the old attempt's copy is still in flight"
    desk.table.land(old, segment.place, payload, checksum(payload))
    new = desk.granted(epoch=1)
    for i in range(desk.count):
        desk.push(new, i)
        assert not desk.push(old, i)
    with desk.commit(new) as received:
        assert torch.equal(received.image.payload, desk.image.payload)
    desk.table.check_integrity()
    assert desk.table.stats().late == desk.count + 1


def test_a_newer_epoch_ends_the_older_stream() -> None:
    desk = Desk()
    old = desk.granted(epoch=3)
    desk.push(old, 0)
    desk.granted(epoch=4)
    with _refused("STALE_EPOCH"):
        desk.commit(old)
    with _refused("STALE_EPOCH"):
        desk.open(epoch=3)
    with _refused("STALE_EPOCH"):
        desk.table.grant("r", 3, N, 10.0)
    desk.table.check_integrity()


def test_an_image_that_was_superseded_after_delivery_says_so_and_keeps_its_memory() -> None:
    desk = Desk()
    landing = desk.granted(epoch=0)
    for i in range(desk.count):
        desk.push(landing, i)
    received = desk.commit(landing)
    desk.granted(epoch=1)
    assert not received.is_current
    received.image.verify()
    desk.table.check_integrity()
    received.release()
    desk.table.check_integrity()
    with pytest.raises(IntegrityError):
        received.release()


def test_asking_again_for_the_same_grant_renews_it() -> None:
    desk = Desk()
    first = desk.table.grant("r", 0, N, 10.0)
    desk.clock.advance(9.0)
    assert desk.table.grant("r", 0, N, 10.0) == first
    desk.clock.advance(9.0)
    assert desk.table.expire() == []
    assert desk.table.stats().grants == 1


def test_the_budget_bounds_grants_and_refusals_are_counted() -> None:
    desk = Desk(images=2.2)
    assert desk.table.grant("a", 0, N, 10.0) is not None
    assert desk.table.grant("b", 0, N, 10.0) is not None
    assert desk.table.grant("c", 0, N, 10.0) is None
    stats = desk.table.stats()
    assert stats.grants_refused == 1 and stats.held_bytes <= stats.budget_bytes
    assert desk.table.revoke("a", 0)
    assert desk.table.grant("c", 0, N, 10.0) is not None


def test_a_lease_without_signs_of_life_frees_its_memory() -> None:
    desk = Desk()
    unopened = desk.table.grant("a", 0, N, 10.0)
    landing = desk.granted("b")
    desk.clock.advance(6.0)
    desk.push(landing, 0)
    desk.clock.advance(6.0)
    assert desk.table.expire() == [unopened]
    desk.clock.advance(6.0)
    assert [grant.request_id for grant in desk.table.expire()] == ["b"]
    assert desk.table.stats().held_bytes == 0 and desk.table.stats().leases_expired == 2
    with _refused("LEASE_EXPIRED"):
        desk.commit(landing)


def test_renewals_cannot_outlive_the_longest_lease() -> None:
    desk = Desk()
    landing = desk.granted()
    for _ in range(20):
        desk.table.renew(landing)
        desk.clock.advance(5.0)
    assert [grant.request_id for grant in desk.table.expire()] == ["r"]


def test_a_delivered_image_does_not_expire() -> None:
    desk = Desk()
    landing = desk.granted()
    for i in range(desk.count):
        desk.push(landing, i)
    received = desk.commit(landing)
    desk.clock.advance(1000.0)
    assert desk.table.expire() == [] and received.is_current
    received.release()


@pytest.mark.parametrize(
    ("field", "value"), [("fingerprint", "f00"), ("model_hash", "other"), ("checksum_name", "crc32c")]
)
def test_a_foreign_sender_is_refused_with_both_values(field: str, value: str) -> None:
    desk = Desk()
    desk.table.grant("r", 0, N, 10.0)
    with _refused("SPEC_MISMATCH") as info:
        desk.open(**{field: value})
    ours = {"fingerprint": desk.spec.fingerprint, "model_hash": "weights", "checksum_name": CHECKSUM_NAME}[field]
    assert value in str(info.value) and ours in str(info.value)


def test_opening_needs_a_grant_of_that_length_that_is_not_open_yet() -> None:
    desk = Desk()
    with _refused("NO_GRANT"):
        desk.open()
    desk.table.grant("r", 0, N, 10.0)
    with _refused("NO_GRANT"):
        desk.open(epoch=1)
    with _refused("PROTOCOL"):
        desk.open(num_tokens=N + 1)
    desk.open()
    with _refused("BUSY"):
        desk.open()


def test_more_bytes_in_flight_than_the_credit_end_the_attempt() -> None:
    desk = Desk(credit_bytes=12_000)
    landing = desk.granted()
    places = [s.place for s in desk.image.header.segments if s.place.length > 6_000]
    assert desk.table.accept(landing, places[0], places[0].length)
    with _refused("CREDIT_EXCEEDED"):
        desk.table.accept(landing, places[1], places[1].length)
    assert desk.table.stats().held_bytes > 0, "one copy is still in flight"
    desk.table.drop(landing, places[0])
    assert desk.table.stats().held_bytes == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"offset": 64}, "should be"),
        ({"length": 1}, "should be"),
        ({"row_end": 10_000}, "not alive"),
        ({"row_start": 5, "row_end": 5}, "not alive"),
    ],
)
def test_a_misplaced_segment_ends_the_attempt(change: dict[str, int], named: str) -> None:
    desk = Desk()
    landing = desk.granted()
    place = desk.image.header.segments[1].place
    fields = {name: getattr(place, name) for name in ("pool", "row_start", "row_end", "offset", "length")}
    wrong = RowRange(**{**fields, **change})
    with _refused("MISPLACED") as info:
        desk.table.accept(landing, wrong, wrong.length)
    assert named in str(info.value)
    assert desk.table.stats().held_bytes == 0


def test_overlapping_segments_end_the_attempt() -> None:
    desk = Desk()
    landing = desk.granted()
    place = desk.image.header.segments[0].place
    desk.push(landing, 0)
    shifted = desk.spec.place(place.pool, place.row_start + 1, place.row_end, N)
    with _refused("MISPLACED") as info:
        desk.table.accept(landing, shifted, shifted.length)
    assert "overlaps" in str(info.value)


def test_a_damaged_segment_is_refused_and_never_written() -> None:
    desk = Desk()
    landing = desk.granted()
    segment = desk.image.header.segments[2]
    payload = bytearray(desk.image.segment_bytes(segment))
    good = checksum(bytes(payload))
    payload[5] ^= 1
    assert desk.table.accept(landing, segment.place, len(payload))
    with _refused("CHECKSUM"):
        desk.table.land(landing, segment.place, bytes(payload), good)
    assert desk.table.stats().checksum_failures == 1 and desk.table.stats().held_bytes == 0


def test_a_commit_with_missing_rows_names_pool_and_rows() -> None:
    desk = Desk()
    for missing in range(desk.count):
        landing = desk.granted(epoch=missing)
        for i in range(desk.count):
            if i != missing:
                desk.push(landing, i)
        place = desk.image.header.segments[missing].place
        with _refused("GAP") as info:
            desk.commit(landing)
        assert f"pool {place.pool.value}: rows [{place.row_start}, {place.row_end}) missing" in str(info.value)
    assert desk.table.stats().held_bytes == 0


@pytest.mark.parametrize("change", [{"num_segments": 3}, {"num_bytes": 17}])
def test_a_commit_with_wrong_totals_is_refused(change: dict[str, int]) -> None:
    desk = Desk()
    landing = desk.granted()
    for i in range(desk.count):
        desk.push(landing, i)
    with _refused("PROTOCOL"):
        desk.commit(landing, **change)


def test_abort_and_revoke_are_idempotent() -> None:
    desk = Desk()
    landing = desk.granted()
    desk.table.abort(landing, "gone")
    desk.table.abort(landing, "gone")
    assert not desk.table.revoke("r", 0)
    assert desk.table.stats().held_bytes == 0
    desk.table.check_integrity()


@pytest.mark.parametrize("seed", range(6))
def test_random_attempts_never_leak_or_mix_memory(seed: int) -> None:
    rng = random.Random(seed)
    desk = Desk(images=2.5, num_tokens=130)
    epochs = dict.fromkeys("abc", -1)
    landings: list[Landing] = []
    delivered: list[ReceivedImage] = []
    for _ in range(600):
        name = rng.choice("abc")
        match rng.randrange(9):
            case 0:
                epochs[name] += 1
                desk.table.grant(name, epochs[name], desk.num_tokens, 10.0)
            case 1:
                with contextlib.suppress(TransferRefused):
                    landings.append(desk.open(name, max(0, epochs[name])))
            case 2 | 3 | 4 | 5 if landings:
                landing = rng.choice(landings)
                for _ in range(rng.randint(1, desk.count)):
                    desk.push(landing, rng.randrange(desk.count))
            case 6 if landings:
                landing = landings.pop(rng.randrange(len(landings)))
                for i in range(desk.count):
                    desk.push(landing, i)
                with contextlib.suppress(TransferRefused):
                    delivered.append(desk.commit(landing))
            case 7:
                desk.table.revoke(name, epochs[name]) if rng.random() < 0.5 else desk.table.expire()
                desk.clock.advance(rng.choice((0.1, 4.0)))
            case 8 if delivered:
                image = delivered.pop(rng.randrange(len(delivered)))
                assert torch.equal(image.image.payload, desk.image.payload)
                image.release()
        desk.table.check_integrity()
    for image in delivered:
        image.release()
    for name, epoch in epochs.items():
        desk.table.revoke(name, epoch)
    assert desk.table.stats().images > 5
    assert desk.table.stats().held_bytes == 0
