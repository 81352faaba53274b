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

from workers.model.config import PAGE_TOKENS, LayerKind, ModelConfig

Op = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class KernelSet:
    """Ops by the names of `workers/kernels`, their scratch bound."""

    embed_streams: Op
    hc_pre: Op
    hc_post_pre: Op
    hc_post_head: Op
    project_x: Op
    norm_and_store: Op
    compress_c4: Op
    compress_c128: Op
    linear: Op
    select_entries: Op
    sparse_attention: Op
    grouped_linear: Op
    gate_and_shared: Op
    route: Op
    expert_gate_up: Op
    expert_down: Op
    head: Op
    sample_greedy: Op


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step that a set must serve."""

    num_tokens: int
    block: int
    """Tokens that go through attention at a time."""
    num_pages: int
    """Logical pages of the longest sequence."""
    device: torch.device


class MakeKernels(Protocol):
    """Makes the ops of one kind of step, with scratch for it."""

    def __call__(self, config: ModelConfig, sizes: StepSizes) -> KernelSet: ...


def decode_kernels(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    """Triton's ops for steps of one token a sequence; batch invariant bit for bit."""
    from workers.kernels import compressor, experts_decode, indexer, kv_store, linear_decode, mhc, routing, sampling
    from workers.kernels import sparse_attention as attention

    c, tokens, device = config, sizes.num_tokens, sizes.device
    heads = (c.num_attention_heads, c.head_dim)
    # A small batch splits its keys over more programs than a large one: the largest batch is not the largest need.
    floats = max(
        attention.work_floats(count, *heads, sizes.num_pages, c.index_topk, kind.value, device)
        for kind in set(c.layer_kinds)
        for count in range(1, tokens + 1)
    )
    streams = torch.empty(mhc.work_floats(tokens, c.hidden_size), device=device)
    counts = experts_decode.num_counters(tokens, c.num_experts_per_tok, c.n_routed_experts, c.moe_intermediate_size)
    return KernelSet(
        embed_streams=mhc.embed_streams,
        hc_pre=partial(mhc.hc_pre, work=streams),
        hc_post_pre=partial(mhc.hc_post_pre, work=streams),
        hc_post_head=partial(mhc.hc_post_head, work=streams),
        project_x=linear_decode.project_x,
        norm_and_store=kv_store.norm_and_store,
        compress_c4=partial(compressor.compress_c4, mode="decode"),
        compress_c128=partial(compressor.compress_c128, mode="decode"),
        linear=linear_decode.linear,
        select_entries=partial(indexer.select_entries, work=_index_work(config, sizes, prefill=False), mode="decode"),
        sparse_attention=partial(
            attention.sparse_attention, work=torch.empty(max(1, floats), device=device), mode="decode"
        ),
        grouped_linear=linear_decode.grouped_linear,
        gate_and_shared=linear_decode.gate_and_shared,
        route=routing.route,
        expert_gate_up=partial(
            experts_decode.expert_gate_up, counters=torch.zeros(counts, dtype=torch.int32, device=device)
        ),
        expert_down=experts_decode.expert_down,
        head=linear_decode.head,
        sample_greedy=sampling.sample_greedy,
    )


def prefill_kernels(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    """Triton's ops for steps of many tokens."""
    from workers.kernels import compressor, experts_prefill, indexer, kv_store, linear_prefill, mhc, routing, sampling
    from workers.kernels import sparse_attention as attention

    c, tokens, device = config, sizes.num_tokens, sizes.device
    width = c.num_attention_heads * c.head_dim
    rows = linear_prefill.PrefillWork.empty(
        tokens,
        columns=max(c.hidden_size, c.q_lora_rank, c.o_groups * c.o_lora_rank, c.moe_intermediate_size),
        weight_elements=c.o_lora_rank * width,
        inner=c.moe_intermediate_size,
        device=device,
    )
    streams = torch.empty(mhc.work_floats(tokens, c.hidden_size), device=device)
    return KernelSet(
        embed_streams=mhc.embed_streams,
        hc_pre=partial(mhc.hc_pre, work=streams),
        hc_post_pre=partial(mhc.hc_post_pre, work=streams),
        hc_post_head=partial(mhc.hc_post_head, work=streams),
        project_x=partial(linear_prefill.project_x, work=rows),
        norm_and_store=kv_store.norm_and_store,
        compress_c4=partial(compressor.compress_c4, mode="prefill"),
        compress_c128=partial(compressor.compress_c128, mode="prefill"),
        linear=partial(linear_prefill.linear, work=rows),
        select_entries=partial(indexer.select_entries, work=_index_work(config, sizes, prefill=True), mode="prefill"),
        sparse_attention=partial(attention.sparse_attention, work=None, mode="prefill"),
        grouped_linear=partial(linear_prefill.grouped_linear, work=rows),
        gate_and_shared=partial(linear_prefill.gate_and_shared, work=rows),
        route=routing.route,
        expert_gate_up=experts_prefill.expert_gate_up,
        expert_down=experts_prefill.expert_down,
        head=linear_prefill.head,
        sample_greedy=sampling.sample_greedy,
    )


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
    names = [field.name for field in dataclasses.fields(kernels)]
    return KernelSet(**{name: recorder.op(name, getattr(kernels, name)) for name in names})
