"""The router over the workers' real services and KV hand-off; only the model is a fake."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router.chat.tokenizer import ChatTokenizer, Detokenizer
from router.config import RouterConfig
from router.model_info import ModelInfo
from router.server import start_router
from tests.router.conftest import MODEL
from tests.workers.runtime.fake_model import oracle_tokens
from tests.workers.service.cluster import Cluster, running_cluster
from workers.messages import SamplingParams

PROMPT = list(range(20, 50))


@pytest.fixture
async def line(model_dir: Path) -> AsyncIterator[tuple[str, Cluster]]:
    """URL of a router, and its workers; both must be empty in the end."""
    async with running_cluster() as cluster:
        router = await start_router(
            RouterConfig(port=0, drain_s=0.0),
            [cluster.prefill_client],
            [cluster.decode_client],
            model_dir,
            ModelInfo.from_dir(model_dir, name=MODEL),
        )
        yield router.url, cluster
        await router.close()
        await cluster.idle()


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": PROMPT, "temperature": 0, "ignore_eos": True, **fields}


async def test_http_answers_are_what_the_model_computes(line: tuple[str, Cluster], tokenizer: ChatTokenizer):
    url, cluster = line
    expected = oracle_tokens(PROMPT, SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    async with aiohttp.ClientSession() as session:
        async with session.post(url + "/v1/completions", json=body(max_tokens=20)) as response:
            whole = await response.json()
        async with session.post(url + "/v1/completions", json=body(max_tokens=20, stream=True)) as response:
            lines = [line[6:] for line in (await response.text()).split("\n") if line.startswith("data: {")]
    assert whole["choices"][0]["text"] == Detokenizer(tokenizer).push(tuple(expected))
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == whole["choices"][0]["text"]
    assert whole["usage"]["completion_tokens"] == 20
    assert whole["choices"][0]["finish_reason"] == "length"
    stats = await cluster.decode_client.stats()
    assert stats.kv_bytes_received > 0 and stats.prefill_tokens == 0


async def test_a_client_that_leaves_frees_both_workers(line: tuple[str, Cluster]):
    url, cluster = line
    session = aiohttp.ClientSession()
    response = await session.post(url + "/v1/completions", json=body(max_tokens=1500, stream=True))
    await response.content.readline()
    response.close()
    async with asyncio.timeout(20):
        while (await cluster.decode_client.stats()).requests_aborted != 1:
            await asyncio.sleep(0.005)
    await session.close()


async def test_more_tokens_than_fit_is_a_clear_refusal(line: tuple[str, Cluster]):
    url, _ = line
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + "/v1/completions", json=body(max_tokens=5000)) as response,
    ):
        error = (await response.json())["error"]
    assert response.status == 400 and error["code"] == "context_length_exceeded"
