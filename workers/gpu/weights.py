"""`GpuWeights`: one model's tensors on a device, in the layouts that the Triton kernels read.

Owns: which official tensors share a kernel operand and in which order, and all device memory of the weights. Does not
own: where values come from (`loading.py`), what the kernels do with them. Nothing is held twice: an FP8 linear keeps
its codes and its decoded block scales, an expert its checkpoint bytes; no matrix has an fp32 copy on the device.

Order of the fused operands (rows):
    x_fp8   wq_a | wkv                                              one pass over the normed hidden state
    x_bf16  compressor wkv | wgate | indexer's wkv | wgate | weights_proj   its columns are raw compressor rows
    q_fp8   wq_b | indexer.wq_b                                     one pass over the latent
    shared_w13  w1 | w3
    expert  w1 codes | w3 codes | w2 codes | w1 scales | w3 scales | w2 scales   bytes as in the checkpoint
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from workers.experts.layout import TIER_SHIFT, ExpertShape, ExpertSlab
from workers.model.config import WEIGHT_BLOCK, LayerKind, ModelConfig, RouterKind


class Fp8Weight(NamedTuple):
    """`codes` uint8 (e4m3) `[N, K]` and `scales` fp32 `[N/128, K/128]`, decoded from e8m0."""

    codes: Tensor
    scales: Tensor

    def rows(self, begin: int, end: int | None = None) -> Fp8Weight:
        """A view of rows, `begin` and `end` (default: the last) multiples of `WEIGHT_BLOCK`."""
        last = None if end is None else end // WEIGHT_BLOCK
        return Fp8Weight(self.codes[begin:end], self.scales[begin // WEIGHT_BLOCK : last])


class HyperConnection(NamedTuple):
    """mHC of one sublayer (`fn [24, 4D]`, `base [24]`, `scale [3]`) or of the head (4 rows, 1 scale), fp32, and the
    model's constants: Sinkhorn steps, `hc_eps`, `rms_norm_eps`."""

    fn: Tensor
    base: Tensor
    scale: Tensor
    iters: int
    eps: float
    norm_eps: float


class Compressor(NamedTuple):
    """What pooling needs beside the raw rows: `ape [ratio, c*hd]` and `norm [hd]`, fp32."""

    ape: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """One block's operands."""

    kind: LayerKind
    attn_norm: Tensor  # fp32 [D]
    ffn_norm: Tensor  # fp32 [D]
    hc_attn: HyperConnection
    hc_ffn: HyperConnection
    x_fp8: Fp8Weight  # [q_lora + hd, D]
    x_bf16: Tensor | None  # bf16 [N2, D]; None in sliding-only layers
    q_norm: Tensor  # fp32 [q_lora]
    kv_norm: Tensor  # fp32 [hd]
    q_fp8: Fp8Weight  # [H*hd (+ Hi*Di), q_lora]
    sink: Tensor  # fp32 [H]
    wo_a: Fp8Weight  # [G*o_lora, H*hd/G]
    wo_b: Fp8Weight  # [D, G*o_lora]
    compressor: Compressor | None
    index_compressor: Compressor | None
    gate: Tensor  # bf16 [E, D]
    bias: Tensor | None  # fp32 [E], learned router
    tid2eid: Tensor | None  # int32 [V, k], hash router
    shared_w13: Fp8Weight  # [2I, D]
    shared_w2: Fp8Weight  # [D, I]
    experts: ExpertSlab


@dataclass(frozen=True, slots=True)
class GpuWeights:
    """A whole trunk on one device."""

    embed: Tensor  # bf16 [V, D]
    head: Tensor  # bf16 [V, D]
    norm: Tensor  # fp32 [D]
    hc_head: HyperConnection
    layers: tuple[GpuLayer, ...]

    @classmethod
    def allocate(
        cls, config: ModelConfig, device: torch.device | str, *, experts_per_layer: int | None = None
    ) -> GpuWeights:
        """Uninitialised memory for every operand, all experts resident. Raises ValueError as `unsupported_shape`.

        `experts_per_layer`: a smaller slab that experts share in turn, for benchmarks of models that do not fit; 0:
        none, for a model whose experts are kept elsewhere (`cached_experts.py`).
        """
        reason = unsupported_shape(config)
        if reason is not None:
            raise ValueError(reason)
        held = config.n_routed_experts if experts_per_layer is None else experts_per_layer
        return _Allocator(config, torch.device(device), held).model()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.device

    @property
    def nbytes(self) -> int:
        """Device bytes held, shared memory counted once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self)}
        return sum(storages.values())


def x_bf16_columns(config: ModelConfig, kind: LayerKind) -> dict[str, tuple[int, int]]:
    """Half-open column range of each part of `x_bf16`'s output; empty for sliding-only layers."""
    if kind is LayerKind.SLIDING:
        return {}
    width = config.head_dim * (2 if kind is LayerKind.C4 else 1)
    sizes = {"compressor.wkv": width, "compressor.wgate": width}
    if kind is LayerKind.C4:
        index = 2 * config.index_head_dim
        sizes |= {"indexer.compressor.wkv": index, "indexer.compressor.wgate": index}
        sizes |= {"indexer.weights_proj": config.index_n_heads}
    columns, start = {}, 0
    for name, size in sizes.items():
        columns[name] = (start, start + size)
        start += size
    return columns


