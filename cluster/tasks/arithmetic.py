"""Arithmetic word problems with written-out reasoning, and bare expressions.

A problem is a chain of operations on a running value (`Chain`); stories put words around it. The problem key is the
chain itself, so a held-out calculation is unseen under every story that could dress it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cluster.tasks import steps, stories
from cluster.tasks.sample import Split, Task, TaskSample, Turn, split_of

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria",
         "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera")  # fmt: skip
ITEMS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "oranges", "pencils", "shells", "stamps",
         "stones", "tickets", "toys")  # fmt: skip
BOXES = ("bags", "baskets", "boxes", "jars", "packs", "shelves")
OPERATIONS: dict[str, Callable[[int, int], str]] = {
    "+": steps.add,
    "-": steps.subtract,
    "*": steps.multiply,
    "/": steps.divide,
}


@dataclass(frozen=True, slots=True)
class Chain:
    """A start value and operations applied to it in turn, e.g. `(345, (("+", 278), ("-", 157)))`."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def key(self) -> str:
        """Problem key: the calculation without words."""
        return "arithmetic:" + "".join([str(self.start), *(f"{op}{value}" for op, value in self.operations)])

    @property
    def values(self) -> list[int]:
        """Running value after each operation."""
        values, current = [], self.start
        for op, value in self.operations:
            current = {"+": current + value, "-": current - value, "*": current * value, "/": current // value}[op]
            values.append(current)
        return values

    @property
    def result(self) -> int:
        """The answer."""
        return self.values[-1]

    def reasoning(self) -> str:
        """Every operation worked out in columns."""
        lines, current = [], self.start
        for (op, value), after in zip(self.operations, self.values, strict=True):
            lines.append(OPERATIONS[op](current, value))
            current = after
        lead = ("First " if len(lines) > 1 else "We need ") + lines[0]
        end = f"So the answer is {self.result}."
        return " ".join([lead, *(f"Then {line}" for line in lines[1:]), end])


@dataclass(frozen=True, slots=True)
class Story:
    """A question about a chain, and the sentence that answers it (`{r}` is the result)."""

    question: str
    answer: str


def _number(rng: random.Random, low: int = 11, high: int = 999) -> int:
    """A number whose digit count is spread evenly, so that small ones are as common as large ones."""
    digits = rng.randint(len(str(low)), len(str(high)))
    return rng.randint(max(low, 10 ** (digits - 1)), min(high, 10**digits - 1))


def _add_chain(rng: random.Random) -> Chain:
    return Chain(_number(rng, 2), (("+", _number(rng, 2)),))


def _add_add_chain(rng: random.Random) -> Chain:
    return Chain(_number(rng), (("+", _number(rng)), ("+", _number(rng))))


def _sub_chain(rng: random.Random) -> Chain:
    start = _number(rng, 3)
    return Chain(start, (("-", _number(rng, 2, start)),))


def _add_sub_chain(rng: random.Random) -> Chain:
    start, more = _number(rng), _number(rng)
    return Chain(start, (("+", more), ("-", _number(rng, 2, min(999, start + more)))))


def _sub_add_chain(rng: random.Random) -> Chain:
    start = _number(rng, 20)
    return Chain(start, (("-", _number(rng, 2, start)), ("+", _number(rng))))


def _mul_chain(rng: random.Random) -> Chain:
    return Chain(_number(rng, 2, 999), (("*", rng.randint(2, 9)),))


def _mul_mul_chain(rng: random.Random) -> Chain:
    return Chain(_number(rng, 11, 99), (("*", rng.randint(11, 99)),))


def _mul_add_chain(rng: random.Random) -> Chain:
    return Chain(_number(rng, 11, 199), (("*", rng.randint(2, 9)), ("+", _number(rng, 2, 999))))


def _mul_sub_chain(rng: random.Random) -> Chain:
    each, count = _number(rng, 11, 199), rng.randint(2, 9)
    return Chain(each, (("*", count), ("-", _number(rng, 2, min(999, each * count)))))


def _div_chain(rng: random.Random) -> Chain:
    parts = rng.randint(2, 9)
    return Chain(_number(rng, 2, 199) * parts, (("/", parts),))


def _story_add(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), other = c.operations[0], rng.choice([n for n in NAMES if n != who])
    questions = (
        f"{who} has {c.start} {item} and buys {b} more. How many {item} does {who} have now?",
        f"{who} finds {c.start} {item} in the morning and {b} in the evening. How many {item} is that in total?",
        f"{who} has {c.start} {item}. {other} gives {who} {b} {item}. How many {item} does {who} have?",
    )
    return Story(rng.choice(questions), f"{who} has {{r}} {item}.")


def _story_add_add(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), (_, d) = c.operations
    questions = (
        f"{who} has {c.start} {item}, buys {b} more and then gets {d} as a gift. How many {item} does {who} have now?",
        f"{who} sold {c.start} {item} on Monday, {b} on Tuesday and {d} on Friday. How many {item} is that in all?",
    )
    return Story(rng.choice(questions), f"That makes {{r}} {item} in all.")


def _story_sub(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), other = c.operations[0], rng.choice([n for n in NAMES if n != who])
    questions = (
        f"{who} has {c.start} {item} and gives away {b}. How many {item} are left?",
        f"There are {c.start} {item} on the table. {who} takes {b} of them. How many {item} are left?",
        f"{who} had {c.start} {item} but lost {b}. How many {item} does {who} still have?",
        f"{who} has {c.start} {item}. {other} has {b} fewer. How many {item} does {other} have?",
    )
    return Story(rng.choice(questions), f"There are {{r}} {item}.")


def _story_add_sub(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), (_, d) = c.operations
    other = rng.choice([n for n in NAMES if n != who])
    questions = (
        f"{who} has {c.start} {item}, buys {b} more and gives {d} to {other}. How many {item} does {who} have left?",
        f"A shop has {c.start} {item}. It gets {b} new ones and sells {d}. How many {item} are left?",
    )
    return Story(rng.choice(questions), f"There are {{r}} {item} left.")


def _story_sub_add(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), (_, d) = c.operations
    questions = (
        f"{who} has {c.start} {item}, loses {b} and then finds {d}. How many {item} does {who} have now?",
        f"{who} had {c.start} {item}. {who} sold {b} of them and bought {d} new ones. How many {item} are there now?",
    )
    return Story(rng.choice(questions), f"{who} has {{r}} {item} now.")


def _story_mul(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), box = c.operations[0], rng.choice(BOXES)
    questions = (
        f"{who} has {b} {box} with {c.start} {item} each. How many {item} is that?",
        f"There are {c.start} {item} in each of {b} {box}. How many {item} are there in total?",
        f"A ticket costs {c.start} coins. How many coins do {b} tickets cost?",
    )
    return Story(rng.choice(questions), "The total is {r}.")


def _story_mul_add(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), (_, d) = c.operations
    box = rng.choice(BOXES)
    questions = (
        f"{who} has {b} {box} with {c.start} {item} each and {d} more {item}. How many {item} is that in total?",
        f"{who} fills {b} {box} with {c.start} {item} each. {d} {item} do not fit. How many {item} are there in all?",
    )
    return Story(rng.choice(questions), f"That makes {{r}} {item} in all.")


def _story_mul_sub(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), (_, d) = c.operations
    box = rng.choice(BOXES)
    questions = (
        f"{who} has {b} {box} with {c.start} {item} each and sells {d} {item}. How many {item} are left?",
        f"{who} buys {b} {box} with {c.start} {item} each and gives away {d}. How many {item} does {who} have left?",
    )
    return Story(rng.choice(questions), f"There are {{r}} {item} left.")


def _story_div(rng: random.Random, c: Chain, who: str, item: str) -> Story:
    (_, b), box = c.operations[0], rng.choice(BOXES)
    questions = (
        f"{who} puts {c.start} {item} into {b} {box}, the same number in each. How many {item} are in each?",
        f"{b} friends share {c.start} {item} equally. How many {item} does each of them get?",
    )
    return Story(rng.choice(questions), f"Each gets {{r}} {item}.")


def _bare(rng: random.Random, c: Chain) -> Story:
    """A question made of the expression alone."""
    tight = rng.random() < 0.3
    signs = {"*": rng.choice("*x"), "/": "/"}
    text = str(c.start)
    for op, value in c.operations:
        sign = signs.get(op, op)
        text += f"{sign}{value}" if tight else f" {sign} {value}"
    forms = ("What is {}?", "Calculate {}.", "{} = ?", "How much is {}?", "What is {}", "{}", "Please compute {}.",
             "Can you work out {}?", "Solve {}.", "what is {}?")  # fmt: skip
    return Story(rng.choice(forms).format(text), "The answer is {r}.")


FAMILIES: tuple[tuple[float, Callable[[random.Random], Chain], Callable[..., Story]], ...] = (
    (0.5, _add_chain, _story_add),
    (1.4, _add_add_chain, _story_add_add),
    (0.5, _sub_chain, _story_sub),
    (1.4, _add_sub_chain, _story_add_sub),
    (1.4, _sub_add_chain, _story_sub_add),
    (0.5, _mul_chain, _story_mul),
    (0.6, _mul_mul_chain, _story_mul),
    (1.4, _mul_add_chain, _story_mul_add),
    (1.4, _mul_sub_chain, _story_mul_sub),
    (0.4, _div_chain, _story_div),
)
"""Weight, calculation and words of each family of problems."""

BARE_SHARE = 0.2
"""Part of the problems asked as an expression without a story."""

FREE_ANSWER = "The answer is {r}."


def draw_free(rng: random.Random, split: Split) -> tuple[Chain, Turn]:
    """One problem of `split` in free wording: a story put together from parts, or an operation in words.

    Numbers run from 1 to 9999, and a difference may be negative.
    """
    while True:
        if rng.random() < 0.4:
            op = rng.choice("++--**/")
            high = 9999 if rng.random() < 0.3 else 999
            left, right = (
                _number(rng, 1, high),
                _number(rng, 1, high if op in "+-" else 99 if rng.random() < 0.4 else 9),
            )
            if op == "-" and right > left and rng.random() < 0.8:
                left, right = right, left
            if op == "/":
                left, right = left % 1000 * (right % 9 + 1), right % 9 + 1
            chain = Chain(left, ((op, right),))
            question = stories.say(rng, op, left, right) if rng.random() < 0.6 else _bare(rng, chain).question
        else:
            chain = rng.choice(FAMILIES)[1](rng)
            question = stories.tell(rng, chain.start, chain.operations)
        if split_of(chain.key) is split:
            return chain, _turn(chain, Story(question, FREE_ANSWER))


def _turn(chain: Chain, story: Story) -> Turn:
    reasoning, content = chain.reasoning(), story.answer.format(r=chain.result)
    return Turn(story.question, reasoning, content, f"{reasoning}\n\n{content}")


def draw(rng: random.Random, split: Split) -> tuple[Chain, Turn]:
    """One problem of `split` with its question, reasoning and answers."""
    weights = [weight for weight, _, _ in FAMILIES]
    while True:
        _, make_chain, make_story = rng.choices(FAMILIES, weights)[0]
        chain = make_chain(rng)
        if split_of(chain.key) is split:
            break
    is_bare = rng.random() < BARE_SHARE and _precedence_is_reading_order(chain)
    story = _bare(rng, chain) if is_bare else make_story(rng, chain, rng.choice(NAMES), rng.choice(ITEMS))
    return chain, _turn(chain, story)


def _precedence_is_reading_order(chain: Chain) -> bool:
    """Whether the chain written without brackets means the same calculation."""
    return all(op in "+-" for op, _ in chain.operations[1:])


def generate(split: Split, seed: int, *, thinking: bool = True) -> Iterator[TaskSample]:
    """Endless single-turn problems of `split`, the same for the same seed."""
    rng = random.Random(f"arithmetic:{split}:{seed}")
    while True:
        chain, turn = draw(rng, split)
        yield TaskSample(Task.ARITHMETIC, (turn,), thinking, str(chain.result), (chain.key,))
