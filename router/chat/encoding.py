"""A validated conversation to prompt token ids, in the official V4 layout (rendered by deepseek-recipe).

Owns: which thinking mode and effort text a request gets. The recipe's own request conversion is not used: it resets
temperature and top_p when thinking, knows no top_k, min_p or penalties, and adds the effort paragraph of the 0731
release by default. Invariant: only markers that the template inserts become special tokens; marker spellings in the
client's text are encoded as plain text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV4Encoding,
    LatestReminderMessage,
    Message,
    RenderedPrompt,
    SystemMessage,
    ThinkingInitialStage,
    ToolCall,
    ToolDefinition,
    ToolMessage,
    UserMessage,
)

from router.chat.request import AnswerFormat, ChatMessage, ChatRequest, Role, ToolChoice
from router.chat.tokenizer import ChatTokenizer
from router.errors import bad_request
from router.model_info import EffortStyle, ModelInfo

# The recipe's names of the three effort texts, not the API's: low adds none, high "Absolute maximum", max "Beyond".
_Effort = Literal["low", "high", "max"]
_NO_TEXT: _Effort = "low"
_ABSOLUTE: _Effort = "high"
_BEYOND: _Effort = "max"
_EFFORT_TEXT: dict[EffortStyle, dict[str | None, _Effort]] = {
    EffortStyle.NONE: {},
    EffortStyle.PREVIEW: {"max": _ABSOLUTE},
    EffortStyle.REFRESH: {None: _ABSOLUTE, "medium": _ABSOLUTE, "high": _ABSOLUTE, "xhigh": _ABSOLUTE, "max": _BEYOND},
}
_EMPTY_SCHEMA = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Prompt ids, and where in an answer the model starts."""

    token_ids: tuple[int, ...]
    stage: ThinkingInitialStage | None
    """None: thinking is off."""
    starts_in_tool_calls: bool
    """The prompt opened the tool-call block."""


class ChatEncoder:
    """Encodes conversations for one model. Immutable."""

    def __init__(self, tokenizer: ChatTokenizer, model: ModelInfo) -> None:
        self._encoding = DeepseekV4Encoding().with_tokenizer(tokenizer.recipe)
        self._model = model

    def encode(self, request: ChatRequest) -> EncodedPrompt:
        """Token ids of the prompt. Raises `ApiError` 400 for a conversation the layout cannot express."""
        thinking = self._thinking(request)
        try:
            ids = self._encoding.encode(self._conversation(request, thinking=thinking))
        except (RecursionError, ValueError) as exc:
            # The recipe refuses what Rust's JSON cannot hold: schemas nested deeper than 128.
            raise bad_request(None, f"The conversation cannot be encoded: {exc}") from exc
        return EncodedPrompt(
            token_ids=tuple(ids),
            stage=_stage(request.messages[-1]) if thinking else None,
            starts_in_tool_calls=request.tool_choice is ToolChoice.REQUIRED,
        )

    def render(self, request: ChatRequest) -> RenderedPrompt:
        """The prompt as text with the ranges of its special tokens."""
        return self._encoding.render_conversation(self._conversation(request, thinking=self._thinking(request)))

    def _thinking(self, request: ChatRequest) -> bool:
        if request.tool_choice is not ToolChoice.REQUIRED:
            return self._model.default_thinking if request.thinking is None else request.thinking
        # A forced call opens the tool block in the prompt, which leaves no place to think.
        if request.thinking:
            raise bad_request("tool_choice", "A required tool call cannot be combined with thinking.")
        return False

    def _conversation(self, request: ChatRequest, *, thinking: bool) -> Conversation:
        _check_order(request.messages)
        offered = () if request.tool_choice is ToolChoice.NONE else request.tools
        return Conversation(
            [_message(message) for message in request.messages],
            thinking_mode=thinking,
            tools=[
                ToolDefinition(tool.name, tool.description, tool.parameters or _EMPTY_SCHEMA, tool.strict)
                for tool in offered
            ],
            tool_choice=request.tool_choice.value,
            reasoning_effort=_EFFORT_TEXT[self._model.effort].get(request.effort, _NO_TEXT),
            response_format="json_object" if request.answer_format is AnswerFormat.JSON_OBJECT else "text",
            response_schema=request.answer_schema if request.answer_format is AnswerFormat.JSON_SCHEMA else None,
        )


def _stage(last: ChatMessage) -> ThinkingInitialStage:
    if not last.prefix:
        return ThinkingInitialStage.ReasoningStart
    if last.reasoning and not last.content:
        return ThinkingInitialStage.ReasoningContinuation
    return ThinkingInitialStage.ContentContinuation


def _check_order(messages: tuple[ChatMessage, ...]) -> None:
    known_calls = False
    for index, message in enumerate(messages):
        if message.role is Role.TOOL and not known_calls:
            raise bad_request(
                f"messages[{index}].role", "A tool message must follow an assistant message with tool_calls."
            )
        known_calls = known_calls or bool(message.tool_calls)
        if message.prefix and index != len(messages) - 1:
            raise bad_request(f"messages[{index}].prefix", "Only the last message can be continued.")


def _message(message: ChatMessage) -> Message:
    match message.role:
        case Role.SYSTEM:
            return SystemMessage(message.content)
        case Role.USER:
            return UserMessage(message.content)
        case Role.TOOL:
            return ToolMessage(message.content, message.tool_call_id)
        case Role.LATEST_REMINDER:
            return LatestReminderMessage(message.content)
        case Role.ASSISTANT:
            calls = [ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls]
            return AssistantMessage(message.content, message.reasoning, calls or None, message.prefix)
