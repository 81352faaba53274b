"""Whole and streamed answers, as JSON."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from router.chat.tokenizer import EOS
from tests.router.conftest import MODEL, Rig
from tests.support.fake_backends import Script, until
from workers.messages import FinishReason

TOOL_CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="a" string="false">1</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def choices_of(lines: list[str]) -> list[dict[str, Any]]:
    return [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]


async def test_answer_separates_reasoning_from_content(make_rig, say):
    rig: Rig = await make_rig(say("7 plus 5</think>\n\ntwelve" + EOS))
    body = await rig.chat()
    message = body["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "twelve", "refusal": None, "reasoning_content": "7 plus 5"}
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["choices"][0]["logprobs"] is None
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL


async def test_stream_concatenates_to_the_whole_answer(make_rig, say):
    rig: Rig = await make_rig(say("the answer</think>hello é 你好 🎉 world" + EOS))
    whole = (await rig.chat())["choices"][0]["message"]
    lines = await rig.stream()
    assert lines[-1] == "[DONE]"
    chunks = [json.loads(line) for line in lines[:-1]]
    assert all({"id", "object", "created", "model", "choices"} <= set(chunk) for chunk in chunks)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all({"index", "delta", "finish_reason", "logprobs"} <= set(choice) for choice in choices)
    deltas = [choice["delta"] for choice in choices]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["content"] == "hello é 你好 🎉 world"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == whole["reasoning_content"]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["stop"]
    assert choices[-1]["finish_reason"] == "stop"
    assert not any("�" in line for line in lines)
    assert all(line.isascii() for line in lines)


async def test_usage_counts_prompt_output_cached_and_reasoning_tokens(make_rig, say, tokenizer):
    rig: Rig = await make_rig(say("hello</think>world" + EOS))
    rig.prefill[0].cached_tokens = 3
    usage = (await rig.chat())["usage"]
    num_output = len(tokenizer.encode_raw("hello</think>world" + EOS, add_bos=False))
    num_prompt = len(rig.decode[0].admitted[0].prompt_ids)
    assert usage == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": len(tokenizer.encode_raw("hello", add_bos=False))},
    }


async def test_usage_chunk_comes_last_and_without_choices_only_when_asked_for(make_rig, say):
    rig: Rig = await make_rig(say("x</think>hello"))
    with_usage = [json.loads(line) for line in (await rig.stream(stream_options={"include_usage": True}))[:-1]]
    assert with_usage[-1]["choices"] == []
    assert with_usage[-1]["usage"]["completion_tokens"] > 0
    assert all(chunk["usage"] is None for chunk in with_usage[:-1])
    for options in ({}, {"include_usage": False}, None):
        chunks = [json.loads(line) for line in (await rig.stream(stream_options=options))[:-1]]
        assert all(chunk["choices"] for chunk in chunks)
        assert not any(chunk.get("usage") for chunk in chunks)


async def test_continuous_usage_grows_with_every_chunk(make_rig, say):
    rig: Rig = await make_rig(say("</think>hello world"))
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [json.loads(line) for line in (await rig.stream(stream_options=options))[:-1]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] > counts[1] > 0


async def test_length_limit_is_reported_as_such(make_rig, say):
    rig: Rig = await make_rig(say("never ends", FinishReason.LENGTH))
    choice = (await rig.chat(max_tokens=5))["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == ""
    assert choice["message"]["reasoning_content"] == "never ends"


async def test_tool_call_is_structured_whole_and_streamed(make_rig, say):
    rig: Rig = await make_rig(say("need f</think>" + TOOL_CALL + EOS))
    choice = (await rig.chat(tools=TOOLS))["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "f" and json.loads(call["function"]["arguments"]) == {"a": 1}
    choices = choices_of(await rig.stream(tools=TOOLS))
    pieces = [piece for item in choices for piece in item["delta"].get("tool_calls", [])]
    assert json.loads("".join(piece["function"].get("arguments", "") for piece in pieces)) == {"a": 1}
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_stop_string_across_tokens_aborts_the_worker(make_rig, say, tokenizer):
    rig: Rig = await make_rig(say("</think>one, two, three", FinishReason.LENGTH), manual=True)
    decode = rig.decode[0]
    pending = asyncio.create_task(rig.chat(stop=["o, t"]))
    request = await decode.granted()
    for token in tokenizer.encode_raw("</think>one, two, three", add_bos=False):
        decode.emit(request.request_id, (token,))
    choice = (await pending)["choices"][0]
    assert choice["message"]["content"] == "one, tw"
    assert choice["finish_reason"] == "stop"
    await until(lambda: decode.aborted == [request.request_id])


async def test_several_choices_differ_by_seed_and_share_the_prompt_count(make_rig, tokenizer):
    def by_seed(request: Any) -> Script:
        return Script(tuple(tokenizer.encode_raw(f"</think>{request.sampling.seed}", add_bos=False)))

    rig: Rig = await make_rig(by_seed)
    body = await rig.chat(n=3, seed=7)
    assert [choice["message"]["content"] for choice in body["choices"]] == ["7", "8", "9"]
    assert body["usage"]["prompt_tokens"] == len(rig.decode[0].admitted[0].prompt_ids)
    streamed = choices_of(await rig.stream(n=3, seed=7))
    for index in range(3):
        mine = [choice for choice in streamed if choice["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in mine) == str(7 + index)
        assert sum(choice["finish_reason"] is not None for choice in mine) == 1


async def test_an_unset_seed_is_drawn_once_per_request(make_rig, say):
    rig: Rig = await make_rig(say("</think>a"))
    await rig.chat()
    await rig.chat()
    first, second = (request.sampling.seed for request in rig.decode[0].admitted)
    assert first is not None and second is not None and first != second


async def test_logprobs_have_content_and_refusal(make_rig, say):
    rig: Rig = await make_rig(say("r</think>hello" + EOS))
    logprobs = (await rig.chat(logprobs=True, top_logprobs=2))["choices"][0]["logprobs"]
    assert set(logprobs) == {"content", "refusal", "reasoning_content"}
    assert logprobs["refusal"] is None
    assert "".join(entry["token"] for entry in logprobs["content"]) == "hello"
    assert all(set(entry) == {"token", "logprob", "bytes", "top_logprobs"} for entry in logprobs["content"])
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs["content"])
    streamed = [c["logprobs"] for c in choices_of(await rig.stream(logprobs=True)) if c["logprobs"]]
    assert all({"content", "refusal"} <= set(item) for item in streamed)
    assert "".join(entry["token"] for item in streamed for entry in item["content"] or ()) == "hello"


async def test_thinking_switches_reach_the_prompt(make_rig, say, tokenizer):
    rig: Rig = await make_rig(say("hello"))
    off: list[dict[str, Any]] = [
        {"chat_template_kwargs": {"thinking": False}},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"enable_thinking": False},
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
    ]
    on: list[dict[str, Any]] = [{}, {"thinking": {"type": "enabled"}}, {"reasoning_effort": "low"}]
    for fields in off + on:
        message = (await rig.chat(**fields))["choices"][0]["message"]
        ends_with_end = rig.decode[0].admitted[-1].prompt_ids[-1] == tokenizer.marker_ids["</think>"]
        assert ends_with_end == (fields in off), fields
        assert message["content"] == ("hello" if fields in off else "")


async def test_text_completions_take_every_form_of_prompt(make_rig, say, tokenizer):
    rig: Rig = await make_rig(say(" world" + EOS))
    ids = tokenizer.encode_raw("hello")
    for prompt, expected in [("hello", 1), (["hello", "hello"], 2), (ids, 1), ([ids, ids], 2)]:
        async with rig.post("/v1/completions", json={"model": MODEL, "prompt": prompt, "max_tokens": 4}) as response:
            body = await response.json()
        assert response.status == 200, body
        assert [choice["text"] for choice in body["choices"]] == [" world"] * expected
        assert body["object"] == "text_completion"
        assert list(rig.decode[0].admitted[-1].prompt_ids) == ids
    async with rig.post(
        "/v1/completions", json={"model": MODEL, "prompt": "hello", "echo": True, "stream": True, "logprobs": None}
    ) as response:
        text = await response.text()
    lines = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    assert "".join(choice["text"] for choice in choices_of(lines)) == "hello world"


async def test_text_completion_logprobs_are_columns(make_rig, say):
    rig: Rig = await make_rig(say("ab" + EOS))
    async with rig.post("/v1/completions", json={"model": MODEL, "prompt": "x", "logprobs": 1}) as response:
        logprobs = (await response.json())["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["a", "b"]
    assert logprobs["token_logprobs"] == [-0.25, -0.25]
    assert logprobs["text_offset"] == [0, 1]


async def test_a_stop_token_id_has_no_text(make_rig, tokenizer):
    a, b = tokenizer.encode_raw("a", add_bos=False) + tokenizer.encode_raw("b", add_bos=False)
    rig: Rig = await make_rig(lambda request: Script((a, b)))
    body = await rig.chat(stop_token_ids=[b], thinking={"type": "disabled"})
    assert body["choices"][0]["message"]["content"] == "a"
    assert body["usage"]["completion_tokens"] == 2
