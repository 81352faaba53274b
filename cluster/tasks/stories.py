"""Free-form arithmetic questions put together from sentence parts, to teach the model wordings beyond fixed stories.

Each part fits one operation of a `cluster.tasks.arithmetic.Chain`; subjects, pronouns and things vary, some of them
made-up words. Answers are always "The answer is N."
"""

from __future__ import annotations

import random

from cluster.tasks.words import PEOPLE, PLACES

NAMES = {
    "he": ("Tom", "Ben", "David", "Felix", "Henry", "Jack", "Leo", "Oscar", "Paul", "Sam", "Bob", "Peter", "John",
           "Max",           "Tim", "Alex", "Carlos", "Hiro", "Omar", "James"),
    "she": ("Anna", "Clara", "Emma", "Grace", "Ida", "Kate", "Maria", "Nina", "Rosa", "Vera", "Alice", "Mary", "Lisa",
            "Mia", "Sarah", "Julia", "Yuki", "Fatima", "Eva", "Olga"),
}  # fmt: skip
THINGS = ("apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "oranges", "pencils", "shells", "stamps",
          "stones", "tickets", "toys", "candies", "euros", "dollars", "pens", "balls", "cakes", "bananas", "cookies",
          "stickers", "pages", "chairs", "bottles", "letters", "points", "photos", "cars", "shirts", "lemons", "nuts",
          "chocolates", "balloons", "keys", "cups", "sheep", "fish", "kites")  # fmt: skip
MORE = ("buys {n} more", "gets {n} more", "finds {n} more", "wins {n}", "receives {n} {t}", "picks {n} more",
        "collects {n} more", "gets {n} {t} from {o}", "finds {n} {t}", "buys {n} new ones", "is given {n} more",
        "makes {n} more", "earns {n}", "adds {n}")  # fmt: skip
LESS = ("eats {n}", "eats {n} {t}", "loses {n}", "gives away {n}", "sells {n}", "uses {n}", "gives {n} to {o}",
        "gives {o} {n}", "throws away {n}", "drops {n}", "spends {n}", "breaks {n}", "sells {n} of them",
        "loses {n} {t}", "gives {n} {t} to {o}", "takes {n} away", "sends {n} to {o}", "puts {n} aside")  # fmt: skip
HOLDINGS = ("{w} has {n} {t}.", "{w} had {n} {t}.", "{w} owns {n} {t}.", "{w} starts with {n} {t}.",
            "{w} bought {n} {t}.", "{w} collected {n} {t}.")  # fmt: skip
ENDINGS = ("How many {t} does {w} have now?", "How many {t} does {p} have?", "How many {t} are left?",
           "How many does {p} have now?", "How many {t} does {p} have in the end?", "How many are there now?",
           "How many {t} remain?", "How many {t} are there in the end?", "So how many {t} does {w} have?")  # fmt: skip
SCENES = ("There are {n} {t} in the {l}.", "A shop has {n} {t}.", "A box holds {n} {t}.",
          "In the {l} there are {n} {t}.", "The {j} has {n} {t}.", "We have {n} {t}.", "I have {n} {t}.")  # fmt: skip
SCENE_MORE = ("Then {n} more arrive.", "{n} more are added.", "{o} brings {n} more.", "Then come {n} more.",
              "{n} new ones are bought.", "Another {n} are found.")  # fmt: skip
SCENE_LESS = ("{n} are sold.", "{n} are taken away.", "Then {n} are lost.", "{o} takes {n}.", "{n} of them are broken.",
              "{n} are eaten.", "{n} go away.", "{n} are given to {o}.")  # fmt: skip
GROUPS = ("There are {m} rows of {n} {t}.", "{w} has {m} boxes with {n} {t} in each.", "{w} buys {m} bags of {n} {t}.",
          "Each of {m} friends has {n} {t}.", "{w} makes {n} {t} a day for {m} days.", "{m} boxes hold {n} {t} each.",
          "{w} packs {m} boxes. Each box has {n} {t}.", "{w} reads {n} pages every day for {m} days.",
          "One bag has {n} {t}. There are {m} bags.", "{w} works {m} hours and earns {n} dollars per hour.",
          "A ticket costs {n} euros. {w} buys {m} tickets.")  # fmt: skip
GROUP_ENDINGS = ("How many is that in total?", "How many {t} are there?", "How many are there in all?",
                 "What is the total?", "How many {t} is that?", "How much is that altogether?")  # fmt: skip
SHARES = ("{w} shares {n} {t} equally among {m} friends. How many {t} does each friend get?",
          "{n} {t} are divided equally into {m} boxes. How many are in each box?",
          "{m} people split {n} {t}. How many does each one get?", "{w} has {n} {t} and {m} bags. Each bag gets the "
          "same number. How many {t} are in one bag?", "How many {t} does each of {m} children get from "
          "{n} {t}?")  # fmt: skip
