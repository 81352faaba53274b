"""What a step's tables may not say: kernels follow them to raw memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvstore.pools.aggregate import PoolSizes
from tests.support.tiny import tiny_config
from workers.batch import NO_PAGE, ForwardBatch, check_batch
from workers.model.config import PAGE_TOKENS

SIZES = PoolSizes(full_pages=4, window_pages=3, slots=2)
CONFIG = tiny_config()


class Tables:
    def __init__(self, full: tuple[int, ...], window: tuple[int | None, ...], slot: int) -> None:
        self.full_pages, self.window_pages, self.slot = full, window, slot


def batch() -> ForwardBatch:
    """A sequence in its third page whose first window page is gone, and a new one."""
    start = 2 * PAGE_TOKENS + CONFIG.sliding_window
    items = [(Tables((0, 3, 1), (None, 0, 2), 1), start, [5]), (Tables((2,), (1,), 0), 0, [1, 2])]
    return ForwardBatch.build(items)


def test_a_step_inside_its_pages_is_let_through() -> None:
    check_batch(batch(), CONFIG, SIZES, num_pages=3)


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("token ids", lambda b: b.token_ids.__setitem__(1, CONFIG.vocab_size)),
        ("token ids", lambda b: b.token_ids.__setitem__(1, -1)),
        ("slots", lambda b: b.slots.__setitem__(0, SIZES.slots)),
        ("slots", lambda b: b.slots.fill_(1)),
        ("unmapped", lambda b: b.full_pages.__setitem__((0, 0), NO_PAGE)),
        ("unmapped", lambda b: b.full_pages.__setitem__((0, 2), SIZES.full_pages)),
        ("unmapped", lambda b: b.window_pages.__setitem__((0, 2), NO_PAGE)),
        ("unmapped", lambda b: b.window_pages.__setitem__((1, 0), SIZES.window_pages)),
    ],
)
def test_whatever_does_not_exist_is_refused(what: str, damage: Callable[[ForwardBatch], object]) -> None:
    step = batch()
    damage(step)
    with pytest.raises(ValueError, match=what):
        check_batch(step, CONFIG, SIZES)


def test_more_pages_than_the_tables_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="tables hold 2"):
        check_batch(batch(), CONFIG, SIZES, num_pages=2)
