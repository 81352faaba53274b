"""`ModelWeights`: one model's tensors as nested dataclasses whose attributes carry the official names.

`tensor_tree(config)` describes every tensor once (official name, shape, storage class); loading, naming, random
initialisation and transformation all walk that one description. Routed experts of a layer are stacked into `[E, ...]`
tensors. Tensors are fp32 (dequantised) except the int64 hash table; they may be parameters that require gradients.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from workers.errors import BadCheckpoint
from workers.model.config import LayerKind, ModelConfig, RouterKind
from workers.reference.moe import ExpertWeights


class WeightClass(enum.Enum):
    """How the checkpoint stores a tensor; decides which fake quantisation it sees in training."""

    EXPERT = "fp4"
    """Routed experts: e2m1 with an e8m0 scale per 32 columns."""
    LINEAR = "fp8"
    """Other large linears: e4m3 with an e8m0 scale per 128 x 128."""
    BF16 = "bf16"
    FP32 = "fp32"
    TABLE = "int64"
    """Token-id to expert-id table; never transformed."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One leaf: its name (stacked experts have `*` for the expert id), official tensor names, shape and class."""

    name: str
    parts: tuple[str, ...]
    """Official names; more than one means a stack along a new first axis."""
    shape: tuple[int, ...]
    """Shape of the leaf, including the stacking axis."""
    weight_class: WeightClass


@dataclass(frozen=True, slots=True)
class HyperConnectionWeights:
    """mHC of one sublayer (`hc_attn_*`, `hc_ffn_*`) or of the head (`hc_head_*`)."""

    fn: Tensor
    base: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class CompressorWeights:
    """`ape [ratio, c*hd]`, `wkv`, `wgate [c*hd, D]`, `norm [hd]`; c = 2 for C4, 1 for C128."""

    ape: Tensor
    wkv: Tensor
    wgate: Tensor
    norm: Tensor


@dataclass(frozen=True, slots=True)
class IndexerWeights:
    """`wq_b [Hi*Di, q_lora]`, `weights_proj [Hi, D]` and the compressor that makes its keys."""

    wq_b: Tensor
    weights_proj: Tensor
    compressor: CompressorWeights


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """`wq_a [q_lora, D]`, `wq_b [H*hd, q_lora]`, `wkv [hd, D]`, `wo_a [G*o_lora, H*hd/G]`, `wo_b [D, G*o_lora]`."""

    attn_sink: Tensor
    wq_a: Tensor
    q_norm: Tensor
    wq_b: Tensor
    wkv: Tensor
    kv_norm: Tensor
    wo_a: Tensor
    wo_b: Tensor
    compressor: CompressorWeights | None
    indexer: IndexerWeights | None


@dataclass(frozen=True, slots=True)
class GateWeights:
    """Router `weight [E, D]` with either a selection `bias [E]` or a token table `tid2eid [V, k]`."""

    weight: Tensor
    bias: Tensor | None
    tid2eid: Tensor | None


