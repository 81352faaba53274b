"""The model over whole sequences of equal length: differentiable, no paging. For training and as the oracle's partner.

Static shapes and no data-dependent control flow, so a training step compiles. Window attention works on a band of
query blocks against two key blocks each, compressed attention on `[T, N]` masks (N entries), experts all run on all
tokens. Memory is `O(B * H * T * N)` per C4 layer; `checkpoint_layers` trades it for recomputation.

The indexer cannot learn from the language loss (selection has no gradient), so each C4 layer can return the divergence
between the main attention's distribution over compressed entries and the indexer's scores. Its gradient reaches only
the indexer's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from workers.model import layers as parts
from workers.model.config import LayerKind, ModelConfig
from workers.model.layers import Rope
from workers.model.precision import Precision
from workers.model.weights import (
    AttentionWeights,
    CompressorWeights,
    FfnWeights,
    LayerWeights,
    ModelWeights,
    TensorInfo,
)
from workers.reference import mhc
from workers.reference.compressor import compress_finish, compress_pool, compress_project, visible_entries
from workers.reference.indexer import index_scores, select_topk
from workers.reference.moe import moe_dense
from workers.reference.norm_rope import rms_norm

MASKED_SCORE = -1e30
"""Score of hidden entries in the indexer's softmax: finite, because an all `-inf` row has a NaN gradient."""


@dataclass(frozen=True, slots=True)
class FullOptions:
    """What a training step may change about the plain function."""

    dense_c4: bool = False
    """C4 layers attend to all visible entries instead of the indexer's top-k."""
    indexer_loss: bool = False
    """Return the indexer divergence of each C4 layer (over the visible set if `dense_c4`, else over the chosen set)."""
    captured_mass: bool = False
    """With `indexer_loss` and `dense_c4`: also measure how much attention mass the top-k choice would have kept."""
    weight_transform: Callable[[TensorInfo, Tensor], Tensor] | None = None
    """Applied to every weight before use, e.g. fake quantisation by `TensorInfo.weight_class`."""
    matmul_dtype: torch.dtype | None = None
    """Autocast dtype of the large linears; mHC, norms, routers, compressors, attention and the head stay fp32."""
    checkpoint_layers: bool = False
    """Recompute each layer in the backward pass instead of keeping its activations."""


class IndexerReport(NamedTuple):
    """Training signal of one C4 layer's indexer."""

    layer: int
    divergence: Tensor
    """Mean over queries with a non-empty set of KL(attention over entries || softmax of index scores); scalar."""
    captured: Tensor | None
    """Mean share of the attention mass on compressed entries that the top-k choice keeps; scalar, no gradient."""


@dataclass(frozen=True, slots=True)
class FullOutput:
    """Result of `run_full` or `mtp_forward`."""

    logits: Tensor
    """fp32 `[B, T, V]`."""
    streams: Tensor
    """fp32 `[B, T, S, D]`: the residual streams before the head collapses them."""
    expert_load: Tensor
    """fp32 `[L, E]`: how many (token, choice) pairs each expert got, per layer."""
    indexer: tuple[IndexerReport, ...]
    """One per C4 layer when `indexer_loss` is on."""


def forward_full(
    weights: ModelWeights,
    config: ModelConfig,
    token_ids: Tensor,
    precision: Precision,
    options: FullOptions | None = None,
) -> Tensor:
    """Logits fp32 `[B, T, V]` of `token_ids [B, T]` at positions 0..T-1."""
    return run_full(weights, config, token_ids, precision, options).logits


def run_full(
    weights: ModelWeights,
    config: ModelConfig,
    token_ids: Tensor,
    precision: Precision,
    options: FullOptions | None = None,
) -> FullOutput:
    """`forward_full` with everything a trainer needs beside the logits."""
    options = options or FullOptions()
    weights = weights if options.weight_transform is None else weights.map(config, options.weight_transform)
    ropes = _RopeTables(config, token_ids.shape[-1], token_ids.device)
    streams = parts.embed_streams(weights, config, token_ids)
    loads, reports = [], []
    for index, kind in enumerate(config.layer_kinds):
        block = _Block(config, kind, precision, options, ropes)
        streams, load, divergence, captured = block.run(weights.layers[index], streams, token_ids)
        loads.append(load)
        if divergence is not None:
            reports.append(IndexerReport(index, divergence, captured))
    logits = parts.head_logits(weights, config, streams)
    return FullOutput(logits, streams, torch.stack(loads), tuple(reports))


