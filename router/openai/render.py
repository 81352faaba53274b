"""Neutral deltas to OpenAI objects: chat completions and text completions, whole or streamed.

Streams are the hot path: everything of a chunk that does not change is encoded once per request, and a delta of plain
text costs one JSON string. JSON is ASCII only, so that no client splits lines at U+2028.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii as encode_text
from typing import Any

from router import sse
from router.answer import Usage
from router.chat.parsing import Delta
from router.errors import ApiError
from router.model_info import ModelInfo
from router.openai.schema import StreamOptions


class _Chunks:
    """The constant parts of a stream's chunks."""

    def __init__(self, answer_id: str, kind: str, created: int, model: ModelInfo, options: StreamOptions) -> None:
        self._base: dict[str, Any] = {
            "id": answer_id,
            "object": kind,
            "created": created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._head = "data: " + json.dumps(self._base)[:-1] + ', "choices": ['
        self._tail = '], "usage": null}\n\n' if options.include_usage else "]}\n\n"
        self._options = options

    def chunk(self, choice: str, usage: Usage, output_tokens: int | None = None) -> bytes:
        """A chunk with one choice, given as JSON."""
        if self._options.continuous_usage:
            return f'{self._head}{choice}], "usage": {json.dumps(usage.as_dict(output_tokens))}}}\n\n'.encode()
        return f"{self._head}{choice}{self._tail}".encode()

    def end(self, usage: Usage) -> bytes:
        """The usage chunk, when asked for, and the end mark."""
        if not self._options.include_usage:
            return sse.DONE
        last = json.dumps({**self._base, "choices": [], "usage": usage.as_dict()}).encode()
        return sse.data(last) + sse.DONE

    def body(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        return {**self._base, "choices": choices, "usage": usage.as_dict()}


class ChatRenderer:
    """/v1/chat/completions."""

    def __init__(
        self, answer_id: str, created: int, model: ModelInfo, options: StreamOptions, num_choices: int
    ) -> None:
        kind = "chat.completion.chunk" if options.stream else "chat.completion"
        self._chunks = _Chunks(answer_id, kind, created, model, options)
        self._num_choices = num_choices

    def start(self) -> bytes:
        delta = '{"role": "assistant", "content": ""}'
        return b"".join(self._chunk(choice, delta, None, Usage()) for choice in range(self._num_choices))

    def delta(self, choice: int, delta: Delta, usage: Usage) -> bytes:
        if delta.tool_calls is not None or (delta.reasoning and delta.content):
            fields: dict[str, Any] = {"tool_calls": delta.tool_calls} if delta.tool_calls is not None else {}
            if delta.content:
                fields["content"] = delta.content
            if delta.reasoning:
                fields["reasoning_content"] = delta.reasoning
            shown = json.dumps(fields)
        elif delta.reasoning:
            shown = f'{{"reasoning_content": {encode_text(delta.reasoning)}}}'
        else:
            shown = f'{{"content": {encode_text(delta.content)}}}'
        return self._chunk(choice, shown, _chat_logprobs(delta), usage, delta.output_tokens)

    def end_choice(self, choice: int, reason: str, usage: Usage) -> bytes:
        last = f'{{"index": {choice}, "delta": {{}}, "logprobs": null, "finish_reason": "{reason}"}}'
        return self._chunks.chunk(last, usage)

    def end(self, usage: Usage) -> bytes:
        return self._chunks.end(usage)

    def error(self, error: ApiError) -> bytes:
        return sse.error(error.json())

    def body(self, deltas: Sequence[Sequence[Delta]], reasons: Sequence[str], usage: Usage) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(parts),
                "logprobs": _joined_logprobs(parts),
                "finish_reason": reason,
            }
            for index, (parts, reason) in enumerate(zip(deltas, reasons, strict=True))
        ]
        return self._chunks.body(choices, usage)

    def _chunk(
        self, choice: int, delta: str, logprobs: dict[str, Any] | None, usage: Usage, output_tokens: int | None = None
    ) -> bytes:
        shown = "null" if logprobs is None else json.dumps(logprobs)
        return self._chunks.chunk(
            f'{{"index": {choice}, "delta": {delta}, "logprobs": {shown}, "finish_reason": null}}', usage, output_tokens
        )