SPOKEN = {
    "+": ("{a} plus {b}", "the sum of {a} and {b}", "{a} and {b} together", "{b} added to {a}", "{b} more than {a}"),
    "-": ("{a} minus {b}", "the difference between {a} and {b}", "{b} subtracted from {a}", "{b} less than {a}"),
    "*": ("{a} times {b}", "the product of {a} and {b}", "{a} multiplied by {b}", "{a}×{b}", "{a} × {b}"),
    "/": ("{a} divided by {b}", "{a} over {b}", "{a} ÷ {b}"),
}
COMMANDS = {
    "+": ("Add {a} and {b}.", "Add {b} to {a}."),
    "-": ("Subtract {b} from {a}.", "Take {b} from {a}."),
    "*": ("Multiply {a} by {b}.", "Multiply {a} and {b}."),
    "/": ("Divide {a} by {b}.",),
}
OPENERS = (
    "",
    "",
    "",
    "",
    "",
    "Hello! ",
    "Hi, ",
    "Please help me. ",
    "Quick question: ",
    "Here is a problem. ",
    "Question: ",
)
CLOSERS = ("", "", "", "", "", "", " Think step by step.", " Please explain.", " Show your work.", " Thanks!")


def _made_up(rng: random.Random) -> str:
    return "".join(
        rng.choice(("ba", "do", "fi", "ga", "ku", "lem", "nor", "pi", "ra", "sto", "vu", "zan")) for _ in "12"
    )


def _fill(rng: random.Random, template: str, values: dict[str, str]) -> str:
    text = template.format(**values)
    return text[0].upper() + text[1:]


def _parts(rng: random.Random) -> dict[str, str]:
    """Who, pronoun, other person, thing, place and job of one story."""
    pronoun = rng.choice(("he", "she"))
    who = rng.choice(NAMES[pronoun]) if rng.random() < 0.9 else _made_up(rng).title()
    if rng.random() < 0.1:
        who = f"{rng.choice(('The', 'A'))} {rng.choice(PEOPLE)}"
    other = rng.choice([name for name in (*NAMES["he"], *NAMES["she"]) if name != who])
    thing = rng.choice(THINGS) if rng.random() < 0.93 else _made_up(rng) + "s"
    return {"w": who, "p": pronoun, "o": other, "t": thing, "l": rng.choice(PLACES), "j": rng.choice(PEOPLE)}


def tell(rng: random.Random, start: int, operations: tuple[tuple[str, int], ...]) -> str:
    """A story for `start` and one or two operations on it."""
    parts = _parts(rng)
    first, amount = operations[0]
    sentences: list[str] = []
    is_scene = first in "+-" and rng.random() < 0.35
    if first == "/":
        return _decorate(rng, _fill(rng, rng.choice(SHARES), {**parts, "n": str(start), "m": str(amount)}))
    if first == "*":
        sentences.append(_fill(rng, rng.choice(GROUPS), {**parts, "n": str(start), "m": str(amount)}))
        endings: tuple[str, ...] = GROUP_ENDINGS
        rest = operations[1:]
    else:
        sentences.append(_fill(rng, rng.choice(SCENES if is_scene else HOLDINGS), {**parts, "n": str(start)}))
        endings = ("How many {t} are there now?", "How many are left?", "How many {t} are there in the end?")
        endings = endings if is_scene else ENDINGS
        rest = operations
    for number, (op, value) in enumerate(rest):
        values = {**parts, "n": str(value)}
        if is_scene:
            sentences.append(_fill(rng, rng.choice(SCENE_MORE if op == "+" else SCENE_LESS), values))
            continue
        subject = rng.choice((parts["p"], parts["w"]))
        lead = (
            rng.choice(("Then ", "Later ", "After that ", "", ""))
            if number or first == "*"
            else rng.choice(("", "", "Then "))
        )
        action = f"{lead}{subject} {rng.choice(MORE if op == '+' else LESS)}."
        sentences.append(_fill(rng, action, values))
    if len(sentences) > 1 and first != "*" and not is_scene and rng.random() < 0.25:
        sentences = _joined(sentences, parts)
    sentences.append(_fill(rng, rng.choice(endings), parts))
    return _decorate(rng, " ".join(sentences))


def _joined(sentences: list[str], parts: dict[str, str]) -> list[str]:
    """The first two sentences as one: "Tom has 5 apples and then eats 2."."""
    head, action = sentences[0][:-1], sentences[1]
    for subject in (parts["p"], parts["w"]):
        lead = f"{subject[0].upper()}{subject[1:]} "
        if action.startswith(lead):
            return [f"{head} and then {action[len(lead) :]}", *sentences[2:]]
    return sentences


def say(rng: random.Random, op: str, left: int, right: int) -> str:
    """One operation as people say it."""
    values = {"a": left, "b": right}
    if rng.random() < 0.25:
        return _decorate(rng, rng.choice(COMMANDS[op]).format(**values))
    forms = ("What is {}?", "what's {}?", "Calculate {}.", "How much is {}?", "Tell me {}.", "{}?", "{}", "Compute {}.",
             "What do you get for {}?", "What does {} give?", "I need {}.", "Can you tell me {}?")  # fmt: skip
    return _decorate(rng, rng.choice(forms).format(rng.choice(SPOKEN[op]).format(**values)))


def _decorate(rng: random.Random, text: str) -> str:
    return f"{rng.choice(OPENERS)}{text}{rng.choice(CLOSERS)}"
