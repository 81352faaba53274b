"""Decode steps that are launched ahead give the tokens, ends and errors of steps run in turn."""

from __future__ import annotations

import random

import pytest

from tests.workers.runtime.fake_model import VOCAB, FakeModel, fake_engine, oracle_tokens
from tests.workers.runtime.pair import Pair, make_request, tokens_of
from workers.messages import FinishReason


def _model(pair: Pair) -> FakeModel:
    model = pair.decode_engine.model
    assert isinstance(model, FakeModel) and model.ahead is not None
    return model


def test_a_lone_greedy_request_runs_ahead_except_at_pages() -> None:
    request = make_request("a", [5] * 250, max_tokens=20, ignore_eos=True)
    with Pair(decode_engine=fake_engine(ahead=True)) as pair:
        assert pair.run(request) == oracle_tokens(request.prompt_ids, request.sampling, "a")
        model = _model(pair)
        # 19 steps; the first, the one that opens a page and the one after it know their pages only when planned.
        assert len(model.steps) == 19 and model.ahead is not None and model.ahead.num_next == 17


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_requests_joining_and_leaving_at_random_steps_get_the_tokens_they_get_alone(
    temperature: float, seed: int
) -> None:
    rng = random.Random(seed)
    requests = [
        make_request(
            f"r{i}",
            [rng.randrange(2, VOCAB) for _ in range(rng.choice([1, 60, 127, 254, 256]))],
            max_tokens=rng.randint(1, 40),
            temperature=temperature * (i % 2),
            seed=i,
            logprobs=1 if i % 3 == 2 else None,
        )
        for i in range(12)
    ]
    with Pair(decode_engine=fake_engine(ahead=True)) as pair:
        for request in requests:
            pair.start(request)
        for request in requests:
            tokens = tokens_of(pair.events.rest(request.request_id))
            assert tokens == oracle_tokens(request.prompt_ids, request.sampling, request.request_id)
        assert _model(pair).ahead.num_next > 0


def test_a_stop_token_ends_the_request_and_nothing_runs_after_it() -> None:
    free = make_request("free", [5, 7, 9], max_tokens=8, ignore_eos=True)
    tokens = oracle_tokens(free.prompt_ids, free.sampling, "free")
    stop = next(t for i, t in enumerate(tokens) if i >= 3 and t != 1 and t not in tokens[:i])
    request = make_request("a", [5, 7, 9], max_tokens=8, stop_token_ids=(stop,), ignore_eos=False)
    with Pair(decode_engine=fake_engine(ahead=True)) as pair:
        expected = oracle_tokens(request.prompt_ids, request.sampling, "a")
        assert pair.run(request) == expected and expected[-1] == stop
        assert len(_model(pair).steps) == len(expected) - 1


def test_a_step_that_fails_on_its_way_fails_its_requests_and_the_worker_serves_on() -> None:
    request = make_request("a", [5, 6], max_tokens=12, ignore_eos=True)
    tokens = oracle_tokens(request.prompt_ids, request.sampling, "a")
    with Pair(decode_engine=fake_engine(ahead=True)) as pair:
        _model(pair).fail_on = tokens[3]
        pair.start(request)
        assert pair.events.rest("a")[-1].finish is FinishReason.ERROR
        _model(pair).fail_on = None
        again = make_request("b", [5, 6], max_tokens=12, ignore_eos=True)
        assert pair.run(again) == oracle_tokens(again.prompt_ids, again.sampling, "b")


def test_a_row_of_nan_fails_its_request_alone() -> None:
    good, bad = (make_request(name, [5, 6 + i], max_tokens=12, ignore_eos=True) for i, name in enumerate("ab"))
    tokens = oracle_tokens(bad.prompt_ids, bad.sampling, "b")
    with Pair(decode_engine=fake_engine(ahead=True)) as pair:
        _model(pair).nan_on = next(t for t in tokens[1:] if t not in oracle_tokens(good.prompt_ids, good.sampling, "a"))
        for request in (good, bad):
            pair.start(request)
        assert pair.events.rest("b")[-1].finish is FinishReason.ERROR
        assert tokens_of(pair.events.rest("a")) == oracle_tokens(good.prompt_ids, good.sampling, "a")
