"""Two workers promise each other disjoint sets, which together are everything whenever there is room."""

from __future__ import annotations

import numpy as np
import pytest

from workers.experts.complement import promised

LAYERS, EXPERTS = 7, 16
PAIRS = LAYERS * EXPERTS


@pytest.mark.parametrize("is_even", [False, True])
@pytest.mark.parametrize("slots", [(PAIRS, PAIRS), (98, 98), (98, 40), (40, 98), (PAIRS - 30, 30), (56, 56), (500, 3)])
def test_nothing_is_left_out_when_both_together_have_room(slots: tuple[int, int], is_even: bool) -> None:
    first, second = (promised(side, slots, LAYERS, EXPERTS, is_even=is_even) for side in (0, 1))
    assert len(first) <= slots[0] and len(second) <= slots[1]
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(PAIRS))


def test_prefill_promises_all_and_decode_only_the_rest() -> None:
    first, second = (promised(side, (98, 90), LAYERS, EXPERTS, is_even=False) for side in (0, 1))
    assert len(first) == 98 and len(second) == PAIRS - 98
    first, second = (promised(side, (98, 90), LAYERS, EXPERTS, is_even=True) for side in (0, 1))
    assert len(first) == len(second) == PAIRS // 2


@pytest.mark.parametrize(("is_even", "expected"), [(False, (40, 20)), (True, (20, 20))])
def test_without_room_for_everything_a_decoding_worker_keeps_half_of_its_slots(
    is_even: bool, expected: tuple[int, int]
) -> None:
    first, second = (promised(side, (40, 40), LAYERS, EXPERTS, is_even=is_even) for side in (0, 1))
    assert (len(first), len(second)) == expected and not set(first) & set(second)


def test_every_layer_gets_its_equal_share() -> None:
    for side in (0, 1):
        layers = promised(side, (61, 70), LAYERS, EXPERTS, is_even=False) // EXPERTS
        counts = np.bincount(layers, minlength=LAYERS)
        assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="side 2"):
        promised(2, (1, 1), LAYERS, EXPERTS, is_even=False)


def test_decode_promises_what_a_profile_says_it_keeps_anyway() -> None:
    profile = np.random.default_rng(3).random(PAIRS)
    first, second = (promised(side, (98, 90), LAYERS, EXPERTS, is_even=False, profile=profile) for side in (0, 1))
    assert len(second) == PAIRS - 98 and profile[second].min() > profile[first].max()
    assert np.array_equal(np.sort(np.concatenate([first, second])), np.arange(PAIRS))
    even = [promised(0, (98, 90), LAYERS, EXPERTS, is_even=True, profile=values) for values in (profile, None)]
    assert np.array_equal(*even), "equal workers share hot and cold"