@dataclass(frozen=True, slots=True)
class FfnWeights:
    """MoE of one layer."""

    gate: GateWeights
    experts: ExpertWeights
    shared_experts: ExpertWeights


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One block."""

    attn_norm: Tensor
    ffn_norm: Tensor
    hc_attn: HyperConnectionWeights
    hc_ffn: HyperConnectionWeights
    attn: AttentionWeights
    ffn: FfnWeights


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """The multi-token-prediction block `mtp.N`: an ordinary sliding-only block with its own input mix and head."""

    layer: LayerWeights
    e_proj: Tensor
    h_proj: Tensor
    enorm: Tensor
    hnorm: Tensor
    norm: Tensor
    hc_head: HyperConnectionWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """All tensors of one model. `mtp` is empty when the checkpoint has none."""

    embed: Tensor
    head: Tensor
    norm: Tensor
    hc_head: HyperConnectionWeights
    layers: tuple[LayerWeights, ...]
    mtp: tuple[MtpWeights, ...]

    @classmethod
    def from_named(cls, config: ModelConfig, tensors: Mapping[str, Tensor]) -> ModelWeights:
        """Build from official tensor names; MTP is taken when present. Raises `BadCheckpoint` on a missing, extra or
        misshapen tensor. Tensors are used as they are, except that experts are stacked (copied)."""
        has_mtp = any(name.startswith("mtp.") for name in tensors)
        tree = tensor_tree(config, mtp=has_mtp)
        unused = set(tensors) - {part for info in _leaves(tree) for part in info.parts}
        if unused:
            raise BadCheckpoint("weights", min(unused), "no such tensor in this config", "present")
        return _map(lambda info: _take(info, tensors), tree)

    def to_named(self, config: ModelConfig) -> dict[str, Tensor]:
        """Inverse of `from_named`: official names to tensors (views of the stacked experts)."""
        named: dict[str, Tensor] = {}
        for info, tensor in zip(_leaves(tensor_tree(config, mtp=bool(self.mtp))), _leaves(self), strict=True):
            parts = tensor.unbind(0) if len(info.parts) > 1 or "*" in info.name else (tensor,)
            named.update(zip(info.parts, parts, strict=True))
        return named

    def items(self, config: ModelConfig) -> Iterator[tuple[TensorInfo, Tensor]]:
        """Every leaf with its description, in a fixed order. Experts appear stacked."""
        return zip(_leaves(tensor_tree(config, mtp=bool(self.mtp))), _leaves(self), strict=True)

    def map(self, config: ModelConfig, transform: Callable[[TensorInfo, Tensor], Tensor]) -> ModelWeights:
        """New weights with `transform` applied to every leaf: moving devices, making parameters, fake quantisation."""
        return _map(transform, tensor_tree(config, mtp=bool(self.mtp)), self)

    def to(self, config: ModelConfig, device: torch.device | str) -> ModelWeights:
        """Copy on a device."""
        return self.map(config, lambda _, tensor: tensor.to(device))


def _take(info: TensorInfo, tensors: Mapping[str, Tensor]) -> Tensor:
    stacked = "*" in info.name
    part_shape = info.shape[1:] if stacked else info.shape
    for part in info.parts:
        if part not in tensors:
            raise BadCheckpoint("weights", part, f"a tensor of shape {list(part_shape)}", "missing")
        if tuple(tensors[part].shape) != part_shape:
            raise BadCheckpoint("weights", part, f"shape {list(part_shape)}", f"shape {list(tensors[part].shape)}")
    return torch.stack([tensors[part] for part in info.parts]) if stacked else tensors[info.parts[0]]


def _children(node: Any) -> tuple[Any, ...] | None:
    if dataclasses.is_dataclass(node) and not isinstance(node, TensorInfo):
        return tuple(getattr(node, field.name) for field in dataclasses.fields(node))
    return tuple(node) if isinstance(node, tuple) else None


def _leaves(node: Any) -> Iterator[Any]:
    children = _children(node)
    if children is not None:
        for child in children:
            yield from _leaves(child)
    elif node is not None:
        yield node


def _map(transform: Callable[..., Any], node: Any, *others: Any) -> Any:
    """Rebuild the tree of `node` with `transform` of the corresponding leaves of all trees."""
    children = _children(node)
    if children is None:
        return None if node is None else transform(node, *others)
    columns = zip(children, *(_children(other) or () for other in others), strict=True)
    mapped = [_map(transform, *column) for column in columns]
    return tuple(mapped) if type(node) is tuple else type(node)(*mapped)


class _TreeBuilder:
    """Lays out the `TensorInfo` tree of one config."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config

    def leaf(self, name: str, weight_class: WeightClass, *shape: int) -> Any:
        return TensorInfo(name, (name,), shape, weight_class)

    def hyper_connection(self, prefix: str, *, head: bool = False) -> HyperConnectionWeights:
        streams = self.config.hc_mult
        rows = streams if head else streams * (2 + streams)
        return HyperConnectionWeights(
            fn=self.leaf(f"{prefix}_fn", WeightClass.FP32, rows, streams * self.config.hidden_size),
            base=self.leaf(f"{prefix}_base", WeightClass.FP32, rows),
            scale=self.leaf(f"{prefix}_scale", WeightClass.FP32, 1 if head else 3),
        )

    def compressor(self, prefix: str, ratio: int, head_dim: int) -> CompressorWeights:
        width = head_dim * (2 if ratio == LayerKind.C4.value else 1)
        return CompressorWeights(
            ape=self.leaf(f"{prefix}.ape", WeightClass.FP32, ratio, width),
            wkv=self.leaf(f"{prefix}.wkv.weight", WeightClass.BF16, width, self.config.hidden_size),
            wgate=self.leaf(f"{prefix}.wgate.weight", WeightClass.BF16, width, self.config.hidden_size),
            norm=self.leaf(f"{prefix}.norm.weight", WeightClass.BF16, head_dim),
        )

    def indexer(self, prefix: str) -> IndexerWeights:
        c = self.config
        rows = c.index_n_heads * c.index_head_dim
        return IndexerWeights(
            wq_b=self.leaf(f"{prefix}.wq_b.weight", WeightClass.LINEAR, rows, c.q_lora_rank),
            weights_proj=self.leaf(f"{prefix}.weights_proj.weight", WeightClass.BF16, c.index_n_heads, c.hidden_size),
            compressor=self.compressor(f"{prefix}.compressor", LayerKind.C4.value, c.index_head_dim),
        )

    def attention(self, prefix: str, kind: LayerKind) -> AttentionWeights:
        c = self.config
        linear, bf16 = WeightClass.LINEAR, WeightClass.BF16
        width = c.num_attention_heads * c.head_dim
        compressed = kind is not LayerKind.SLIDING
        return AttentionWeights(
            attn_sink=self.leaf(f"{prefix}.attn_sink", WeightClass.FP32, c.num_attention_heads),
            wq_a=self.leaf(f"{prefix}.wq_a.weight", linear, c.q_lora_rank, c.hidden_size),
            q_norm=self.leaf(f"{prefix}.q_norm.weight", bf16, c.q_lora_rank),
            wq_b=self.leaf(f"{prefix}.wq_b.weight", linear, width, c.q_lora_rank),
            wkv=self.leaf(f"{prefix}.wkv.weight", linear, c.head_dim, c.hidden_size),
            kv_norm=self.leaf(f"{prefix}.kv_norm.weight", bf16, c.head_dim),
            wo_a=self.leaf(f"{prefix}.wo_a.weight", linear, c.o_groups * c.o_lora_rank, width // c.o_groups),
            wo_b=self.leaf(f"{prefix}.wo_b.weight", linear, c.hidden_size, c.o_groups * c.o_lora_rank),
            compressor=self.compressor(f"{prefix}.compressor", kind.value, c.head_dim) if compressed else None,
            indexer=self.indexer(f"{prefix}.indexer") if kind is LayerKind.C4 else None,
        )

    def gate(self, prefix: str, router: RouterKind) -> GateWeights:
        c = self.config
        hashed = router is RouterKind.HASH
        table = self.leaf(f"{prefix}.tid2eid", WeightClass.TABLE, c.vocab_size, c.num_experts_per_tok)
        bias = self.leaf(f"{prefix}.bias", WeightClass.FP32, c.n_routed_experts)
        weight = self.leaf(f"{prefix}.weight", WeightClass.BF16, c.n_routed_experts, c.hidden_size)
        return GateWeights(weight=weight, bias=None if hashed else bias, tid2eid=table if hashed else None)

    def experts(self, prefix: str) -> ExpertWeights:
        c = self.config

        def stacked(matrix: str, *shape: int) -> Any:
            parts = tuple(f"{prefix}.{expert}.{matrix}.weight" for expert in range(c.n_routed_experts))
            shape = (c.n_routed_experts, *shape)
            return TensorInfo(f"{prefix}.*.{matrix}.weight", parts, shape, WeightClass.EXPERT)

        inner, hidden = c.moe_intermediate_size, c.hidden_size
        return ExpertWeights(
            w1=stacked("w1", inner, hidden), w2=stacked("w2", hidden, inner), w3=stacked("w3", inner, hidden)
        )

    def shared(self, prefix: str) -> ExpertWeights:
        inner = self.config.moe_intermediate_size * self.config.n_shared_experts
        hidden = self.config.hidden_size
        return ExpertWeights(
            w1=self.leaf(f"{prefix}.w1.weight", WeightClass.LINEAR, inner, hidden),
            w2=self.leaf(f"{prefix}.w2.weight", WeightClass.LINEAR, hidden, inner),
            w3=self.leaf(f"{prefix}.w3.weight", WeightClass.LINEAR, inner, hidden),
        )

    def layer(self, prefix: str, kind: LayerKind, router: RouterKind) -> LayerWeights:
        hidden = self.config.hidden_size
        return LayerWeights(
            attn_norm=self.leaf(f"{prefix}.attn_norm.weight", WeightClass.BF16, hidden),
            ffn_norm=self.leaf(f"{prefix}.ffn_norm.weight", WeightClass.BF16, hidden),
            hc_attn=self.hyper_connection(f"{prefix}.hc_attn"),
            hc_ffn=self.hyper_connection(f"{prefix}.hc_ffn"),
            attn=self.attention(f"{prefix}.attn", kind),
            ffn=FfnWeights(
                gate=self.gate(f"{prefix}.ffn.gate", router),
                experts=self.experts(f"{prefix}.ffn.experts"),
                shared_experts=self.shared(f"{prefix}.ffn.shared_experts"),
            ),
        )

    def mtp(self, prefix: str) -> MtpWeights:
        hidden = self.config.hidden_size
        return MtpWeights(
            layer=self.layer(prefix, LayerKind.SLIDING, RouterKind.LEARNED),
            e_proj=self.leaf(f"{prefix}.e_proj.weight", WeightClass.LINEAR, hidden, hidden),
            h_proj=self.leaf(f"{prefix}.h_proj.weight", WeightClass.LINEAR, hidden, hidden),
            enorm=self.leaf(f"{prefix}.enorm.weight", WeightClass.BF16, hidden),
            hnorm=self.leaf(f"{prefix}.hnorm.weight", WeightClass.BF16, hidden),
            norm=self.leaf(f"{prefix}.norm.weight", WeightClass.BF16, hidden),
            hc_head=self.hyper_connection(f"{prefix}.hc_head", head=True),
        )


def tensor_tree(config: ModelConfig, *, mtp: bool) -> Any:
    """A `ModelWeights` whose leaves are `TensorInfo`: every tensor of the config, with or without the MTP block."""
    build = _TreeBuilder(config)
    kinds = config.layer_kinds
    return ModelWeights(
        embed=build.leaf("embed.weight", WeightClass.BF16, config.vocab_size, config.hidden_size),
        head=build.leaf("head.weight", WeightClass.BF16, config.vocab_size, config.hidden_size),
        norm=build.leaf("norm.weight", WeightClass.BF16, config.hidden_size),
        hc_head=build.hyper_connection("hc_head", head=True),
        layers=tuple(build.layer(f"layers.{i}", kind, config.router_kind(i)) for i, kind in enumerate(kinds)),
        mtp=tuple(build.mtp(f"mtp.{i}") for i in range(config.num_nextn_predict_layers)) if mtp else (),
    )


def tensor_infos(config: ModelConfig, *, mtp: bool = True) -> tuple[TensorInfo, ...]:
    """Every leaf of the config, in the order of `ModelWeights.items`."""
    return tuple(_leaves(tensor_tree(config, mtp=mtp)))


def random_named_weights(config: ModelConfig, seed: int, *, mtp: bool = True) -> dict[str, Tensor]:
    """Official names to random tensors at scales where every part of the model matters: linears keep the variance of
    their input, norms are near 1, and biases, sinks, positional biases and mHC gates differ from their defaults."""
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, Tensor] = {}
    for info in tensor_infos(config, mtp=mtp):
        tensor = _random_tensor(info, config, generator)
        parts = tensor.unbind(0) if "*" in info.name else (tensor,)
        named.update(zip(info.parts, parts, strict=True))
    return named


def _random_tensor(info: TensorInfo, config: ModelConfig, generator: torch.Generator) -> Tensor:
    if info.weight_class is WeightClass.TABLE:
        order = torch.rand(info.shape[0], config.n_routed_experts, generator=generator).argsort(-1)
        return order[:, : info.shape[1]].contiguous()
    noise = torch.randn(info.shape, generator=generator)
    name = info.name
    if name.endswith("norm.weight"):
        return 1.0 + 0.1 * noise
    if name == "embed.weight":
        return noise
    if name.endswith(("_base", ".ape", ".attn_sink")):
        return 0.5 * noise
    if name.endswith("_scale"):
        return 1.0 + 0.2 * noise
    if name.endswith("gate.bias"):
        return 0.1 * noise
    return noise / math.sqrt(info.shape[-1])
