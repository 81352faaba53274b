"""Two answers are the same only when every token, every reported log-probability and the end are."""

from __future__ import annotations

import dataclasses
import math

from cluster.stress.answers import Answer, Parting, difference, differences, token_of


def answer(**changes: object) -> Answer:
    whole = Answer(
        index=3,
        tokens=("a", "b", "c"),
        witnesses=("[-1.0, []]", "[-2.0, []]", "[-3.0, []]"),
        reasoning="",
        content="abc",
        finish="stop",
        prompt_tokens=5,
        completion_tokens=4,
        total_s=0.1,
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def entry(logprob: float, top: float = -0.5) -> dict[str, object]:
    return {
        "token": "x",
        "bytes": [120],
        "logprob": logprob,
        "top_logprobs": [{"token": "y", "bytes": [121], "logprob": top}],
    }


def test_equal_answers_do_not_part_whatever_they_took() -> None:
    assert difference(answer(), answer(total_s=9.0)) is None


def test_the_first_different_token_is_named() -> None:
    found = difference(answer(), answer(tokens=("a", "X", "Y")))
    assert found is not None
    assert (found.index, found.at, found.parting) == (3, 1, Parting.TOKEN)


def test_a_changed_logit_shows_although_tokens_agree() -> None:
    found = difference(answer(), answer(witnesses=("[-1.0, []]", "[-2.0, []]", "[-3.0000000001, []]")))
    assert found is not None
    assert (found.at, found.parting) == (2, Parting.LOGITS)


def test_logits_before_a_different_token_are_found_first() -> None:
    other = answer(tokens=("a", "b", "X"), witnesses=("[-1.5, []]", "[-2.0, []]", "[-3.0, []]"))
    found = difference(answer(), other)
    assert found is not None and found.at == 0


def test_an_answer_that_ends_early_parts_at_its_end() -> None:
    short = answer(tokens=("a", "b"), witnesses=("[-1.0, []]", "[-2.0, []]"), completion_tokens=3, content="ab")
    found = difference(answer(), short)
    assert found is not None
    assert (found.at, found.parting) == (2, Parting.END)


def test_a_hidden_stop_token_counts() -> None:
    found = difference(answer(), answer(completion_tokens=5))
    assert found is not None and found.parting is Parting.END


def test_errors_part_where_they_came_and_tell_broken_logits_from_faults() -> None:
    fault = difference(answer(), answer(error="gone", error_code="worker_unavailable"))
    broken = difference(answer(), answer(error="not finite", error_code="model_output_invalid"))
    assert fault is not None and fault.parting is Parting.ERROR
    assert broken is not None and broken.parting is Parting.BROKEN_LOGITS


def test_the_witness_keeps_the_last_bit_of_every_number() -> None:
    value = -1.2345678901234567
    _, witness = token_of(entry(value))
    _, next_up = token_of(entry(math.nextafter(value, 0.0)))
    _, other_top = token_of(entry(value, top=math.nextafter(-0.5, 0.0)))
    assert len({witness, next_up, other_top}) == 3


def test_tokens_are_known_by_their_bytes() -> None:
    half = {"token": "\ufffd", "bytes": [0xE2], "logprob": -1.0, "top_logprobs": []}
    other = {"token": "\ufffd", "bytes": [0xC3], "logprob": -1.0, "top_logprobs": []}
    assert token_of(half)[0] != token_of(other)[0]


def test_only_samples_of_both_runs_are_compared() -> None:
    plain = [answer(index=0), answer(index=1)]
    other = [answer(index=1, finish="length"), answer(index=2)]
    assert [item.index for item in differences(plain, other)] == [1]
