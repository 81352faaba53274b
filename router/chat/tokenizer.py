"""Token ids to text and back, from the checkpoint's `tokenizer.json` (byte-level BPE).

Owns: the byte table of the vocabulary, special ids by their spelling, incremental decoding. A token of a byte-level
vocabulary is a fixed byte string, so decoding is concatenation and only an incomplete UTF-8 sequence is ever held back.
Does not own: chat prompts (`encoding`), whose plain text must not turn into special tokens.
"""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

import deepseek_recipe
import tokenizers

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK_START = "<think>"
THINK_END = "</think>"
DSML = "｜DSML｜"

REQUIRED_MARKERS = (BOS, EOS, USER, ASSISTANT, THINK_START, THINK_END)
_VISIBLE_MARKERS = frozenset({THINK_START, THINK_END, DSML})


class BadTokenizer(ValueError):
    """`tokenizer.json` is not a byte-level BPE tokenizer with the V4 markers."""


def _byte_of_symbol() -> dict[str, int]:
    """GPT-2's printable stand-in of each byte, inverted: printable bytes stand for themselves, the rest for 256 + n."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class ChatTokenizer:
    """The tokenizer of one checkpoint. Immutable; safe to share between tasks and threads."""

    def __init__(self, text: str, source: str = "tokenizer.json") -> None:
        data: dict[str, Any] = json.loads(text)
        if not _has_byte_level(data.get("decoder")) or data.get("model", {}).get("type") != "BPE":
            raise BadTokenizer(f"{source}: expected a byte-level BPE tokenizer")
        self._encoder = tokenizers.Tokenizer.from_str(text)
        self.recipe = deepseek_recipe.Tokenizer.from_str(text)
        """The same vocabulary for the recipe's encoder and stream parser."""
        added = {item["content"]: item for item in data.get("added_tokens", [])}
        missing = [marker for marker in REQUIRED_MARKERS if marker not in added]
        if missing:
            raise BadTokenizer(f"{source}: added_tokens lacks {', '.join(missing)}")
        self.marker_ids: dict[str, int] = {content: item["id"] for content, item in added.items()}
        self.hidden_ids = frozenset(
            item["id"] for content, item in added.items() if item["special"] and content not in _VISIBLE_MARKERS
        )
        """Special tokens that never show in an answer's text (turn markers, end of sequence)."""
        self._bytes = self._byte_table()

    @classmethod
    def from_dir(cls, directory: Path) -> ChatTokenizer:
        """Reads `directory/tokenizer.json`. Raises `BadTokenizer` or `OSError`."""
        path = directory / "tokenizer.json"
        return cls(path.read_text(encoding="utf-8"), str(path))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._bytes)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id outside the vocabulary."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def encode_raw(self, text: str, *, add_bos: bool = True) -> list[int]:
        """Ids of a raw prompt, in which marker spellings are markers; begins with BOS unless it already does."""
        ids: list[int] = self._encoder.encode(text, add_special_tokens=False).ids
        bos = self.marker_ids[BOS]
        return [bos, *ids] if add_bos and ids[:1] != [bos] else ids

    def _byte_table(self) -> list[bytes]:
        symbols = _byte_of_symbol()
        vocab: dict[str, int] = self._encoder.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocab.values()) + 1)
        for token, token_id in vocab.items():
            if token in self.marker_ids:
                table[token_id] = token.encode()
            else:
                table[token_id] = bytes(symbols[symbol] for symbol in token)
        return table


def _has_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_has_byte_level, decoder.get("decoders", ())))


class Detokenizer:
    """Incremental text of one output. Text comes out as soon as its characters are complete, never in between."""

    __slots__ = ("_decode", "_tokenizer")

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_ids: tuple[int, ...]) -> str:
        """Text that these tokens complete; hidden special tokens contribute none."""
        hidden, token_bytes = self._tokenizer.hidden_ids, self._tokenizer.token_bytes
        return self._decode(b"".join([token_bytes(i) for i in token_ids if i not in hidden]))

    def finish(self) -> str:
        """The rest: U+FFFD for an incomplete character."""
        return self._decode(b"", True)
