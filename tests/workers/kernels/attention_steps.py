"""Steps of attention over shuffled, poisoned fp8 pages: what the attention kernels are tested and timed on.

A step has one token of each of several sequences (decode) or runs of tokens of each (prefill). Only the rows that its
tokens may see are written; every other byte of the pools is 0xFF, NaN in each format.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.pools.pool import Pool
from kvstore.spec import PoolName, build_kv_spec
from workers.reference import kv_format
from workers.reference.norm_rope import apply_rope, rms_norm
from workers.reference.sparse_attention import sparse_attention as reference_attention

PAGE_TOKENS, WINDOW, ROPE, EPS = 256, 128, 64, 1e-6


@dataclass
class Meta:
    """Step metadata as the kernels take it."""

    positions: Tensor
    sequence_of_token: Tensor
    full_pages: Tensor
    window_pages: Tensor
    start: Tensor
    cu_starts: Tensor

    def rows(self, tokens: Sequence[int]) -> Meta:
        """The same tables for some of the tokens, for decode."""
        index = torch.tensor(tokens, dtype=torch.int64, device=self.positions.device)
        tables = (self.full_pages, self.window_pages, self.start, self.cu_starts)
        return Meta(self.positions[index], self.sequence_of_token[index], *tables)


@dataclass
class AttentionStep:
    """Inputs of one call, and the expected result."""

    meta: Meta
    q: Tensor  # bf16 [T, > H * hd]
    window: Pool
    entries: Pool | None
    selected: Tensor | None
    ratio: int
    sink: Tensor
    rope_table: Tensor
    heads: int
    head_dim: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, int, Tensor, Tensor]:
        """Arguments of the kernel between `meta` and `out`."""
        entry_pool = None if self.entries is None else self.entries.data[0]
        return self.window.data[0], entry_pool, self.selected, self.ratio, self.sink, self.rope_table

    def expected(self, tokens: Sequence[int] | None = None) -> Tensor:
        """fp32 [T, H * hd] by the reference, from the stored rows."""
        tokens = range(self.q.shape[0]) if tokens is None else tokens
        return torch.stack([self._expected_of(t) for t in tokens])

    def _expected_of(self, token: int) -> Tensor:
        position, b = int(self.meta.positions[token]), int(self.meta.sequence_of_token[token])
        if position < 0:
            return torch.zeros(self.heads * self.head_dim, device=self.q.device)
        cos, sin = self.rope_table[position].split(ROPE // 2)
        q = self.q[token, : self.heads * self.head_dim].float().view(self.heads, self.head_dim)
        q = apply_rope(rms_norm(q, None, EPS), cos, sin)
        rows = self._read(self.window, self.meta.window_pages[b], range(max(0, position + 1 - WINDOW), position + 1))
        if self.ratio == 4 and self.selected is not None and self.entries is not None:
            chosen = [int(r) for r in self.selected[token].tolist() if r >= 0]
            rows = torch.cat([rows, self._read(self.entries, self.meta.full_pages[b], chosen)])
        elif self.ratio == 128 and self.entries is not None:
            visible = range((position + 1) // 128)
            rows = torch.cat([rows, self._read(self.entries, self.meta.full_pages[b], visible)])
        mask = torch.ones(1, rows.shape[0], dtype=torch.bool, device=rows.device)
        out = reference_attention(q[None], rows[None], mask, self.sink, self.head_dim**-0.5)[0]
        return apply_rope(out, cos, -sin).flatten()

    def _read(self, pool: Pool, pages: Tensor, rows: Sequence[int]) -> Tensor:
        row = torch.tensor(rows, dtype=torch.int64, device=pages.device)
        per_unit = pool.spec.rows_per_unit
        location = pages[row // per_unit].long() * per_unit + row % per_unit
        return kv_format.unpack_kv_fp8(pool.read_rows(0, location), self.head_dim, ROPE)


def attention_step(
    device: torch.device,
    runs: Sequence[tuple[int, int]],
    *,
    ratio: int,
    heads: int = 8,
    head_dim: int = 512,
    num_selected: int = 512,
    seed: int = 0,
    capacity_pages: int = 0,
) -> AttentionStep:
    """A step of `runs`: (first position, tokens) of each sequence; a first position of -1 is a padding token.

    capacity_pages: least columns of the page tables, beyond what the positions need.
    """
    random = torch.Generator().manual_seed(seed)
    spec = build_kv_spec([ratio], head_dim=head_dim, rope_dim=ROPE, index_head_dim=128, window=WINDOW, fmt="fp8")
    counts = [count for _, count in runs]
    ends = [start + count for start, count in runs]
    columns = max(capacity_pages, *(-(-max(end, 1) // PAGE_TOKENS) for end in ends))
    num_units = columns * len(runs) + 2
    tables = torch.full((2, len(runs), columns), -1, dtype=torch.int32)
    for space in range(2):
        order = torch.randperm(num_units, generator=random).tolist()
        for b, end in enumerate(ends):
            for page in range(-(-end // PAGE_TOKENS)):
                tables[space, b, page] = order.pop()
    window = _poisoned(Pool(spec.pool(PoolName.WINDOW), num_units, device))
    for b, (start, count) in enumerate(runs):
        if start >= 0:
            _fill(window, tables[1, b], range(max(0, start + 1 - WINDOW), start + count), head_dim, random)
            tables[1, b, : max(0, start + 1 - WINDOW) // PAGE_TOKENS] = -1  # reclaimed
    entries = None
    if ratio:
        entries = _poisoned(Pool(spec.pool(PoolName.C4 if ratio == 4 else PoolName.C128), num_units, device))
        for b, end in enumerate(ends):
            _fill(entries, tables[0, b], range(end // ratio), head_dim, random)
    positions = [start + i if start >= 0 else -1 for start, count in runs for i in range(count)]
    selected = None
    if ratio == 4:
        selected = torch.full((len(positions), num_selected), -1, dtype=torch.int32)
        for row, position in zip(selected, positions, strict=True):
            visible = torch.randperm((position + 1) // 4, generator=random)[:num_selected]
            row[: len(visible)] = visible.int()
    angles = torch.arange(max(1, *ends)).float()[:, None] * 160000.0 ** (-torch.arange(0, ROPE, 2).float() / ROPE)
    sequences = [b for b, (_, count) in enumerate(runs) for _ in range(count)]
    q = torch.randn(len(positions), heads * head_dim + 64, generator=random) * 3
    return AttentionStep(
        meta=Meta(
            positions=torch.tensor(positions, dtype=torch.int32, device=device),
            sequence_of_token=torch.tensor(sequences, dtype=torch.int32, device=device),
            full_pages=tables[0].to(device),
            window_pages=tables[1].to(device),
            start=torch.tensor([max(start, 0) for start, _ in runs], dtype=torch.int32, device=device),
            cu_starts=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device),
        ),
        q=q.bfloat16().to(device),
        window=window,
        entries=entries,
        selected=None if selected is None else selected.to(device),
        ratio=ratio,
        sink=(torch.randn(heads, generator=random) * 2).to(device),
        rope_table=torch.cat((angles.cos(), angles.sin()), dim=1).to(device),
        heads=heads,
        head_dim=head_dim,
    )


def _poisoned(pool: Pool) -> Pool:
    pool.data.fill_(0xFF)
    return pool


def _fill(pool: Pool, pages: Tensor, rows: range, head_dim: int, random: torch.Generator) -> None:
    """Random entries of different sizes in `rows` of one sequence."""
    row = torch.arange(rows.start, rows.stop)
    per_unit = pool.spec.rows_per_unit
    entries = torch.randn(len(rows), head_dim, generator=random) * torch.rand(len(rows), 1, generator=random) * 2
    location = pages.cpu()[row // per_unit].long() * per_unit + row % per_unit
    pool.write_rows(0, location.to(pool.data.device), kv_format.pack_kv_fp8(entries, ROPE).to(pool.data.device))
