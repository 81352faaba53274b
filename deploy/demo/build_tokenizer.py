"""Build dsv4-nano's tokenizer: byte-level BPE over the demo tasks, V4's special tokens, one token per digit.

    python -m deploy.demo.build_tokenizer --out DIR

Writes tokenizer.json, tokenizer_config.json and generation_config.json. The corpus is the training split of the seeded
generators, so the same generators give the same files. NOTE: they have gained wordings since the shipped tokenizer was
built (commit f034823); a rebuild gives a vocabulary that the shipped weights do not fit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster.tasks import arithmetic, recall, smalltalk
from cluster.tasks.sample import Split, TaskSample

VOCAB_SIZE = 1024
MAX_POSITIONS = 16384

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
PAD = "<｜▁pad▁｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"
SPECIAL_TOKENS = (BOS, EOS, PAD, USER, ASSISTANT, "｜DSML｜", "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>",
                  "<｜authority｜>", "<｜domain｜>", "<｜title｜>", "<｜read_url｜>")  # fmt: skip
PLAIN_ADDED_TOKENS = (THINK, END_THINK)
"""Added but not flagged special, as in the official tokenizer: skipping special tokens keeps them in the text."""

WORD_PATTERN = r"[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s"
"""Pieces that BPE never merges across: one digit, one word or run of signs with the space before it, white space."""

RECALL_TEXTS = 900
"""Recall contexts in the corpus, dense with facts: fewer leave the names of common items split into pieces."""


def _texts(sample: TaskSample) -> Iterator[str]:
    for turn in sample.turns:
        yield from (turn.user, turn.reasoning, turn.content)


def corpus() -> Iterator[str]:
    """Training texts of the three tasks, about five megabytes."""
    for sample in itertools.islice(arithmetic.generate(Split.TRAIN, 0), 4000):
        yield from _texts(sample)
    rng = random.Random(0)
    for _ in range(RECALL_TEXTS):
        _, turns = recall.draw(rng, Split.TRAIN, 900, num_asked=2, num_others=20)
        for turn in turns:
            yield from (turn.user, turn.reasoning)
    for sample in itertools.islice(smalltalk.generate(Split.TRAIN, 0), 4000):
        yield from _texts(sample)


def build() -> Tokenizer:
    """Train the tokenizer; ids of `SPECIAL_TOKENS` are their places in the tuple, so BOS is 0 and EOS is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    added += [AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED_TOKENS]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def main() -> None:
    """Write the tokenizer files into a folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    write(parser.parse_args().out)


def write(out: Path) -> None:
    """Build and write the files into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    build().save(str(out / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 0.3, "top_p": 0.95}
    for name, content in (("tokenizer_config.json", tokenizer_config), ("generation_config.json", generation_config)):
        (out / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
