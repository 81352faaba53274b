"""The official Python client, unchanged, against the router."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from router.chat.tokenizer import EOS
from tests.router.conftest import MODEL, Rig
from tests.router.test_answers import TOOL_CALL, TOOLS
from tests.support.fake_backends import until
from workers.errors import WorkerFull

HELLO: Any = [{"role": "user", "content": "hello"}]
ANSWER = "7 plus 5</think>hello 你好 world" + EOS


@pytest.fixture
async def clients() -> AsyncIterator[Any]:
    made: list[AsyncOpenAI] = []

    def client(rig: Rig, **kwargs: Any) -> AsyncOpenAI:
        made.append(AsyncOpenAI(base_url=rig.url + "/v1", api_key="any", **kwargs))
        return made[-1]

    yield client
    for item in made:
        await item.close()


async def test_create_whole_and_streamed(make_rig, say, clients):
    client = clients(await make_rig(say(ANSWER)))
    whole = await client.chat.completions.create(model=MODEL, messages=HELLO)
    assert whole.choices[0].message.content == "hello 你好 world"
    assert whole.choices[0].message.model_extra["reasoning_content"] == "7 plus 5"
    assert whole.usage.completion_tokens_details.reasoning_tokens > 0
    stream = await client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello 你好 world"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage


async def test_stream_helper_accumulates_the_same_message(make_rig, say, clients):
    client = clients(await make_rig(say(ANSWER)))
    async with client.chat.completions.stream(
        model=MODEL, messages=HELLO, logprobs=True, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "hello 你好 world"
    assert final.choices[0].finish_reason == "stop"
    assert b"".join(bytes(e.bytes) for e in final.choices[0].logprobs.content).decode() == "hello 你好 world"
    assert {"content.delta", "content.done", "chunk", "logprobs.content.delta"} <= kinds


async def test_stream_helper_assembles_tool_calls(make_rig, say, clients):
    client = clients(await make_rig(say("</think>" + TOOL_CALL + EOS)))
    async with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=TOOLS) as stream:
        kinds = {event.type async for event in stream}
        final = await stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls
    assert call.function.name == "f" and json.loads(call.function.arguments) == {"a": 1}
    assert final.choices[0].finish_reason == "tool_calls"
    assert "tool_calls.function.arguments.done" in kinds


async def test_a_tool_result_can_be_sent_back(make_rig, say, clients):
    rig: Rig = await make_rig(say("need</think>" + TOOL_CALL + EOS))
    client = clients(rig)
    first = (await client.chat.completions.create(model=MODEL, messages=HELLO, tools=TOOLS)).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "42 found"}
    await client.chat.completions.create(
        model=MODEL, messages=[*HELLO, first.model_dump(exclude_none=True), result], tools=TOOLS
    )
    prompt = b"".join(map(rig.tokenizer.token_bytes, rig.decode[0].admitted[-1].prompt_ids)).decode()
    assert "<tool_result>42 found</tool_result>" in prompt
    assert "<think>need</think>" in prompt


async def test_completions_and_models(make_rig, say, clients):
    client = clients(await make_rig(say(" world")))
    text = await client.completions.create(model=MODEL, prompt="hello", max_tokens=3)
    assert text.choices[0].text == " world"
    assert [model.id async for model in await client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL


async def test_errors_become_the_clients_classes(make_rig, say, clients):
    rig: Rig = await make_rig(say("x"), api_keys=("right",))
    with pytest.raises(openai.AuthenticationError):
        await clients(rig).models.list()
    client = AsyncOpenAI(base_url=rig.url + "/v1", api_key="right", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-9", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model=MODEL, messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    rig.decode[0].admit_errors.append(WorkerFull("full"))
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model=MODEL, messages=HELLO)
    await client.close()


async def test_the_client_waits_and_retries_when_workers_are_full(make_rig, say, clients):
    rig: Rig = await make_rig(say("</think>hello"))
    rig.decode[0].admit_errors.append(WorkerFull("full"))
    answer = await clients(rig, max_retries=1).chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "hello"


async def test_a_failure_in_mid_stream_raises(make_rig, say, clients):
    rig: Rig = await make_rig(say(""), manual=True)
    client = clients(rig, max_retries=0)
    opening = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, rig.tokenizer.encode_raw("hello", add_bos=False))
    stream = await opening
    rig.decode[0].break_stream()
    with pytest.raises(openai.APIError) as failure:
        async for _ in stream:
            pass
    assert failure.value.code == "worker_unavailable"


async def test_closing_a_stream_early_frees_the_workers(make_rig, say, clients):
    rig: Rig = await make_rig(say(""), manual=True)
    client = clients(rig)
    opening = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=HELLO, stream=True))
    request = await rig.decode[0].granted()
    rig.decode[0].emit(request.request_id, rig.tokenizer.encode_raw("hello", add_bos=False))
    await (await opening).close()
    await until(lambda: rig.decode[0].aborted == [request.request_id] and rig.leaks() == {})
