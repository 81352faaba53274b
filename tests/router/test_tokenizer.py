"""Token ids to text: the byte table, incremental decoding, markers."""

from __future__ import annotations

import json
import random

import pytest
from tokenizers import Tokenizer

from router.chat.tokenizer import BOS, DSML, EOS, THINK_END, BadTokenizer, ChatTokenizer, Detokenizer
from tests.support.chat_tokenizer import tokenizer_json

TEXTS = ["hello world", "naïve café", "你好，世界", "🎉👩‍👩‍👧 done", "tabs\tand\nlines\u2028", "a\x00b\x7f"]


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_tokens_concatenate_to_the_text(tokenizer: ChatTokenizer, text: str):
    ids = tokenizer.encode_raw(text, add_bos=False)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert Tokenizer.from_str(tokenizer_json()).decode(ids, skip_special_tokens=False) == text


def test_incremental_text_never_splits_a_character(tokenizer: ChatTokenizer, seed: int):
    text = "".join(random.Random(seed).choices("aé你🎉 \n", k=200))
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push((token,)) for token in tokenizer.encode_raw(text, add_bos=False)]
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("�" in piece for piece in pieces)


def test_incomplete_character_becomes_a_replacement_only_at_the_end(tokenizer: ChatTokenizer):
    first_byte, *_ = tokenizer.encode_raw("你", add_bos=False)
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push((first_byte,)) == ""
    assert detokenizer.finish() == "�"


def test_turn_markers_never_show_but_thinking_and_tool_markers_do(tokenizer: ChatTokenizer):
    ids = [tokenizer.marker_ids[marker] for marker in (BOS, THINK_END, EOS, DSML)]
    assert Detokenizer(tokenizer).push(tuple(ids)) == THINK_END + DSML


def test_unknown_ids_have_no_text(tokenizer: ChatTokenizer):
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_bytes(-1) == b""


def test_raw_prompts_begin_with_one_bos(tokenizer: ChatTokenizer):
    bos = tokenizer.marker_ids[BOS]
    assert tokenizer.encode_raw("hello")[0] == bos
    assert tokenizer.encode_raw(BOS + "hello") == tokenizer.encode_raw("hello")


@pytest.mark.parametrize("missing", [BOS, THINK_END])
def test_a_tokenizer_without_a_marker_is_refused_by_name(missing: str):
    data = json.loads(tokenizer_json())
    data["added_tokens"] = [item for item in data["added_tokens"] if item["content"] != missing]
    with pytest.raises(BadTokenizer, match=missing):
        ChatTokenizer(json.dumps(data))


def test_a_tokenizer_that_is_not_byte_level_is_refused():
    data = json.loads(tokenizer_json())
    data["decoder"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
    with pytest.raises(BadTokenizer, match="byte-level"):
        ChatTokenizer(json.dumps(data))
