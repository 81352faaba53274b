"""`ForwardBatch`: the tensors of one model step, several sequences of different lengths flattened into one token axis.

Owns: the shape letters of the worker package and the layout of a step's inputs. A step may mix prefill chunks (many new
tokens of one sequence) and decode (one new token): every token only knows its sequence and its position, so the model
needs no mode flag. Does not own: which sequences run (scheduler) or the bytes behind a page (`kvstore`).

Shape letters: `T` tokens of the step, `B` sequences, `H` query heads, `D` head size, `K` selected entries, `E` experts,
`S` logical pages of the longest sequence, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kvstore.pools.aggregate import PoolSizes
from workers.model.config import PAGE_TOKENS, ModelConfig

NO_PAGE = -1
"""Filler of page tables: beyond a sequence's last page, or a window page that was reclaimed. Never addressed."""


class PageTables(Protocol):
    """What a step must know of one sequence's memory; `kvstore.SequenceIndices` satisfies it."""

    @property
    def full_pages(self) -> tuple[int, ...]:
        """Physical page of each logical page in the compressed pools."""

    @property
    def window_pages(self) -> tuple[int | None, ...]:
        """Physical page of each logical page in the window pool, `None` once reclaimed."""

    @property
    def slot(self) -> int:
        """Request slot of the compressor-state rings."""


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Inputs of one step, all int64 on one device. Sequence b owns tokens `cu_starts[b] : cu_starts[b + 1]`."""

    token_ids: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] absolute position of each token in its sequence
    sequence_of_token: torch.Tensor  # [T] index into the B axis
    cu_starts: torch.Tensor  # [B+1] first token of each sequence
    full_pages: torch.Tensor  # [B, S] NO_PAGE beyond the end
    window_pages: torch.Tensor  # [B, S] NO_PAGE beyond the end and where reclaimed
    slots: torch.Tensor  # [B]
    start: torch.Tensor  # [B] tokens committed before this step
    num_new: torch.Tensor  # [B] tokens added by this step, >= 1

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.token_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        """B."""
        return int(self.slots.shape[0])

    @property
    def last_token_rows(self) -> torch.Tensor:
        """[B] row on the token axis of each sequence's last new token."""
        return self.cu_starts[1:] - 1

    @staticmethod
    def build(
        items: Sequence[tuple[PageTables, int, Sequence[int]]], device: torch.device | str = "cpu"
    ) -> ForwardBatch:
        """Flatten `(tables, start, new token ids)` per sequence into one batch.

        Raises ValueError when there is nothing to run, a sequence has no new token, or its page tables do not reach
        its last new token.
        """
        if not items:
            raise ValueError("a batch needs at least one sequence")
        starts = np.array([start for _, start, _ in items], dtype=np.int64)
        counts = np.array([len(ids) for _, _, ids in items], dtype=np.int64)
        if (counts < 1).any() or (starts < 0).any():
            raise ValueError(f"every sequence needs start >= 0 and a new token: starts {starts}, counts {counts}")
        ends = starts + counts
        num_pages = -(-ends // PAGE_TOKENS)
        cu_starts = np.zeros(len(items) + 1, dtype=np.int64)
        np.cumsum(counts, out=cu_starts[1:])
        full = np.full((len(items), int(num_pages.max())), NO_PAGE, dtype=np.int64)
        window = full.copy()
        token_ids = np.empty(int(cu_starts[-1]), dtype=np.int64)
        for b, (tables, start, ids) in enumerate(items):
            needed = int(num_pages[b])
            if len(tables.full_pages) < needed or len(tables.window_pages) < needed:
                raise ValueError(
                    f"sequence {b}: tokens {start}..{start + len(ids)} need {needed} pages, tables have "
                    f"{len(tables.full_pages)} full and {len(tables.window_pages)} window pages"
                )
            full[b, :needed] = tables.full_pages[:needed]
            window[b, :needed] = [NO_PAGE if page is None else page for page in tables.window_pages[:needed]]
            token_ids[cu_starts[b] : cu_starts[b + 1]] = ids
        sequence_of_token = np.repeat(np.arange(len(items)), counts)
        positions = np.arange(token_ids.shape[0]) - np.repeat(cu_starts[:-1] - starts, counts)
        slots = np.array([tables.slot for tables, _, _ in items], dtype=np.int64)
        arrays = (token_ids, positions, sequence_of_token, cu_starts, full, window, slots, starts, counts)
        return ForwardBatch(*(torch.from_numpy(array).to(device) for array in arrays))


def check_batch(batch: ForwardBatch, config: ModelConfig, sizes: PoolSizes, num_pages: int | None = None) -> None:
    """Raise ValueError unless every id, page and slot that the step touches exists: kernels address raw memory.

    `batch` is on the CPU. `num_pages`: logical pages that a model's tables have room for, where that is limited.
    """
    ids, slots = batch.token_ids.numpy(), batch.slots.numpy()
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        raise ValueError(f"token ids must be in [0, {config.vocab_size})")
    if slots.min() < 0 or slots.max() >= sizes.slots or len(np.unique(slots)) != len(slots):
        raise ValueError(f"slots {slots} of {sizes.slots}")
    if num_pages is not None and batch.full_pages.shape[1] > num_pages:
        raise ValueError(f"{batch.full_pages.shape[1]} pages a sequence, tables hold {num_pages}")
    start = batch.start.numpy()[:, None]
    last = (start + batch.num_new.numpy()[:, None] - 1) // PAGE_TOKENS
    first = np.maximum(start + 1 - config.sliding_window, 0) // PAGE_TOKENS
    column = np.arange(batch.full_pages.shape[1])
    full, window = batch.full_pages.numpy(), batch.window_pages.numpy()
    lost = ((full < 0) | (full >= sizes.full_pages)) & (column <= last)
    gone = ((window < 0) | (window >= sizes.window_pages)) & (column <= last) & (column >= first)
    if lost.any() or gone.any():
        raise ValueError(f"unmapped (sequence, page): full {np.argwhere(lost)}, window {np.argwhere(gone)}")
