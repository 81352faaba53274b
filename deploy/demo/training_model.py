"""dsv4-nano's training pass: `workers.model.full_sequence`, laid out for one large GPU.

The mathematics is that of `run_full` (a test compares them). What differs is cost: bf16 matrix products and streams,
compiled parts, parameters stacked by shape so that fake quantisation and Muon run on few large
tensors, and a gradient that unrolls only the last Sinkhorn steps. The indexer learns the attention distribution over
ALL visible entries, also while attention is restricted to its choice, so entries it misses still pull it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.model import layers as parts
from workers.model.config import LayerKind, ModelConfig
from workers.model.full_sequence import pool_sequence
from workers.model.layers import Rope
from workers.model.precision import Precision
from workers.model.weights import ModelWeights, WeightClass, tensor_tree
from workers.reference.compressor import compress_finish, compress_project
from workers.reference.moe import moe_dense
from workers.reference.norm_rope import rms_norm
from workers.reference.quant import fp4_weight_fake_quant, fp8_weight_fake_quant

SINKHORN_STEPS_WITH_GRADIENT = 3
"""The iteration has converged long before its last steps, so earlier ones add nothing to the gradient but time."""

HIDDEN = -1e30
"""Score of a masked entry: finite, so that rows without entries have no NaN."""


class Node:
    """Plain attribute holder with the names of `ModelWeights`: the compiler guards these cheaply."""


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """What is fixed for one compiled block."""

    config: ModelConfig
    kind: LayerKind
    precision: Precision
    is_dense: bool
    """Attend to every visible C4 entry instead of the indexer's choice."""


class ParameterStore:
    """Master weights in fp32, one stacked tensor per (storage class, shape, optimiser role)."""

    def __init__(self, config: ModelConfig, named: dict[str, Tensor], device: torch.device) -> None:
        self.config = config
        self.tables: dict[str, Tensor] = {}
        self.biases: dict[str, Tensor] = {}
        members: dict[tuple[WeightClass, tuple[int, ...], str], list[str]] = {}
        values: dict[str, Tensor] = {}
        for info, tensor in ModelWeights.from_named(config, named).items(config):
            if info.weight_class is WeightClass.TABLE:
                self.tables[info.name] = tensor.to(device)
            elif info.name.endswith("gate.bias"):
                self.biases[info.name] = tensor.float().to(device)
            else:
                values[info.name] = tensor.float()
                members.setdefault((info.weight_class, info.shape, role_of(info.name, info.shape)), []).append(
                    info.name
                )
        self.members = members
        self.stacks = {
            key: torch.nn.Parameter(torch.stack([values[name] for name in names]).to(device))
            for key, names in members.items()
        }
        self._layout = _to_nodes(tensor_tree(config, mtp=True))

    def quantised(self, dtype: torch.dtype) -> Node:
        """The tree of weights as the checkpoint will hold them; gradients pass straight through to the stacks.

        FP4 and FP8 values times their scales are exact in bf16, so those come in the matmul dtype.
        """
        leaves: dict[str, Tensor] = {**self.tables, **self.biases}
        for key, names in self.members.items():
            stored = stored_form(self.stacks[key], key[0], dtype)
            leaves.update(zip(names, stored.unbind(0), strict=True))
        return _fill(self._layout, leaves)

    def to_named(self) -> dict[str, Tensor]:
        """Official names to fp32 master tensors (experts unstacked)."""
        leaves: dict[str, Tensor] = {**self.tables, **self.biases}
        for key, names in self.members.items():
            leaves.update(zip(names, self.stacks[key].detach().unbind(0), strict=True))
        named: dict[str, Tensor] = {}
        for info in _infos(tensor_tree(self.config, mtp=True)):
            pieces = leaves[info.name].unbind(0) if "*" in info.name else (leaves[info.name],)
            named.update(zip(info.parts, pieces, strict=True))
        return named


def role_of(name: str, shape: tuple[int, ...]) -> str:
    """Optimiser role: `muon` for inner matrices, else one of the Adam groups."""
    if name in ("embed.weight", "head.weight"):
        return "embedding"
    if name.endswith("_fn"):
        return "mixing"
    if len(shape) < 2 or name.endswith(".ape"):
        return "scalar"
    if name.endswith(("gate.weight", "weights_proj.weight")):
        return "router"
    return "muon"


def stored_form(stack: Tensor, weight_class: WeightClass, dtype: torch.dtype) -> Tensor:
    """`[n, ...]` master weights as read back from the checkpoint."""
    if weight_class is WeightClass.EXPERT:
        return fp4_weight_fake_quant(stack).to(dtype)
    if weight_class is WeightClass.LINEAR:
        return fp8_weight_fake_quant(stack).to(dtype)
    return stack


