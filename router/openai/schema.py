"""OpenAI request bodies to neutral requests.

Owns: field names, ranges and defaults of /v1/chat/completions and /v1/completions. Fields it does not know are reported
back, never refused: clients send vendor extensions. Values it knows and cannot honour are refused with their path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from router.chat.request import AnswerFormat, ChatRequest, Sampling, TextRequest
from router.config import RouterConfig
from router.errors import bad_request
from router.openai.fields import Fields
from router.openai.messages import parse_messages, parse_tool_choice, parse_tools
from workers.messages import MAX_TOP_LOGPROBS

_MAX_INT = 2**63 - 1
_WITHOUT_EFFECT = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
    "modalities",
)
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How the client wants the answer delivered."""

    stream: bool = False
    include_usage: bool = False
    """A last chunk with usage and without choices."""
    continuous_usage: bool = False
    """Usage so far in every chunk."""


@dataclass(frozen=True, slots=True)
class Call:
    """What both endpoints share."""

    model: str
    delivery: StreamOptions
    ignored: tuple[str, ...]
    """Fields without effect that the client should hear of."""


@dataclass(frozen=True, slots=True)
class ChatCall(Call):
    """A body of /v1/chat/completions."""

    request: ChatRequest


@dataclass(frozen=True, slots=True)
class TextCall(Call):
    """A body of /v1/completions."""

    request: TextRequest


def parse_chat(body: Any, config: RouterConfig) -> ChatCall:
    """Reads a chat body. Raises `ApiError` 400."""
    fields = Fields(body)
    model = fields.text("model")
    delivery = _delivery(fields)
    messages = parse_messages(fields)
    tools = parse_tools(fields)
    tool_choice, tools = parse_tool_choice(fields, tools)
    thinking, effort = _thinking(fields)
    answer_format, schema = _answer_format(fields)
    wants_logprobs = fields.flag("logprobs")
    top = fields.integer("top_logprobs", None, 0, MAX_TOP_LOGPROBS)
    if top is not None and not wants_logprobs:
        raise bad_request("top_logprobs", "top_logprobs requires logprobs to be true.")
    request = ChatRequest(
        messages=messages,
        tools=tools,
        tool_choice=tool_choice,
        thinking=thinking,
        effort=effort,
        answer_format=answer_format,
        answer_schema=schema,
        sampling=_sampling(fields, config, (top or 0) if wants_logprobs else None),
        stop=_stop(fields, config),
        num_choices=fields.integer("n", 1, 1, config.max_choices),
        priority=fields.integer("priority", 0, -(2**31), 2**31 - 1),
    )
    fields.skip(*_WITHOUT_EFFECT)
    return ChatCall(model, delivery, tuple(fields.unread()), request)


def parse_text(body: Any, config: RouterConfig) -> TextCall:
    """Reads a completions body. Raises `ApiError` 400."""
    fields = Fields(body)
    model = fields.text("model")
    delivery = _delivery(fields)
    prompts = _prompts(fields)
    choices = fields.integer("n", 1, 1, config.max_choices)
    best_of = fields.integer("best_of", choices, 1, config.max_choices)
    if best_of != choices:
        raise bad_request("best_of", "best_of other than n is not supported.")
    if len(prompts) * choices > config.max_choices:
        raise bad_request("prompt", f"At most {config.max_choices} choices (prompts x n) in one request.")
    logprobs = fields.integer("logprobs", None, 0, MAX_TOP_LOGPROBS)
    echo = fields.flag("echo")
    if echo and logprobs is not None:
        raise bad_request("echo", "echo with logprobs is not supported: prompt tokens have no log-probabilities.")
    if fields.raw("suffix"):
        raise bad_request("suffix", "suffix is not supported.")
    request = TextRequest(
        prompts=prompts,
        echo=echo,
        sampling=_sampling(fields, config, logprobs),
        stop=_stop(fields, config),
        num_choices=choices,
        priority=fields.integer("priority", 0, -(2**31), 2**31 - 1),
    )
    fields.skip(*_WITHOUT_EFFECT)
    return TextCall(model, delivery, tuple(fields.unread()), request)


def _delivery(fields: Fields) -> StreamOptions:
    stream = fields.flag("stream")
    options = fields.fields("stream_options")
    if options is None:
        return StreamOptions(stream)
    if not stream:
        raise bad_request("stream_options", "stream_options is only allowed when stream is true.")
    continuous = options.flag("continuous_usage_stats")
    return StreamOptions(stream, options.flag("include_usage"), continuous)


