"""What a client gets for a request that cannot be served: the status, and a complete OpenAI error object."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import pytest

from tests.router.conftest import MODEL, Rig, chat_body
from tests.support.chat_tokenizer import MAX_CONTEXT
from workers.errors import RequestTooLong, WorkerFull

HELLO = [{"role": "user", "content": "hello"}]

WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "hello"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [3]}, "messages[0]"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].role"),
    ({"model": 5}, "model"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 2_018_570_552_060}, "max_tokens"),
    ({"max_tokens": 1e16}, "max_tokens"),
    ({"max_completion_tokens": -1}, "max_completion_tokens"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"seed": 2**63}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 1]}, "stop"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"stop_token_ids": [-1]}, "stop_token_ids"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
    ({"thinking": {"type": "perhaps"}}, "thinking.type"),
    ({"thinking": "on"}, "thinking"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
]


@pytest.fixture
async def rig(make_rig, say) -> Rig:
    made: Rig = await make_rig(say("</think>hi"), api_keys=(), max_body_bytes=100_000)
    return made


async def test_every_wrong_field_is_named(rig: Rig):
    for fields, param in WRONG_FIELDS:
        error = await rig.refused(400, json=chat_body(**fields))
        assert error["param"] == param, (fields, error)
        assert error["type"] == "invalid_request_error"
    assert rig.decode[0].admitted == []


async def test_schemas_nested_too_deeply_are_refused(rig: Rig):
    schema: dict[str, Any] = {}
    for _ in range(300):
        schema = {"a": schema}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    await rig.refused(400, json=chat_body(tools=[tool]))
    wrapper = {"type": "json_schema", "json_schema": {"schema": schema}}
    await rig.refused(400, json=chat_body(response_format=wrapper, user="\ud800"))


async def test_missing_fields_are_named(rig: Rig):
    assert (await rig.refused(400, json={"messages": HELLO}))["param"] == "model"
    assert (await rig.refused(400, json={"model": MODEL}))["param"] == "messages"
    assert (await rig.refused(400, "/v1/completions", json={"model": MODEL}))["param"] == "prompt"


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], {"a": 1}, [-1], [1.5], [True], [10**6]])
async def test_wrong_prompts_are_refused(rig: Rig, prompt: Any):
    assert (await rig.refused(400, "/v1/completions", json={"model": MODEL, "prompt": prompt}))["param"]


@pytest.mark.parametrize(
    "data", [b"", b"{", b"nonsense", b"[" * 50_000, b'{"a": NaN}', b"\xff\xfe{}", b'{"a": ' + b"9" * 5000 + b"}"]
)
async def test_bodies_that_are_not_json_are_refused(rig: Rig, data: bytes):
    for path in ("/v1/chat/completions", "/v1/completions"):
        error = await rig.refused(400, path, data=data, headers={"Content-Type": "application/json"})
        assert error["code"] == "invalid_json"


@pytest.mark.parametrize("data", [b"null", b"[]", b"5", b'"text"'])
async def test_bodies_that_are_not_objects_are_refused(rig: Rig, data: bytes):
    await rig.refused(400, data=data, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"])
async def test_other_content_types_are_415(rig: Rig, kind: str):
    error = await rig.refused(415, data=json.dumps(chat_body()), headers={"Content-Type": kind})
    assert "application/json" in error["message"]


async def test_json_with_a_charset_is_accepted(rig: Rig):
    headers = {"Content-Type": "application/json; charset=utf-8"}
    async with rig.post("/v1/chat/completions", data=json.dumps(chat_body()), headers=headers) as response:
        assert response.status == 200


async def test_a_body_that_is_not_what_its_encoding_says_is_400(rig: Rig):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    async with rig.session.post(rig.url + "/v1/completions", data=b"no gzip", headers=headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "invalid_body"


async def test_a_huge_body_is_413(rig: Rig):
    await rig.refused(413, json=chat_body(user="x" * 200_000))


async def test_a_huge_body_without_a_length_is_413(rig: Rig):
    async def pieces():
        for _ in range(40):
            yield b'"' + b"x" * 10_000

    await rig.refused(413, data=pieces(), headers={"Content-Type": "application/json"})


async def test_unknown_model_is_404(rig: Rig):
    error = await rig.refused(404, json=chat_body(model="gpt-9"))
    assert error["code"] == "model_not_found" and error["param"] == "model"
    async with rig.session.get(rig.url + "/v1/models/gpt-9") as response:
        assert response.status == 404
        assert (await response.json())["error"]["code"] == "model_not_found"


async def test_paths_and_methods_that_do_not_exist_answer_in_json(rig: Rig):
    for path in ("/", "/server_info", "/get_model_info", "/v1/chat/completions/render", "/tokenize", "/v1/responses"):
        assert (await rig.refused(404, path, json={}))["code"] == "unknown_path"
    async with rig.session.get(rig.url + "/v1/chat/completions") as response:
        assert response.status == 405
        assert response.headers["Allow"] == "POST"
        assert (await response.json())["error"]["code"] == "method_not_allowed"


async def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(rig: Rig):
    error = await rig.refused(400, json=chat_body(messages=[{"role": "user", "content": "z" * (MAX_CONTEXT + 100)}]))
    assert error["code"] == "context_length_exceeded"
    assert str(MAX_CONTEXT) in error["message"]
    error = await rig.refused(400, json=chat_body(max_tokens=MAX_CONTEXT))
    assert error["code"] == "context_length_exceeded"


async def test_the_default_budget_shrinks_to_what_the_context_leaves(rig: Rig):
    await rig.chat(messages=[{"role": "user", "content": "z" * (MAX_CONTEXT - 50)}])
    request = rig.decode[0].admitted[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens == MAX_CONTEXT


async def test_a_worker_that_finds_the_request_too_long_is_believed(rig: Rig):
    rig.decode[0].admit_errors.append(RequestTooLong("needs 9 pages, the pool has 8"))
    error = await rig.refused(400, json=chat_body())
    assert error["code"] == "context_length_exceeded" and "9 pages" in error["message"]


async def test_full_workers_are_429_with_retry_after(rig: Rig):
    rig.decode[0].admit_errors.append(WorkerFull("no slot"))
    async with rig.post("/v1/chat/completions", json=chat_body()) as response:
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == "rate_limit_exceeded"


async def test_no_worker_is_503_with_retry_after(make_rig, say):
    rig: Rig = await make_rig(say("x"), num_prefill=0)
    async with rig.post("/v1/chat/completions", json=chat_body()) as response:
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert (await response.json())["error"]["code"] == "worker_unavailable"
    async with rig.session.get(rig.url + "/ready") as response:
        assert response.status == 503
        assert (await response.json())["workers"] == {"prefill": 0, "decode": 1}
    async with rig.session.get(rig.url + "/health") as response:
        assert response.status == 200


async def test_more_requests_than_allowed_are_429(make_rig, say):
    rig: Rig = await make_rig(say("</think>x"), manual=True, max_active_requests=1)
    pending = asyncio.create_task(rig.chat())
    request = await rig.decode[0].granted()
    assert (await rig.refused(429, json=chat_body()))["type"] == "rate_limit_error"
    rig.decode[0].play(request.request_id, rig.decode[0].script(request))
    await pending
    await asyncio.gather(*[rig.refused(400, json={})])


async def test_api_keys_are_checked_under_v1_only(make_rig, say):
    rig: Rig = await make_rig(say("</think>x"), api_keys=("secret", "other"))
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
    ):
        error = await rig.refused(401, json=chat_body(), headers=headers)
        assert error["code"] == "invalid_api_key"
    for key in ("secret", "other"):
        async with rig.post(
            "/v1/chat/completions", json=chat_body(), headers={"Authorization": f"Bearer {key}"}
        ) as response:
            assert response.status == 200
    for path in ("/health", "/ready", "/metrics"):
        async with rig.session.get(rig.url + path) as response:
            assert response.status == 200


async def test_unknown_fields_are_ignored_and_named_in_a_header(rig: Rig):
    body = chat_body(cache_salt="x", top_secret=1, user="me", **{"bad\nname": 1})
    async with rig.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200
        assert response.headers["X-Ignored-Fields"] == "cache_salt, top_secret"


async def test_request_ids_are_echoed_or_made(rig: Rig):
    async with rig.post("/v1/chat/completions", json=chat_body(), headers={"X-Request-ID": "abc-1"}) as response:
        assert response.headers["X-Request-ID"] == "abc-1"
    async with rig.post("/v1/chat/completions", json={}, headers={"X-Request-ID": "abc-2"}) as response:
        assert response.headers["X-Request-ID"] == "abc-2"
    async with rig.post("/v1/chat/completions", json=chat_body(), headers={"X-Request-ID": "x" * 500}) as response:
        assert len(response.headers["X-Request-ID"]) == 32
    async with rig.post("/v1/chat/completions", json=chat_body(stream=True)) as response:
        assert len(response.headers["X-Request-ID"]) == 32


async def test_what_clients_send_in_practice_is_accepted(rig: Rig, tokenizer):
    accepted: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]},
        {"messages": [{"role": "developer", "content": "be brief"}, *HELLO]},
        {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": None}, *HELLO]},
        {"max_completion_tokens": 7, "max_tokens": 5},
        {"max_tokens": 16.0},
        {"max_tokens": None, "temperature": None, "stop": None, "n": None, "tools": None, "logprobs": None},
        {"top_p": 0},
        {"top_k": -1},
        {"seed": -5},
        {"priority": 3, "min_tokens": 2, "ignore_eos": True, "repetition_penalty": 1.1, "min_p": 0.1},
        {"parallel_tool_calls": True, "logit_bias": {"5": -100}, "metadata": {}, "store": False},
        {"response_format": {"type": "text"}, "tool_choice": "none"},
        {"messages": [{"role": "user", "content": "cut \ud83d emoji"}]},
    ]
    for fields in accepted:
        await rig.chat(**fields)
    by_request = rig.decode[0].admitted
    assert by_request[3].sampling.max_tokens == 7
    assert by_request[4].sampling.max_tokens == 16
    assert (by_request[6].sampling.top_p, by_request[6].sampling.top_k) == (1.0, 1)
    assert by_request[9].priority == 3 and by_request[9].sampling.ignore_eos
    prompt = b"".join(map(tokenizer.token_bytes, by_request[-1].prompt_ids)).decode()
    assert "cut � emoji" in prompt


async def test_models_are_listed_and_single(rig: Rig):
    async with rig.session.get(rig.url + "/v1/models") as response:
        listed = await response.json()
    async with rig.session.get(f"{rig.url}/v1/models/{MODEL}") as response:
        one = await response.json()
    assert listed["object"] == "list" and listed["data"] == [one]
    assert {"id", "object", "created", "owned_by"} <= set(one) and one["id"] == MODEL


async def test_accepted_sockets_have_no_delay(rig: Rig):
    async with rig.session.get(rig.url + "/health") as response:
        await response.read()
    sockets = [
        transport.get_extra_info("socket")
        for server in rig.router._runner.server.connections
        if (transport := server.transport) is not None
    ]
    assert sockets
    assert all(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for sock in sockets)