def _infos(node: Any) -> Iterator[Any]:
    if hasattr(node, "weight_class"):
        yield node
    elif dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _infos(getattr(node, field.name))
    elif isinstance(node, tuple):
        for child in node:
            yield from _infos(child)


def _to_nodes(tree: Any) -> Any:
    """The same tree with plain nodes and tensor names as leaves."""
    if tree is None:
        return None
    if hasattr(tree, "weight_class"):
        return tree.name
    names = getattr(tree, "_fields", None)
    if names is None and isinstance(tree, tuple):
        return tuple(_to_nodes(child) for child in tree)
    names = names or [field.name for field in dataclasses.fields(tree)]
    node = Node()
    for name in names:
        setattr(node, name, _to_nodes(getattr(tree, name)))
    return node


def _fill(layout: Any, leaves: dict[str, Tensor]) -> Any:
    if layout is None:
        return None
    if isinstance(layout, str):
        return leaves[layout]
    if isinstance(layout, tuple):
        return tuple(_fill(child, leaves) for child in layout)
    node = Node()
    for name, child in vars(layout).items():
        setattr(node, name, _fill(child, leaves))
    return node


def sinkhorn(logits: Tensor, *, iters: int, eps: float) -> Tensor:
    """`workers.reference.mhc.sinkhorn` with the gradient of its last steps only. `[..., S, S]`."""
    start = logits.softmax(-1) + eps
    with torch.no_grad():
        rows, columns = torch.ones_like(start[..., :1]), 1 / (start.sum(-2, keepdim=True) + eps)
        for _ in range(iters - 1 - SINKHORN_STEPS_WITH_GRADIENT):
            rows = rows / (rows * (start * columns).sum(-1, keepdim=True) + eps)
            columns = columns / (columns * (start * rows).sum(-2, keepdim=True) + eps)
    comb = start * rows * columns
    for _ in range(SINKHORN_STEPS_WITH_GRADIENT):
        comb = comb / (comb.sum(-1, keepdim=True) + eps)
        comb = comb / (comb.sum(-2, keepdim=True) + eps)
    return comb


def _mixes(streams: Tensor, fn: Tensor, eps: float) -> Tensor:
    flat = streams.flatten(-2)
    rsqrt_mean = torch.rsqrt(flat.float().square().mean(-1, keepdim=True) + eps)
    return F.linear(flat, fn.to(flat.dtype)).float() * rsqrt_mean


