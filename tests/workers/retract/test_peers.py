"""Images at other decode workers, and KV that is computed again, over real sockets."""

from __future__ import annotations

import asyncio

import pytest

from tests.workers.retract.fleet import Fleet, running_fleet
from tests.workers.retract.harness import prompt, retract_config
from tests.workers.runtime.pair import make_request
from workers.errors import NotAllowed, RequestError
from workers.messages import FinishReason, RetractControl
from workers.retract.config import RetractConfig

HARSH = {"poison_freed": True, "other_pages": True}


async def run(fleet: Fleet, num: int = 3, length: int = 100, **options: object) -> None:
    requests = [make_request(f"r{i}", prompt(length + 20 * i, i), max_tokens=24, **options) for i in range(num)]
    await asyncio.gather(*(fleet.cluster.start(r) for r in requests))
    await fleet.check_tokens(requests)


async def test_the_peer_tier_gives_the_bytes_back() -> None:
    async with running_fleet() as fleet:
        await fleet.control(interval=8, tier="peer", **HARSH)
        await run(fleet)
        report = await fleet.cluster.decode_client.retract_report(reset=True)
        assert report.by_tier == {"peer": report.events} and report.events >= 6 and not report.fallbacks
        assert (await fleet.cluster.decode_client.retract_report()).events == 0
        stats = await fleet.cluster.decode_client.stats()
        assert stats.retracts == {"forced": report.events} and stats.resumes == report.events
        moved = stats.retract_bytes
        assert moved["out/pinned"] == moved["in/pinned"] == moved["out/peer"] == moved["in/peer"] == report.bytes_out
        assert stats.parked == stats.parked_bytes == 0 and stats.retract_ms["out/peer"] > 0


async def test_a_forced_recompute_goes_on_with_the_same_tokens() -> None:
    async with running_fleet() as fleet:
        await fleet.control(interval=8, tier="recompute", **HARSH)
        await run(fleet, temperature=0.7, seed=2)
        report = await fleet.cluster.decode_client.retract_report()
        assert report.by_tier == {"recompute": report.events}
        assert report.fallbacks == {"forced_recompute": report.events}


async def test_a_host_too_small_for_one_request_recomputes() -> None:
    async with running_fleet(retract=retract_config(host=4096)) as fleet:
        await fleet.control(interval=8, **HARSH)
        await run(fleet)
        report = await fleet.cluster.decode_client.retract_report()
        assert report.by_tier == {"recompute": report.events}
        assert report.fallbacks == {"host_too_small": report.events}


async def test_without_anyone_to_recompute_a_forced_victim_is_spared() -> None:
    async with running_fleet(retract=retract_config(host=4096), with_prefill=False) as fleet:
        await fleet.control(interval=8, **HARSH)
        await run(fleet)
        report = await fleet.cluster.decode_client.retract_report()
        assert report.resumes == 0 and report.fallbacks["spared"] == report.events > 0


async def test_a_peer_without_room_is_counted_and_the_image_stays_here() -> None:
    tight = retract_config(guest_budget_bytes=4096)
    async with running_fleet(retract=tight) as fleet:
        await fleet.control(interval=8, tier="peer", **HARSH)
        await run(fleet)
        report = await fleet.cluster.decode_client.retract_report()
        assert report.by_tier == {"pinned": report.events} and report.fallbacks["peer_failed"] >= 1


async def test_a_peer_that_has_lost_the_image_makes_the_request_recompute() -> None:
    async with running_fleet() as fleet:
        guests = fleet.peer.neighbours.guests
        keep, guests.takes = (
            guests.takes,
            lambda received: keep(received) and (guests.forget(received.request_id) or True),
        )
        await fleet.control(interval=8, tier="peer", **HARSH)
        await run(fleet)
        report = await fleet.cluster.decode_client.retract_report()
        assert report.by_tier == {"recompute": report.events} and report.fallbacks["lost"] == report.events > 0


async def test_when_no_prefill_worker_can_be_reached_only_that_request_fails_with_503() -> None:
    slow = retract_config(recompute_attempts=2)
    async with running_fleet(retract=slow) as fleet:
        client = fleet.cluster.decode_client
        await client.set_peers(["127.0.0.1:9"], [])
        await fleet.control(interval=4, victim="named", names=("bad",), tier="recompute")
        good = [make_request(f"good{i}", prompt(40, i), max_tokens=60) for i in range(2)]
        bad = make_request("bad", prompt(50), max_tokens=60)
        await asyncio.gather(*(fleet.cluster.start(r) for r in (*good, bad)))
        last = (await fleet.cluster.router.end_of("bad"))[-1]
        assert last.finish is FinishReason.ERROR and last.error is not None
        assert (last.error.status, last.error.code) == (503, "kv_lost")
        await fleet.check_tokens(good)
        report = await client.retract_report()
        assert report.fallbacks["recompute_failed"] == 2 and report.fallbacks["failed"] == 1


@pytest.mark.parametrize("tier", ["peer", "recompute", "pinned"])
async def test_an_abort_while_an_image_is_on_its_way_frees_everything(tier: str) -> None:
    async with running_fleet() as fleet:
        await fleet.control(interval=1, tier=tier, **HARSH)
        for i in range(6):
            request = make_request(f"a{i}", prompt(300, i), max_tokens=200)
            await fleet.cluster.start(request)
            await fleet.cluster.router.until(request.request_id, 1 + i % 3)
            await fleet.cluster.decode_client.abort(request.request_id)
            assert (await fleet.cluster.router.end_of(request.request_id))[-1].finish is FinishReason.ABORTED


async def test_control_is_refused_unless_it_was_allowed() -> None:
    from tests.workers.service.cluster import running_cluster

    async with running_cluster() as cluster:
        with pytest.raises(RequestError) as caught:
            await cluster.decode_client.control(RetractControl(interval=1))
        assert caught.value.status == NotAllowed.status == 403
        assert (await cluster.decode_client.retract_report()).events == 0


def test_configs_name_the_field_that_is_wrong() -> None:
    with pytest.raises(ValueError, match="admission"):
        RetractConfig(admission="hope")
    with pytest.raises(ValueError, match="forecast_safety"):
        RetractConfig(forecast_safety=0.5)
    with pytest.raises(ValueError, match="mutate"):
        RetractControl(mutate="skip:everything")
    with pytest.raises(ValueError, match="unknown keys"):
        RetractControl.from_dict({"intervall": 3})
