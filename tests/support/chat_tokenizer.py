"""A byte-level BPE tokenizer with V4's markers, small enough to build in every test run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

_SPECIAL = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜latest_reminder｜>",
)
_PLAIN = ("<think>", "</think>", "｜DSML｜")
_SAMPLE = "the answer to the question is hello world and there are 12 apples left, so 7 plus 5 equals twelve. "

MAX_CONTEXT = 2048


@functools.cache
def tokenizer_json() -> str:
    """`tokenizer.json` as text; about 350 tokens, markers first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(text, special=True, normalized=False) for text in _SPECIAL]
    added += [AddedToken(text, special=False, normalized=False) for text in _PLAIN]
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=added,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_SAMPLE] * 8, trainer)
    # The trainer flags every token it was given as special; the real V4 file does not flag these.
    data = json.loads(tokenizer.to_str())
    for item in data["added_tokens"]:
        item["special"] = item["content"] not in _PLAIN
    return json.dumps(data)


def write_model_dir(directory: Path) -> Path:
    """A folder with the small files of a checkpoint that the router reads."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    vocab_size = Tokenizer.from_str(tokenizer_json()).get_vocab_size()
    config = {"max_position_embeddings": MAX_CONTEXT, "vocab_size": vocab_size}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
