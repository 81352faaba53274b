"""Recall: find the value of one item among others, anywhere in a text of 512 to 8K tokens.

A context is filler sentences with facts ("The code of the red lantern is 4821.") at random places. Only one of them is
asked (training conversations may ask several in turn). Lengths are estimates in tokens made without a tokenizer:
`estimate_tokens` is within a few percent for dsv4-nano's, and a caller that has the tokenizer trims by itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.tasks import words
from cluster.tasks.sample import Split, Task, TaskSample, Turn, split_of

LENGTHS = (512, 1024, 2048, 4096, 8192)
"""Context sizes in tokens that the evaluation draws from unless told otherwise."""

MIN_DISTRACTORS, MAX_DISTRACTORS = 3, 11
"""Facts beside the one that is asked, in an evaluation sample."""

RESERVED_TOKENS = 64
"""Part of a context size kept for the chat markers, the lead, the question and the answer."""

FREE_FACTS = 4.0
"""Free facts per odd item where odd ones are drawn at all."""

TOKENS_PER_PIECE = 1.02
"""Tokens per piece that `estimate_tokens` counts: the rest is words that dsv4-nano's tokenizer splits."""

_PIECE = re.compile(r"[0-9]|[A-Za-z]+|[^\sA-Za-z0-9]|(?<=\s)(?=[0-9])")


@dataclass(frozen=True, slots=True)
class Fact:
    """`attribute` of `item` is `value`."""

    attribute: str
    item: str
    value: str

    @property
    def key(self) -> str:
        """Problem key of asking for this fact."""
        return f"recall:{self.attribute}|{self.item}|{self.value}"

    @property
    def sentence(self) -> str:
        """The plain statement, which is also the answer."""
        return f"The {self.attribute} of the {self.item} is {self.value}."

    def state(self, rng: random.Random) -> str:
        """The fact as one of the wordings found in a context."""
        forms = (
            self.sentence,
            self.sentence,
            f"Remember that the {self.attribute} of the {self.item} is {self.value}.",
            f"Note: the {self.attribute} of the {self.item} is {self.value}.",
            f"The {self.item} has the {self.attribute} {self.value}.",
        )
        return rng.choice(forms)

    def ask(self, rng: random.Random) -> str:
        """A question for the fact."""
        forms = (
            f"What is the {self.attribute} of the {self.item}?",
            f"What was the {self.attribute} of the {self.item}?",
            f"Which {self.attribute} does the {self.item} have?",
            f"Tell me the {self.attribute} of the {self.item}.",
            f"Please find the {self.attribute} of the {self.item}.",
            f"Do you remember the {self.attribute} of the {self.item}?",
            f"what is the {self.attribute} of the {self.item}",
        )
        return rng.choice(forms)

    def turn(self, question: str) -> Turn:
        """The question with its answers; thinking repeats what is looked for before stating it."""
        reasoning = f"I look for the {self.attribute} of the {self.item}. {self.sentence}"
        return Turn(question, reasoning, self.sentence, self.sentence)


def estimate_tokens(text: str) -> int:
    """Tokens of `text` up to `TOKENS_PER_PIECE`, without a tokenizer: words, digits, signs, spaces before digits."""
    return len(_PIECE.findall(text))


def filler_sentence(rng: random.Random) -> str:
    """One sentence that states no fact."""
    pick = rng.choice
    form = rng.randrange(12)
    who = f"{pick(words.QUALITIES)} {pick(words.ANIMALS if rng.random() < 0.5 else words.PEOPLE)}"
    place, time = pick(words.PLACES), pick(words.TIMES)
    if form == 0:
        return f"The {who} {pick(words.PAST_ACTIONS)} the {place} {time}."
    if form == 1:
        return f"A {who} {pick(words.PAST_ACTIONS)} the {pick(words.COLOURS)} {pick(words.THINGS)}."
    if form == 2:
        return f"There was {pick(words.WEATHER)} near the {place} {time}."
    if form == 3:
        return f"In the {place} you can find a {pick(words.COLOURS)} {pick(words.THINGS)} and some {pick(words.FOODS)}."
    if form == 4:
        return f"The {pick(words.PEOPLE)} made {pick(words.FOODS)} for the {who} {time}."
    if form == 5:
        return f"Nobody at the {place} had seen the {pick(words.THINGS)} {time}."
    if form == 6:
        return f"When the {pick(words.WEATHER)} came, the {who} {pick(words.PAST_ACTIONS)} the {place}."
    if form == 7:
        return f"The {pick(words.PEOPLE)} and the {pick(words.ANIMALS)} had {pick(words.FOODS)} {time}."
    if form == 8:
        return f"It was {pick(words.QUALITIES)} and {pick(words.QUALITIES)} at the {place} {time}."
    if form == 9:
        return f"The {pick(words.THINGS)} in the {place} was {pick(words.COLOURS)} and {pick(words.QUALITIES)}."
    if form == 10:
        return f"{time[0].upper()}{time[1:]} the {who} {pick(words.PAST_ACTIONS)} the {pick(words.THINGS)}."
    return f"About {rng.randint(2, 4000)} people live between the {place} and the {pick(words.PLACES)}."


