"""Output tokens to reasoning, content and tool calls, one event at a time.

Owns: `Delta` (the neutral piece of an answer), the chat parser over deepseek-recipe's stream processor, and the raw
parser with its stop strings. Both hold back what cannot be decided yet: half a character, a suffix that may become
`</think>`, a tool-call block or a stop string. Invariants: the concatenated deltas do not depend on how tokens were
grouped into events; after `stopped`, nothing more comes out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_recipe import (
    ChatCompletionChunkGenerator,
    ChatCompletionRequest,
    Conversation,
    ConversationRequest,
    InferenceChunk,
    InferenceFinishReason,
    ModelVersion,
    ParsingOptions,
    PromptUsage,
    StreamProcessor,
)

from router.chat.encoding import EncodedPrompt
from router.chat.request import AnswerFormat, ChatRequest, ToolChoice
from router.chat.tokenizer import ChatTokenizer, Detokenizer
from workers.messages import FinishReason, TokenLogprob

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot carry (vLLM's value)."""


@dataclass(slots=True)
class Delta:
    """What one or more tokens added to an answer."""

    content: str = ""
    reasoning: str = ""
    tool_calls: list[dict[str, Any]] | None = None
    """OpenAI's streamed form: index, and of id, type, function.name, function.arguments what is new."""
    content_logprobs: list[dict[str, Any]] | None = None
    """OpenAI's form: token, logprob, bytes, top_logprobs."""
    reasoning_logprobs: list[dict[str, Any]] | None = None
    output_tokens: int = 0
    """Output tokens of the whole answer so far, set by `router.answer`."""


class OutputParser(Protocol):
    """One choice's output, from tokens to deltas."""

    stopped: bool
    """A stop string ended the output; the worker has not been told yet."""
    reasoning_tokens: int | None
    """Known after `finish`; None when the choice did not think."""
    finish_reason: str
    """stop, length or tool_calls; set by `finish` or when `stopped`."""

    def push(self, token_ids: tuple[int, ...], logprobs: Sequence[TokenLogprob] | None) -> list[Delta]:
        """Deltas that these tokens complete."""
        ...

    def finish(self, reason: FinishReason) -> list[Delta]:
        """What was held back. Call once, after STOP or LENGTH, unless `stopped`."""
        ...


class ChatParser:
    """Parses the V4 chat layout: reasoning up to `</think>`, content, DSML tool calls."""

    __slots__ = ("_hidden", "_processor", "_thinking", "finish_reason", "reasoning_tokens", "stopped")

    def __init__(self, tokenizer: ChatTokenizer, request: ChatRequest, prompt: EncodedPrompt) -> None:
        options = ParsingOptions(
            parse_tool_calls=bool(request.tools) and request.tool_choice is not ToolChoice.NONE,
            starts_in_tool_calls=prompt.starts_in_tool_calls,
            parse_json_output=request.answer_format is not AnswerFormat.TEXT,
            thinking_initial_stage=prompt.stage,
            stop_sequences=list(request.stop),
        )
        self._thinking = prompt.stage is not None
        self._processor = StreamProcessor(_generator(thinking=self._thinking), options, tokenizer.recipe)
        self._processor.push(InferenceChunk.ready(prompt_usage=PromptUsage()))
        self._hidden = tokenizer.hidden_ids
        self.stopped = False
        self.reasoning_tokens: int | None = None
        self.finish_reason = ""

    def push(self, token_ids: tuple[int, ...], logprobs: Sequence[TokenLogprob] | None) -> list[Delta]:
        deltas: list[Delta] = []
        for at, token in enumerate(token_ids):
            if token in self._hidden:
                continue
            # One token a chunk: the processor would drop complete characters together with a last incomplete one.
            pairs = None if logprobs is None else [_recipe_logprob(logprobs[at])]
            self._read(self._processor.push(InferenceChunk.tokens((token,), pairs)), deltas)
            if self.stopped:
                break
        return deltas

    def finish(self, reason: FinishReason) -> list[Delta]:
        end = InferenceFinishReason.Length if reason is FinishReason.LENGTH else InferenceFinishReason.Stop
        deltas: list[Delta] = []
        self._read(self._processor.push(InferenceChunk.finish(end)), deltas)
        self.stopped = False
        return deltas

    def _read(self, chunks: Sequence[Any], deltas: list[Delta]) -> None:
        for chunk in chunks:
            data = json.loads(chunk.to_json())
            if usage := data["usage"]:
                self._read_usage(usage)
            for choice in data["choices"]:
                if choice["finish_reason"]:
                    self.finish_reason = choice["finish_reason"]
                    self.stopped = True
                _append(deltas, choice["delta"], choice["logprobs"])

    def _read_usage(self, usage: dict[str, Any]) -> None:
        if self._thinking:
            self.reasoning_tokens = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)


