"""Requests over real gRPC: both workers, the KV transfer between them, the client the router uses."""

from __future__ import annotations

import asyncio
import dataclasses
import random

import pytest

from tests.workers.runtime.fake_model import VOCAB, FakeModel, fake_engine, oracle_tokens
from tests.workers.runtime.pair import make_request, tokens_of
from tests.workers.service.cluster import WAIT_S, Router, running_cluster
from workers.errors import RequestAborted, RequestError, RequestTooLong, WorkerFull, WorkerUnavailable
from workers.loop import EngineLoop
from workers.messages import FinishReason, WorkerRole
from workers.service.client import WorkerClient


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 10_007 + length)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


async def test_tokens_over_grpc_equal_the_oracle_and_statistics_add_up() -> None:
    async with running_cluster() as cluster:
        lengths = [1, 5, 129, 256, 400]
        requests = [make_request(f"r{n}", prompt(n), max_tokens=15, temperature=n % 2, seed=n) for n in lengths]
        results = await asyncio.gather(*(cluster.start(r) for r in requests))
        for request, result in zip(requests, results, strict=True):
            events = await cluster.router.end_of(request.request_id)
            assert tokens_of(events) == oracle_tokens(request.prompt_ids, request.sampling)
            assert result.num_prompt_tokens == len(request.prompt_ids) and result.kv_bytes_sent > 0
        await cluster.idle()
        prefill, decode = await cluster.prefill_client.stats(), await cluster.decode_client.stats()
        assert prefill.prefill_tokens == sum(lengths) and decode.prefill_tokens == 0
        assert decode.tokens_generated == 15 * len(lengths) and prefill.tokens_generated == 0
        assert decode.kv_bytes_received == prefill.kv_bytes_sent == sum(r.kv_bytes_sent for r in results)
        assert decode.kv_images_committed == decode.requests_finished == prefill.requests_finished == len(lengths)
        assert prefill.role is WorkerRole.PREFILL and decode.role is WorkerRole.DECODE
        assert decode.ready and decode.routers == 1 and decode.rss_bytes > 0
        assert decode.full_pages.free == decode.full_pages.total > 0


async def test_rows_of_one_chunk_travel_while_the_next_computes() -> None:
    async with running_cluster() as cluster:
        await cluster.start(make_request("a", prompt(1024), max_tokens=1))
        transfer = cluster.prefill.servicer.last_transfer
        assert transfer is not None
        steps = list(cluster.prefill.engine.times.recent)
        assert len(steps) == 8
        early = [t for t in transfer.traces if t.sent_s < steps[-1][0]]
        assert early and min(t.sent_s for t in transfer.traces) < steps[1][1]
        stats = await cluster.prefill_client.stats()
        assert 0 <= stats.kv_hidden_s_total <= stats.kv_send_s_total > 0


async def test_many_requests_at_random_leave_nothing_behind(seed: int) -> None:
    rng = random.Random(seed)

    async def one(number: int, cluster) -> None:  # type: ignore[no-untyped-def]
        request = make_request(f"q{number}", prompt(rng.choice([3, 90, 140]), number), max_tokens=rng.randint(1, 60))
        await asyncio.sleep(rng.random() * 0.2)
        fate = rng.random()
        if fate < 0.3:
            task = asyncio.create_task(cluster.start(request))
            await asyncio.sleep(rng.random() * 0.1)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await cluster.decode_client.abort(request.request_id)
            await cluster.prefill_client.abort(request.request_id)
            return
        await cluster.start(request)
        if fate < 0.5:
            await cluster.decode_client.abort(request.request_id)
            await cluster.router.end_of(request.request_id)
            return
        events = await cluster.router.end_of(request.request_id)
        assert tokens_of(events) == oracle_tokens(request.prompt_ids, request.sampling)

    async with running_cluster() as cluster:
        await asyncio.gather(*(one(number, cluster) for number in range(24)))


async def test_errors_keep_their_class_across_the_wire() -> None:
    async with running_cluster(max_context=64, max_waiting=0, decode_engine=fake_engine(slots=1)) as cluster:
        with pytest.raises(RequestTooLong, match="at most 64"):
            await cluster.decode_client.admit(make_request("a", prompt(60)))
        with pytest.raises(RequestError, match=r"\[0, 61\)") as caught:
            await cluster.decode_client.admit(make_request("a", [VOCAB]))
        assert caught.value.status == 400
        grant = await cluster.decode_client.admit(make_request("a", prompt(5)))
        with pytest.raises(WorkerFull):
            await cluster.decode_client.admit(make_request("b", prompt(5)))
        with pytest.raises(RequestError, match="grant is for 5 tokens"):
            await cluster.prefill_client.prefill(make_request("a", prompt(6)), grant)
        bad = make_request("c", prompt(5))
        object.__setattr__(bad.sampling, "top_p", 3.0)
        with pytest.raises(RequestError, match="top_p") as caught:
            await cluster.decode_client.admit(bad)
        assert (caught.value.status, caught.value.code) == (400, "invalid_request")
        await cluster.decode_client.abort("a")


