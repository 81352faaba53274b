"""`KernelSet`: every op that a step launches, as one object: the seam between the steps and the Triton kernels.

Owns: which kernel module serves which op in decode and in prefill, and the scratch that ops ask for, bound to them
when a set is made. Importing this module does not import Triton; making a set does. Ops write preallocated outputs and
return nothing, so a step is a list of launches: `recorded` turns a set into one that notes them instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.gpu.branch import Branch
from workers.model.config import PAGE_TOKENS, LayerKind, ModelConfig

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class KernelSet:
    """Ops of one kind of step, their scratch bound; arguments as in `step.py`."""

    embed_streams: Op
    hc_pre: Op
    hc_post_pre: Op
    hc_post_head: Op
    project_x: Op
    store_and_compress: Op
    linear: Op
    select_entries: Op
    sparse_attention: Op
    grouped_linear: Op
    route: Op
    expert_gate_up: Op
    expert_down: Op
    head: Op
    sample_greedy: Op
    branch: Branch | None = None
    """For launches beside others. Where there is one, `linear` can norm latents by itself."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step that a set must serve."""

    num_tokens: int
    block: int
    """Tokens that go through attention at a time."""
    num_pages: int
    """Logical pages of the longest sequence."""
    device: torch.device
    num_sequences: int = 1
    """Prefill: sequences of a step, and the C4 entries of all of them together at its end."""
    num_entries: int = 0


class MakeKernels(Protocol):
    """Makes the ops of one kind of step, with scratch for it."""

    def __call__(self, config: ModelConfig, sizes: StepSizes) -> KernelSet: ...


