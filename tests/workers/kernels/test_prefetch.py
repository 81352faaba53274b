"""Launch arguments of bulk prefetches. That bytes come to L2 shows only in times."""

from __future__ import annotations

import pytest
import torch

from workers.kernels.prefetch import AHEAD_BYTES, SHARE_LIMIT, SHARE_STEP, ahead_of


@pytest.mark.parametrize("programs", [1, 7, 64, 132, 528])
@pytest.mark.parametrize("shape", [(4096, 4096), (8192, 4096), (256, 256), (3, 16)])
def test_shares_stay_inside_the_weight_and_within_one_instruction(shape: tuple[int, int], programs: int) -> None:
    weight = torch.empty(shape, dtype=torch.uint8)
    pointer, share = ahead_of(weight, weight, programs)
    assert pointer.data_ptr() == weight.data_ptr()
    assert share % SHARE_STEP == 0 and 0 <= share <= SHARE_LIMIT
    wanted = min(weight.nbytes, AHEAD_BYTES)
    assert share * programs <= wanted
    assert share == SHARE_LIMIT or wanted - share * programs < programs * SHARE_STEP


def test_bytes_of_any_dtype_count() -> None:
    weight = torch.empty(1024, 1024, dtype=torch.bfloat16)
    pointer, share = ahead_of(weight, weight, 64)
    assert pointer.dtype == torch.uint8 and share * 64 == 2 << 20


def test_nothing_is_brought_of_no_weight() -> None:
    other = torch.empty(4, 8, dtype=torch.bfloat16)
    pointer, share = ahead_of(None, other, 64)
    assert pointer.data_ptr() == other.data_ptr() and share == 0


def test_a_weight_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        ahead_of(torch.empty(64, 64)[:, :32], torch.empty(1), 4)
