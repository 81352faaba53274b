"""Whole and streamed chat answers, as JSON."""

from __future__ import annotations

import json


async def test_answer_separates_reasoning_from_content(make_rig, say):
    rig = await make_rig(say("7 plus 5</think>\n\ntwelve"))
    body = await rig.chat()
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "twelve", "refusal": None, "reasoning_content": "7 plus 5"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["object"] == "chat.completion"
    assert body["model"] == "dsv4-nano"


async def test_stream_concatenates_to_the_whole_answer(make_rig, say):
    rig = await make_rig(say("the answer</think>hello é 你好 🎉 world"))
    whole = (await rig.chat())["choices"][0]["message"]
    lines = await rig.stream()
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert all({"id", "object", "created", "model", "choices"} <= set(chunk) for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"] == "hello é 你好 🎉 world"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == whole["reasoning_content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert sum(chunk["choices"][0]["finish_reason"] is not None for chunk in chunks) == 1
    assert not any("�" in line for line in lines)
    assert all(line.isascii() for line in lines)
