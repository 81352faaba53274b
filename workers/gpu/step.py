"""One step of the model as a list of launches, for decode (one token a sequence) and for prefill (packed chunks).

Owns: the order of launches and which buffer each reads and writes. Nothing here looks at a value on the device,
allocates or waits, so the decode step can be captured in a CUDA graph and is the same at every replay. Projections, KV
writes and experts see all tokens at once; what needs wide buffers (queries, attention) goes through in blocks. Every
token is treated by itself there, so blocks change nothing but memory; a decode step is one block.

    embed_streams, hc_pre
    per layer
        project_x           wq_a | wkv and the compressors' raw rows
        store_and_compress  latent norm; window rows, finished entries and compressor states to their pools
        linear              wq_b | indexer.wq_b
        select_entries      C4: index queries and scores, then top-k
                            (with a branch: store beside the rows of indexer.wq_b, selection beside those of wq_b)
        sparse_attention
        grouped_linear, linear                      wo_a, wo_b
        hc_post_pre                                 output to the streams, next input
        route, expert_gate_up, expert_down          router; routed experts and the shared one
        hc_post_pre         (after the last layer: hc_post_head)
    head
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers.experts.layout import ExpertSlab
from workers.gpu.branch import Branch
from workers.gpu.buffers import Activations, LayerPools, StepMeta
from workers.gpu.kernel_set import KernelSet, Recorder
from workers.gpu.rope_tables import RopeTables
from workers.gpu.weights import GpuLayer, GpuWeights, x_bf16_columns
from workers.model.config import LayerKind, ModelConfig

BESIDE_TOKENS = 1
"""Up to so many tokens a C4 layer's store and selection run beside the product of the queries, which then norms raw
latents.
# measured (H200, 2026-11-21): at 8 and 64 tokens 1 and 3 % of the step are lost with it."""


@dataclass(frozen=True, slots=True)
class StepParts:
    """What all steps of one model share."""

    config: ModelConfig
    weights: GpuWeights
    ropes: RopeTables
    pools: tuple[LayerPools, ...]

    @classmethod
    def of(cls, config: ModelConfig, weights: GpuWeights, ropes: RopeTables, pools: KVPools) -> StepParts:
        """With the layers' views of `pools`."""
        return cls(config, weights, ropes, tuple(LayerPools.of(pools, i, w) for i, w in enumerate(weights.layers)))

    def representatives(self) -> StepParts:
        """The same of as few layers as launch every kernel of a step: one of each kind and router, two at least."""
        layers = self.weights.layers
        first: dict[tuple[LayerKind, bool], int] = {}
        for index, layer in enumerate(layers):
            first.setdefault((layer.kind, layer.tid2eid is None), index)
        chosen = sorted({*first.values(), min(1, len(layers) - 1)})
        weights = replace(self.weights, layers=tuple(layers[i] for i in chosen))
        return replace(self, weights=weights, pools=tuple(self.pools[i] for i in chosen))


class LayerExperts(Protocol):
    """Brings a step's absent experts to the device, layer by layer; `ExpertStream` is one."""

    def begin(self, num_tokens: int) -> None:
        """A step begins."""

    def layer(self, index: int, groups: Any) -> ExpertSlab:
        """Where this layer's experts are; what is enqueued from here on finds them there. `groups`: who needs whom."""

    def done(self, index: int) -> None:
        """The layer's expert products have been enqueued."""