def _sampling(fields: Fields, config: RouterConfig, logprobs: int | None) -> Sampling:
    limit = config.max_output_tokens
    max_tokens = fields.integer("max_tokens", None, 1, limit)
    max_tokens = fields.integer("max_completion_tokens", max_tokens, 1, limit)
    min_tokens = fields.integer("min_tokens", 0, 0, limit)
    if max_tokens is not None and min_tokens > max_tokens:
        raise bad_request("min_tokens", f"min_tokens: found {min_tokens}, expected at most max_tokens ({max_tokens}).")
    return Sampling(
        max_tokens=max_tokens,
        temperature=fields.number("temperature", None, 0.0, 2.0),
        top_p=fields.number("top_p", None, 0.0, 1.0),
        top_k=max(0, fields.integer("top_k", 0, -1, 2**31 - 1)),
        min_p=fields.number("min_p", 0.0, 0.0, 1.0),
        seed=fields.integer("seed", None, -_MAX_INT - 1, _MAX_INT),
        presence_penalty=fields.number("presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2.0, 2.0),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 10.0),
        stop_token_ids=_token_ids(fields.items("stop_token_ids", []), fields.path("stop_token_ids")),
        ignore_eos=fields.flag("ignore_eos"),
        min_tokens=min_tokens,
        logprobs=logprobs,
        logit_bias=_logit_bias(fields),
    )


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
    biases = fields.fields("logit_bias")
    if biases is None:
        return ()
    pairs: list[tuple[int, float]] = []
    for name in biases.unread():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise bad_request(biases.path(name), f"logit_bias: found key {name[:40]!r}, expected a token id.")
        pairs.append((int(name), biases.number(name, 0.0, -100.0, 100.0)))
    return tuple(pairs)


def _stop(fields: Fields, config: RouterConfig) -> tuple[str, ...]:
    value = fields.raw("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise fields.wrong("stop", "a string or a list of strings")
    if not all(stops):
        raise bad_request("stop", "stop: a stop string cannot be empty.")
    if len(stops) > config.max_stop_strings:
        raise bad_request("stop", f"stop: found {len(stops)} strings, expected at most {config.max_stop_strings}.")
    return tuple(stops)


def _thinking(fields: Fields) -> tuple[bool | None, str | None]:
    """Every spelling in use; a plain switch wins over what the effort implies."""
    effort = fields.choice("reasoning_effort", _EFFORTS, None)
    if (reasoning := fields.fields("reasoning")) is not None:
        effort = reasoning.choice("effort", _EFFORTS, effort)
    thinking = fields.flag("enable_thinking", None)
    if (template := fields.fields("chat_template_kwargs")) is not None:
        thinking = template.flag("enable_thinking", thinking)
        thinking = template.flag("thinking", thinking)
        effort = template.choice("reasoning_effort", _EFFORTS, effort)
    value = fields.raw("thinking")
    if isinstance(value, bool):
        thinking = value
    elif value is not None:
        switch = fields.fields("thinking")
        assert switch is not None
        kind = switch.choice("type", ("enabled", "disabled", "adaptive"))
        thinking = kind != "disabled"
    if thinking is None and effort == "none":
        thinking = False
    return thinking, effort


def _answer_format(fields: Fields) -> tuple[AnswerFormat, Any]:
    spec = fields.fields("response_format")
    if spec is None:
        return AnswerFormat.TEXT, None
    kind = AnswerFormat(spec.choice("type", tuple(item.value for item in AnswerFormat)))
    if kind is not AnswerFormat.JSON_SCHEMA:
        return kind, None
    wrapper = spec.fields("json_schema")
    schema = None if wrapper is None else wrapper.fields("schema")
    if wrapper is None or schema is None:
        raise bad_request("response_format.json_schema.schema", "response_format.json_schema.schema is required.")
    return kind, wrapper.raw("schema")


def _prompts(fields: Fields) -> tuple[str | tuple[int, ...], ...]:
    value = fields.raw("prompt")
    if value is None:
        fields.items("prompt")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(isinstance(item, list) and item for item in value):
            return tuple(_token_ids(item, f"prompt[{index}]") for index, item in enumerate(value))
        if not any(isinstance(item, str | list) for item in value):
            return (_token_ids(value, "prompt"),)
    raise bad_request("prompt", "prompt: expected a string, token ids, or a non-empty list of either.")


def _token_ids(values: list[Any], path: str) -> tuple[int, ...]:
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
            raise bad_request(path, f"{path}: expected token ids, found {value!r:.40}.")
    return tuple(values)