def _generator(*, thinking: bool) -> ChatCompletionChunkGenerator:
    request = ConversationRequest(Conversation(thinking_mode=thinking), ModelVersion.DeepseekV4Pro)
    return ChatCompletionRequest.chunk_generator(request, "", "")


def _recipe_logprob(item: TokenLogprob) -> tuple[float, list[tuple[int, float]]]:
    return max(item.logprob, MIN_LOGPROB), [(token, max(value, MIN_LOGPROB)) for token, value in item.top]


def _append(deltas: list[Delta], raw: dict[str, Any], logprobs: dict[str, Any] | None) -> None:
    """Adds one chunk's delta; text that continues the same section joins the delta before it."""
    content, reasoning, calls = raw.get("content"), raw.get("reasoning_content"), raw.get("tool_calls")
    content_logprobs = logprobs.get("content") if logprobs else None
    reasoning_logprobs = logprobs.get("reasoning_content") if logprobs else None
    if not (content or reasoning or calls or content_logprobs or reasoning_logprobs):
        return
    last = deltas[-1] if deltas else None
    if last is not None and logprobs is None and last.content_logprobs is None and last.reasoning_logprobs is None:
        if content and last.content:
            last.content += content
            return
        if reasoning and last.reasoning:
            last.reasoning += reasoning
            return
        if calls and last.tool_calls and _join_arguments(last.tool_calls[-1], calls):
            return
    deltas.append(Delta(content or "", reasoning or "", calls, content_logprobs, reasoning_logprobs))


def _join_arguments(last: dict[str, Any], calls: list[dict[str, Any]]) -> bool:
    """Adds the arguments of a lone continuation of the same call to `last`; False when it is something else."""
    if len(calls) != 1 or "id" in calls[0] or calls[0]["index"] != last["index"]:
        return False
    last["function"]["arguments"] = last["function"].get("arguments", "") + calls[0]["function"]["arguments"]
    return True


class StopStrings:
    """Finds the first stop string in text that comes in pieces, and holds back what may become one."""

    __slots__ = ("_held", "_longest", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string ended it."""
        if not self._stops:
            return text, False
        text = self._held + text
        cut = min((at for at in map(text.find, self._stops) if at >= 0), default=-1)
        if cut >= 0:
            self._held = ""
            return text[:cut], True
        keep = next(
            (n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._is_start(text[-n:])),
            0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back and turned out to be ordinary text."""
        held, self._held = self._held, ""
        return held

    def _is_start(self, suffix: str) -> bool:
        return any(stop.startswith(suffix) for stop in self._stops)


class RawParser:
    """Plain text with stop strings: no sections, no tool calls."""

    __slots__ = ("_stops", "_text", "_tokenizer", "finish_reason", "reasoning_tokens", "stopped")

    def __init__(self, tokenizer: ChatTokenizer, stops: tuple[str, ...]) -> None:
        self._text = Detokenizer(tokenizer)
        self._stops = StopStrings(stops)
        self._tokenizer = tokenizer
        self.stopped = False
        self.reasoning_tokens: int | None = None
        self.finish_reason = ""

    def push(self, token_ids: tuple[int, ...], logprobs: Sequence[TokenLogprob] | None) -> list[Delta]:
        text, self.stopped = self._stops.push(self._text.push(token_ids))
        if self.stopped:
            self.finish_reason = FinishReason.STOP.value
        hidden = self._tokenizer.hidden_ids
        shown = [item for item in logprobs or () if item.token_id not in hidden]
        entries = [describe_logprob(self._tokenizer, item) for item in shown] or None
        return [Delta(content=text, content_logprobs=entries)] if text or entries else []

    def finish(self, reason: FinishReason) -> list[Delta]:
        text, stopped = self._stops.push(self._text.finish())
        self.finish_reason = FinishReason.STOP.value if stopped else reason.value
        text += self._stops.finish()
        return [Delta(content=text)] if text else []


def describe_logprob(tokenizer: ChatTokenizer, item: TokenLogprob) -> dict[str, Any]:
    """OpenAI's chat form of one token's log-probability."""
    return {
        **_describe_token(tokenizer, item.token_id, item.logprob),
        "top_logprobs": [_describe_token(tokenizer, token, value) for token, value in item.top],
    }


def _describe_token(tokenizer: ChatTokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id)
    return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, MIN_LOGPROB), "bytes": list(raw)}