def mtp_forward(
    weights: ModelWeights,
    config: ModelConfig,
    streams: Tensor,
    next_ids: Tensor,
    precision: Precision,
    options: FullOptions | None = None,
) -> FullOutput:
    """The MTP block: from the trunk's `streams [B, T, S, D]` at positions p and the known tokens `next_ids [B, T]` at
    p + 1, logits for position p + 2. Source: spec of the official release, `mtp.0`; embedding and head are the trunk's.

    The block runs at positions p; being sliding-only it does not depend on a constant shift of them.
    """
    options = options or FullOptions()
    weights = weights if options.weight_transform is None else weights.map(config, options.weight_transform)
    mtp, eps = weights.mtp[0], config.rms_norm_eps
    with _autocast(options, streams.device):
        embedded = rms_norm(weights.embed[next_ids].float(), mtp.enorm, eps)
        hidden = rms_norm(streams.float(), mtp.hnorm, eps)
        act_fp8 = precision.act_fp8
        mixed = parts.linear(embedded, mtp.e_proj, act_fp8=act_fp8).unsqueeze(-2)
        mixed = (mixed + parts.linear(hidden, mtp.h_proj, act_fp8=act_fp8)).float()
    ropes = _RopeTables(config, next_ids.shape[-1], next_ids.device)
    block = _Block(config, LayerKind.SLIDING, precision, options, ropes)
    out, load, _, _ = block.run(mtp.layer, mixed, next_ids)
    collapsed = parts.collapse_streams(mtp.hc_head, config, out)
    logits = F.linear(rms_norm(collapsed, mtp.norm, eps), weights.head)
    return FullOutput(logits, out, load.unsqueeze(0), ())


def _autocast(options: FullOptions, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=options.matmul_dtype, enabled=options.matmul_dtype is not None)


