"""`synthetic:PRESET[:layers=N][:seed=S]`: a model of a known shape with random weights, without a checkpoint.

Owns: the name, and the folder that it stands for: config, seed (`workers/checkpoint/recipe.py`) and a tokenizer whose
vocabulary has the model's size. Everything else takes the folder for a checkpoint; the weights are drawn by whoever
loads it. Answers make no sense; speed, memory and exactness of restores are those of a real model of the shape.

The tokenizer's words are all runs of three letters and as many of four as fit, each one token with the space before it,
so that a prompt of N three-letter words has N tokens and any token id has a text of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.state import state_folder
from workers.checkpoint.recipe import RECIPE_NAME

PREFIX = "synthetic:"

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "｜DSML｜",
    "<｜latest_reminder｜>", "<｜action｜>", "<｜query｜>", "<｜authority｜>", "<｜domain｜>", "<｜title｜>",
    "<｜read_url｜>",
)  # fmt: skip
VISIBLE = ("<think>", "</think>")
"""Added tokens that are not flagged special, as in the official tokenizer."""

WORD_PATTERN = r"[0-9]| ?[A-Za-z]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s"
"""Pieces that tokens never cross."""

_NAME = re.compile(r"^synthetic:(?P<preset>[a-z0-9-]+)(?::layers=(?P<layers>[0-9]+))?(?::seed=(?P<seed>[0-9]+))?$")


class BadName(ClusterError, ValueError):
    """A synthetic model's name is not understood."""


@dataclass(frozen=True, slots=True)
class SyntheticName:
    """What a name asks for."""

    preset: str
    layers: int | None
    """The trunk's first layers; None: all."""
    seed: int

    @classmethod
    def parse(cls, text: str) -> SyntheticName:
        """Raises `BadName` with what is expected."""
        from workers.model.presets import PRESETS

        found = _NAME.match(text)
        if found is None:
            raise BadName(f"found {text!r}, expected {PREFIX}PRESET[:layers=N][:seed=S]")
        preset, layers = found["preset"], int(found["layers"]) if found["layers"] else None
        if preset not in PRESETS:
            raise BadName(f"found preset {preset!r}, expected one of {', '.join(PRESETS)}")
        most = PRESETS[preset].num_hidden_layers
        if layers is not None and not 1 <= layers <= most:
            raise BadName(f"found {layers} layers, expected 1 to {most}")
        return cls(preset, layers, int(found["seed"] or 0))

    @property
    def folder_name(self) -> str:
        """What the model is called when nobody names it."""
        parts = [self.preset, "synthetic", f"{self.layers}-layers" if self.layers else "", f"seed-{self.seed}"]
        return "-".join(part for part in parts if part and part != "seed-0")


def model_folder(model: str | Path, base: Path) -> Path:
    """The checkpoint folder that `model` means: a path counted from `base`, or a synthetic name, whose folder is
    written into the user's state folder. Raises `BadName`."""
    if not str(model).startswith(PREFIX):
        return (base / Path(model).expanduser()).resolve()
    name = SyntheticName.parse(str(model))
    folder = state_folder() / "models" / name.folder_name
    try:
        write_folder(folder, name)
    except OSError as exc:
        raise BadName(f"{model}: cannot write {folder}: {exc.strerror or exc}") from exc
    return folder


def write_folder(folder: Path, name: SyntheticName) -> None:
    """Config, recipe, tokenizer and sampling defaults; files that are right already are left alone."""
    from workers.checkpoint.synth import write_recipe
    from workers.model.presets import PRESETS

    layer_ids = None if name.layers is None else range(name.layers)
    config = write_recipe(folder, PRESETS[name.preset], layer_ids=layer_ids, seed=name.seed)
    _write(folder / "tokenizer.json", tokenizer(config.vocab_size))
    _write(folder / "generation_config.json", {"temperature": 1.0, "top_p": 1.0})


def tokenizer(vocab_size: int) -> dict[str, Any]:
    """A byte-level tokenizer of that many tokens, as `tokenizer.json` holds it. Raises `BadName` for too few."""
    added = (*SPECIAL, *VISIBLE)
    symbols = _byte_symbols()
    least = len(added) + len(symbols)
    if vocab_size < least:
        raise BadName(f"a vocabulary of {vocab_size} tokens cannot hold {least} markers and bytes")
    tokens = [*added, *symbols, *itertools.islice(_words(), vocab_size - least)]
    if len(tokens) != vocab_size:
        raise BadName(f"a vocabulary of {vocab_size} tokens is larger than the {len(tokens)} that there are")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": text in SPECIAL}
            for number, text in enumerate(added)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": WORD_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
            # A whole word that is a token needs no merges to become one.
            "ignore_merges": True,
            "vocab": {text: number for number, text in enumerate(tokens)},
            "merges": [],
        },
    }  # fmt: skip


def vocabulary_of(folder: Path) -> int | None:
    """Tokens of a synthetic model's vocabulary; None for any other folder."""
    if not (folder / RECIPE_NAME).is_file():
        return None
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def text_of(draw: random.Random, num_words: int, vocab_size: int) -> str:
    """Random words that a synthetic tokenizer of this size knows, each one token (the first may be three)."""
    letters, known = string.ascii_lowercase, vocab_size - len(SPECIAL) - len(VISIBLE) - 256
    words = []
    for _ in range(num_words):
        number = draw.randrange(min(26**3, known))
        words.append(letters[number // 676] + letters[number // 26 % 26] + letters[number % 26])
    return " ".join(words)


def _byte_symbols() -> list[str]:
    """The printable stand-in of each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted(set(range(256)) - set(printable))
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(hidden))]


def _words() -> Iterator[str]:
    """Words with the space before them, then the same three letters without, then longer ones."""
    space = "\u0120"
    short = ["".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=3)]
    yield from (space + word for word in short)
    yield from short
    yield from (space + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))


def _write(path: Path, data: object) -> None:
    """Whole or not at all: another command may be reading, or writing the same."""
    text = json.dumps(data, ensure_ascii=False)
    if path.is_file() and path.read_bytes() == text.encode():
        return
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
