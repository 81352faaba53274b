"""Output tokens to deltas: sections, tool calls, stop strings, whatever the grouping of tokens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat.encoding import ChatEncoder
from router.chat.parsing import ChatParser, Delta, RawParser, StopStrings
from router.chat.request import AnswerFormat, ChatMessage, ChatRequest, Role, ToolChoice, ToolSpec
from router.chat.tokenizer import EOS, ChatTokenizer
from router.model_info import ModelInfo
from tests.support.chat_tokenizer import tokenizer_json
from workers.messages import FinishReason, TokenLogprob

MODEL = ModelInfo(name="m", max_context=4096, vocab_size=350)
TOKENIZER = ChatTokenizer(tokenizer_json())
HELLO = (ChatMessage(Role.USER, "Hello"),)
TOOLS = (ToolSpec("f", None, None),)
CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">'
    '\n<｜DSML｜parameter name="a" string="true">x "y"\nz</｜DSML｜parameter>'
    '\n<｜DSML｜parameter name="n" string="false">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


def parser_for(request: ChatRequest) -> ChatParser:
    return ChatParser(TOKENIZER, request, ChatEncoder(TOKENIZER, MODEL).encode(request))


def run(
    request: ChatRequest, text: str, *, widths: list[int] | None = None, finish: FinishReason = FinishReason.STOP
) -> tuple[ChatParser, list[Delta]]:
    parser = parser_for(request)
    ids = TOKENIZER.encode_raw(text, add_bos=False)
    deltas: list[Delta] = []
    widths = widths or [1]
    at = turn = 0
    while at < len(ids) and not parser.stopped:
        width = widths[turn % len(widths)]
        deltas += parser.push(tuple(ids[at : at + width]), None)
        at, turn = at + width, turn + 1
    if not parser.stopped:
        deltas += parser.finish(finish)
    return parser, deltas


def joined(deltas: list[Delta]) -> tuple[str, str, str]:
    arguments = "".join(call["function"].get("arguments", "") for delta in deltas for call in delta.tool_calls or ())
    return "".join(d.reasoning for d in deltas), "".join(d.content for d in deltas), arguments


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_grouping_of_tokens_does_not_change_the_answer(widths: list[int]):
    text = "so a < b </ x</think>\n\nThe <b>answer</b> is 你好 🎉\n\n<x" + CALL
    parser, deltas = run(ChatRequest(HELLO, tools=TOOLS), text, widths=widths)
    reasoning, content, arguments = joined(deltas)
    assert reasoning == "so a < b </ x"
    assert content == "The <b>answer</b> is 你好 🎉\n\n<x"
    assert json.loads(arguments) == {"a": 'x "y"\nz', "n": [1, 2]}
    assert parser.finish_reason == "tool_calls"


def test_nothing_of_a_tool_block_leaks_before_it_is_decided():
    parser = parser_for(ChatRequest(HELLO, tools=TOOLS, thinking=False))
    seen = ""
    for piece in ("a", "\n", "\n", "<"):
        for delta in parser.push(tuple(TOKENIZER.encode_raw(piece, add_bos=False)), None):
            seen += delta.content
    assert seen == "a"
    deltas = parser.push(tuple(TOKENIZER.encode_raw("b>", add_bos=False)), None)
    assert "".join(delta.content for delta in deltas) == "\n\n<b>"


def test_only_the_marker_token_ends_the_reasoning():
    parser = parser_for(ChatRequest(HELLO))
    spelled = [token for piece in ("</", "think", ">") for token in TOKENIZER.encode_raw(piece, add_bos=False)]
    deltas = [delta for token in spelled for delta in parser.push((token,), None)]
    assert joined(deltas) == ("</think>", "", "")


def test_unclosed_reasoning_stays_reasoning():
    parser, deltas = run(ChatRequest(HELLO), "thinking on", finish=FinishReason.LENGTH)
    assert joined(deltas) == ("thinking on", "", "")
    assert parser.finish_reason == "length"
    assert parser.reasoning_tokens == len(TOKENIZER.encode_raw("thinking on", add_bos=False))


def test_reasoning_tokens_are_none_without_thinking():
    parser, deltas = run(ChatRequest(HELLO, thinking=False), "hello" + EOS)
    assert joined(deltas) == ("", "hello", "")
    assert parser.reasoning_tokens is None


def test_tool_markup_is_text_when_no_tools_were_given():
    _, deltas = run(ChatRequest(HELLO, thinking=False), "see" + CALL)
    assert joined(deltas)[1] == "see" + CALL


def test_required_call_starts_inside_the_block():
    request = ChatRequest(HELLO, tools=TOOLS, tool_choice=ToolChoice.REQUIRED)
    parser, deltas = run(request, CALL.removeprefix("\n\n<｜DSML｜tool_calls>\n"))
    assert json.loads(joined(deltas)[2]) == {"a": 'x "y"\nz', "n": [1, 2]}
    assert parser.finish_reason == "tool_calls"


def test_tool_call_ids_and_names_come_once():
    _, deltas = run(ChatRequest(HELLO, tools=TOOLS, thinking=False), CALL)
    first, *others = [call for delta in deltas for call in delta.tool_calls or ()]
    assert first["id"] and first["type"] == "function" and first["function"]["name"] == "f"
    assert not any("id" in call for call in others)


def test_stop_string_ends_the_content_but_not_the_reasoning():
    request = ChatRequest(HELLO, stop=("world",))
    parser, deltas = run(request, "hello world</think>hello world and more")
    assert joined(deltas) == ("hello world", "hello ", "")
    assert parser.stopped and parser.finish_reason == "stop"


def test_half_a_character_at_the_length_limit_is_left_out():
    ids = TOKENIZER.encode_raw("a你", add_bos=False)
    parser = parser_for(ChatRequest(HELLO, thinking=False))
    deltas = parser.push(tuple(ids[:-1]), None) + parser.finish(FinishReason.LENGTH)
    assert joined(deltas)[1] == "a"


def test_logprobs_stay_with_their_section():
    parser = parser_for(ChatRequest(HELLO))
    content, reasoning = [], []
    for token in TOKENIZER.encode_raw("hello</think>world" + EOS, add_bos=False):
        for delta in parser.push((token,), (TokenLogprob(token, float("-inf"), ((token, -0.5),)),)):
            content += delta.content_logprobs or []
            reasoning += delta.reasoning_logprobs or []
    assert "".join(entry["token"] for entry in reasoning) == "hello"
    assert "".join(entry["token"] for entry in content) == "world"
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert content[0]["logprob"] == -9999.0
    assert content[0]["top_logprobs"][0]["logprob"] == -0.5


def test_json_answers_lose_their_fence():
    request = ChatRequest(HELLO, thinking=False, answer_format=AnswerFormat.JSON_OBJECT)
    _, deltas = run(request, 'sure:\n```json\n{"a": 1}\n```')
    assert json.loads(joined(deltas)[1]) == {"a": 1}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_stop_strings_agree_with_a_search_in_the_whole_text(stops: list[str], pieces: list[str]):
    finder = StopStrings(tuple(stops))
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = finder.push(piece)
        shown += text
        if stopped:
            break
    if not stopped:
        shown += finder.finish()
    whole = "".join(pieces)
    # The first match to complete wins: what was shown is the text before it, and a match was complete by then.
    if stopped:
        assert any(whole.startswith(shown + stop) for stop in stops)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == whole
        assert not any(stop in whole for stop in stops)


@pytest.mark.parametrize("finish", [FinishReason.STOP, FinishReason.LENGTH])
def test_raw_text_keeps_every_marker_it_may_show(finish: FinishReason):
    parser = RawParser(TOKENIZER, ())
    text = "\n\nhello</think> x ｜DSML｜"
    deltas = [d for token in TOKENIZER.encode_raw(text, add_bos=False) for d in parser.push((token,), None)]
    deltas += parser.finish(finish)
    assert "".join(delta.content for delta in deltas) == text
    assert parser.finish_reason == finish.value