class _RopeTables:
    """Tables of the token positions and of the entries' first tokens, per layer kind."""

    def __init__(self, config: ModelConfig, num_tokens: int, device: torch.device) -> None:
        self.positions = torch.arange(num_tokens, device=device)
        kinds = set(config.layer_kinds) | {LayerKind.SLIDING}
        self.tokens = {kind: Rope.at(config, kind, self.positions) for kind in kinds}
        self.entries = {
            kind: Rope.at(config, kind, torch.arange(num_tokens // kind.value, device=device) * kind.value)
            for kind in kinds
            if kind is not LayerKind.SLIDING
        }


@dataclass(frozen=True, slots=True)
class _Block:
    """One layer's function; carries what does not vary within a pass."""

    config: ModelConfig
    kind: LayerKind
    precision: Precision
    options: FullOptions
    ropes: _RopeTables

    def run(
        self, layer: LayerWeights, streams: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """New streams, expert load `[E]`, indexer divergence and captured mass."""
        if self.options.checkpoint_layers and torch.is_grad_enabled():
            return checkpoint(self._forward, layer, streams, token_ids, use_reentrant=False)
        return self._forward(layer, streams, token_ids)

    def _forward(
        self, layer: LayerWeights, streams: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        config = self.config
        mixed, post, comb = parts.stream_mix(layer.hc_attn, config, streams)
        x = rms_norm(mixed, layer.attn_norm, config.rms_norm_eps)
        out, divergence, captured = self._attention(layer.attn, x)
        streams = mhc.hc_post(out, streams, post, comb)
        mixed, post, comb = parts.stream_mix(layer.hc_ffn, config, streams)
        x = rms_norm(mixed, layer.ffn_norm, config.rms_norm_eps)
        out, load = self._ffn(layer.ffn, x, token_ids)
        return mhc.hc_post(out, streams, post, comb), load, divergence, captured

    def _ffn(self, ffn: FfnWeights, x: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = parts.route(ffn, self.config, x, token_ids)
        flat = ids.flatten()
        load = torch.zeros(self.config.n_routed_experts, device=x.device)
        load = load.scatter_add(0, flat, torch.ones_like(flat, dtype=load.dtype))
        with _autocast(self.options, x.device):
            limit, act_fp8 = self.config.swiglu_limit, self.precision.act_fp8
            out = moe_dense(x, ids, weights, ffn.experts, ffn.shared_experts, limit, act_fp8)
        return out.float(), load

    def _attention(self, attn: AttentionWeights, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        config, precision = self.config, self.precision
        rope = self.ropes.tokens[self.kind]
        with _autocast(self.options, x.device):
            latent, q = parts.attention_queries(attn, config, x, rope, precision)
            kv = parts.window_entry(attn, config, x, rope, precision)
        latent, q, kv = latent.float(), q.float(), kv.float()
        entries = mask = scores = None
        if attn.compressor is not None and x.shape[1] >= self.kind.value:
            entries = self._entries(attn.compressor, x)
            mask = self._visible(entries.shape[1])
            if attn.indexer is not None:
                scores = self._index_scores(attn, x, latent)
                mask = mask if self.options.dense_c4 else self._choose(scores, mask)
        heads, entry_mass = windowed_attention(q, kv, entries, mask, attn.attn_sink, config.sliding_window)
        divergence = captured = None
        if scores is not None and self.options.indexer_loss:
            divergence, captured = self._indexer_report(scores, entry_mass, mask)
        with _autocast(self.options, x.device):
            out = parts.attention_output(attn, config, heads, rope, precision)
        return out, divergence, captured

    def _pooled(self, compressor: CompressorWeights, x: Tensor) -> Tensor:
        rows = compress_project(x, compressor.wkv, compressor.wgate)
        return pool_sequence(rows, compressor.ape, self.kind.value)

    def _entries(self, compressor: CompressorWeights, x: Tensor) -> Tensor:
        """Compressed KV entries `[B, N, hd]`, as stored."""
        rope = self.ropes.entries[self.kind]
        entry = compress_finish(self._pooled(compressor, x), compressor.norm, *rope, self.config.rms_norm_eps)
        return parts.store_entry(entry, self.config, self.precision)

    def _index_scores(self, attn: AttentionWeights, x: Tensor, latent: Tensor) -> Tensor:
        """Index scores `[B, T, N]`; inputs are detached so that only the indexer learns from them."""
        indexer = attn.indexer
        assert indexer is not None
        x, latent = x.detach(), latent.detach()
        rope = self.ropes.entries[self.kind]
        pooled = self._pooled(indexer.compressor, x)
        keys = compress_finish(pooled, indexer.compressor.norm, *rope, self.config.rms_norm_eps)
        keys = parts.store_index_vector(keys, self.precision)
        q, weights = parts.index_queries(indexer, self.config, x, latent, self.ropes.tokens[self.kind], self.precision)
        return index_scores(q, weights, keys)

    def _visible(self, num_entries: int) -> Tensor:
        """`[1, T, N]`: which entries each query may see."""
        count = visible_entries(self.ropes.positions, self.kind.value)
        return (torch.arange(num_entries, device=count.device) < count.unsqueeze(-1)).unsqueeze(0)

    def _choose(self, scores: Tensor, visible: Tensor) -> Tensor:
        """`[B, T, N]`: the indexer's top-k of the visible entries."""
        num_entries = scores.shape[-1]
        if num_entries <= self.config.index_topk:
            return visible
        indices, valid = select_topk(scores.detach(), visible, self.config.index_topk)
        surplus = indices.masked_fill(~valid, num_entries)  # an extra column swallows the invalid picks
        chosen = torch.zeros(*scores.shape[:-1], num_entries + 1, dtype=torch.bool, device=scores.device)
        return chosen.scatter(-1, surplus, True)[..., :num_entries]

    def _indexer_report(self, scores: Tensor, mass: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """KL of the attention mass over the masked set against the softmax of the index scores over the same set."""
        total = mass.sum(-1, keepdim=True)
        target = mass / total.clamp(min=1e-20)
        log_scores = scores.masked_fill(~mask, MASKED_SCORE).log_softmax(-1)
        terms = target * (target.clamp(min=1e-20).log() - log_scores)
        per_query = terms.masked_fill(~mask, 0.0).sum(-1)
        has_entry = mask.any(-1).expand_as(per_query)
        divergence = (per_query * has_entry).sum() / has_entry.sum().clamp(min=1)
        if not (self.options.captured_mass and self.options.dense_c4):
            return divergence, None
        kept = (target * self._choose(scores, mask)).sum(-1)
        return divergence, (kept * has_entry).sum() / has_entry.sum().clamp(min=1)


def pool_sequence(rows: Tensor, ape: Tensor, ratio: int) -> Tensor:
    """Pooled entries `[B, T // ratio, hd]` of the raw rows `[B, T, W]` of whole sequences starting at position 0."""
    num_entries = rows.shape[1] // ratio
    windows = rows[:, : num_entries * ratio].unflatten(1, (num_entries, ratio))  # [B, N, r, W]
    present = torch.ones(num_entries, ratio, dtype=torch.bool, device=rows.device)
    if ratio == LayerKind.C4.value:
        previous = F.pad(windows, (0, 0, 0, 0, 1, 0))[:, :-1]
        windows = torch.cat((previous, windows), dim=2)  # [B, N, 2r, W]
        had_previous = (torch.arange(num_entries, device=rows.device) > 0).unsqueeze(-1).expand(-1, ratio)
        present = torch.cat((had_previous, present), dim=-1)
    return compress_pool(windows, present, ape, ratio=ratio)


def windowed_attention(
    q: Tensor, kv: Tensor, entries: Tensor | None, entry_mask: Tensor | None, sink: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """Attention of every query over its last `window` tokens (itself included) and its masked-in compressed entries.

    `q [B, T, H, d]`, `kv [B, T, d]`, `entries [B, N, d]`, `entry_mask [1 or B, T, N]`. Returns heads `[B, T, H, d]` and
    the head-summed probability of each entry `[B, T, N]` (no gradient). Same mathematics as `sparse_attention`, laid
    out as blocks of `window` queries against their own and the previous block of keys.
    """
    num_tokens = q.shape[1]
    padding = -num_tokens % window
    num_blocks = (num_tokens + padding) // window
    queries = F.pad(q * q.shape[-1] ** -0.5, (0, 0, 0, 0, 0, padding)).unflatten(
        1, (num_blocks, window)
    )  # [B, n, W, H, d]
    blocks = F.pad(kv, (0, 0, 0, padding)).unflatten(1, (num_blocks, window))  # [B, n, W, d]
    keys = torch.cat((F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1], blocks), dim=2)  # [B, n, 2W, d]
    scores = (queries.flatten(2, 3) @ keys.transpose(-1, -2)).unflatten(2, (window, -1))  # [B, n, W, H, 2W]
    scores = scores.masked_fill(~_band(num_blocks, window, q.device), float("-inf"))
    sinks = sink.float().view(1, 1, 1, -1)  # [1, 1, 1, H]
    peak = torch.maximum(scores.amax(-1), sinks)  # [B, n, W, H]
    if entries is None or entry_mask is None:
        peak = peak.detach()
        exps = (scores - peak.unsqueeze(-1)).exp()
        total = exps.sum(-1) + (sinks - peak).exp()
        heads = (exps.flatten(2, 3) @ keys).unflatten(2, (window, -1)) / total.unsqueeze(-1)
        return heads.flatten(1, 2)[:, :num_tokens], q.new_zeros(*q.shape[:2], 0)
    mask = F.pad(entry_mask, (0, 0, 0, padding)).unflatten(1, (num_blocks, window)).unsqueeze(-2)  # [., n, W, 1, N]
    entry_scores = (queries.flatten(1, 3) @ entries.transpose(-1, -2)).unflatten(1, queries.shape[1:4])
    entry_scores = entry_scores.masked_fill(~mask, float("-inf"))  # [B, n, W, H, N]
    peak = torch.maximum(peak, entry_scores.amax(-1)).detach()
    exps = (scores - peak.unsqueeze(-1)).exp()
    entry_exps = (entry_scores - peak.unsqueeze(-1)).exp()
    total = exps.sum(-1) + entry_exps.sum(-1) + (sinks - peak).exp()
    heads = (exps.flatten(2, 3) @ keys).unflatten(2, (window, -1))
    heads = heads + (entry_exps.flatten(1, 3) @ entries).unflatten(1, queries.shape[1:4])
    heads = heads / total.unsqueeze(-1)
    with torch.no_grad():
        mass = torch.einsum("bnwhk,bnwh->bnwk", entry_exps, 1 / total)
    return heads.flatten(1, 2)[:, :num_tokens], mass.flatten(1, 2)[:, :num_tokens]


def _band(num_blocks: int, window: int, device: torch.device) -> Tensor:
    """`[n, W, 1, 2W]`: query i of a block sees key j of (previous | own block) iff i < j <= i + W; block 0 has no
    previous."""
    query = torch.arange(window, device=device).view(1, -1, 1, 1)
    key = torch.arange(2 * window, device=device).view(1, 1, 1, -1)
    block = torch.arange(num_blocks, device=device).view(-1, 1, 1, 1)
    return (key > query) & (key <= query + window) & ((block > 0) | (key >= window))
