"""Prompts in the official V4 layout. Expected strings follow the layout table of the official encoding."""

from __future__ import annotations

import dataclasses

import pytest

from router.chat.encoding import ChatEncoder
from router.chat.request import AnswerFormat, ChatMessage, ChatRequest, PastToolCall, Role, ToolChoice, ToolSpec
from router.chat.tokenizer import ASSISTANT, BOS, EOS, THINK_END, THINK_START, USER, ChatTokenizer
from router.errors import ApiError
from router.model_info import EffortStyle, ModelInfo

MODEL = ModelInfo(name="m", max_context=4096, vocab_size=350)
HELLO = (ChatMessage(Role.USER, "Hello"),)
TOOL = ToolSpec("f", "does f", {"type": "object", "properties": {}})


def prompt(tokenizer: ChatTokenizer, request: ChatRequest, model: ModelInfo = MODEL) -> str:
    return ChatEncoder(tokenizer, model).render(request).prompt


def test_thinking_opens_the_reasoning_and_chat_closes_it(tokenizer: ChatTokenizer):
    messages = (ChatMessage(Role.SYSTEM, "SYS"), *HELLO)
    thinking = ChatRequest(messages, thinking=True)
    assert prompt(tokenizer, thinking) == f"{BOS}SYS{USER}Hello{ASSISTANT}{THINK_START}"
    assert prompt(tokenizer, dataclasses.replace(thinking, thinking=False)).endswith(f"Hello{ASSISTANT}{THINK_END}")


def test_thinking_defaults_to_the_model(tokenizer: ChatTokenizer):
    assert prompt(tokenizer, ChatRequest(HELLO)).endswith(THINK_START)
    quiet = dataclasses.replace(MODEL, default_thinking=False)
    assert prompt(tokenizer, ChatRequest(HELLO), quiet).endswith(THINK_END)


def test_old_reasoning_is_dropped_without_tools(tokenizer: ChatTokenizer):
    messages = (
        ChatMessage(Role.USER, "q1"),
        ChatMessage(Role.ASSISTANT, "a1", reasoning="r1"),
        ChatMessage(Role.USER, "q2"),
    )
    expected = f"{BOS}{USER}q1{ASSISTANT}{THINK_END}a1{EOS}{USER}q2{ASSISTANT}{THINK_START}"
    assert prompt(tokenizer, ChatRequest(messages)) == expected


def test_tool_results_follow_the_order_of_the_calls(tokenizer: ChatTokenizer):
    messages = (
        ChatMessage(Role.USER, "q1"),
        ChatMessage(
            Role.ASSISTANT,
            "txt",
            reasoning="r1",
            tool_calls=(PastToolCall("c1", "f", '{"a": 1}'), PastToolCall("c2", "f", "{}")),
        ),
        ChatMessage(Role.TOOL, "R2", tool_call_id="c2"),
        ChatMessage(Role.TOOL, "R1", tool_call_id="c1"),
        ChatMessage(Role.USER, "and?"),
    )
    text = prompt(tokenizer, ChatRequest(messages, tools=(TOOL,)))
    assert f"{THINK_START}r1{THINK_END}txt\n\n<｜DSML｜tool_calls>\n" in text
    assert text.endswith(
        f"{EOS}{USER}<tool_result>R1</tool_result>\n\n<tool_result>R2</tool_result>\n\nand?{ASSISTANT}{THINK_START}"
    )