def stream_mix(hc: Any, config: ModelConfig, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`mhc.hc_pre` for streams of any dtype: sublayer input in fp32, post gates, mixing matrix."""
    size = config.hc_mult
    mixes = _mixes(streams, hc.fn, config.rms_norm_eps)
    pre = torch.sigmoid(mixes[..., :size] * hc.scale[0] + hc.base[:size]) + config.hc_eps
    post = 2 * torch.sigmoid(mixes[..., size : 2 * size] * hc.scale[1] + hc.base[size : 2 * size])
    logits = (mixes[..., 2 * size :] * hc.scale[2] + hc.base[2 * size :]).unflatten(-1, (size, size))
    mixed = (pre.unsqueeze(-1) * streams.float()).sum(-2)
    return mixed, post, sinkhorn(logits, iters=config.hc_sinkhorn_iters, eps=config.hc_eps)


def stream_update(out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """`mhc.hc_post` as sums over the few streams instead of a batch of tiny matrix products."""
    wide = streams.float()
    mixed = sum(comb[..., j, :, None] * wide[..., j, None, :] for j in range(streams.shape[-2]))
    return (post.unsqueeze(-1) * out.float().unsqueeze(-2) + mixed).to(streams.dtype)


def collapse(hc: Any, config: ModelConfig, streams: Tensor) -> Tensor:
    """`mhc.hc_head` for streams of any dtype."""
    weights = torch.sigmoid(_mixes(streams, hc.fn, config.rms_norm_eps) * hc.scale + hc.base) + config.hc_eps
    return (weights.unsqueeze(-1) * streams.float()).sum(-2)


def attend(
    q: Tensor,
    kv: Tensor,
    entries: Tensor | None,
    visible: Tensor | None,
    chosen: Tensor | None,
    sink: Tensor,
    window: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Window and compressed attention of `q [B, T, H, d]` (T a multiple of `window`) in the dtype of `q`.

    `kv [B, T, d]`, `entries [B, N, d]`; `visible [T, N]` and `chosen [B, T, N]` (None: all visible) are masks. Returns
    heads `[B, T, H, d]`, the head-averaged distribution over ALL visible entries `[B, T, N]` and the share of
    attention that went to entries `[B, T]`, both without gradient.
    """
    batch, num_tokens, num_heads, dim = q.shape
    num_blocks = num_tokens // window
    queries = (q * dim**-0.5).reshape(batch * num_blocks, window * num_heads, dim)
    blocks = kv.unflatten(1, (num_blocks, window))
    keys = torch.cat((F.pad(blocks, (0, 0, 0, 0, 1, 0))[:, :-1], blocks), dim=2).flatten(0, 1)  # [B*n, 2W, d]
    near = (queries @ keys.transpose(-1, -2)).view(batch, num_blocks, window, num_heads, 2 * window).float()
    index = torch.arange(window, device=q.device)
    key = torch.arange(2 * window, device=q.device)
    band = (key > index[:, None]) & (key <= index[:, None] + window)
    first = torch.arange(num_blocks, device=q.device)[:, None, None] > 0
    band = band & (first | (key >= window))  # [n, W, 2W]
    near = near.masked_fill(~band[None, :, :, None, :], HIDDEN)
    total = torch.logaddexp(near.logsumexp(-1), sink.float()).flatten(1, 2)  # [B, T, H]
    if entries is None or visible is None:
        probs = (near - total.unflatten(1, (num_blocks, window)).unsqueeze(-1)).exp().to(q.dtype)
        out = probs.view(batch * num_blocks, window * num_heads, -1) @ keys
        return out.view(q.shape), None, None
    far = (queries.view(batch, num_tokens * num_heads, dim) @ entries.transpose(-1, -2)).float()
    far = far.view(batch, num_tokens, num_heads, -1).masked_fill(~visible[:, None, :], HIDDEN)
    shown = far if chosen is None else far.masked_fill(~chosen[:, :, None, :], HIDDEN)
    far_total = shown.logsumexp(-1)  # [B, T, H]
    total = torch.logaddexp(total, far_total)
    probs = (near - total.unflatten(1, (num_blocks, window)).unsqueeze(-1)).exp().to(q.dtype)
    out = (probs.view(batch * num_blocks, window * num_heads, -1) @ keys).view(q.shape)
    far_probs = (shown - total.unsqueeze(-1)).exp().to(q.dtype)
    out = out + (far_probs.view(batch, num_tokens * num_heads, -1) @ entries).view(q.shape)
    with torch.no_grad():
        target = far.softmax(-1).mean(2)
        share = (far_total - total).exp().mean(-1)
    return out, target, share


def choose(scores: Tensor, visible: Tensor, k: int) -> Tensor | None:
    """`[B, T, N]` mask of the k best visible entries; None where k covers them all."""
    if scores.shape[-1] <= k:
        return None
    best = scores.detach().masked_fill(~visible, HIDDEN).topk(k, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True) & visible


def index_divergence(scores: Tensor, target: Tensor, share: Tensor, visible: Tensor) -> Tensor:
    """KL of the attention's distribution over entries against the softmax of the index scores; mean over queries.

    Queries count by the share of attention they give to entries: those that read only their window have no preference.
    """
    log_scores = scores.masked_fill(~visible, HIDDEN).log_softmax(-1)
    terms = target * (target.clamp(min=1e-9).log() - log_scores)
    weight = share * visible.any(-1)
    return (terms.masked_fill(~visible, 0.0).sum(-1) * weight).sum() / weight.sum().clamp(min=1e-3)


def attention(attn: Any, plan: BlockPlan, x: Tensor, rope: Rope, entry_rope: Rope | None) -> tuple[Tensor, Tensor]:
    """Attention sublayer output and the indexer's divergence (0 where there is no indexer)."""
    config, precision = plan.config, plan.precision
    latent, q = parts.attention_queries(attn, config, x, rope, precision)
    kv = parts.window_entry(attn, config, x, rope, precision)
    entries = visible = chosen = scores = None
    if entry_rope is not None:
        ratio, num_entries = plan.kind.value, entry_rope.cos.shape[0]
        positions = torch.arange(x.shape[1], device=x.device)
        visible = torch.arange(num_entries, device=x.device) < ((positions + 1) // ratio)[:, None]
        rows = compress_project(x, attn.compressor.wkv, attn.compressor.wgate)
        pooled = pool_sequence(rows, attn.compressor.ape, ratio)
        entry = compress_finish(pooled, attn.compressor.norm, *entry_rope, config.rms_norm_eps)
        entries = parts.store_entry(entry, config, precision).to(q.dtype)
        if attn.indexer is not None:
            scores = index_scores(attn.indexer, plan, x.detach(), latent.detach(), rope, entry_rope)
            chosen = None if plan.is_dense else choose(scores, visible, config.index_topk)
    heads, target, share = attend(q, kv.to(q.dtype), entries, visible, chosen, attn.attn_sink, config.sliding_window)
    out = parts.attention_output(attn, config, heads, rope, precision)
    if scores is None:
        return out, x.new_zeros((), dtype=torch.float32)
    return out, index_divergence(scores, target, share, visible)


def index_scores(indexer: Any, plan: BlockPlan, x: Tensor, latent: Tensor, rope: Rope, entry_rope: Rope) -> Tensor:
    """Index scores `[B, T, N]` in fp32 from detached inputs."""
    config = plan.config
    rows = compress_project(x, indexer.compressor.wkv, indexer.compressor.wgate)
    pooled = pool_sequence(rows, indexer.compressor.ape, plan.kind.value)
    keys = compress_finish(pooled, indexer.compressor.norm, *entry_rope, config.rms_norm_eps)
    keys = parts.store_index_vector(keys, plan.precision)  # [B, N, Di]
    q, weights = parts.index_queries(indexer, config, x, latent, rope, plan.precision)
    dots = torch.relu(q.to(x.dtype).flatten(1, 2) @ keys.to(x.dtype).transpose(-1, -2))  # [B, T*Hi, N]
    dots = dots.unflatten(1, (q.shape[1], q.shape[2]))
    return (dots.float() * weights.float().unsqueeze(-1)).sum(-2)


def enter_attention(layer: Any, config: ModelConfig, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The attention sublayer's normed input `[N, D]`, gates and mixing matrix, from `streams [N, S, D]`."""
    mixed, post, comb = stream_mix(layer.hc_attn, config, streams)
    return rms_norm(mixed, layer.attn_norm, config.rms_norm_eps).to(streams.dtype), post, comb


def finish_block(
    layer: Any,
    config: ModelConfig,
    precision: Precision,
    out: Tensor,
    streams: Tensor,
    post: Tensor,
    comb: Tensor,
    token_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write the attention output `[N, D]` to the streams, then run the MoE sublayer: new streams, expert load `[E]`."""
    streams = stream_update(out, streams, post, comb)
    mixed, post, comb = stream_mix(layer.hc_ffn, config, streams)
    x = rms_norm(mixed, layer.ffn_norm, config.rms_norm_eps).to(streams.dtype)
    with torch.autocast(x.device.type, enabled=False):
        ids, weights = parts.route(layer.ffn, config, x, token_ids)
    load = (ids.unsqueeze(-1) == torch.arange(config.n_routed_experts, device=x.device)).sum((0, 1)).float()
    ffn = layer.ffn
    out = moe_dense(x, ids, weights, ffn.experts, ffn.shared_experts, config.swiglu_limit, precision.act_fp8)
    return stream_update(out, streams, post, comb), load


def head_loss(
    streams: Tensor, norm: Tensor, head: Tensor, hc: Any, config: ModelConfig, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted mean cross-entropy of `targets [N]` and whether each greedy choice is right `[N]`."""
    hidden = rms_norm(collapse(hc, config, streams), norm, config.rms_norm_eps)
    logits = F.linear(hidden.to(streams.dtype), head.to(streams.dtype)).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (loss * weights).sum() / weights.sum().clamp(min=1e-6), logits.argmax(-1) == targets


def mtp_input(mtp: Any, config: ModelConfig, streams: Tensor, embedded: Tensor, precision: Precision) -> Tensor:
    """The MTP block's input streams from the trunk's and the embedding of the next token."""
    eps = config.rms_norm_eps
    known = parts.linear(rms_norm(embedded, mtp.enorm, eps), mtp.e_proj, act_fp8=precision.act_fp8)
    hidden = parts.linear(rms_norm(streams, mtp.hnorm, eps), mtp.h_proj, act_fp8=precision.act_fp8)
    return known.unsqueeze(-2) + hidden


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one pass yields to the trainer."""

    loss: Tensor
    divergence: Tensor
    """Mean over C4 layers."""
    mtp_loss: Tensor
    load: Tensor
    """`[L + 1, E]` token counts per expert; the last row is the MTP block's."""
    correct: Tensor
    """`[B, T]`: the greedy choice equals the target."""
    mtp_correct: Tensor | None
    """`[B, T]`: the MTP block's greedy choice equals the token after the target."""


class TrainingModel:
    """Runs passes over a `ParameterStore`.

    Only attention is compiled per layer kind and sequence length; everything else acts on a flat token axis, so its
    compiled form serves every length. Streams are `[N, S, D]` with N = B * T.
    """

    def __init__(self, store: ParameterStore, precision: Precision, *, dtype: torch.dtype, is_compiled: bool) -> None:
        self.store, self.precision, self.dtype = store, precision, dtype
        wrap = (lambda f: torch.compile(f, dynamic=False, fullgraph=True)) if is_compiled else (lambda f: f)
        self._enter, self._attention, self._finish = wrap(enter_attention), wrap(attention), wrap(finish_block)
        self._head, self._mtp_input = wrap(head_loss), wrap(mtp_input)
        self._ropes: dict[tuple[LayerKind, int], tuple[Rope, Rope | None]] = {}

    def _rope(self, kind: LayerKind, num_tokens: int, device: torch.device) -> tuple[Rope, Rope | None]:
        if (kind, num_tokens) not in self._ropes:
            config, positions = self.store.config, torch.arange(num_tokens, device=device)
            entries = None
            if kind is not LayerKind.SLIDING:
                starts = torch.arange(num_tokens // kind.value, device=device) * kind.value
                entries = Rope.at(config, kind, starts)
            self._ropes[kind, num_tokens] = (Rope.at(config, kind, positions), entries)
        return self._ropes[kind, num_tokens]

    def _run_block(
        self, layer: Any, plan: BlockPlan, streams: Tensor, token_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer on `streams [N, S, D]`: new streams, expert load `[E]`, indexer divergence."""
        rope, entry_rope = self._rope(plan.kind, token_ids.shape[1], token_ids.device)
        x, post, comb = self._enter(layer, plan.config, streams)
        out, divergence = self._attention(layer.attn, plan, x.unflatten(0, token_ids.shape), rope, entry_rope)
        flat, ids = out.flatten(0, 1), token_ids.flatten()
        streams, load = self._finish(layer, plan.config, plan.precision, flat, streams, post, comb, ids)
        return streams, load, divergence

    def run(
        self, token_ids: Tensor, targets: Tensor, weights: Tensor, *, is_dense: bool = False, with_mtp: bool = False
    ) -> StepOutput:
        """One pass over `token_ids [B, T]` (T a multiple of 128) against `targets [B, T]` with `weights [B, T]`."""
        config, device = self.store.config, token_ids.device
        model = self.store.quantised(self.dtype)
        loads, divergences = [], []
        with torch.autocast(device.type, dtype=self.dtype, enabled=self.dtype is not torch.float32):
            embedded = F.embedding(token_ids.flatten(), model.embed).to(self.dtype)
            streams = embedded.unsqueeze(-2).expand(-1, config.hc_mult, -1).contiguous()
            for layer, kind in zip(model.layers, config.layer_kinds, strict=True):
                plan = BlockPlan(config, kind, self.precision, is_dense and kind is LayerKind.C4)
                streams, load, divergence = self._run_block(layer, plan, streams, token_ids)
                loads.append(load)
                divergences += [divergence] if kind is LayerKind.C4 else []
            flat = (targets.flatten(), weights.flatten())
            loss, correct = self._head(streams, model.norm, model.head, model.hc_head, config, *flat)
            mtp_loss = loss.new_zeros(())
            mtp_correct = None
            if with_mtp:
                mtp_loss, mtp_correct, load = self._run_mtp(model, streams.detach(), targets, weights)
                loads.append(load)
        divergence = torch.stack(divergences).mean()
        return StepOutput(loss, divergence, mtp_loss, torch.stack(loads), correct.view_as(targets), mtp_correct)

    def _run_mtp(self, model: Any, streams: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The MTP block for the token after `targets`: loss, correct `[B, T]`, load; the trunk gets no gradient."""
        config, mtp = self.store.config, model.mtp[0]
        embedded = F.embedding(targets.flatten(), model.embed.detach()).to(self.dtype)
        plan = BlockPlan(config, LayerKind.SLIDING, self.precision, False)
        inputs = self._mtp_input(mtp, config, streams, embedded, self.precision).to(self.dtype)
        out, load, _ = self._run_block(mtp.layer, plan, inputs, targets)
        later = torch.cat((targets[:, 1:], torch.zeros_like(targets[:, :1])), dim=1).flatten()
        later_weights = torch.cat((weights[:, 1:], torch.zeros_like(weights[:, :1])), dim=1).flatten()
        loss, correct = self._head(out, mtp.norm, model.head.detach(), mtp.hc_head, config, later, later_weights)
        return loss, correct.view_as(targets), load
