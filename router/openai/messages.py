"""OpenAI messages and tools to the neutral ones: roles, content parts, past tool calls, tool choice."""

from __future__ import annotations

from typing import Any

from router.chat.request import ChatMessage, PastToolCall, Role, ToolChoice, ToolSpec
from router.errors import bad_request
from router.openai.fields import Fields

_ROLES = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
    "latest_reminder": Role.LATEST_REMINDER,
}
# Source: the recipe's own conversion joins the text parts of one message like this.
_PART_SEPARATOR = "\n\n"


def parse_messages(fields: Fields) -> tuple[ChatMessage, ...]:
    """The conversation; at least one message."""
    items = fields.items("messages")
    if not items:
        raise bad_request("messages", "messages: expected at least one message.")
    return tuple(_message(Fields(item, f"messages[{index}]")) for index, item in enumerate(items))


def parse_tools(fields: Fields) -> tuple[ToolSpec, ...]:
    """The functions on offer."""
    tools = []
    for index, item in enumerate(fields.items("tools", [])):
        tool = Fields(item, f"tools[{index}]")
        tool.choice("type", ("function",), "function")
        function = tool.fields("function")
        if function is None:
            raise bad_request(tool.path("function"), f"Missing required parameter: '{tool.path('function')}'.")
        parameters = function.fields("parameters")
        tools.append(
            ToolSpec(
                name=_name(function),
                description=function.text("description", None),
                parameters=None if parameters is None else function.raw("parameters"),
                strict=function.flag("strict", None),
            )
        )
    return tuple(tools)


def parse_tool_choice(fields: Fields, tools: tuple[ToolSpec, ...]) -> tuple[ToolChoice, tuple[ToolSpec, ...]]:
    """The choice, and the tools it leaves: naming one function offers only that one and requires a call."""
    value = fields.raw("tool_choice")
    if value is None:
        return ToolChoice.AUTO, tools
    if isinstance(value, str):
        choice = ToolChoice(fields.choice("tool_choice", tuple(item.value for item in ToolChoice)))
        if choice is ToolChoice.REQUIRED and not tools:
            raise bad_request("tool_choice", "tool_choice 'required' needs at least one tool.")
        return choice, tools
    named = Fields(value, "tool_choice")
    named.choice("type", ("function",))
    function = named.fields("function")
    name = _name(function) if function is not None else _name(named)
    chosen = tuple(tool for tool in tools if tool.name == name)
    if not chosen:
        raise bad_request("tool_choice", f"tool_choice names {name[:80]!r}, which is not among the tools.")
    return ToolChoice.REQUIRED, chosen


def _message(fields: Fields) -> ChatMessage:
    role = _ROLES[fields.choice("role", tuple(_ROLES))]
    calls = _past_calls(fields) if role is Role.ASSISTANT else ()
    content = _content(fields)
    if content is None and not calls and role is not Role.ASSISTANT:
        raise bad_request(fields.path("content"), f"Missing required parameter: '{fields.path('content')}'.")
    reasoning = fields.text("reasoning_content", None) if role is Role.ASSISTANT else None
    if role is Role.ASSISTANT and reasoning is None:
        reasoning = fields.text("reasoning", None)
    return ChatMessage(
        role=role,
        content=content or "",
        reasoning=reasoning,
        tool_calls=calls,
        tool_call_id=fields.text("tool_call_id") if role is Role.TOOL else None,
        prefix=role is Role.ASSISTANT and fields.flag("prefix"),
    )


def _content(fields: Fields) -> str | None:
    value = fields.raw("content")
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise fields.wrong("content", "a string or a list of text parts")
    texts: list[str] = []
    for index, item in enumerate(value):
        part = Fields(item, f"{fields.path('content')}[{index}]")
        kind = part.choice("type", ("text", "refusal"))
        texts.append(part.text(kind))
    return _PART_SEPARATOR.join(texts)


def _past_calls(fields: Fields) -> tuple[PastToolCall, ...]:
    calls = []
    for index, item in enumerate(fields.items("tool_calls", [])):
        call = Fields(item, f"{fields.path('tool_calls')}[{index}]")
        function: Any = call.fields("function")
        if function is None:
            raise bad_request(call.path("function"), f"Missing required parameter: '{call.path('function')}'.")
        calls.append(PastToolCall(call.text("id", ""), _name(function), function.text("arguments", "{}")))
    return tuple(calls)


def _name(fields: Fields) -> str:
    name: str = fields.text("name")
    if not name or len(name) > 256:
        raise bad_request(fields.path("name"), f"{fields.path('name')}: expected 1 to 256 characters.")
    return name
