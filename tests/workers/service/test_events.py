"""Event streams: order, merging, limits, and who is told when a router is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from workers.errors import WorkerFull
from workers.messages import TokenEvent
from workers.service.events import MAX_PENDING_EVENTS, EventHub, Key, StreamReplaced

WAIT_S = 10.0


def events_of(first: int, count: int) -> list[TokenEvent]:
    return [TokenEvent("a", 0, index, (5,)) for index in range(first, first + count)]


async def take(stream: AsyncIterator[list[TokenEvent]]) -> list[TokenEvent]:
    return await asyncio.wait_for(anext(stream), WAIT_S)


async def settle() -> None:
    """Lets callbacks that are due run."""
    for _ in range(5):
        await asyncio.sleep(0)


async def connected(hub: EventHub, router_id: str) -> AsyncIterator[list[TokenEvent]]:
    """A stream that is current: its generator has begun."""
    stream = hub.stream(router_id)
    waiting = asyncio.ensure_future(anext(stream))
    await settle()
    hub.publish({router_id: [TokenEvent("hello", 0, 0, (1,))]})
    await asyncio.wait_for(waiting, WAIT_S)
    return stream


async def test_steps_merge_in_order_while_the_reader_is_away() -> None:
    hub = EventHub(60.0, lambda keys: None)
    stream = await connected(hub, "r")
    hub.publish({"r": events_of(0, 1)})
    hub.publish({"r": events_of(1, 2), "other": events_of(0, 1)})
    await settle()
    assert [e.index for e in await take(stream)] == [0, 1, 2]
    await stream.aclose()  # type: ignore[attr-defined]
    hub.close()


async def test_events_before_the_first_stream_wait_for_it() -> None:
    hub = EventHub(60.0, lambda keys: None)
    hub.expect("a", 0, "r")
    hub.publish({"r": events_of(0, 1)})
    await settle()
    stream = hub.stream("r")
    assert [e.index for e in await take(stream)] == [0]
    hub.close()
    await stream.aclose()  # type: ignore[attr-defined]


async def test_a_reader_that_leaves_too_much_unread_loses_its_stream() -> None:
    hub = EventHub(60.0, lambda keys: None)
    stream = await connected(hub, "r")
    hub.publish({"r": events_of(0, MAX_PENDING_EVENTS + 1)})
    await settle()
    with pytest.raises(WorkerFull, match="unread"):
        await take(stream)
    assert hub.num_streams == 0
    hub.close()


async def test_closing_delivers_what_is_pending_and_then_ends() -> None:
    hub = EventHub(60.0, lambda keys: None)
    stream = await connected(hub, "r")
    hub.publish({"r": events_of(0, 3)})
    await settle()
    hub.close()
    assert len(await take(stream)) == 3
    with pytest.raises(StopAsyncIteration):
        await take(stream)


async def test_a_newer_stream_takes_over_and_ends_what_the_older_was_responsible_for() -> None:
    lost: list[Key] = []
    hub = EventHub(60.0, lost.extend)
    first = await connected(hub, "r")
    hub.expect("a", 0, "r")
    second = await connected(hub, "r")
    assert lost == [("a", 0)]
    with pytest.raises(StreamReplaced):
        await take(first)
    hub.expect("b", 0, "r")
    await second.aclose()  # type: ignore[attr-defined]
    hub.expect("c", 0, "r")
    third = await connected(hub, "r")
    assert lost == [("a", 0), ("a", 0), ("b", 0)]
    await third.aclose()  # type: ignore[attr-defined]
    hub.close()


async def test_after_the_grace_time_without_a_stream_every_request_is_lost() -> None:
    told: asyncio.Future[list[Key]] = asyncio.get_running_loop().create_future()
    hub = EventHub(0.01, told.set_result)
    hub.expect("a", 0, "r")
    hub.expect("b", 3, "r")
    assert await asyncio.wait_for(told, WAIT_S) == [("a", 0), ("b", 3)]
    hub.close()


async def test_ended_requests_are_not_reported_as_lost() -> None:
    lost: list[Key] = []
    hub = EventHub(60.0, lost.extend)
    stream = await connected(hub, "r")
    hub.expect("a", 0, "r")
    hub.forget("a", 0)
    await settle()
    await stream.aclose()  # type: ignore[attr-defined]
    again = await connected(hub, "r")
    assert lost == []
    await again.aclose()  # type: ignore[attr-defined]
    hub.close()
