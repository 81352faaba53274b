"""Rendered rows are what serving sends: same ids as deepseek-recipe, right loss weights, whole documents per row."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
from deepseek_recipe import (
    AssistantMessage,
    Conversation,
    DeepseekV4Encoding,
    SystemMessage,
    Tokenizer,
    UserMessage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tasks import arithmetic, recall, smalltalk
from cluster.tasks.sample import Split, TaskSample
from deploy.demo import rows
from deploy.demo.rows import NANO_DIR, Renderer

RENDERER = Renderer()


@pytest.fixture(scope="module")
def recipe() -> DeepseekV4Encoding:
    return DeepseekV4Encoding().with_tokenizer(Tokenizer.from_file(str(NANO_DIR / "tokenizer.json")))


def samples() -> list[TaskSample]:
    rng = random.Random(0)
    found = [rows.draw_short(rng) for _ in range(60)] + [rows.draw_recall(rng, 120, 300) for _ in range(20)]
    for generator in (arithmetic.generate(Split.HELD_OUT, 0), smalltalk.generate(Split.HELD_OUT, 0)):
        found += itertools.islice(generator, 20)
    return [*found, *itertools.islice(recall.generate(Split.HELD_OUT, 0, thinking=True), 3)]


def conversation(sample: TaskSample) -> Conversation:
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    messages = [kinds[message["role"]](message["content"]) for message in sample.messages()]
    return Conversation(messages, thinking_mode=sample.thinking, reasoning_effort="low")


def test_prompts_have_the_token_ids_of_deepseek_recipe(recipe: DeepseekV4Encoding) -> None:
    checked = samples()
    assert {len(sample.turns) for sample in checked} > {1, 2}
    for sample in checked:
        assert RENDERER.document(sample, answered=False).ids == recipe.encode(conversation(sample))


def test_only_generated_tokens_have_full_weight() -> None:
    for sample in samples():
        document, prompt = RENDERER.document(sample), RENDERER.document(sample, answered=False)
        assert document.ids[: len(prompt.ids)] == prompt.ids
        tail = document.weights[len(prompt.ids) :]
        assert tail and all(weight == rows.ANSWER_WEIGHT for weight in tail)
        assert document.ids[-1] == rows.EOS_ID
        if sample.thinking:
            assert all(weight < rows.ANSWER_WEIGHT for weight in prompt.weights)


@pytest.mark.parametrize("length", rows.RECALL_RANGES)
def test_rows_begin_with_a_document_and_fit(length: int) -> None:
    rng = random.Random(length)
    for _ in range(3):
        ids, weights = rows.draw_row(rng, length, RENDERER)
        assert ids.shape == weights.shape == (length + 1,)
        assert ids[0] == rows.BOS_ID and (weights == 1).any()
        padding = ids == rows.PAD_ID
        assert not weights[padding].any()
        assert (np.diff(padding.astype(int)) >= 0).all()


@pytest.mark.parametrize("length", recall.LENGTHS)
def test_recall_samples_fit_the_length_they_are_named_after(length: int) -> None:
    for sample in itertools.islice(recall.generate(Split.HELD_OUT, 1, num_tokens=length), 4):
        size = len(RENDERER.document(sample).ids)
        assert 0.85 * length < size <= length


def test_most_arithmetic_answers_are_long_enough_to_measure_decoding() -> None:
    sizes = []
    for sample in itertools.islice(arithmetic.generate(Split.HELD_OUT, 1), 300):
        whole, prompt = RENDERER.document(sample), RENDERER.document(sample, answered=False)
        sizes.append(len(whole.ids) - len(prompt.ids))
    assert np.median(sizes) >= 120 and max(sizes) < 400


@settings(deadline=None)
@given(text=st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    ids = RENDERER.encode(text)
    markers = (*range(15),)
    if not any(marker in ids for marker in markers):
        assert RENDERER._tokenizer.decode(ids, skip_special_tokens=False) == text


def test_digits_are_single_tokens_and_special_ids_are_fixed() -> None:
    assert len(RENDERER.encode("12345")) == 5
    content = json.loads((NANO_DIR / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert ids["<｜begin▁of▁sentence｜>"] == rows.BOS_ID and ids["<｜end▁of▁sentence｜>"] == rows.EOS_ID
    assert ids["<｜User｜>"] == rows.USER_ID and ids["<｜Assistant｜>"] == rows.ASSISTANT_ID
    assert ids["<think>"] == rows.THINK_ID and ids["</think>"] == rows.END_THINK_ID
    assert ids["<｜▁pad▁｜>"] == rows.PAD_ID
