"""Demo tasks: held-out problems never reach training, answers are right, lengths and wordings are as promised."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.tasks import arithmetic, recall, smalltalk, steps
from cluster.tasks.sample import Split, Task, TaskSample, Turn, split_of
from cluster.tasks.scoring import is_correct

GENERATORS: dict[str, Callable[[Split, int], Iterator[TaskSample]]] = {
    "arithmetic": arithmetic.generate,
    "recall": recall.generate,
    "smalltalk": smalltalk.generate,
}
EQUATION = re.compile(r"(?<![\d*+/-] )(\d+) ([*+/-]) (\d+) = (-?\d+)(?! [*+/-])")


def take(samples: Iterator[TaskSample], count: int) -> list[TaskSample]:
    return list(itertools.islice(samples, count))


@pytest.mark.parametrize("name", GENERATORS)
def test_problems_of_one_split_never_occur_in_the_other(name: str) -> None:
    for split in Split:
        samples = take(GENERATORS[name](split, 7), 60)
        assert all(split_of(key) is split for sample in samples for key in sample.keys)
        assert all(sample.keys for sample in samples)


def test_training_only_wordings_also_keep_held_out_problems_out() -> None:
    rng = random.Random(1)
    for _ in range(300):
        chain, _ = arithmetic.draw_free(rng, Split.TRAIN)
        assert split_of(chain.key) is Split.TRAIN
        facts, _ = recall.draw(rng, Split.TRAIN, 0, num_asked=2, num_others=1, odd_share=0.2)
        assert all(split_of(fact.key) is Split.TRAIN for fact in facts)


@pytest.mark.parametrize("name", GENERATORS)
def test_a_seed_gives_the_same_samples_again(name: str) -> None:
    generate = GENERATORS[name]
    assert take(generate(Split.HELD_OUT, 3), 10) == take(generate(Split.HELD_OUT, 3), 10)
    assert take(generate(Split.HELD_OUT, 3), 10) != take(generate(Split.HELD_OUT, 4), 10)


@pytest.mark.parametrize("name", GENERATORS)
def test_expected_answers_score_as_correct_and_others_do_not(name: str) -> None:
    for sample in take(GENERATORS[name](Split.HELD_OUT, 5), 50):
        turn = sample.turns[-1]
        assert is_correct(sample, turn.reasoning, turn.content)
        assert is_correct(sample, None, turn.direct)
        assert not is_correct(sample, turn.reasoning, "")
        assert not is_correct(sample, None, "It is 123456789 or so.")


def test_answer_inside_unfinished_reasoning_is_wrong() -> None:
    sample = TaskSample(Task.ARITHMETIC, (Turn("1 + 1", "", "", ""),), True, "2", ("k",))
    assert not is_correct(sample, "So the answer is 2.", "")
    assert is_correct(sample, None, "We need 1 + 1.</think>The answer is 2.")


@settings(deadline=None)
@given(a=st.integers(0, 9999), b=st.integers(0, 9999))
def test_every_written_equation_of_sums_and_differences_holds(a: int, b: int) -> None:
    for text, result in ((steps.add(a, b), a + b), (steps.subtract(a, b), a - b)):
        assert text.endswith(f"= {result}.")
        assert_equations_hold(text)


@settings(deadline=None)
@given(a=st.integers(0, 999), b=st.integers(1, 99), c=st.integers(1, 9))
def test_every_written_equation_of_products_and_quotients_holds(a: int, b: int, c: int) -> None:
    assert steps.multiply(a, b).endswith(f"= {a * b}.")
    assert steps.divide(a * c, c).endswith(f"= {a}.")
    assert_equations_hold(steps.multiply(a, b))


def assert_equations_hold(text: str) -> None:
    found = EQUATION.findall(text)
    assert found
    for left, op, right, result in found:
        x, y = int(left), int(right)
        assert int(result) == {"+": x + y, "-": x - y, "*": x * y, "/": x // max(y, 1)}[op], (text, left, op, right)


def test_a_recall_context_states_the_asked_fact_exactly_once() -> None:
    for sample in take(recall.generate(Split.HELD_OUT, 2), 12):
        text = sample.turns[0].user
        assert text.count(f" {sample.answer}.") >= 1
        item = sample.keys[0].split("|")[1]
        context = text.rsplit("\n\n", 1)[0]
        assert len(re.findall(rf"of the {item} is \d|The {item} has the \w+ \d", context)) == 1


def test_places_of_the_asked_fact_cover_the_whole_context() -> None:
    places = []
    for sample in take(recall.generate(Split.HELD_OUT, 9, num_tokens=1024), 60):
        text = sample.turns[0].user
        places.append(text.index(f" {sample.answer}.") / len(text))
    assert min(places) < 0.15 and max(places) > 0.8


def test_messages_end_with_the_question_and_carry_past_answers() -> None:
    first = Turn("hi", "thought", "hello", "hello!")
    sample = TaskSample(Task.SMALLTALK, (first, Turn("bye", "", "", "")), True, "goodbye", ("k",), "Be kind.")
    assert sample.messages() == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
    ]
