"""A synthetic model's name becomes a folder that reads like a checkpoint, with a word for every token."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path

import pytest

from cluster.config import ConfigError, config_from_mapping
from cluster.synthetic import BadName, SyntheticName, model_folder, tokenizer
from router.chat.tokenizer import ChatTokenizer, Detokenizer
from router.model_info import ModelInfo
from workers.checkpoint.check import check_directory
from workers.model.presets import NANO, V4_FLASH


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSV4_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("text", "expected", "folder"),
    [
        ("synthetic:v4-flash", SyntheticName("v4-flash", None, 0), "v4-flash-synthetic"),
        ("synthetic:nano:layers=4", SyntheticName("nano", 4, 0), "nano-synthetic-4-layers"),
        ("synthetic:nano:layers=4:seed=7", SyntheticName("nano", 4, 7), "nano-synthetic-4-layers-seed-7"),
        ("synthetic:nano:seed=7", SyntheticName("nano", None, 7), "nano-synthetic-seed-7"),
    ],
)
def test_names(text: str, expected: SyntheticName, folder: str) -> None:
    name = SyntheticName.parse(text)
    assert name == expected
    assert name.folder_name == folder


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("synthetic:", "PRESET"),
        ("synthetic:v5", "v4-flash"),
        ("synthetic:nano:layers=0", "1 to 8"),
        ("synthetic:nano:layers=9", "1 to 8"),
        ("synthetic:nano:seed=1:layers=2", "PRESET"),
    ],
)
def test_a_wrong_name_says_what_is_expected(text: str, problem: str) -> None:
    with pytest.raises(BadName, match=problem):
        SyntheticName.parse(text)


def test_config_key_takes_a_name_or_a_path(tmp_path: Path, state: Path) -> None:
    named = config_from_mapping({"model": "synthetic:nano:layers=3"}, source="x", base=tmp_path)
    assert named.model == state / "models" / "nano-synthetic-3-layers"
    assert named.served_name == "nano-synthetic-3-layers"
    assert config_from_mapping({"model": "some/folder"}, source="x", base=tmp_path).model == tmp_path / "some/folder"
    with pytest.raises(ConfigError, match="model: .*preset"):
        config_from_mapping({"model": "synthetic:other"}, source="x", base=tmp_path)


def test_folder_is_a_sound_checkpoint_for_workers_and_router(tmp_path: Path) -> None:
    folder = model_folder("synthetic:v4-flash:layers=3", tmp_path)
    checked = check_directory(folder).require_sound()
    assert checked.config.compress_ratios == V4_FLASH.compress_ratios[:3]
    assert ModelInfo.from_dir(folder, name="x").vocab_size == V4_FLASH.vocab_size
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert len(before) == 4
    assert model_folder("synthetic:v4-flash:layers=3", tmp_path) == folder
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before, "who reads them is not disturbed"


def test_a_damaged_folder_is_written_anew(tmp_path: Path) -> None:
    folder = model_folder("synthetic:nano:layers=3", tmp_path)
    for path in folder.iterdir():
        path.write_bytes(b"\xff{")
    assert model_folder("synthetic:nano:layers=3", tmp_path) == folder
    assert check_directory(folder).require_sound().config.num_hidden_layers == 3
    assert len(list(folder.iterdir())) == 4, "no part of a file stays behind"


@pytest.mark.parametrize("vocab_size", [NANO.vocab_size, V4_FLASH.vocab_size])
def test_every_token_has_a_text_of_its_own(vocab_size: int) -> None:
    found = ChatTokenizer(json.dumps(tokenizer(vocab_size)))
    assert found.vocab_size == vocab_size
    assert len({found.token_bytes(number) for number in range(vocab_size)}) == vocab_size
    assert min(len(found.token_bytes(number)) for number in range(vocab_size)) >= 1


def test_a_word_of_three_letters_is_one_token_at_the_full_vocabulary() -> None:
    found = ChatTokenizer(json.dumps(tokenizer(V4_FLASH.vocab_size)))
    draw = random.Random(1)
    text = " ".join("".join(draw.choices(string.ascii_lowercase, k=3)) for _ in range(500))
    ids = found.encode_raw(text, add_bos=False)
    assert len(ids) == 500
    assert Detokenizer(found).push(tuple(ids)) == text
    other = "Zwölf Boxkämpfer, 12!\n\tjagen..."
    assert Detokenizer(found).push(tuple(found.encode_raw(other, add_bos=False))) == other


@pytest.mark.parametrize("vocab_size", [200, 1_000_000])
def test_impossible_vocabularies_are_refused(vocab_size: int) -> None:
    with pytest.raises(BadName, match=str(vocab_size)):
        tokenizer(vocab_size)
