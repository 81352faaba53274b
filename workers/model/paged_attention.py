"""Attention of one layer over the paged KV of many sequences, in plain torch.

Every step of it works per token, found through (sequence, position), so prefill chunks and decode tokens share one code
path and a sequence's result does not depend on where its chunks were cut:

    1. write the window row of each new token
    2. project raw compressor rows; pool each entry that a new token finishes, its source rows coming from this chunk
       or, before it, from the slot's ring; write entries and indexer keys; only then write the rings
    3. per block of queries: window rows, plus the selected C4 or all visible C128 entries, through the page tables

Visibility is decided from positions alone ((t + 1) // ratio entries, 128 window rows including t itself), never from
what a page or ring happens to hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvstore.spec import PoolName
from workers.batch import ForwardBatch
from workers.model import layers as parts
from workers.model.config import LayerKind, ModelConfig
from workers.model.paged_kv import PagedKV
from workers.model.precision import Precision
from workers.model.weights import AttentionWeights, CompressorWeights
from workers.reference.compressor import compress_finish, compress_pool, compress_project, visible_entries
from workers.reference.indexer import index_scores, select_topk
from workers.reference.norm_rope import rope_cos_sin
from workers.reference.sparse_attention import sparse_attention

BLOCK_FLOATS = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Gathered floats that one block of queries may hold (64 MiB; on a GPU 512 MiB, where launches cost more than memory):
bounds memory, does not change results."""

POOLED_TOKENS = {LayerKind.C4: 8, LayerKind.C128: 128}
"""Source rows of one entry, and length of the layer's state ring."""


@dataclass(frozen=True, slots=True)
class EntryPools:
    """Which pools one compressor writes: its entries (None: indexer keys) and its ring."""

    state: PoolName
    entries: PoolName


MAIN_C4 = EntryPools(PoolName.C4_STATE, PoolName.C4)
MAIN_C128 = EntryPools(PoolName.C128_STATE, PoolName.C128)
INDEXER_C4 = EntryPools(PoolName.C4_INDEXER_STATE, PoolName.C4_INDEXER)


