"""What travels with a prompt's KV: the bytes, and what a cache makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from workers.experts.policy import LFRU, LRU
from workers.experts.prompt_uses import encode_uses, shares_of
from workers.experts.residency import Residency


def test_shares_survive_the_bytes_within_their_steps() -> None:
    rng = np.random.default_rng(3)
    tokens = 5000
    uses = np.stack([np.bincount(rng.zipf(1.3, (tokens, 2)).ravel() % 16, minlength=16) for _ in range(3)]).ravel()
    shares = shares_of(encode_uses(uses), 48, layers=3, top_k=2)
    assert shares is not None
    assert np.allclose(shares, np.minimum(1.0, uses / tokens), rtol=0.1, atol=1e-3)
    assert np.array_equal(shares == 0, uses == 0)


def test_counts_beyond_the_scale_are_the_largest_code() -> None:
    assert encode_uses(np.array([0, 1, 1 << 40])) == bytes([0, 12, 255])


def test_bytes_of_another_model_and_of_no_prompt_mean_nothing() -> None:
    assert encode_uses(np.zeros(8, np.int64)) == b""
    for raw in (b"", bytes(8), bytes(range(9))):
        assert shares_of(raw, 8, layers=2, top_k=1) is None


@pytest.mark.parametrize("policy", [LFRU, LRU])
def test_a_prompt_displaces_what_nobody_used_lately(policy) -> None:  # type: ignore[no-untyped-def]
    residency = Residency(1, 8, 1, policy)
    residency.note(np.array([9, 9, 0, 0, 0, 0, 0, 0]), 9)
    residency.note(np.zeros(8, np.int64), 200)
    shares = np.array([0.0, 0.0, 0.9, 0.8, 0.0, 0.0, 0.0, 0.0])
    residency.note_prompt(shares)
    moves = residency.decide(np.array([0, 1]), 0, 8, keep=lambda pairs: np.zeros(len(pairs), bool))
    assert sorted(moves.enter.tolist()) == [2, 3] and sorted(moves.leave.tolist()) == [0, 1]


def test_many_prompts_do_not_outgrow_the_steps_that_follow() -> None:
    residency = Residency(1, 4, 1, LFRU)
    for _ in range(100):
        residency.note_prompt(np.array([1.0, 0.0, 0.0, 0.0]))
    for _ in range(100):
        residency.note(np.array([0, 8, 0, 0]), 8)
    moves = residency.decide(np.array([0]), 0, 1, keep=lambda pairs: np.zeros(len(pairs), bool))
    assert moves.enter.tolist() == [1] and moves.leave.tolist() == [0]