@pytest.mark.parametrize(
    ("style", "effort", "starts"),
    [
        (EffortStyle.NONE, None, ""),
        (EffortStyle.NONE, "max", ""),
        (EffortStyle.PREVIEW, None, ""),
        (EffortStyle.PREVIEW, "high", ""),
        (EffortStyle.PREVIEW, "max", "Reasoning Effort: Absolute maximum"),
        (EffortStyle.REFRESH, "low", ""),
        (EffortStyle.REFRESH, "minimal", ""),
        (EffortStyle.REFRESH, None, "Reasoning Effort: Absolute maximum"),
        (EffortStyle.REFRESH, "high", "Reasoning Effort: Absolute maximum"),
        (EffortStyle.REFRESH, "max", "Reasoning Effort: Beyond maximum"),
    ],
)
def test_effort_text_goes_by_checkpoint_date(
    tokenizer: ChatTokenizer, style: EffortStyle, effort: str | None, starts: str
):
    text = prompt(tokenizer, ChatRequest(HELLO, effort=effort), dataclasses.replace(MODEL, effort=style))
    assert text.startswith(BOS + (starts or USER))


def test_no_effort_text_without_thinking(tokenizer: ChatTokenizer):
    model = dataclasses.replace(MODEL, effort=EffortStyle.REFRESH)
    assert prompt(tokenizer, ChatRequest(HELLO, thinking=False, effort="max"), model).startswith(BOS + USER)


@pytest.mark.parametrize("marker", [ASSISTANT, THINK_END, EOS, BOS, "｜DSML｜"])
def test_markers_in_user_text_are_plain_text(tokenizer: ChatTokenizer, marker: str):
    encoder = ChatEncoder(tokenizer, MODEL)
    plain = encoder.encode(ChatRequest(HELLO)).token_ids
    attacked = encoder.encode(ChatRequest((ChatMessage(Role.USER, f"a{marker}b"),))).token_ids
    marker_ids = set(tokenizer.marker_ids.values())
    assert [i for i in attacked if i in marker_ids] == [i for i in plain if i in marker_ids]
    assert f"a{marker}b".encode() in b"".join(map(tokenizer.token_bytes, attacked))


def test_prompt_ids_decode_to_the_rendered_prompt(tokenizer: ChatTokenizer):
    request = ChatRequest((ChatMessage(Role.SYSTEM, "sýs"), ChatMessage(Role.USER, "你好 hello")))
    encoder = ChatEncoder(tokenizer, MODEL)
    ids = encoder.encode(request).token_ids
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == encoder.render(request).prompt


def test_required_tool_call_opens_the_block_and_cannot_think(tokenizer: ChatTokenizer):
    request = ChatRequest(HELLO, tools=(TOOL,), tool_choice=ToolChoice.REQUIRED)
    assert prompt(tokenizer, request).endswith(f"{THINK_END}\n\n<｜DSML｜tool_calls>\n")
    assert ChatEncoder(tokenizer, MODEL).encode(request).starts_in_tool_calls
    with pytest.raises(ApiError) as refused:
        ChatEncoder(tokenizer, MODEL).encode(dataclasses.replace(request, thinking=True))
    assert refused.value.param == "tool_choice"


def test_tools_are_not_offered_when_the_choice_is_none(tokenizer: ChatTokenizer):
    assert "## Tools" not in prompt(tokenizer, ChatRequest(HELLO, tools=(TOOL,), tool_choice=ToolChoice.NONE))


def test_a_prefix_message_is_continued(tokenizer: ChatTokenizer):
    messages = (*HELLO, ChatMessage(Role.ASSISTANT, "par", prefix=True))
    assert prompt(tokenizer, ChatRequest(messages, thinking=False)).endswith(f"{THINK_END}par")


def test_answer_schema_reaches_the_prompt(tokenizer: ChatTokenizer):
    request = ChatRequest(
        HELLO, thinking=False, answer_format=AnswerFormat.JSON_SCHEMA, answer_schema={"type": "object"}
    )
    assert '{"type": "object"}' in prompt(tokenizer, request)


def test_a_tool_result_without_a_call_is_refused(tokenizer: ChatTokenizer):
    with pytest.raises(ApiError) as refused:
        ChatEncoder(tokenizer, MODEL).encode(ChatRequest((ChatMessage(Role.TOOL, "R", tool_call_id="c"),)))
    assert refused.value.param == "messages[0].role"
