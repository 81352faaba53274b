"""The relay from compute threads to the event loop: order, completeness, and a loop that is gone."""

from __future__ import annotations

import asyncio
import threading

from kvstore.transfer.relay import LoopRelay


async def test_calls_run_on_the_loop_in_the_order_they_were_posted() -> None:
    relay = LoopRelay()
    seen: list[tuple[int, int]] = []

    def compute() -> None:
        for i in range(100):
            relay.post(lambda i=i: seen.append((i, threading.get_ident())))  # type: ignore[misc]

    await asyncio.to_thread(compute)
    await relay.close()
    await asyncio.sleep(0)
    assert seen == [(i, threading.get_ident()) for i in range(100)]


async def test_posting_to_a_closed_relay_is_dropped() -> None:
    relay = LoopRelay()
    await relay.close()
    seen: list[int] = []
    relay.post(lambda: seen.append(1))
    await asyncio.sleep(0)
    assert seen == []


def test_a_loop_that_is_gone_ends_the_thread() -> None:
    relays: list[LoopRelay] = []

    async def main() -> None:
        relays.append(LoopRelay())

    asyncio.run(main())
    relays[0].post(lambda: None)
    relays[0]._thread.join(5.0)
    assert not relays[0]._thread.is_alive()