async def test_another_layout_is_refused_with_both_fingerprints() -> None:
    async with running_cluster() as cluster:
        request = make_request("a", prompt(5))
        grant = await cluster.decode_client.admit(request)
        with pytest.raises(RequestError, match="layout fingerprint differs") as caught:
            await cluster.prefill_client.prefill(request, dataclasses.replace(grant, fingerprint="beef"))
        assert "beef" in str(caught.value) and grant.fingerprint in str(caught.value)
        await cluster.decode_client.abort("a")


async def test_a_prompt_that_fails_ends_the_grant_with_an_error_event() -> None:
    async with running_cluster() as cluster:
        model = cluster.prefill.engine.model
        assert isinstance(model, FakeModel)
        model.fail_on = 7
        request = make_request("a", [*prompt(300), 7])
        with pytest.raises(RequestError, match="fake model failure"):
            await cluster.start(request)
        last = (await cluster.router.end_of("a"))[-1]
        assert last.finish is FinishReason.ERROR and last.index == 0
        model.fail_on = None
        again = dataclasses.replace(request, epoch=1)
        cluster.router.received.clear()
        await cluster.start(again)
        assert tokens_of(await cluster.router.end_of("a")) == oracle_tokens(again.prompt_ids, again.sampling)


async def test_a_prefill_worker_that_dies_midway_ends_the_grant() -> None:
    async with running_cluster() as cluster:
        request = make_request("a", prompt(1500))
        grant = await cluster.decode_client.admit(request)
        task = asyncio.create_task(cluster.prefill_client.prefill(request, grant))
        async with asyncio.timeout(WAIT_S):
            while not cluster.decode.receiver.stats().segments:
                await asyncio.sleep(0.005)
        await cluster.prefill.stop()
        with pytest.raises(RequestError):
            await task
        assert (await cluster.router.end_of("a"))[-1].finish is FinishReason.ERROR


async def test_abort_at_prefill_ends_the_call_and_the_grant() -> None:
    async with running_cluster() as cluster:
        request = make_request("a", prompt(1500))
        grant = await cluster.decode_client.admit(request)
        task = asyncio.create_task(cluster.prefill_client.prefill(request, grant))
        async with asyncio.timeout(WAIT_S):
            while not cluster.decode.receiver.stats().segments:
                await asyncio.sleep(0.005)
        await cluster.prefill_client.abort("a")
        with pytest.raises(RequestAborted):
            await task
        assert (await cluster.router.end_of("a"))[-1].finish is not None


async def test_abort_at_decode_ends_the_prefill_call() -> None:
    async with running_cluster() as cluster:
        request = make_request("a", prompt(1500))
        grant = await cluster.decode_client.admit(request)
        task = asyncio.create_task(cluster.prefill_client.prefill(request, grant))
        async with asyncio.timeout(WAIT_S):
            while not cluster.decode.receiver.stats().segments:
                await asyncio.sleep(0.005)
        await cluster.decode_client.abort("a")
        with pytest.raises(RequestAborted):
            await task
        assert [e.finish for e in await cluster.router.end_of("a")] == [FinishReason.ABORTED]


async def test_a_cancelled_prefill_call_frees_the_prompt() -> None:
    async with running_cluster() as cluster:
        request = make_request("a", prompt(1500))
        grant = await cluster.decode_client.admit(request)
        task = asyncio.create_task(cluster.prefill_client.prefill(request, grant))
        async with asyncio.timeout(WAIT_S):
            while not cluster.decode.receiver.stats().segments:
                await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await cluster.idle()


async def test_a_cancelled_admission_leaves_the_queue() -> None:
    async with running_cluster(decode_engine=fake_engine(slots=1)) as cluster:
        await cluster.decode_client.admit(make_request("a", prompt(5)))
        task = asyncio.create_task(cluster.decode_client.admit(make_request("b", prompt(5))))
        async with asyncio.timeout(WAIT_S):
            while (await cluster.decode_client.stats()).waiting < 2:
                await asyncio.sleep(0.005)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.decode_client.abort("a")
        await cluster.idle()
        assert "b" not in cluster.router.received


async def test_a_grant_without_kv_expires_with_an_error_event() -> None:
    async with running_cluster(lease_s=0.2) as cluster:
        await cluster.decode_client.admit(make_request("a", prompt(5)))
        last = (await cluster.router.end_of("a"))[-1]
        assert last.error is not None and last.error.status == 504 and "lease" in last.error.message
        assert (await cluster.decode_client.stats()).leases_expired == 1


async def test_a_deadline_ends_a_running_request_at_decode() -> None:
    async with running_cluster() as cluster:
        request = make_request("a", prompt(5), max_tokens=2000, deadline_s=0.3)
        await cluster.start(request)
        last = (await cluster.router.end_of("a"))[-1]
        assert last.error is not None and last.error.status == 504


