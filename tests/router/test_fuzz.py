"""Random garbage at the endpoints: every answer is a success or a complete 4xx error object, never a 5xx."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from tests.router.conftest import MODEL, Rig

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, 1e16, 1e308, 2**31, 2**63, 2**64, -(2**70), "", "a", "\ud800", "\x00", "日本", [],
    [[]], {}, {"type": "function"}, [None], [1, "a"], {"": None}, "x" * 3000, [{}] * 3, {"a": {"b": [{}]}}, "none",
    "<｜Assistant｜></think>", "enabled", {"type": "text", "text": 5},
    {"type": "json_schema", "json_schema": {"schema": {}}},
]  # fmt: skip
FIELDS = [
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "temperature", "top_p",
    "top_k", "min_p", "seed", "stop", "logprobs", "top_logprobs", "logit_bias", "tools", "tool_choice", "thinking",
    "enable_thinking", "chat_template_kwargs", "reasoning_effort", "reasoning", "response_format", "priority", "prompt",
    "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "echo",
    "suffix", "best_of", "user", "metadata", "unheard_of",
]  # fmt: skip
MESSAGE_FIELDS = ["role", "content", "tool_calls", "tool_call_id", "reasoning_content", "prefix", "name"]
ROLES = ["system", "developer", "user", "assistant", "tool", "latest_reminder"]


def any_value(rng: random.Random, depth: int = 0) -> Any:
    if depth < 3 and rng.random() < 0.25:
        return [any_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.2:
        return {rng.choice(FIELDS + MESSAGE_FIELDS + ["function", "name", "type"]): any_value(rng, depth + 1)}
    return rng.choice(ODD)


def any_message(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return any_value(rng)
    message: dict[str, Any] = {"role": rng.choice(ROLES), "content": rng.choice(["hi", "", None, [{"type": "text"}]])}
    if message["role"] == "tool":
        message["tool_call_id"] = "c"
    if message["role"] == "assistant" and rng.random() < 0.5:
        message["tool_calls"] = [{"id": "c", "function": {"name": "f", "arguments": rng.choice(["{}", "[", "", "5"])}}]
    if rng.random() < 0.3:
        message[rng.choice(MESSAGE_FIELDS)] = any_value(rng)
    return message


def any_body(rng: random.Random) -> Any:
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 4, "prompt": rng.choice(["hi", [5, 6], ["a", "b"]])}
    body["messages"] = [{"role": "user", "content": "hi"}]
    if rng.random() < 0.5:
        body["messages"] = [any_message(rng) for _ in range(rng.randrange(1, 4))]
    for name in rng.sample(FIELDS, rng.randrange(3)):
        body[name] = any_value(rng)
    return body


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
async def test_garbage_never_breaks_the_router(make_rig, say, seed: int, path: str):
    rig: Rig = await make_rig(say("</think>hi"))
    rng = random.Random(seed)
    statuses: dict[int, int] = {}
    for _ in range(250):
        raw = json.dumps(any_body(rng))
        async with rig.post(path, data=raw, headers={"Content-Type": "application/json"}) as response:
            text = await response.text()
        statuses[response.status] = statuses.get(response.status, 0) + 1
        assert response.status in (200, 400, 404), (raw, text)
        if response.status != 200:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}, raw
        else:
            assert "event: error" not in text, raw
    # Both outcomes must be frequent, or the generator tests nothing.
    assert statuses[200] > 25 and statuses[400] > 25, statuses
    assert rig.leaks() == {}