def _chat_logprobs(delta: Delta) -> dict[str, Any] | None:
    if delta.content_logprobs is None and delta.reasoning_logprobs is None:
        return None
    # The API's schema wants both content and refusal; reasoning_content is DeepSeek's addition.
    logprobs: dict[str, Any] = {"content": delta.content_logprobs, "refusal": None}
    if delta.reasoning_logprobs is not None:
        logprobs["reasoning_content"] = delta.reasoning_logprobs
    return logprobs


def _joined_logprobs(parts: Sequence[Delta]) -> dict[str, Any] | None:
    content = [entry for part in parts for entry in part.content_logprobs or ()]
    reasoning = [entry for part in parts for entry in part.reasoning_logprobs or ()]
    if not content and not reasoning:
        return None
    logprobs: dict[str, Any] = {"content": content, "refusal": None}
    if reasoning:
        logprobs["reasoning_content"] = reasoning
    return logprobs


def _message(parts: Sequence[Delta]) -> dict[str, Any]:
    content = "".join(part.content for part in parts)
    reasoning = "".join(part.reasoning for part in parts)
    calls = _joined_calls(parts)
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["content"] = content or None
        message["tool_calls"] = calls
    return message


def _joined_calls(parts: Sequence[Delta]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for piece in (piece for part in parts for piece in part.tool_calls or ()):
        function = piece["function"]
        call = calls.setdefault(
            piece["index"],
            {"id": "", "type": "function", "function": {"name": "", "arguments": ""}},
        )
        call["id"] = piece.get("id") or call["id"]
        call["function"]["name"] += function.get("name", "")
        call["function"]["arguments"] += function.get("arguments", "")
    return [calls[index] for index in sorted(calls)]


class TextRenderer:
    """/v1/completions."""

    def __init__(
        self, answer_id: str, created: int, model: ModelInfo, options: StreamOptions, echoes: Sequence[str]
    ) -> None:
        self._chunks = _Chunks(answer_id, "text_completion", created, model, options)
        self._echoes = echoes
        self._offsets = [len(echo) for echo in echoes]

    def start(self) -> bytes:
        return b"".join(
            self._chunk(choice, echo, None, "null", Usage()) for choice, echo in enumerate(self._echoes) if echo
        )

    def delta(self, choice: int, delta: Delta, usage: Usage) -> bytes:
        logprobs = None
        if delta.content_logprobs is not None:
            logprobs = _text_logprobs(delta.content_logprobs, self._offsets[choice])
            self._offsets[choice] += sum(len(entry["token"]) for entry in delta.content_logprobs)
        return self._chunk(choice, delta.content, logprobs, "null", usage, delta.output_tokens)

    def end_choice(self, choice: int, reason: str, usage: Usage) -> bytes:
        return self._chunk(choice, "", None, f'"{reason}"', usage)

    def end(self, usage: Usage) -> bytes:
        return self._chunks.end(usage)

    def error(self, error: ApiError) -> bytes:
        return sse.error(error.json())

    def body(self, deltas: Sequence[Sequence[Delta]], reasons: Sequence[str], usage: Usage) -> dict[str, Any]:
        choices = []
        for index, (parts, reason) in enumerate(zip(deltas, reasons, strict=True)):
            entries = [entry for part in parts for entry in part.content_logprobs or ()]
            choices.append(
                {
                    "index": index,
                    "text": self._echoes[index] + "".join(part.content for part in parts),
                    "logprobs": _text_logprobs(entries, self._offsets[index]) if entries else None,
                    "finish_reason": reason,
                }
            )
        return self._chunks.body(choices, usage)

    def _chunk(
        self,
        choice: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str,
        usage: Usage,
        output_tokens: int | None = None,
    ) -> bytes:
        shown = "null" if logprobs is None else json.dumps(logprobs)
        return self._chunks.chunk(
            f'{{"index": {choice}, "text": {encode_text(text)}, "logprobs": {shown}, "finish_reason": {reason}}}',
            usage,
            output_tokens,
        )


def _text_logprobs(entries: list[dict[str, Any]], offset: int) -> dict[str, Any]:
    """The older columnar form."""
    offsets = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry["token"])
    return {
        "tokens": [entry["token"] for entry in entries],
        "token_logprobs": [entry["logprob"] for entry in entries],
        "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
        "text_offset": offsets,
    }