def unsupported_shape(config: ModelConfig) -> str | None:
    """Why the kernels cannot run this architecture, or `None`."""
    multiples = {
        "hidden_size": config.hidden_size,
        "head_dim": config.head_dim,
        "q_lora_rank": config.q_lora_rank,
        "o_lora_rank": config.o_lora_rank,
        "moe_intermediate_size": config.moe_intermediate_size,
        "num_attention_heads * head_dim / o_groups": config.num_attention_heads * config.head_dim // config.o_groups,
    }
    for name, value in multiples.items():
        if value % WEIGHT_BLOCK:
            return f"{name} {value} is not a multiple of {WEIGHT_BLOCK}"
    exact = {"hc_mult": 4, "qk_rope_head_dim": 64, "index_head_dim": 128, "sliding_window": 128}
    for name, value in exact.items():
        if getattr(config, name) != value:
            return f"{name} {getattr(config, name)} is not {value}"
    if config.expert_dtype == "fp8":
        return "experts are stored in FP8, the kernels take FP4"
    if config.num_hidden_layers * config.n_routed_experts >= 1 << TIER_SHIFT:
        return f"more than {1 << TIER_SHIFT} experts"
    return None


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, tuple):
        for child in node:
            yield from _tensors(child)
    elif dataclasses.is_dataclass(node):
        for field in dataclasses.fields(node):
            yield from _tensors(getattr(node, field.name))


class _Allocator:
    """Makes the empty operands of one config."""

    def __init__(self, config: ModelConfig, device: torch.device, slots_per_layer: int) -> None:
        self.config, self.device, self.slots_per_layer = config, device, slots_per_layer

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def bf16(self, *shape: int) -> Tensor:
        return self.empty(*shape, dtype=torch.bfloat16)

    def fp8(self, rows: int, columns: int) -> Fp8Weight:
        scales = self.empty(-(-rows // WEIGHT_BLOCK), columns // WEIGHT_BLOCK)
        return Fp8Weight(self.empty(rows, columns, dtype=torch.uint8), scales)

    def hyper_connection(self, *, head: bool = False) -> HyperConnection:
        c = self.config
        rows = c.hc_mult if head else c.hc_mult * (2 + c.hc_mult)
        fn = self.empty(rows, c.hc_mult * c.hidden_size)
        scale = self.empty(1 if head else 3)
        return HyperConnection(fn, self.empty(rows), scale, c.hc_sinkhorn_iters, c.hc_eps, c.rms_norm_eps)

    def compressor(self, kind: LayerKind, head_dim: int) -> Compressor:
        width = head_dim * (2 if kind is LayerKind.C4 else 1)
        return Compressor(self.empty(kind.value, width), self.empty(head_dim))

    def model(self) -> GpuWeights:
        c = self.config
        shape = ExpertShape(c.hidden_size, c.moe_intermediate_size)
        slots = c.num_hidden_layers * self.slots_per_layer
        base = self.empty(slots * shape.expert_bytes, dtype=torch.uint8)
        return GpuWeights(
            embed=self.bf16(c.vocab_size, c.hidden_size),
            head=self.bf16(c.vocab_size, c.hidden_size),
            norm=self.empty(c.hidden_size),
            hc_head=self.hyper_connection(head=True),
            layers=tuple(self.layer(i, kind, base) for i, kind in enumerate(c.layer_kinds)),
        )

    def layer(self, index: int, kind: LayerKind, base: Tensor) -> GpuLayer:
        c = self.config
        hidden, inner, experts = c.hidden_size, c.moe_intermediate_size, c.n_routed_experts
        width, latent = c.num_attention_heads * c.head_dim, c.o_groups * c.o_lora_rank
        indexed = kind is LayerKind.C4
        columns = x_bf16_columns(c, kind)
        hashed = c.router_kind(index) is RouterKind.HASH
        slots = torch.arange(experts, dtype=torch.int32, device=self.device) % max(1, self.slots_per_layer)
        return GpuLayer(
            kind=kind,
            attn_norm=self.empty(hidden),
            ffn_norm=self.empty(hidden),
            hc_attn=self.hyper_connection(),
            hc_ffn=self.hyper_connection(),
            x_fp8=self.fp8(c.q_lora_rank + c.head_dim, hidden),
            x_bf16=self.bf16(max(end for _, end in columns.values()), hidden) if columns else None,
            q_norm=self.empty(c.q_lora_rank),
            kv_norm=self.empty(c.head_dim),
            q_fp8=self.fp8(width + (c.index_n_heads * c.index_head_dim if indexed else 0), c.q_lora_rank),
            sink=self.empty(c.num_attention_heads),
            wo_a=self.fp8(latent, width // c.o_groups),
            wo_b=self.fp8(hidden, latent),
            compressor=self.compressor(kind, c.head_dim) if columns else None,
            index_compressor=self.compressor(kind, c.index_head_dim) if indexed else None,
            gate=self.bf16(experts, hidden),
            bias=None if hashed else self.empty(experts),
            tid2eid=self.empty(c.vocab_size, c.num_experts_per_tok, dtype=torch.int32) if hashed else None,
            shared_w13=self.fp8(2 * inner, hidden),
            shared_w2=self.fp8(hidden, inner),
            experts=ExpertSlab(base, slots + index * self.slots_per_layer),
        )
