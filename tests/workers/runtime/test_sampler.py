"""Sampling: what each parameter does, and that nothing but the request itself decides a token."""

from __future__ import annotations

import math
import random

import pytest
import torch

from workers.messages import SamplingParams
from workers.sampler import SampleState, gumbel_noise, request_seed, sample, splitmix64

VOCAB = 97
STOP = frozenset({1})


def state(
    output: tuple[int, ...] = (), prompt: tuple[int, ...] = (3, 4), seed: int = 7, **kwargs: object
) -> SampleState:
    params = SamplingParams(max_tokens=64, **kwargs)  # type: ignore[arg-type]
    return SampleState(params, seed, STOP, prompt, output, VOCAB)


def logits_of(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def token(logits: torch.Tensor, s: SampleState) -> int:
    result = sample(logits.reshape(1, -1), [s])[0].token_id
    assert result is not None
    return result


def draws(logits: torch.Tensor, count: int, **kwargs: object) -> list[int]:
    """`count` tokens at successive output positions of one request."""
    return [token(logits, state(output=(5,) * n, **kwargs)) for n in range(count)]


def test_greedy_takes_the_largest_logit(seed: int) -> None:
    logits = logits_of(4, seed)
    chosen = [r.token_id for r in sample(logits, [state(temperature=0.0) for _ in range(4)])]
    assert chosen == logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 1e-30])
def test_a_vanishing_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([8.0, 40.0, 16.0, -24.0])
    assert draws(logits, 6, temperature=temperature, top_p=0.9) == [1] * 6


def test_splitmix64_matches_the_published_sequence() -> None:
    """First outputs of the reference generator seeded with 1234567 (its state advances by the golden ratio)."""
    golden = 0x9E3779B97F4A7C15
    found = [splitmix64((1234567 + i * golden) % 2**64) for i in range(3)]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_noise_in_a_batch_equals_the_scalar_definition() -> None:
    noise = gumbel_noise([5, 2**64 - 1], [0, 9], 8, torch.device("cpu"))
    golden = 0x9E3779B97F4A7C15
    for row, (s, p) in enumerate([(5, 0), (2**64 - 1, 9)]):
        key = splitmix64((splitmix64(s) + p) % 2**64)
        for v in range(8):
            bits = splitmix64((key + golden * v) % 2**64) >> 12
            uniform = (bits + 0.5) * 2.0**-52
            assert noise[row, v].item() == pytest.approx(-math.log(-math.log(uniform)), rel=1e-12)


def test_a_token_does_not_depend_on_the_rest_of_the_batch(seed: int) -> None:
    rng = random.Random(seed)
    options: list[dict[str, object]] = [
        {},
        {"temperature": 0.0},
        {"top_p": 0.7},
        {"top_k": 5},
        {"min_p": 0.1},
        {"top_p": 0.9, "top_k": 20, "temperature": 1.7},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"repetition_penalty": 1.3, "logprobs": 3},
        {"min_tokens": 9, "logit_bias": ((5, 4.0),)},
    ]
    logits = logits_of(64, seed)
    rows = [(i, rng.choice(options), tuple(rng.randrange(VOCAB) for _ in range(rng.randrange(12)))) for i in range(64)]
    make = lambda row: state(output=row[2], seed=row[0], **row[1])  # noqa: E731
    alone = [sample(logits[row[0] : row[0] + 1], [make(row)])[0] for row in rows]
    for size in (2, 7, 64):
        for _ in range(4):
            picked = rng.sample(rows, size)
            together = sample(logits[[r[0] for r in picked]], [make(r) for r in picked])
            assert together == [alone[r[0]] for r in picked]


def test_a_state_rebuilt_from_its_tokens_continues_alike(seed: int) -> None:
    options = {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "min_tokens": 4}
    kept, output = state(**options), ()
    for position in range(20):
        logits = logits_of(1, seed + position)
        rebuilt = state(output=output, **options)
        chosen = token(logits, kept)
        assert chosen == token(logits, rebuilt)
        kept.observe(chosen)
        output = (*output, chosen)


def test_frequencies_follow_the_softmax() -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[:3] = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    counts = [0, 0, 0]
    for chosen in draws(logits, 3000):
        counts[chosen] += 1
    assert [c / 3000 for c in counts] == pytest.approx([0.6, 0.3, 0.1], abs=0.03)