async def test_each_router_hears_only_of_its_own_requests() -> None:
    async with running_cluster() as cluster:
        other = Router(cluster.decode_client, "other")
        await cluster.start(make_request("a", prompt(5)))
        await cluster.start(make_request("b", prompt(5), router="other"))
        await cluster.router.end_of("a")
        await other.end_of("b")
        assert set(cluster.router.received) == {"a"} and set(other.received) == {"b"}
        await other.close()


async def test_a_router_that_is_gone_for_the_grace_time_loses_its_requests() -> None:
    async with running_cluster(router_grace_s=0.1) as cluster:
        other = Router(cluster.decode_client, "other")
        await cluster.start(make_request("a", prompt(5), max_tokens=2000, router="other"))
        await other.until("a", 1)
        await other.close()
        await cluster.idle()
        assert (await cluster.decode_client.stats()).requests_aborted == 1


async def test_a_request_of_a_router_that_never_connects_ends_after_the_grace_time() -> None:
    async with running_cluster(router_grace_s=0.1) as cluster:
        await cluster.decode_client.admit(make_request("a", prompt(5), router="ghost"))
        await cluster.idle()


async def test_a_router_that_reconnects_starts_clean_and_new_requests_survive() -> None:
    async with running_cluster() as cluster:
        first = Router(cluster.decode_client, "x")
        await cluster.start(make_request("old", prompt(5), max_tokens=2000, router="x"))
        await first.until("old", 1)
        await first.close()
        async with asyncio.timeout(WAIT_S):
            while (await cluster.decode_client.stats()).routers > 1:
                await asyncio.sleep(0.005)
        new = make_request("new", prompt(6), router="x")
        await cluster.start(new)
        second = Router(cluster.decode_client, "x")
        assert tokens_of(await second.end_of("new")) == oracle_tokens(new.prompt_ids, new.sampling)
        await cluster.idle()
        await second.close()


async def test_a_second_stream_of_one_router_replaces_the_first() -> None:
    async with running_cluster() as cluster:
        await cluster.start(make_request("a", prompt(5), max_tokens=3))
        await cluster.router.end_of("a")
        second = Router(cluster.decode_client, "r")
        error = await cluster.router.lost()
        assert isinstance(error, RequestError) and error.code == "stream_replaced"
        request = make_request("b", prompt(5))
        await cluster.start(request)
        assert tokens_of(await second.end_of("b")) == oracle_tokens(request.prompt_ids, request.sampling)
        await second.close()


async def test_a_stopping_decode_worker_ends_every_request_and_then_the_stream() -> None:
    async with running_cluster() as cluster:
        await cluster.start(make_request("a", prompt(5), max_tokens=2000))
        await cluster.router.until("a", 1)
        await cluster.decode.stop()
        last = (await cluster.router.end_of("a"))[-1]
        assert last.error is not None and last.error.code == "worker_stopping"
        await cluster.router.lost()
        with pytest.raises(WorkerUnavailable):
            await cluster.decode_client.admit(make_request("b", prompt(5)))
        with pytest.raises(WorkerUnavailable):
            await cluster.decode_client.stats()


async def test_experts_are_given_back_after_the_last_step_of_a_stopping_worker() -> None:
    """What is shared ends while the engine can still leave a peer; memory goes when nothing reads it any more."""

    class Experts:
        note = ""

        def __init__(self) -> None:
            self.events: list[str] = []
            self.loop: EngineLoop | None = None

        def stats_fields(self) -> dict[str, object]:
            return {}

        def start_sharing(self, call: object) -> None:
            self.events.append("shared")

        def stop_sharing(self) -> None:
            assert self.loop is not None and self.loop.alive
            self.events.append("apart")

        def close(self) -> None:
            assert self.loop is not None and self.loop.has_ended
            self.events.append("closed")

    engine, experts = fake_engine(), Experts()
    engine.experts = experts
    async with running_cluster(decode_engine=engine) as cluster:
        experts.loop = cluster.decode.worker.loop
    assert experts.events == ["shared", "apart", "closed"]


async def test_closing_a_client_ends_its_stream_and_calls_as_unavailable() -> None:
    async with running_cluster(router_grace_s=0.1) as cluster:
        client = WorkerClient("d", WorkerRole.DECODE, cluster.decode.address)
        router = Router(client, "y")
        await client.stats()
        await client.close()
        assert isinstance(await router.lost(), WorkerUnavailable)
        with pytest.raises(WorkerUnavailable):
            await client.stats()


async def test_a_port_that_is_taken_is_an_os_error() -> None:
    async with running_cluster() as cluster:
        port = int(cluster.decode.address.rpartition(":")[2])
        with pytest.raises(OSError, match=str(port)):
            async with running_cluster(port=port):
                pass


async def test_a_reader_that_is_cancelled_while_its_stream_opens_ends() -> None:
    """Whenever it happens, the very moment of the answer too: a cancellation lost there leaves it reading for ever."""
    async with running_cluster() as cluster:
        for turn in range(300):
            router = Router(cluster.decode_client, router_id=f"r{turn}")
            for _ in range(turn % 40):
                await asyncio.sleep(0)
            async with asyncio.timeout(WAIT_S):
                await router.close()
