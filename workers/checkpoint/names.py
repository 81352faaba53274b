"""The complete table of tensors that a DeepSeek-V4 checkpoint must hold, derived from `ModelConfig`.

Owns: official names, logical shapes, the stored forms that are accepted for each tensor, the organ and block it belongs
to, and all byte totals. Does not own: reading (`index.py`), number formats (`quant.py`). Torch-free.
Source: tensor inventories of DeepSeek-V4-Flash, -Pro and -Flash-0731, whose totals this table reproduces to the byte.

A block is a unit of sharding and of layer selection: `embed`, `layers.N`, `head` (head, final norm, stream head) and
`mtp.N`. MTP blocks and the 0731 draft stages are known but not run yet: `TensorSpec.used` is false for them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from workers.model.config import WEIGHT_BLOCK, LayerKind, ModelConfig, RouterKind

FP4_GROUP = 32
"""Columns that share one scale of a packed FP4 weight (MXFP4)."""

DTYPE_BYTES = {"F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}
"""Bytes per element of the safetensors dtype tags that a checkpoint of this family may use."""

Shape = tuple[int, ...]


class Organ(enum.StrEnum):
    """Part of the model that a tensor belongs to, as `dsv4 checkpoint inspect` groups them."""

    EMBED = "embed"
    HEAD = "head"
    NORM = "norms"
    ATTENTION = "attention linears, sinks"
    COMPRESSOR = "compressor, indexer"
    MHC = "mHC"
    ROUTER = "router"
    HASH_TABLE = "tid2eid"
    ROUTED_EXPERTS = "routed experts"
    SHARED_EXPERTS = "shared experts"
    MTP = "MTP projections"
    DRAFT = "DSpark projections"


class Encoding(enum.Enum):
    """How a tensor is stored in an official release."""

    FP4 = "fp4"
    FP8 = "fp8"
    BF16 = "bf16"
    F32 = "f32"
    I64 = "i64"


@dataclass(frozen=True, slots=True)
class StoredForm:
    """One accepted way to store a tensor: safetensors tag and shape, and those of its scale (no scale: empty)."""

    dtype: str
    shape: Shape
    scale_dtypes: tuple[str, ...] = ()
    scale_shape: Shape = ()

    def __str__(self) -> str:
        scale = f" + scale {'|'.join(self.scale_dtypes)} {list(self.scale_shape)}" if self.scale_dtypes else ""
        return f"{self.dtype} {list(self.shape)}{scale}"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the model: `shape` is logical (FP4 unpacked), `used` false if the engine does not run it yet."""

    name: str
    organ: Organ
    block: str
    shape: Shape
    encoding: Encoding
    used: bool = True

    @property
    def scale_name(self) -> str:
        """Name of the scale tensor that a quantised form needs."""
        return self.name.removesuffix("weight") + "scale"

    @property
    def official(self) -> StoredForm:
        """The form that DeepSeek ships and that we write."""
        return self.forms()[0]

    def forms(self) -> tuple[StoredForm, ...]:
        """Accepted forms, official one first; quantised tensors may also come as plain BF16 or F32."""
        plain = (StoredForm("BF16", self.shape), StoredForm("F32", self.shape))
        match self.encoding:
            case Encoding.FP4:
                rows, columns = self.shape
                packed, scale = (rows, columns // 2), (rows, columns // FP4_GROUP)
                return (*(StoredForm(tag, packed, ("F8_E8M0", "U8"), scale) for tag in ("I8", "U8")), *plain)
            case Encoding.FP8:
                blocks = tuple(-(-n // WEIGHT_BLOCK) for n in self.shape)
                return (StoredForm("F8_E4M3", self.shape, ("F8_E8M0", "U8", "F32"), blocks), *plain)
            case Encoding.BF16:
                return plain
            case Encoding.F32:
                return plain[::-1]
            case Encoding.I64:
                return (StoredForm("I64", self.shape), StoredForm("I32", self.shape))

    def stored(self) -> Iterator[tuple[str, str, Shape]]:
        """(name, dtype tag, shape) of the tensors that the official form puts into a shard: weight, then scale."""
        form = self.official
        yield self.name, form.dtype, form.shape
        if form.scale_dtypes:
            yield self.scale_name, form.scale_dtypes[0], form.scale_shape

    @property
    def stored_bytes(self) -> int:
        """Payload bytes of the official form, scale included."""
        return sum(tensor_bytes(dtype, shape) for _, dtype, shape in self.stored())


@dataclass(frozen=True, slots=True)
class Total:
    """A count of stored tensors (scales count too) and their payload bytes."""

    tensors: int = 0
    bytes: int = 0

    def __add__(self, other: Total) -> Total:
        return Total(self.tensors + other.tensors, self.bytes + other.bytes)


def tensor_bytes(dtype: str, shape: Shape) -> int:
    """Payload bytes of one stored tensor."""
    count = DTYPE_BYTES[dtype]
    for n in shape:
        count *= n
    return count


@lru_cache(maxsize=8)
def tensor_table(config: ModelConfig) -> Mapping[str, TensorSpec]:
    """Every tensor of the model by official name, in file order (embed, layers, head, draft blocks).

    `config.expert_dtype` None is read as packed FP4; a loader that finds FP8 experts replaces it first.
    """
    table: dict[str, TensorSpec] = {}
    for spec in _all_specs(config):
        if spec.name in table:
            raise AssertionError(f"two specs named {spec.name}")
        table[spec.name] = spec
    return MappingProxyType(table)


def aliases(config: ModelConfig) -> Mapping[str, str]:
    """Other spellings of a tensor's name -> the name in `tensor_table`.

    The leaf names of the 0731 Markov tensors are not known from an official file; both spellings that third-party
    loaders take are accepted.
    """
    if config.draft is None:
        return {}
    head = f"mtp.{config.num_draft_blocks - 1}.markov_head"
    pairs = (("markov_w1", "embed"), ("markov_w2", "head"))
    return {f"{head}.{other}{leaf}": f"{head}.{name}.weight" for other, name in pairs for leaf in ("", ".weight")} | {
        f"{head}.{name}": f"{head}.{name}.weight" for _, name in pairs
    }


def total_by_dtype(config: ModelConfig) -> dict[str, Total]:
    """Totals of the official form per safetensors dtype tag."""
    totals: dict[str, Total] = {}
    for spec in tensor_table(config).values():
        for _, dtype, shape in spec.stored():
            totals[dtype] = totals.get(dtype, Total()) + Total(1, tensor_bytes(dtype, shape))
    return totals


def total_by_organ(config: ModelConfig) -> dict[Organ, Total]:
    """Totals of the official form per organ."""
    totals: dict[Organ, Total] = {}
    for spec in tensor_table(config).values():
        totals[spec.organ] = totals.get(spec.organ, Total()) + spec_total(spec)
    return totals


def total_by_block(config: ModelConfig) -> dict[str, Total]:
    """Totals of the official form per block, in file order."""
    totals: dict[str, Total] = {}
    for spec in tensor_table(config).values():
        totals[spec.block] = totals.get(spec.block, Total()) + spec_total(spec)
    return totals


def spec_total(spec: TensorSpec) -> Total:
    """Stored tensors and bytes of one spec in its official form."""
    return Total(2 if spec.official.scale_dtypes else 1, spec.stored_bytes)


@dataclass(frozen=True, slots=True)
class _Block:
    """Makes the specs of one block: prefixes names and fixes block and use."""

    name: str
    prefix: str
    used: bool = True

    def spec(self, leaf: str, organ: Organ, encoding: Encoding, *shape: int) -> TensorSpec:
        return TensorSpec(self.prefix + leaf, organ, self.name, shape, encoding, self.used)

    def stream_head(self, config: ModelConfig) -> Iterator[TensorSpec]:
        """The mHC head that folds the residual streams into one vector."""
        streams, hidden = config.hc_mult, config.hidden_size
        yield self.spec("hc_head_fn", Organ.MHC, Encoding.F32, streams, streams * hidden)
        yield self.spec("hc_head_base", Organ.MHC, Encoding.F32, streams)
        yield self.spec("hc_head_scale", Organ.MHC, Encoding.F32, 1)


def _all_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    vocab, hidden = config.vocab_size, config.hidden_size
    yield _Block("embed", "").spec("embed.weight", Organ.EMBED, Encoding.BF16, vocab, hidden)
    for layer, kind in enumerate(config.layer_kinds):
        yield from _transformer_block(_Block(f"layers.{layer}", f"layers.{layer}."), config, kind, layer)
    top = _Block("head", "")
    yield top.spec("head.weight", Organ.HEAD, Encoding.BF16, vocab, hidden)
    yield top.spec("norm.weight", Organ.NORM, Encoding.BF16, hidden)
    yield from top.stream_head(config)
    for stage in range(config.num_draft_blocks):
        block = _Block(f"mtp.{stage}", f"mtp.{stage}.", used=False)
        yield from _transformer_block(block, config, LayerKind.SLIDING, None)
        yield from _mtp_extras(block, config) if config.draft is None else _draft_extras(block, config, stage)


def _transformer_block(block: _Block, config: ModelConfig, kind: LayerKind, layer: int | None) -> Iterator[TensorSpec]:
    """One attention + MoE block; `layer` is None outside the trunk, where routing is always learned."""
    hidden, streams = config.hidden_size, config.hc_mult
    mixes = (2 + streams) * streams
    for site in ("attn", "ffn"):
        yield block.spec(f"{site}_norm.weight", Organ.NORM, Encoding.BF16, hidden)
        yield block.spec(f"hc_{site}_fn", Organ.MHC, Encoding.F32, mixes, streams * hidden)
        yield block.spec(f"hc_{site}_base", Organ.MHC, Encoding.F32, mixes)
        yield block.spec(f"hc_{site}_scale", Organ.MHC, Encoding.F32, 3)
    yield from _attention(block, config)
    if kind is not LayerKind.SLIDING:
        overlap = 2 if kind is LayerKind.C4 else 1
        yield from _compressor(block, config, "attn.compressor", config.head_dim, kind.value, overlap)
    if kind is LayerKind.C4:
        yield from _indexer(block, config)
    yield from _moe(block, config, layer)


def _attention(block: _Block, config: ModelConfig) -> Iterator[TensorSpec]:
    hidden, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
    groups, rank = config.o_groups, config.o_lora_rank
    attention, fp8 = Organ.ATTENTION, Encoding.FP8
    yield block.spec("attn.attn_sink", attention, Encoding.F32, heads)
    yield block.spec("attn.wq_a.weight", attention, fp8, config.q_lora_rank, hidden)
    yield block.spec("attn.q_norm.weight", Organ.NORM, Encoding.BF16, config.q_lora_rank)
    yield block.spec("attn.wq_b.weight", attention, fp8, heads * head_dim, config.q_lora_rank)
    yield block.spec("attn.wkv.weight", attention, fp8, head_dim, hidden)
    yield block.spec("attn.kv_norm.weight", Organ.NORM, Encoding.BF16, head_dim)
    yield block.spec("attn.wo_a.weight", attention, fp8, groups * rank, heads * head_dim // groups)
    yield block.spec("attn.wo_b.weight", attention, fp8, hidden, groups * rank)


def _compressor(
    block: _Block, config: ModelConfig, prefix: str, head_dim: int, ratio: int, overlap: int
) -> Iterator[TensorSpec]:
    """`overlap` is 2 for C4, whose two column halves feed this window's and the next window's entry."""
    organ, width = Organ.COMPRESSOR, overlap * head_dim
    yield block.spec(f"{prefix}.ape", organ, Encoding.F32, ratio, width)
    yield block.spec(f"{prefix}.wkv.weight", organ, Encoding.BF16, width, config.hidden_size)
    yield block.spec(f"{prefix}.wgate.weight", organ, Encoding.BF16, width, config.hidden_size)
    yield block.spec(f"{prefix}.norm.weight", organ, Encoding.BF16, head_dim)


def _indexer(block: _Block, config: ModelConfig) -> Iterator[TensorSpec]:
    organ, heads, width = Organ.COMPRESSOR, config.index_n_heads, config.index_n_heads * config.index_head_dim
    yield block.spec("attn.indexer.wq_b.weight", organ, Encoding.FP8, width, config.q_lora_rank)
    yield block.spec("attn.indexer.weights_proj.weight", organ, Encoding.BF16, heads, config.hidden_size)
    yield from _compressor(block, config, "attn.indexer.compressor", config.index_head_dim, LayerKind.C4.value, 2)


def _moe(block: _Block, config: ModelConfig, layer: int | None) -> Iterator[TensorSpec]:
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.n_routed_experts
    yield block.spec("ffn.gate.weight", Organ.ROUTER, Encoding.BF16, experts, hidden)
    if layer is not None and config.router_kind(layer) is RouterKind.HASH:
        table = (config.vocab_size, config.num_experts_per_tok)
        yield block.spec("ffn.gate.tid2eid", Organ.HASH_TABLE, Encoding.I64, *table)
    else:
        yield block.spec("ffn.gate.bias", Organ.ROUTER, Encoding.F32, experts)
    expert = Encoding.FP8 if config.expert_dtype == "fp8" else Encoding.FP4
    shapes = {"w1": (inner, hidden), "w2": (hidden, inner), "w3": (inner, hidden)}
    for index in range(experts):
        for leaf, shape in shapes.items():
            yield block.spec(f"ffn.experts.{index}.{leaf}.weight", Organ.ROUTED_EXPERTS, expert, *shape)
    for leaf, shape in shapes.items():
        yield block.spec(f"ffn.shared_experts.{leaf}.weight", Organ.SHARED_EXPERTS, Encoding.FP8, *shape)


def _mtp_extras(block: _Block, config: ModelConfig) -> Iterator[TensorSpec]:
    """What an April MTP block adds: projections of token and streams, three norms, its own stream head."""
    hidden = config.hidden_size
    for leaf in ("e_proj", "h_proj"):
        yield block.spec(f"{leaf}.weight", Organ.MTP, Encoding.FP8, hidden, hidden)
    for leaf in ("enorm", "hnorm", "norm"):
        yield block.spec(f"{leaf}.weight", Organ.NORM, Encoding.BF16, hidden)
    yield from block.stream_head(config)


def _draft_extras(block: _Block, config: ModelConfig, stage: int) -> Iterator[TensorSpec]:
    """What the DSpark stages add: target features come in at the first, Markov and confidence heads end the last."""
    assert config.draft is not None
    hidden, rank = config.hidden_size, config.draft.markov_rank
    if stage == 0:
        features = len(config.draft.target_layer_ids) * hidden
        yield block.spec("main_proj.weight", Organ.DRAFT, Encoding.FP8, hidden, features)
        yield block.spec("main_norm.weight", Organ.NORM, Encoding.BF16, hidden)
    if stage == config.num_draft_blocks - 1:
        yield block.spec("norm.weight", Organ.NORM, Encoding.BF16, hidden)
        yield from block.stream_head(config)
        for leaf in ("embed", "head"):
            yield block.spec(f"markov_head.{leaf}.weight", Organ.DRAFT, Encoding.BF16, config.vocab_size, rank)
        yield block.spec("confidence_head.proj.weight", Organ.DRAFT, Encoding.BF16, 1, hidden + rank)