def test_temperature_sharpens() -> None:
    logits = torch.zeros(VOCAB)
    logits[11] = 3.0
    assert draws(logits, 200, temperature=0.3).count(11) > draws(logits, 200).count(11) + 50


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"top_k": 2}, {10, 11}),
        ({"top_p": 0.5}, {10}),
        ({"top_p": 0.75}, {10, 11}),
        ({"min_p": 0.35}, {10, 11}),
        ({"top_k": 1}, {10}),
    ],
)
def test_truncation_keeps_exactly_the_best(options: dict[str, object], allowed: set[int]) -> None:
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[10, 11, 12]] = torch.log(torch.tensor([0.6, 0.25, 0.15]))
    assert set(draws(logits, 300, **options)) == allowed


def test_top_k_one_keeps_one_token_among_equals() -> None:
    logits = torch.zeros(VOCAB)
    assert len(set(draws(logits, 50, top_k=1))) == 1


def test_penalties_follow_their_formulas() -> None:
    logits = torch.zeros(VOCAB)
    logits[5], logits[6] = 2.0, 1.6
    assert token(logits, state((5, 5), temperature=0.0, frequency_penalty=0.3)) == 6
    assert token(logits, state((5, 5), temperature=0.0, frequency_penalty=0.19)) == 5
    assert token(logits, state((5, 5), temperature=0.0, presence_penalty=0.5)) == 6
    assert token(logits, state((5, 5), temperature=0.0, presence_penalty=0.3)) == 5
    assert token(logits, state((), prompt=(5,), temperature=0.0, repetition_penalty=1.5)) == 6
    assert token(logits, state((), prompt=(5,), temperature=0.0, presence_penalty=1.0)) == 5


def test_repetition_penalty_pushes_negative_logits_further_down() -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[5], logits[6] = -1.0, -1.5
    assert token(logits, state((5,), temperature=0.0, repetition_penalty=2.0)) == 6


def test_bias_moves_a_logit_and_ids_outside_the_vocabulary_are_ignored() -> None:
    logits = torch.zeros(VOCAB)
    assert token(logits, state(temperature=0.0, logit_bias=((42, 1.0), (VOCAB + 5, 100.0)))) == 42


def test_stop_ids_are_suppressed_until_min_tokens() -> None:
    logits = torch.zeros(VOCAB)
    logits[1], logits[8] = 5.0, 4.0
    assert token(logits, state((7,), temperature=0.0, min_tokens=2)) == 8
    assert token(logits, state((7, 7), temperature=0.0, min_tokens=2)) == 1


def test_logprobs_are_the_models_own_with_alternatives_best_first(seed: int) -> None:
    logits = logits_of(1, seed)
    result = sample(logits, [state(temperature=0.0, logprobs=4, logit_bias=((50, 100.0),))])[0]
    expected = torch.log_softmax(logits[0], -1)
    assert result.token_id == 50 and result.logprob is not None
    assert result.logprob.logprob == pytest.approx(expected[50].item())
    assert [i for i, _ in result.logprob.top] == expected.topk(4).indices.tolist()
    none = sample(logits, [state(temperature=0.0, logprobs=0)])[0].logprob
    assert none is not None and none.top == ()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_of_nan_fails_alone(seed: int, temperature: float) -> None:
    logits = logits_of(3, seed)
    expected = [r.token_id for r in sample(logits, [state(temperature=temperature) for _ in range(3)])]
    logits[1, 13] = torch.nan
    found = [r.token_id for r in sample(logits, [state(temperature=temperature) for _ in range(3)])]
    assert found == [expected[0], None, expected[2]]


def test_logits_stay_unchanged(seed: int) -> None:
    logits = logits_of(2, seed)
    before = logits.clone()
    sample(logits, [state((5,), frequency_penalty=1.0, top_k=3, logprobs=2), state(temperature=0.0)])
    assert torch.equal(logits, before)


def test_a_request_without_seed_draws_from_its_id() -> None:
    params = SamplingParams(max_tokens=1)
    assert request_seed(params, "a") == request_seed(params, "a") != request_seed(params, "b")
    assert request_seed(SamplingParams(max_tokens=1, seed=-1), "a") == 2**64 - 1


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_k", -1), ("min_p", 2.0), ("logprobs", 21),
     ("repetition_penalty", 0.0), ("min_tokens", 99), ("seed", 2**64), ("temperature", math.nan),
     ("presence_penalty", math.inf), ("logit_bias", ((-1, 0.0),))],
)  # fmt: skip
def test_parameters_out_of_range_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{"max_tokens": 5, field: value})  # type: ignore[arg-type]
