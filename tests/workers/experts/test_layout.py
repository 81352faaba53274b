"""Parts of an expert and codes of places."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.support.expert_bytes import parts_of, write_expert
from workers.experts.layout import TIER_SHIFT, ExpertShape, Tier, code_of

SHAPES = ((4096, 2048), (7168, 3072), (256, 128))
"""V4-Flash, V4-Pro, dsv4-nano."""


def test_an_expert_of_v4_flash_has_the_checkpoints_bytes() -> None:
    assert ExpertShape(4096, 2048).expert_bytes == 13_369_344


@pytest.mark.parametrize(("hidden", "inner"), SHAPES)
def test_parts_follow_each_other_without_gap_or_overlap(hidden: int, inner: int) -> None:
    shape = ExpertShape(hidden, inner)
    offsets = shape.offsets()
    assert list(offsets) == ["w1", "w3", "w2"]
    parts = [(codes, shape.codes_bytes) for codes, _ in offsets.values()]
    parts += [(scales, shape.scales_bytes) for _, scales in offsets.values()]
    end = 0
    for start, size in parts:
        assert start == end and start % 16 == 0
        end += size
    assert end == shape.expert_bytes


def test_written_tensors_are_read_back() -> None:
    shape = ExpertShape(256, 128)
    expert = torch.arange(shape.expert_bytes).to(torch.uint8)
    copy = torch.empty_like(expert)
    write_expert(shape, {name: view.view(torch.int8) for name, view in parts_of(shape, expert).items()}, copy)
    assert torch.equal(copy, expert)


def test_sizes_that_loads_cannot_serve_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 128"):
        ExpertShape(200, 128)


def test_a_code_is_tier_and_index() -> None:
    assert code_of(Tier.PEER, 5) == 2 << TIER_SHIFT | 5
    with pytest.raises(ValueError, match="24 bits"):
        code_of(Tier.HOST, 1 << TIER_SHIFT)


def test_the_layout_needs_no_torch() -> None:
    code = "import sys, workers.experts.layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