@dataclass(frozen=True, slots=True)
class Step:
    """Launches steps of one kind.

    `recorder` is told which layer the ops of `kernels` belong to. `stream` replaces the layers' own slabs.
    """

    parts: StepParts
    kernels: KernelSet
    buffers: Activations
    recorder: Recorder | None = None
    stream: LayerExperts | None = None

    def run(self, meta: StepMeta, *, rows: Tensor | None = None, max_entries: int | None = None) -> Tensor:
        """Launch all layers over the T tokens of `meta`; logits fp32, a view of the buffers.

        Args:
            rows: int32 [R] on the device, tokens that get logits; all of them when None.
            max_entries: bound of the C4 entries that any token sees, where the host knows one (prefill).
        """
        c, k, a, weights = self.parts.config, self.kernels, self.buffers, self.parts.weights
        tokens = meta.token_ids.shape[0]
        streams = a.view("streams", tokens, c.hc_mult, c.hidden_size)
        x, rounded, experts_x = (a.view(name, tokens, c.hidden_size) for name in ("x", "x_quantised", "x_experts"))
        post, comb = a.view("post", tokens, c.hc_mult), a.view("comb", tokens, c.hc_mult**2)
        attn_out = a.view("sub_out", tokens, 1, c.hidden_size)
        moe_out = a.view("sub_out", tokens, c.num_experts_per_tok + 1, c.hidden_size)
        first = weights.layers[0]
        if self.stream is not None:
            self.stream.begin(tokens)
        k.embed_streams(meta.token_ids, weights.embed, streams)
        k.hc_pre(streams, first.hc_attn, first.attn_norm, x, post, comb, x_quantised=rounded)
        for index, layer in enumerate(weights.layers):
            self._at(index)
            between = (streams, post, comb, layer.hc_attn, layer.attn_norm, x)
            self._attention(index, layer, meta, rounded, attn_out, between, max_entries)
            between = (streams, post, comb, layer.hc_ffn, layer.ffn_norm, x)
            k.hc_post_pre(attn_out, *between, x_quantised=rounded, x_experts=experts_x)
            self._moe(index, layer, meta, x, rounded, experts_x, moe_out, comb)
            if index + 1 < len(weights.layers):
                after = weights.layers[index + 1]
                between = (streams, post, comb, after.hc_attn, after.attn_norm, x)
                k.hc_post_pre(moe_out, *between, x_quantised=rounded)
        self._at(None)
        num_rows = tokens if rows is None else rows.shape[0]
        x_rows, logits = a.view("x_rows", num_rows, c.hidden_size), a.view("logits", num_rows, c.vocab_size)
        k.hc_post_head(moe_out, streams, post, comb, weights.hc_head, weights.norm, rows, x_rows)
        k.head(x_rows, weights.head, logits)
        return logits

    def _at(self, layer: int | None) -> None:
        if self.recorder is not None:
            self.recorder.layer = layer

    def _attention(
        self,
        index: int,
        layer: GpuLayer,
        meta: StepMeta,
        rounded: Tensor,
        out: Tensor,
        between: tuple[Any, ...],
        max_entries: int | None,
    ) -> None:
        """Normed hidden state [T, D] to the sublayer's output [T, 1, D]. All KV is written before any is read.

        `rounded`: the state through e4m3, for products that want it so. `between`: operands of mHC, the state `x` last;
        decode's mHC leaves gates open until here, and `x` too where the products make it.
        """
        x = between[-1]
        c, k, a, pools = self.parts.config, self.kernels, self.buffers, self.parts.pools[index]
        rope, eps, tokens = self.parts.ropes.of(layer.kind), c.rms_norm_eps, x.shape[0]
        out_fp8 = a.view("out_fp8", tokens, layer.x_fp8.codes.shape[0])
        rows = None if layer.x_bf16 is None else a.view("out_bf16", tokens, layer.x_bf16.shape[0])
        branch = k.branch if pools.index is not None and tokens <= BESIDE_TOKENS else None
        latent = a.view("latent", tokens, c.q_lora_rank) if branch is None else None
        k.project_x(x, layer.x_fp8, layer.x_bf16, out_fp8, rows, x_quantised=rounded, between=between)
        with branch.beside() if branch else nullcontext():
            k.store_and_compress(
                out_fp8,
                layer.q_norm,
                layer.kv_norm,
                rope,
                meta,
                pools.window,
                latent,
                rows=rows,
                main=pools.main,
                index=pools.index,
                eps=eps,
                between=between,
            )
        if latent is None:
            latent = out_fp8[:, : c.q_lora_rank]
        for lo in range(0, tokens, a.block):
            hi = min(tokens, lo + a.block)
            part = meta if hi - lo == tokens else meta.tokens(lo, hi)
            some = None if rows is None else rows[lo:hi]
            self._attend(index, layer, part, latent[lo:hi], some, out[lo:hi, 0], max_entries, branch)

    def _attend(
        self,
        index: int,
        layer: GpuLayer,
        meta: StepMeta,
        latent: Tensor,
        rows: Tensor | None,
        out: Tensor,
        max_entries: int | None,
        branch: Branch | None,
    ) -> None:
        """Attention of one block of tokens: latents [t, q_lora] (raw with a branch) and raw bf16 rows [t, N2] to `out`
        [t, D]."""
        c, k, a, pools = self.parts.config, self.kernels, self.buffers, self.parts.pools[index]
        rope, tokens, width = self.parts.ropes.of(layer.kind), latent.shape[0], c.num_attention_heads * c.head_dim
        q = a.view("q", tokens, layer.q_fp8.codes.shape[0])
        heads, o_latent = a.view("heads", tokens, width), a.view("o_latent", tokens, c.o_groups * c.o_lora_rank)
        first = width if branch else 0
        norm = {"norm": (layer.q_norm, c.rms_norm_eps)} if branch else {}
        k.linear(latent, layer.q_fp8.rows(first), q[:, first:], **norm)
        selected = None
        if rows is not None and pools.index is not None:
            selected = a.view("selected", tokens, c.index_topk)
            start, end = x_bf16_columns(c, layer.kind)["indexer.weights_proj"]
            queries, entries = (q[:, width:], rows[:, start:end]), pools.index.entries
            with branch.beside() if branch else nullcontext():
                k.select_entries(
                    *queries, meta, rope, entries, selected, max_entries=max_entries, dependent=branch is None
                )
        if branch:
            k.linear(latent, layer.q_fp8.rows(0, first), q[:, :first], **norm)
            branch.join()
        keys = (pools.window, pools.entries, selected, layer.kind.value)
        k.sparse_attention(q, meta, *keys, layer.sink, rope, heads, eps=c.rms_norm_eps)
        k.grouped_linear(heads.view(tokens, c.o_groups, -1), layer.wo_a, o_latent)
        k.linear(o_latent, layer.wo_b, out)

    def _moe(
        self,
        index: int,
        layer: GpuLayer,
        meta: StepMeta,
        x: Tensor,
        rounded: Tensor,
        experts_x: Tensor,
        out: Tensor,
        comb: Tensor,
    ) -> None:
        """Normed hidden state [T, D] to k routed parts and the shared one [T, k + 1, D].

        `rounded`: x through e4m3; `experts_x`: likewise, columns in the order in which expert kernels unpack weights.
        `comb`: gates that decode's mHC leaves open until here.
        """
        c, k, a, tokens = self.parts.config, self.kernels, self.buffers, x.shape[0]
        chosen, inner, limit = c.num_experts_per_tok, c.moe_intermediate_size, c.swiglu_limit
        gate_logits = a.view("gate_logits", tokens, c.n_routed_experts)
        shared_hidden = a.view("shared_hidden", tokens, inner)
        ids, routing, groups = a.view("ids", tokens, chosen), a.view("routing", tokens, chosen), a.groups(tokens)
        hidden = a.view("hidden", tokens, chosen, inner)
        chooser = layer.bias if layer.tid2eid is None else layer.tid2eid
        heat = {} if layer.experts.heat is None else {"heat": layer.experts.heat}
        scores = (x, layer.gate, gate_logits, chooser, meta.token_ids, c.routed_scaling_factor)
        k.route(*scores, ids, routing, groups, comb=(comb, layer.hc_ffn), **heat)
        slab = layer.experts if self.stream is None else self.stream.layer(index, groups)
        inputs = (x, experts_x, layer.shared_w13, ids, routing, groups, slab)
        # Until `expert_down` writes it, `out` is room for inputs by expert.
        k.expert_gate_up(*inputs, hidden, limit, shared_hidden=shared_hidden, x_quantised=rounded, room=out)
        k.expert_down(hidden, shared_hidden, layer.shared_w2, ids, groups, slab, out)
        if self.stream is not None:
            self.stream.done(index)
