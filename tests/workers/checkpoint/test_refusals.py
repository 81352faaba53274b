"""Every kind of damage is refused by file, tensor, expected and found; `inspect` lists what loading refuses."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.workers.checkpoint.editing import (
    Header,
    edit_header,
    edit_json,
    poke,
    read_shard,
    replace_tensor,
    shard_of,
    write_shard,
)
from workers.checkpoint.check import check_directory
from workers.checkpoint.index import INDEX_NAME, MAX_HEADER_BYTES
from workers.checkpoint.inspect import inspect_directory
from workers.checkpoint.load import iter_tensors, load_named
from workers.errors import BadCheckpoint

NORM = "layers.1.attn.kv_norm.weight"
EXPERT = "layers.1.ffn.experts.2.w1.weight"
EXPERT_SCALE = "layers.1.ffn.experts.2.w1.scale"
LINEAR = "layers.1.attn.wkv.weight"
LINEAR_SCALE = "layers.1.attn.wkv.scale"
TABLE = "layers.0.ffn.gate.tid2eid"


def refusal(directory: Path, *, tensor: str | None, file: str | None = None) -> BadCheckpoint:
    """The error of `load_named`, which `iter_tensors` and a full inspection must share."""
    with pytest.raises(BadCheckpoint) as caught:
        load_named(directory)
    error = caught.value
    with pytest.raises(BadCheckpoint, match=".") as from_iteration:
        list(iter_tensors(directory))
    assert str(from_iteration.value) == str(error)
    problems = inspect_directory(directory, values=True).problems
    assert (error.file, error.tensor, str(error.expected)) in [(p.file, p.tensor, p.expected) for p in problems]
    assert error.tensor == tensor
    if file is not None:
        assert error.file == str(directory / file)
    return error


def test_missing_tensor(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, NORM, None)
    error = refusal(tiny_dir, tensor=NORM, file=INDEX_NAME)
    assert (error.expected, error.found) == ("BF16 [96]", "nothing")


def test_missing_scale(tiny_dir: Path) -> None:
    file = shard_of(tiny_dir, LINEAR).name
    replace_tensor(tiny_dir, LINEAR_SCALE, None)
    error = refusal(tiny_dir, tensor=LINEAR_SCALE, file=file)
    assert "F8_E8M0" in str(error.expected) and error.found == "nothing"


def test_unknown_extra_tensor(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, "layers.0.attn.q_bias", ("F32", [2], bytes(8)))
    error = refusal(tiny_dir, tensor="layers.0.attn.q_bias")
    assert (error.expected, error.found) == ("no such tensor", "F32 [2]")


def test_scale_beside_a_plain_tensor_is_an_extra(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, LINEAR, ("BF16", [96, 160], bytes(96 * 160 * 2)))
    refusal(tiny_dir, tensor=LINEAR_SCALE)


def test_layer_beyond_the_config_is_an_extra(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, "layers.3.attn_norm.weight", ("BF16", [160], bytes(320)))
    refusal(tiny_dir, tensor="layers.3.attn_norm.weight")


def test_part_of_a_draft_block(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, "mtp.0.enorm.weight", None)
    refusal(tiny_dir, tensor="mtp.0.enorm.weight")


@pytest.mark.parametrize(
    ("tensor", "entry", "expected", "found"),
    [
        (NORM, ("BF16", [48, 2], 192), "BF16 [96]", "BF16 [48, 2]"),
        (EXPERT, ("I8", [32, 79], 32 * 79), "I8 [32, 80]", "I8 [32, 79]"),
        (EXPERT, ("F8_E4M3", [32, 160], 32 * 160), "I8 or U8 or BF16 or F32", "dtype F8_E4M3"),
        (LINEAR, ("I8", [96, 80], 96 * 80), "F8_E4M3 or BF16 or F32", "dtype I8"),
        (LINEAR, ("F8_E4M3", [160, 96], 96 * 160), "F8_E4M3 [96, 160]", "F8_E4M3 [160, 96]"),
        (TABLE, ("F32", [96, 2], 768), "I64 or I32", "dtype F32"),
        (EXPERT_SCALE, ("F32", [32, 5], 640), "F8_E8M0 or U8 [32, 5]", "F32 [32, 5]"),
        (LINEAR_SCALE, ("F8_E8M0", [2, 1], 2), "F8_E8M0 or U8 or F32 [1, 2]", "F8_E8M0 [2, 1]"),
    ],
)
def test_wrong_shape_or_dtype(
    tiny_dir: Path, tensor: str, entry: tuple[str, list[int], int], expected: str, found: str
) -> None:
    file = shard_of(tiny_dir, tensor).name
    replace_tensor(tiny_dir, tensor, (entry[0], entry[1], bytes(entry[2])))
    error = refusal(tiny_dir, tensor=tensor, file=file)
    assert (error.expected, error.found) == (expected, found)


def test_fp32_scales_do_not_fit_packed_fp4_but_nan_ones_are_refused_for_fp8(tiny_dir: Path) -> None:
    replace_tensor(tiny_dir, LINEAR_SCALE, ("F32", [1, 2], struct.pack("<2f", 1.0, float("nan"))))
    assert "1 NaN" in str(refusal(tiny_dir, tensor=LINEAR_SCALE).found)


@pytest.mark.parametrize("tensor", [EXPERT_SCALE, LINEAR_SCALE])
def test_nan_scale_byte(tiny_dir: Path, tensor: str) -> None:
    poke(tiny_dir, tensor, 1, b"\xff")
    error = refusal(tiny_dir, tensor=tensor, file=shard_of(tiny_dir, tensor).name)
    assert (error.expected, error.found) == ("finite scales", "1 NaN scale bytes (255)")


@pytest.mark.parametrize("code", [b"\x7f", b"\xff"])
def test_nan_weight_code(tiny_dir: Path, code: bytes) -> None:
    poke(tiny_dir, LINEAR, 96 * 160 - 1, code)
    assert "1 e4m3 NaN codes" in str(refusal(tiny_dir, tensor=LINEAR).found)


@pytest.mark.parametrize("bits", [b"\xc0\x7f", b"\x80\x7f"])
def test_nan_or_infinity_in_a_plain_tensor(tiny_dir: Path, bits: bytes) -> None:
    poke(tiny_dir, NORM, 2, bits)
    assert "1 NaN or infinite" in str(refusal(tiny_dir, tensor=NORM).found)


def test_expert_id_outside_the_model(tiny_dir: Path) -> None:
    poke(tiny_dir, TABLE, 8, struct.pack("<q", 4))
    error = refusal(tiny_dir, tensor=TABLE)
    assert error.expected == "expert ids 0..3"


@pytest.mark.parametrize("cut", [1, 1000])
def test_truncated_shard(tiny_dir: Path, cut: int) -> None:
    path = shard_of(tiny_dir, NORM)
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    last = max(read_shard(path)[0].items(), key=lambda item: item[1]["data_offsets"])[0]
    error = refusal(tiny_dir, tensor=last, file=path.name)
    assert str(len(data)) in str(error.expected) and "truncated" in str(error.found)


@pytest.mark.parametrize("keep", [0, 7, 8, 100])
def test_shard_truncated_inside_its_header(tiny_dir: Path, keep: int) -> None:
    path = shard_of(tiny_dir, NORM)
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in str(refusal(tiny_dir, tensor=None, file=path.name).found)


def test_shard_that_shrinks_after_its_header_was_read(tiny_dir: Path) -> None:
    tensors = iter_tensors(tiny_dir)
    next(tensors)
    for path in tiny_dir.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
    with pytest.raises(BadCheckpoint, match="truncated"):
        list(tensors)


def test_trailing_bytes(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    path.write_bytes(path.read_bytes() + b"x")
    assert "trailing" in str(refusal(tiny_dir, tensor=None, file=path.name).found)


def test_oversized_header(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + path.read_bytes()[8:])
    error = refusal(tiny_dir, tensor=None, file=path.name)
    assert str(MAX_HEADER_BYTES) in str(error.expected)


@pytest.mark.parametrize(
    "header",
    [b"{", b"\xff\xfe", b"[]", b'{"a":1,"a":2}', b"[" * 100_000, b'{"x":{"dtype":"F32","shape":[1]}}', b'{"x":7}'],
)
def test_garbage_header(tiny_dir: Path, header: bytes) -> None:
    path = shard_of(tiny_dir, NORM)
    write_shard(path, header, b"\0" * 4)
    with pytest.raises(BadCheckpoint, match=path.name):
        load_named(tiny_dir)


def _offsets(value: Any) -> Callable[[Header], None]:
    return lambda header: header[NORM].update(data_offsets=value)


@pytest.mark.parametrize(
    "edit",
    [
        _offsets([-192, 0]),
        _offsets([192, 0]),
        _offsets([0, 191]),
        _offsets([0]),
        _offsets("all"),
        _offsets([True, 193]),
        _offsets([2**62, 2**62 + 192]),
        lambda header: header[NORM].update(dtype="F4"),
        lambda header: header[NORM].update(dtype=["BF16"]),
        lambda header: header[NORM].update(shape=[-96]),
        lambda header: header[NORM].update(shape=[2**40, 2**40]),
        lambda header: header[NORM].update(shape=96),
        lambda header: header[NORM].update(shape=[96.0]),
        lambda header: header[NORM].update(strides=[1]),
    ],
)
def test_header_entry_that_lies(tiny_dir: Path, edit: Callable[[Header], None]) -> None:
    path = shard_of(tiny_dir, NORM)
    edit_header(path, edit)
    with pytest.raises(BadCheckpoint) as caught:
        load_named(tiny_dir)
    assert caught.value.file == str(path)


def test_overlapping_tensors(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    header, payload = read_shard(path)
    names = sorted(header, key=lambda name: header[name]["data_offsets"])
    later = names[names.index(NORM) :]
    for name in later:
        header[name]["data_offsets"] = [offset - 2 for offset in header[name]["data_offsets"]]
    write_shard(path, header, bytes(payload[:-2]))
    assert "overlaps" in str(refusal(tiny_dir, tensor=NORM, file=path.name).found)


def test_hole_between_tensors(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    header, payload = read_shard(path)
    for entry in header.values():
        entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    write_shard(path, header, bytes(8) + bytes(payload))
    with pytest.raises(BadCheckpoint, match="leaves a hole"):
        load_named(tiny_dir)


def test_index_pointing_to_a_missing_shard(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    path.unlink()
    error = refusal(tiny_dir, tensor=None, file=path.name)
    assert "No such file" in str(error.found)


def test_tensor_in_the_index_but_not_in_its_shard(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    edit_json(tiny_dir / INDEX_NAME, lambda d: d["weight_map"].update({"ghost.weight": path.name}))
    refusal(tiny_dir, tensor="ghost.weight", file=path.name)


def test_tensor_that_the_index_puts_elsewhere(tiny_dir: Path) -> None:
    home, other = shard_of(tiny_dir, NORM), shard_of(tiny_dir, "embed.weight")
    edit_json(tiny_dir / INDEX_NAME, lambda d: d["weight_map"].update({NORM: other.name}))
    problems = check_directory(tiny_dir).problems
    assert {(p.file, p.tensor) for p in problems} >= {(str(home), NORM), (str(other), NORM)}
    with pytest.raises(BadCheckpoint):
        load_named(tiny_dir)


def test_tensor_in_a_shard_but_not_in_the_index(tiny_dir: Path) -> None:
    path = shard_of(tiny_dir, NORM)
    edit_json(tiny_dir / INDEX_NAME, lambda d: d["weight_map"].pop(NORM))
    refusal(tiny_dir, tensor=NORM, file=path.name)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "x.bin"}}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        "[" * 100_000,
    ],
)
def test_garbage_index(tiny_dir: Path, text: str) -> None:
    (tiny_dir / INDEX_NAME).write_text(text)
    with pytest.raises(BadCheckpoint) as caught:
        load_named(tiny_dir)
    assert caught.value.file == str(tiny_dir / INDEX_NAME)
    assert len(inspect_directory(tiny_dir).problems) == 1


def test_wrong_total_size_is_only_noted(tiny_dir: Path) -> None:
    edit_json(tiny_dir / INDEX_NAME, lambda d: d["metadata"].update(total_size=5))
    report = inspect_directory(tiny_dir)
    assert not report.problems and "total_size 5" in report.notes[0]


def test_empty_and_absent_directory(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(BadCheckpoint, match=r"config\.json: expected a readable file, found No such file"):
            load_named(directory)


def test_config_without_shards(tiny_dir: Path) -> None:
    for path in tiny_dir.glob("*.safetensors*"):
        path.unlink()
    assert refusal(tiny_dir, tensor=None).found == "neither"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scoring_func": "softmax"}, "'scoring_func' to be 'sqrtsoftplus', found 'softmax'"),
        ({"compress_ratios": [0, 4, 16, 0]}, r"'compress_ratios' to be layer types \(0, 4, 128\) only"),
        ({"hidden_sise": 160}, "nearest: 'hidden_size'"),
    ],
)
def test_wrong_config_value_or_layer_type(tiny_dir: Path, change: dict[str, Any], words: str) -> None:
    edit_json(tiny_dir / "config.json", lambda d: d.update(change))
    with pytest.raises(BadCheckpoint, match=words) as caught:
        load_named(tiny_dir)
    assert caught.value.file == str(tiny_dir / "config.json")


def test_config_of_another_size(tiny_dir: Path) -> None:
    edit_json(tiny_dir / "config.json", lambda d: d.update(vocab_size=97))
    error = refusal(tiny_dir, tensor="embed.weight")
    assert (error.expected, error.found) == ("BF16 [97, 160]", "BF16 [96, 160]")


def test_config_naming_other_experts_than_stored(tiny_dir: Path) -> None:
    edit_json(tiny_dir / "config.json", lambda d: d.update(expert_dtype="fp8"))
    assert refusal(tiny_dir, tensor="layers.0.ffn.experts.0.w1.weight").found == "dtype I8"


def test_random_damage_is_refused_or_harmless(tiny_dir: Path, seed: int) -> None:
    """Flipped header and index bytes never give anything but `BadCheckpoint` or a checkpoint that loads."""
    generator = torch.Generator().manual_seed(seed)
    targets = [shard_of(tiny_dir, NORM), tiny_dir / INDEX_NAME, tiny_dir / "config.json"]
    originals = [path.read_bytes() for path in targets]
    refused = 0
    for round_number in range(90):
        path, original = targets[round_number % 3], originals[round_number % 3]
        span = min(len(original), 8 + struct.unpack("<Q", original[:8])[0]) if path.suffix != ".json" else len(original)
        position = int(torch.randint(0, span, (1,), generator=generator))
        value = int(torch.randint(0, 256, (1,), generator=generator))
        path.write_bytes(original[:position] + bytes([value]) + original[position + 1 :])
        try:
            check_directory(tiny_dir).require_sound()
        except BadCheckpoint:
            refused += 1
        path.write_bytes(original)
    assert refused > 30
    assert json.loads((tiny_dir / INDEX_NAME).read_text())
