"""What /metrics tells."""

from __future__ import annotations

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from tests.router.conftest import Rig, chat_body
from tests.support.fake_backends import until
from workers.errors import RequestError


async def samples(rig: Rig) -> dict[str, float]:
    """Every sample by name and labels."""
    async with rig.session.get(rig.url + "/metrics") as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain")
        text = await response.text()
    return {
        sample.name
        + "".join(
            f"|{value}" for _, value in sorted(sample.labels.items()) if sample.name[-6:] != "bucket"
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_requests_tokens_and_latencies_are_counted(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello world"))
    rig.prefill[0].cached_tokens = 2
    usage = (await rig.chat())["usage"]
    await rig.stream()
    await rig.refused(400, json={})
    found = await samples(rig)
    assert found["dsv4_router_requests_total|/v1/chat/completions|200"] == 2
    assert found["dsv4_router_requests_total|/v1/chat/completions|400"] == 1
    assert found["dsv4_router_prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert found["dsv4_router_output_tokens_total"] == 2 * usage["completion_tokens"]
    assert found["dsv4_router_cached_tokens_total"] == 4
    assert found["dsv4_router_time_to_first_token_seconds_count"] == 2
    assert found["dsv4_router_inter_token_latency_seconds_count"] == 2 * (usage["completion_tokens"] - 1)
    assert found["dsv4_router_e2e_request_latency_seconds_count"] == 2
    assert found["dsv4_router_choices_finished_total|stop"] == 2
    assert found["dsv4_router_active_requests"] == 0
    assert found["dsv4_router_workers_reachable|decode"] == 1


async def test_retries_and_disconnects_are_counted(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello"))
    rig.prefill[0].errors.append(RequestError("once"))
    await rig.chat()
    assert (await samples(rig))["dsv4_router_retries_total|internal_error"] == 1
    rig.decode[0].manual = True
    pending = asyncio.create_task(rig.session.post(rig.url + "/v1/chat/completions", json=chat_body()))
    await rig.decode[0].granted(2)
    assert (await samples(rig))["dsv4_router_active_requests"] == 1
    pending.cancel()
    await until(lambda: rig.leaks() == {})
    found = await samples(rig)
    assert found["dsv4_router_client_disconnects_total"] == 1
    assert found["dsv4_router_requests_total|/v1/chat/completions|499"] == 1
    assert found["dsv4_router_active_requests"] == 0


async def test_the_clusters_series_are_appended(make_rig, say):
    async def extra() -> str:
        return "# HELP dsv4_kv_bytes KV.\n# TYPE dsv4_kv_bytes gauge\ndsv4_kv_bytes 7.0\n"

    rig: Rig = await make_rig(say("x"), extra_metrics=extra)
    assert (await samples(rig))["dsv4_kv_bytes"] == 7


async def test_two_routers_in_one_process_count_apart(make_rig, say):
    first: Rig = await make_rig(say("</think>x"))
    second: Rig = await make_rig(say("</think>x"))
    await first.chat()
    assert (await samples(first))["dsv4_router_e2e_request_latency_seconds_count"] == 1
    assert (await samples(second))["dsv4_router_e2e_request_latency_seconds_count"] == 0
