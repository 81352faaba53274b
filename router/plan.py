"""Neutral requests to choices that can be generated: prompts encoded, budgets resolved against the context.

Owns: the output budget rule. A budget that was asked for must fit together with the prompt, else 400; without one, the
default is lowered to what the context leaves.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from router.answer import ChoicePlan
from router.chat.encoding import ChatEncoder
from router.chat.parsing import ChatParser, RawParser
from router.chat.request import ChatRequest, Sampling, TextRequest, for_choice
from router.chat.tokenizer import ChatTokenizer
from router.config import RouterConfig
from router.errors import bad_request, context_too_long
from router.model_info import ModelInfo
from workers.messages import SamplingParams

_LONG_TEXT = 20_000
"""Characters beyond which encoding goes to a thread: there it takes milliseconds, without the interpreter's lock."""


@dataclass(frozen=True, slots=True)
class AnswerPlan:
    """Everything one request generates."""

    choices: tuple[ChoicePlan, ...]
    prompt_tokens: int
    """Each prompt counted once, however many choices it has."""
    priority: int


class Planner:
    """Plans answers of one model. Immutable."""

    def __init__(self, config: RouterConfig, tokenizer: ChatTokenizer, model: ModelInfo) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._encoder = ChatEncoder(tokenizer, model)
        self._model = model

    async def plan_chat(self, request: ChatRequest) -> AnswerPlan:
        """Raises `ApiError` 400 when the conversation cannot be encoded or does not fit."""
        if sum(len(message.content) for message in request.messages) > _LONG_TEXT:
            prompt = await asyncio.to_thread(self._encoder.encode, request)
        else:
            prompt = self._encoder.encode(request)
        params = self._params(request.sampling, len(prompt.token_ids), "messages")
        choices = tuple(
            ChoicePlan(prompt.token_ids, for_choice(params, choice), ChatParser(self._tokenizer, request, prompt))
            for choice in range(request.num_choices)
        )
        return AnswerPlan(choices, len(prompt.token_ids), request.priority)

    async def plan_text(self, request: TextRequest) -> AnswerPlan:
        """Raises `ApiError` 400 when a prompt is out of the vocabulary or does not fit."""
        choices: list[ChoicePlan] = []
        prompt_tokens = 0
        for prompt in request.prompts:
            if isinstance(prompt, str) and len(prompt) > _LONG_TEXT:
                prompt_ids = await asyncio.to_thread(self._prompt_ids, prompt)
            else:
                prompt_ids = self._prompt_ids(prompt)
            params = self._params(request.sampling, len(prompt_ids), "prompt")
            prompt_tokens += len(prompt_ids)
            echo = ""
            if request.echo:
                echo = prompt if isinstance(prompt, str) else self._text_of(prompt)
            for choice in range(request.num_choices):
                parser = RawParser(self._tokenizer, request.stop)
                choices.append(ChoicePlan(prompt_ids, for_choice(params, choice), parser, echo))
        return AnswerPlan(tuple(choices), prompt_tokens, request.priority)

    def _params(self, sampling: Sampling, prompt_tokens: int, param: str) -> SamplingParams:
        room = self._model.max_context - prompt_tokens
        asked = sampling.max_tokens
        if room < 1 or (asked is not None and asked > room):
            raise context_too_long(prompt_tokens, asked, self._model.max_context, param)
        for token_id, _ in sampling.logit_bias:
            if token_id >= self._model.vocab_size:
                raise bad_request("logit_bias", f"logit_bias: {token_id} is not in the vocabulary.")
        budget = asked or min(room, self._config.default_output_tokens)
        if sampling.min_tokens > budget:
            raise bad_request(
                "min_tokens", f"min_tokens: found {sampling.min_tokens}, room for {budget} output tokens."
            )
        return sampling.to_params(
            max_tokens=budget, temperature=self._model.default_temperature, top_p=self._model.default_top_p
        )

    def _prompt_ids(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode_raw(prompt))
        for token_id in prompt:
            if token_id >= self._model.vocab_size:
                raise bad_request("prompt", f"prompt: token id {token_id} is not in the vocabulary.")
        return prompt

    def _text_of(self, prompt: tuple[int, ...]) -> str:
        return b"".join(map(self._tokenizer.token_bytes, prompt)).decode("utf-8", "replace")