def decode_kernels(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    """Triton's ops for steps of one token a sequence; batch invariant bit for bit."""
    from workers.kernels import indexer, linear_decode, mhc, routing_gate, sampling
    from workers.kernels import sparse_attention as attention

    c, tokens, device = config, sizes.num_tokens, sizes.device
    ops = _DecodeOps(config, sizes)
    widest = max(c.q_lora_rank, c.o_groups * c.o_lora_rank)
    rounded = torch.empty(tokens * widest, dtype=torch.bfloat16, device=device)
    samples = sampling.SampleWork.allocate(tokens, c.vocab_size, device)
    # All rows of a product, and those of either part.
    parts = (c.num_attention_heads * c.head_dim, c.index_n_heads * c.index_head_dim)
    arrived = torch.zeros(tokens * c.num_attention_heads, dtype=torch.int32, device=device)
    gate_work = routing_gate.GateWork.allocate(tokens, c.n_routed_experts, c.hidden_size, device)
    return KernelSet(
        embed_streams=mhc.embed_streams,
        hc_pre=ops.hc_pre,
        hc_post_pre=ops.hc_post_pre,
        hc_post_head=partial(mhc.hc_post_head, work=ops.streams),
        project_x=ops.project_x,
        store_and_compress=ops.store_and_compress,
        linear=partial(linear_decode.linear, rounded=rounded),
        select_entries=partial(indexer.select_entries, work=_index_work(config, sizes, prefill=False), mode="decode"),
        sparse_attention=partial(
            attention.sparse_attention, work=_split_work(config, sizes), arrived=arrived, mode="decode"
        ),
        grouped_linear=linear_decode.grouped_linear,
        route=partial(routing_gate.gate_route, work=gate_work, route_work=_route_work(config, sizes)),
        expert_gate_up=ops.expert_gate_up,
        expert_down=ops.expert_down,
        head=linear_decode.head,
        branch=Branch(device) if all(linear_decode.norms(device, rows, c.q_lora_rank) for rows in parts) else None,
        sample_greedy=partial(sampling.sample_greedy, work=samples),
    )


class _DecodeOps:
    """Decode's ops around mHC, and their scratch.

    Before attention there is no second launch of mHC where `linear_decode.mixes_x`: the products make their input
    themselves, and `store_and_compress` makes the gates of the next write-back.
    """

    def __init__(self, config: ModelConfig, sizes: StepSizes) -> None:
        from workers.kernels import compressor, expert_codes, experts_decode, experts_sm90, kv_step, linear_decode, mhc

        self._mhc, self._linear, self._store = mhc, linear_decode, kv_step
        self._experts, self._codes = experts_decode, expert_codes
        c, tokens, device = config, sizes.num_tokens, sizes.device
        self.streams = torch.empty(mhc.work_floats(tokens, c.hidden_size), device=device)
        self._c128_work = compressor.C128Work.allocate(tokens, c.head_dim, device)
        counts = experts_decode.num_counters(tokens, c.num_experts_per_tok, c.n_routed_experts, c.moe_intermediate_size)
        self._counters = torch.zeros(counts, dtype=torch.int32, device=device)
        self._x_rows = c.q_lora_rank + c.head_dim
        # Whether the products of the experts round their inputs themselves.
        self._experts_round = experts_sm90.serves(device, c.hidden_size, c.moe_intermediate_size)

    def _for_many(self, x_quantised: Tensor) -> Tensor | None:
        """Few tokens are rounded by the products themselves."""
        return x_quantised if x_quantised.shape[0] > self._linear.ROUNDED_TOKENS else None

    def _mixed(self, between: tuple[Any, ...]) -> Any:
        """What `project_x` makes its input of; None where it finds it made."""
        streams, post, comb, hc, norm_weight, x = between
        if not self._linear.mixes_x(x, self._x_rows):
            return None
        return self._mhc.Mixed(streams, hc, norm_weight, self.streams, post, comb)

    def hc_pre(
        self, streams: Tensor, hc: Any, norm_weight: Tensor, x: Tensor, post: Tensor, comb: Tensor, *,
        x_quantised: Tensor,
    ) -> None:  # fmt: skip
        if self._linear.mixes_x(x, self._x_rows):
            self._mhc.hc_sums(None, streams, post, comb, hc, self.streams)
            return
        rounded = {"x_quantised": self._for_many(x_quantised)}
        self._mhc.hc_pre(streams, hc, norm_weight, x, post, comb, work=self.streams, finish=False, **rounded)

    def hc_post_pre(self, sub_out: Tensor, *between: Any, x_quantised: Tensor, x_experts: Tensor | None = None) -> None:
        streams, post, comb, hc, _, x = between
        if x_experts is None and self._linear.mixes_x(x, self._x_rows):
            self._mhc.hc_sums(sub_out, streams, post, comb, hc, self.streams)
            return
        if x_experts is not None and self._experts_round:
            rounded = {"x_experts": self._coded(x_experts)}
        else:
            rounded = {"x_quantised": self._for_many(x_quantised), "x_experts": x_experts}
        self._mhc.hc_post_pre(sub_out, *between, work=self.streams, finish=False, **rounded)

    def project_x(self, *tensors: Any, x_quantised: Tensor, between: tuple[Any, ...]) -> None:
        self._linear.project_x(*tensors, x_quantised=x_quantised, mixed=self._mixed(between))

    def store_and_compress(self, *operands: Any, between: tuple[Any, ...], **others: Any) -> None:
        mixed = self._mixed(between)
        comb = None if mixed is not None else (between[2], between[3])
        self._store.store_and_compress(*operands, work=self._c128_work, comb=comb, mixed=mixed, **others)

    def _coded(self, x_experts: Tensor) -> Tensor | None:
        """Where one token's input of the experts is rounded by the launch that makes it."""
        return self._codes.coded_room(x_experts) if self._experts_round and x_experts.shape[0] == 1 else None

    def expert_gate_up(
        self, x: Tensor, experts_x: Tensor, *operands: Any, x_quantised: Tensor, room: Tensor, **others: Any
    ) -> None:
        scratch = {"x_quantised": self._for_many(x_quantised), "counters": self._counters}
        inputs = self._coded(experts_x)
        self._experts.expert_gate_up(x, experts_x if inputs is None else inputs, *operands, **scratch, **others)

    def expert_down(self, *operands: Any, **others: Any) -> None:
        self._experts.expert_down(*operands, counters=self._counters, **others)


class _PrefillOps:
    """Prefill's forms of ops whose arguments differ from decode's, and their scratch."""

    def __init__(self, config: ModelConfig, sizes: StepSizes) -> None:
        from workers.kernels import compressor, experts_prefill, kv_store, linear_prefill, mhc_prefill, routing

        self._compressor, self._experts, self._store, self._routing = compressor, experts_prefill, kv_store, routing
        self._route_work = _route_work(config, sizes)
        self._linear, self._mhc = linear_prefill, mhc_prefill
        c, tokens, device = config, sizes.num_tokens, sizes.device
        width, index = c.num_attention_heads * c.head_dim, c.index_n_heads * c.index_head_dim
        linears = (c.o_lora_rank * width, (width + index) * c.q_lora_rank, c.hidden_size * c.o_groups * c.o_lora_rank)
        self.work = linear_prefill.PrefillWork.empty(
            tokens,
            columns=max(c.hidden_size, c.q_lora_rank, c.o_groups * c.o_lora_rank, c.moe_intermediate_size),
            weight_elements=max(*linears, 2 * c.moe_intermediate_size * c.hidden_size),
            inner=c.moe_intermediate_size,
            device=device,
        )
        self._experts_round = experts_prefill.rounds_inputs(device, c.hidden_size, c.moe_intermediate_size)
        words = experts_prefill.tile_words(tokens * c.num_experts_per_tok, c.n_routed_experts, device)
        self._tiles = torch.empty(words, dtype=torch.int32, device=device)
        self.streams = torch.empty(mhc_prefill.work_floats(tokens, c.hidden_size), device=device)

    def hc_pre(self, *tensors: Any, x_quantised: Tensor) -> None:
        self._mhc.hc_pre(*tensors, work=self.streams)

    def hc_post_pre(self, *tensors: Any, x_quantised: Tensor, x_experts: Tensor | None = None) -> None:
        rounded = None if self._experts_round else x_experts
        self._mhc.hc_post_pre(*tensors, work=self.streams, x_experts=rounded)

    def project_x(self, *tensors: Any, x_quantised: Tensor, between: Any) -> None:
        self._linear.project_x(*tensors, work=self.work)

    def store_and_compress(
        self, out_fp8: Tensor, q_norm: Tensor, kv_norm: Tensor, rope: Tensor, meta: Any, window: Tensor,
        latent: Tensor, *, rows: Tensor | None, main: Any, index: Any, eps: float, between: Any,
    ) -> None:  # fmt: skip
        self._store.norm_and_store(out_fp8, q_norm, kv_norm, rope, meta, window, latent, eps)
        if rows is not None and index is not None:
            self._compressor.compress_c4(rows, meta, main, index, rope, eps, mode="prefill")
        elif rows is not None:
            self._compressor.compress_c128(rows, meta, main, rope, eps, mode="prefill")

    def route(
        self, x: Tensor, gate: Tensor, logits: Tensor, *tensors: Any, comb: Any, heat: Tensor | None = None
    ) -> None:
        self._linear.router_logits(x, gate, logits)
        self._routing.route(logits, *tensors, heat=heat, per_token=True, work=self._route_work)

    def expert_gate_up(
        self, x: Tensor, experts_x: Tensor, shared_w13: Any, ids: Tensor, weights: Tensor, groups: Any, slab: Any,
        hidden: Tensor, limit: float, *, shared_hidden: Tensor, x_quantised: Tensor, room: Tensor,
    ) -> None:  # fmt: skip
        self._linear.shared_gate_up(x, shared_w13, limit, shared_hidden, work=self.work)
        inputs = x if self._experts_round else experts_x
        self._experts.expert_gate_up(inputs, weights, groups, slab, hidden, limit, tiles=self._tiles, room=room)

    def expert_down(self, hidden: Tensor, shared_hidden: Tensor, shared_w2: Any, ids: Tensor, *operands: Any) -> None:
        self._experts.expert_down(hidden, shared_hidden, shared_w2, *operands, tiles=self._tiles, work=self.work)


def prefill_kernels(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    """Triton's ops for steps of many tokens."""
    from workers.kernels import indexer, linear_prefill, mhc, mhc_prefill, sampling
    from workers.kernels import sparse_attention as attention

    ops = _PrefillOps(config, sizes)
    floats = attention.prefill_work_floats(sizes.num_tokens, sizes.num_sequences, sizes.num_entries, config.head_dim)
    attention_work = torch.empty(floats, device=sizes.device)
    return KernelSet(
        embed_streams=mhc.embed_streams,
        hc_pre=ops.hc_pre,
        hc_post_pre=ops.hc_post_pre,
        hc_post_head=partial(mhc_prefill.hc_post_head, work=ops.streams),
        project_x=ops.project_x,
        store_and_compress=ops.store_and_compress,
        linear=partial(linear_prefill.linear, work=ops.work),
        select_entries=partial(indexer.select_entries, work=_index_work(config, sizes, prefill=True), mode="prefill"),
        sparse_attention=partial(attention.sparse_attention, work=attention_work, mode="prefill"),
        grouped_linear=partial(linear_prefill.grouped_linear, work=ops.work),
        route=ops.route,
        expert_gate_up=ops.expert_gate_up,
        expert_down=ops.expert_down,
        head=linear_prefill.head,
        sample_greedy=sampling.sample_greedy,
    )


def _split_work(config: ModelConfig, sizes: StepSizes) -> Tensor:
    """Scratch of decode attention whose keys are split over programs."""
    from workers.kernels import sparse_attention as attention

    c = config
    # A small batch splits its keys over more programs than a large one: the largest batch is not the largest need.
    floats = max(
        attention.work_floats(
            count, c.num_attention_heads, c.head_dim, sizes.num_pages, c.index_topk, kind.value, sizes.device
        )
        for kind in set(c.layer_kinds)
        for count in range(1, sizes.num_tokens + 1)
    )
    return torch.empty(max(1, floats), device=sizes.device)


def _route_work(config: ModelConfig, sizes: StepSizes) -> Tensor:
    from workers.kernels import routing

    words = routing.work_words(sizes.num_tokens, config.n_routed_experts)
    return torch.empty(words, dtype=torch.int32, device=sizes.device)


def _index_work(config: ModelConfig, sizes: StepSizes, *, prefill: bool) -> Any:
    """Scratch of the selection; None for a model without C4 layers."""
    from workers.kernels import indexer

    if LayerKind.C4 not in config.layer_kinds:
        return None
    entries = sizes.num_pages * PAGE_TOKENS // LayerKind.C4.value
    return indexer.IndexWork.allocate(
        sizes.block, entries, config.index_topk, config.index_n_heads, sizes.device, prefill=prefill
    )


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch of a step: the op's name, the layer (None: before or after the layers), and the bound call."""

    op: str
    layer: int | None
    call: Callable[[], Any]


class Recorder:
    """Collects launches in order; the step moves `layer` on."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.layer: int | None = None

    def op(self, name: str, function: Op) -> Op:
        """`function`, noted instead of called."""

        def note(*args: Any, **kwargs: Any) -> None:
            self.launches.append(Launch(name, self.layer, partial(function, *args, **kwargs)))

        return note


def recorded(kernels: KernelSet, recorder: Recorder) -> KernelSet:
    """The same ops, noted in `recorder` instead of launched."""
    ops = {field.name: getattr(kernels, field.name) for field in dataclasses.fields(kernels)}
    return dataclasses.replace(kernels, **{name: recorder.op(name, op) for name, op in ops.items() if callable(op)})
