"""Samples are the same for a seed, long enough to be retracted, and half of them beyond what the indexer keeps."""

from __future__ import annotations

import pytest

from cluster.stress.options import StressOptions
from cluster.stress.pressure import PAGE_TOKENS, SPACES, USUAL_OUTPUT, pressure_samples
from cluster.stress.samples import MIN_OUTPUT_TOKENS, TOKENS_PER_PIECE, stress_samples
from cluster.tasks.recall import estimate_tokens
from cluster.tasks.sample import Split, split_of


def test_one_seed_gives_the_same_samples_and_another_gives_others() -> None:
    first = stress_samples(StressOptions(samples=12, seed=4))
    assert first == stress_samples(StressOptions(samples=12, seed=4))
    assert first != stress_samples(StressOptions(samples=12, seed=5))


def test_expected_outputs_are_long_and_held_out() -> None:
    for sample in stress_samples(StressOptions(samples=60, seed=1)):
        turn = sample.task.turns[-1]
        assert estimate_tokens(f"{turn.reasoning} {turn.content}") * TOKENS_PER_PIECE >= MIN_OUTPUT_TOKENS
        assert all(split_of(key) is Split.HELD_OUT for key in sample.task.keys)


def test_half_of_the_contexts_make_the_indexer_choose() -> None:
    samples = stress_samples(StressOptions(samples=40, seed=1))
    far = [sample for sample in samples if sample.context_tokens]
    assert 20 < len(far) < 26
    for sample in far:
        assert estimate_tokens(sample.task.turns[-1].user) > 256
    for sample in samples:
        if not sample.context_tokens:
            assert estimate_tokens(sample.task.turns[-1].user) < 128


def test_long_contexts_are_spread_up_to_what_the_request_may_take() -> None:
    options = StressOptions(samples=60, seed=1, max_context=8192, max_tokens=512)
    lengths = [estimate_tokens(sample.task.turns[-1].user) for sample in stress_samples(options)]
    assert min(lengths) > 256
    assert 6000 < max(lengths) < 8192 - 512
    assert sum(length < 1500 for length in lengths) > 10


def test_a_share_is_sampled_with_a_seed_among_near_and_far() -> None:
    sampled = [sample for sample in stress_samples(StressOptions(samples=50)) if sample.temperature]
    assert len(sampled) == 10
    assert {bool(sample.context_tokens) for sample in sampled} == {True, False}
    penalised = [sample for sample in sampled if sample.repetition_penalty != 1.0]
    assert len(penalised) == 5
    assert penalised[0].body("m", 5)["repetition_penalty"] == penalised[0].repetition_penalty
    body = sampled[0].body("m", 5)
    assert (body["logprobs"], body["top_logprobs"], body["seed"]) == (True, 5, sampled[0].seed)


@pytest.mark.parametrize("space", SPACES)
def test_pressure_contexts_end_where_an_ordinary_output_crosses_a_page(space: str) -> None:
    for sample in pressure_samples(StressOptions(samples=20, seed=2), space):
        prompt = estimate_tokens(sample.task.turns[-1].user)
        to_boundary = -prompt % PAGE_TOKENS
        assert USUAL_OUTPUT - 70 < to_boundary < USUAL_OUTPUT + 90, prompt