@dataclass(frozen=True, slots=True)
class FreeFact(Fact):
    """A fact in other words than the evaluation's (training only): "Anna's city is Rome.", "My number is 51.".

    `item` is the owner: `my`, or a possessive.
    """

    @property
    def sentence(self) -> str:
        """The plain statement, which is also the answer."""
        owner = "Your" if self.item == "my" else self.item
        return f"{owner} {self.attribute} is {self.value}."

    def state(self, rng: random.Random) -> str:
        """The fact as one of the wordings found in a context."""
        subject = f"{self.item[0].upper()}{self.item[1:]} {self.attribute}"
        return rng.choice(
            (
                f"{subject} is {self.value}.",
                f"Remember: {subject[0].lower() if self.item == 'my' else subject[0]}{subject[1:]} is {self.value}.",
            )
        )

    def ask(self, rng: random.Random) -> str:
        """A question for the fact."""
        subject = f"{self.item} {self.attribute}"
        forms = (f"What is {subject}?", f"what is {subject}?", f"Tell me {subject}.", f"What was {subject}?",
                 f"Do you remember {subject}?", f"What is {subject}")  # fmt: skip
        return rng.choice(forms)

    def turn(self, question: str) -> Turn:
        """The question with its answers."""
        owner = "your" if self.item == "my" else self.item
        return Turn(question, f"I look for {owner} {self.attribute}. {self.sentence}", self.sentence, self.sentence)


def made_up_word(rng: random.Random, syllables: int = 3) -> str:
    """A word that no list holds."""
    parts = ("ka", "lo", "mi", "zu", "ter", "ven", "ros", "tal", "pi", "gor", "sha", "be", "du", "lin", "ox", "fra")
    return "".join(rng.choice(parts) for _ in range(syllables))


def _free_fact(rng: random.Random) -> FreeFact:
    owner = "my" if rng.random() < 0.4 else rng.choice(words.OWNERS) + "'s"
    draw = rng.random()
    if draw < 0.5:
        value = str(rng.randint(1, 10 ** rng.randint(1, 6)))
    elif draw < 0.8:
        value = rng.choice(words.VALUES)
    else:
        value = made_up_word(rng, rng.randint(1, 3)).title()
    return FreeFact(rng.choice(words.FREE_ATTRIBUTES), owner, value)


def _item(rng: random.Random, odd_share: float) -> str:
    """A thing with a colour; rarely (training) a made-up word, so that copying does not depend on the list."""
    if rng.random() < odd_share:
        return made_up_word(rng)
    return f"{rng.choice(words.COLOURS)} {rng.choice(words.THINGS)}"


def _value(rng: random.Random, odd_share: float) -> str:
    """Four digits; rarely (training) two to six."""
    digits = rng.randint(2, 6) if rng.random() < odd_share else 4
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def draw_facts(rng: random.Random, split: Split, num_asked: int, num_others: int, odd_share: float) -> list[Fact]:
    """Facts about different items, the asked ones first and all of `split`."""
    facts: list[Fact] = []
    items: set[str] = set()
    while len(facts) < num_asked + num_others:
        fact = Fact(rng.choice(words.ATTRIBUTES), _item(rng, odd_share), _value(rng, odd_share))
        if odd_share and rng.random() < FREE_FACTS * odd_share:
            fact = _free_fact(rng)
        subject = f"{fact.attribute} {fact.item}" if isinstance(fact, FreeFact) else fact.item
        if subject in items or (len(facts) < num_asked and split_of(fact.key) is not split):
            continue
        items.add(subject)
        facts.append(fact)
    return facts


def write_context(rng: random.Random, facts: list[Fact], num_tokens: int) -> str:
    """Filler with every fact at its own random place, about `num_tokens` long."""
    stated = [fact.state(rng) for fact in facts]
    room = num_tokens / TOKENS_PER_PIECE - sum(estimate_tokens(sentence) for sentence in stated)
    filler: list[str] = []
    while room > 0:
        filler.append(filler_sentence(rng))
        room -= estimate_tokens(filler[-1])
    if room < 0 and filler:
        filler.pop()
    sentences = [*filler, *stated]
    places = sorted(rng.sample(range(len(sentences)), len(stated)))
    rng.shuffle(stated)
    for place, sentence in zip(places, stated, strict=True):
        filler.insert(place, sentence)
    return " ".join(filler)


def _question(rng: random.Random, context: str, question: str) -> str:
    """A user message: the text with the question after it."""
    leads = ("Here are some notes.", "Read this text.", "Please read the following notes.", "Notes:")
    lead = rng.choice(leads) + "\n\n" if rng.random() < 0.8 else ""
    mark = "Question: " if rng.random() < 0.3 else ""
    return f"{lead}{context}\n\n{mark}{question}"


def draw(
    rng: random.Random, split: Split, num_tokens: int, *, num_asked: int = 1, num_others: int = 0, odd_share: float = 0
) -> tuple[list[Fact], tuple[Turn, ...]]:
    """A conversation over one context that asks `num_asked` facts in turn, about `num_tokens` long in all."""
    facts = draw_facts(rng, split, num_asked, num_others, odd_share)
    asked = facts[:num_asked]
    questions = [fact.ask(rng) for fact in asked]
    later = sum(estimate_tokens(f"{q} {f.sentence}") + 4 for q, f in zip(questions[1:], asked[1:], strict=True))
    context = write_context(rng, facts, max(0, num_tokens - RESERVED_TOKENS - later))
    questions[0] = _question(rng, context, questions[0])
    return asked, tuple(fact.turn(question) for fact, question in zip(asked, questions, strict=True))


def generate(split: Split, seed: int, *, num_tokens: int | None = None, thinking: bool = False) -> Iterator[TaskSample]:
    """Endless one-question samples of about `num_tokens` tokens (each of `LENGTHS` up to 2K in turn when None)."""
    rng = random.Random(f"recall:{split}:{seed}:{num_tokens}")
    lengths = LENGTHS[:3] if num_tokens is None else (num_tokens,)
    while True:
        for length in lengths:
            others = rng.randint(MIN_DISTRACTORS, MAX_DISTRACTORS)
            (fact,), turns = draw(rng, split, length, num_others=others)
            yield TaskSample(Task.RECALL, turns, thinking, fact.value, (fact.key,))
