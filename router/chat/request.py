"""The neutral request: what any HTTP dialect must be turned into, and what encoding, lifecycle and parsing work from.

Owns: the frozen values. Does not own: field names and limits of a dialect (`router/openai/schema.py`), token ids.
Another dialect (Responses, Anthropic Messages) is one more parser into `ChatRequest` and one more
`router.answer.Renderer`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from workers.messages import SamplingParams


class Role(Enum):
    """Who speaks. Developer messages are system messages."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"
    LATEST_REMINDER = "latest_reminder"


class ToolChoice(Enum):
    """Whether the answer may, must not or must call a tool."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"


class AnswerFormat(Enum):
    """What the prompt asks the answer to look like; nothing enforces it."""

    TEXT = "text"
    JSON_OBJECT = "json_object"
    JSON_SCHEMA = "json_schema"


@dataclass(frozen=True, slots=True)
class PastToolCall:
    """A call the assistant made earlier. `arguments` should be the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One message of the conversation, text only."""

    role: Role
    content: str
    reasoning: str | None = None
    tool_calls: tuple[PastToolCall, ...] = ()
    tool_call_id: str | None = None
    prefix: bool = False
    """The answer continues this (last, assistant) message."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A function the model may call. `parameters` is its JSON Schema."""

    name: str
    description: str | None
    parameters: Any
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling as asked for: `None` where the model's default applies. Ranges are checked by the dialect."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()

    def to_params(self, *, max_tokens: int, temperature: float, top_p: float) -> SamplingParams:
        """The workers' form; the arguments are the resolved budget and the model's defaults.

        A seed is drawn when none is given, so that every attempt at one choice samples alike.
        """
        asked_top_p = top_p if self.top_p is None else self.top_p
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            # The OpenAI API allows 0: the smallest nucleus, which is the best token.
            top_p=asked_top_p or 1.0,
            top_k=self.top_k if asked_top_p else 1,
            min_p=self.min_p,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            logprobs=self.logprobs,
            logit_bias=self.logit_bias,
        )


def for_choice(params: SamplingParams, choice: int) -> SamplingParams:
    """Sampling of the `choice`-th answer of one request: seeds count up, so that choices differ reproducibly."""
    if choice == 0 or params.seed is None:
        return params
    return replace(params, seed=(params.seed + choice) & (2**63 - 1))


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One validated conversation to answer."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolSpec, ...] = ()
    tool_choice: ToolChoice = ToolChoice.AUTO
    thinking: bool | None = None
    """None: the model's default."""
    effort: str | None = None
    """minimal, low, medium, high, xhigh or max."""
    answer_format: AnswerFormat = AnswerFormat.TEXT
    answer_schema: Any = None
    """JSON Schema, for `AnswerFormat.JSON_SCHEMA`."""
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    """Strings that end the answer's content (not its reasoning); not part of it."""
    num_choices: int = 1
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TextRequest:
    """Raw prompts to continue, without any template."""

    prompts: tuple[str | tuple[int, ...], ...]
    """Text (whose special markers are markers) or token ids."""
    echo: bool = False
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    num_choices: int = 1
    """Answers a prompt."""
    priority: int = 0