class PagedAttention:
    """The attention sublayer of every layer over one set of pools. Writes KV of the batch's pages and slots."""

    def __init__(self, config: ModelConfig, precision: Precision, kv: PagedKV) -> None:
        self.config, self.precision, self.kv = config, precision, kv

    def forward(self, x: Tensor, layer: int, weights: AttentionWeights, batch: ForwardBatch) -> Tensor:
        """Normed hidden states [T, hidden] to the sublayer output [T, hidden]."""
        config, precision = self.config, self.precision
        kind = config.layer_kinds[layer]
        rope = parts.Rope.at(config, kind, batch.positions)
        latent, q = parts.attention_queries(weights, config, x, rope, precision)  # [T, q_lora], [T, H, D]
        where = self.kv.locations(PoolName.WINDOW, batch, batch.sequence_of_token, batch.positions)
        self.kv.write_entries(PoolName.WINDOW, layer, where, parts.window_entry(weights, config, x, rope, precision))
        index_q = None
        if weights.compressor is not None:
            main = MAIN_C4 if kind is LayerKind.C4 else MAIN_C128
            self._compress(x, layer, weights.compressor, main, kind, batch)
        if weights.indexer is not None:
            self._compress(x, layer, weights.indexer.compressor, INDEXER_C4, kind, batch)
            index_q = parts.index_queries(weights.indexer, config, x, latent, rope, precision)
        heads = self._attend(q, index_q, layer, kind, weights.attn_sink, batch)
        return parts.attention_output(weights, config, heads, rope, precision)

    def _compress(
        self,
        x: Tensor,
        layer: int,
        weights: CompressorWeights,
        pools: EntryPools,
        kind: LayerKind,
        batch: ForwardBatch,
    ) -> None:
        """Write the entries that the batch finishes, then the ring rows that later entries will need."""
        ratio, ring = kind.value, POOLED_TOKENS[kind]
        rows = compress_project(x, weights.wkv, weights.wgate)  # [T, W]
        finishing = ((batch.positions + 1) % ratio == 0).nonzero().squeeze(1)  # [F] token indices
        for part in finishing.split(max(1, BLOCK_FLOATS[x.device.type] // (ring * rows.shape[-1]))):
            self._pool_entries(rows, part, layer, weights, pools, kind, batch)
        ends = batch.start + batch.num_new
        kept = (batch.positions >= ends[batch.sequence_of_token] - ring).nonzero().squeeze(1)
        where = self.kv.locations(pools.state, batch, batch.sequence_of_token[kept], batch.positions[kept])
        self.kv.write_state(pools.state, layer, where, rows[kept])

    def _pool_entries(
        self,
        rows: Tensor,
        finishing: Tensor,
        layer: int,
        weights: CompressorWeights,
        pools: EntryPools,
        kind: LayerKind,
        batch: ForwardBatch,
    ) -> None:
        """Pool and write the entries whose last token is `finishing [F]` (indices on the token axis)."""
        ratio, span = kind.value, POOLED_TOKENS[kind]
        sequence = batch.sequence_of_token[finishing]  # [F]
        last = batch.positions[finishing]
        source = last.unsqueeze(1) + torch.arange(1 - span, 1, device=last.device)  # [F, R] positions
        begin = batch.start[sequence].unsqueeze(1)
        in_chunk = source >= begin
        token = (batch.cu_starts[sequence].unsqueeze(1) + source - begin).clamp(min=0)
        present = source >= 0
        where = self.kv.locations(pools.state, batch, sequence.unsqueeze(1).expand_as(source), source.clamp(min=0))
        stored = self.kv.read_state(pools.state, layer, where, present & ~in_chunk)
        gathered = torch.where(in_chunk.unsqueeze(-1), rows[token], stored)  # [F, R, W]
        pooled = compress_pool(gathered, present, weights.ape, ratio=ratio)
        cos, sin = rope_cos_sin(self.config, kind, last + 1 - ratio)
        entry = compress_finish(pooled, weights.norm, cos, sin, self.config.rms_norm_eps)
        where = self.kv.locations(pools.entries, batch, sequence, last // ratio)
        if pools.entries is PoolName.C4_INDEXER:
            self.kv.write_index_keys(layer, where, entry)
        else:
            self.kv.write_entries(pools.entries, layer, where, entry)

    def _attend(
        self,
        q: Tensor,
        index_q: tuple[Tensor, Tensor] | None,
        layer: int,
        kind: LayerKind,
        sink: Tensor,
        batch: ForwardBatch,
    ) -> Tensor:
        """Sparse attention [T, H, D] over window and compressed rows, in blocks of queries."""
        num_entries = 0 if kind is LayerKind.SLIDING else int(visible_entries(batch.positions, kind.value).max())
        per_query = (self.config.sliding_window + min(num_entries, self.config.index_topk)) * self.config.head_dim
        if kind is LayerKind.C4:
            per_query = max(per_query, num_entries * self.config.index_head_dim)
        elif kind is LayerKind.C128:
            per_query = (self.config.sliding_window + num_entries) * self.config.head_dim
        out = []
        block = max(1, BLOCK_FLOATS[q.device.type] // per_query)
        for tokens in torch.arange(q.shape[0], device=q.device).split(block):
            kv, mask = self._window_rows(layer, tokens, batch)
            if kind is LayerKind.C4 and index_q is not None:
                rows, valid = self._select(index_q[0][tokens], index_q[1][tokens], layer, tokens, batch)
                more = self._entry_rows(PoolName.C4, layer, tokens, rows, valid, batch)
                kv, mask = torch.cat((kv, more), dim=1), torch.cat((mask, valid), dim=1)
            elif kind is LayerKind.C128:
                rows, valid = self._visible_rows(tokens, kind, batch)
                more = self._entry_rows(PoolName.C128, layer, tokens, rows, valid, batch)
                kv, mask = torch.cat((kv, more), dim=1), torch.cat((mask, valid), dim=1)
            out.append(sparse_attention(q[tokens], kv, mask, sink, self.config.head_dim**-0.5))
        return torch.cat(out)

    def _window_rows(self, layer: int, tokens: Tensor, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """KV of positions t-127 .. t of each query: ([t, 128, D], mask [t, 128])."""
        back = torch.arange(1 - self.config.sliding_window, 1, device=tokens.device)
        rows = batch.positions[tokens].unsqueeze(1) + back
        valid = rows >= 0
        return self._entry_rows(PoolName.WINDOW, layer, tokens, rows.clamp(min=0), valid, batch), valid

    def _entry_rows(
        self, name: PoolName, layer: int, tokens: Tensor, rows: Tensor, valid: Tensor, batch: ForwardBatch
    ) -> Tensor:
        """Stored entries [t, K, D] of `rows [t, K]` of each query's own sequence."""
        sequences = batch.sequence_of_token[tokens].unsqueeze(1).expand_as(rows)
        return self.kv.read_entries(name, layer, self.kv.locations(name, batch, sequences, rows), valid)

    def _visible_rows(self, tokens: Tensor, kind: LayerKind, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """All entry rows that any of these queries sees: (rows [t, N], valid [t, N])."""
        counts = visible_entries(batch.positions[tokens], kind.value)
        rows = torch.arange(int(counts.max()), device=tokens.device).expand(tokens.shape[0], -1)
        valid = rows < counts.unsqueeze(1)
        return rows.masked_fill(~valid, 0), valid

    def _select(
        self, q: Tensor, head_weights: Tensor, layer: int, tokens: Tensor, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """The indexer's choice for each query: (rows [t, K], valid [t, K])."""
        rows, visible = self._visible_rows(tokens, LayerKind.C4, batch)
        if not rows.shape[1]:
            return rows, visible
        sequences, inverse = batch.sequence_of_token[tokens].unique(return_inverse=True)
        every = torch.arange(rows.shape[1], device=tokens.device).expand(sequences.shape[0], -1)  # [U, N]
        reach = torch.zeros(sequences.shape[0], dtype=torch.int64, device=tokens.device)
        reach = reach.scatter_reduce(0, inverse, visible.sum(1), "amax")
        present = every < reach.unsqueeze(1)
        where = self.kv.locations(
            PoolName.C4_INDEXER,
            batch,
            sequences.unsqueeze(1).expand_as(every),
            every.masked_fill(~present, 0),
        )
        keys = self.kv.read_index_keys(layer, where, present)  # [U, N, Di]
        scores = index_scores(q, head_weights, keys[0] if len(sequences) == 1 else keys[inverse])
        return select_topk(scores, visible, self.config.index_topk)
