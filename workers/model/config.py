"""`ModelConfig`: the shape of one DeepSeek-V4 model, read strictly from `config.json`.

Owns: field names and cross-checks of the architecture; the layer kinds derived from `compress_ratios`; RoPE parameters
per layer kind. Does not own: tensor names (`workers/checkpoint/names.py`), KV layouts (`workers/model/kv_layout.py`).
Torch-free. Field names are those of the official `config.json` (DeepSeek-V4-Flash and -Pro releases).

Reading is strict in three classes of keys: a field of `ModelConfig` is required (few have defaults); a key of
`FIXED_KEYS` may be absent but must hold the only value that this implementation computes; a key of `IGNORED_KEYS` has
no influence on inference and is dropped. Any other key is refused by `BadConfig`, which names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers.errors import BadConfig

WEIGHT_BLOCK = 128
"""Rows and columns that share one FP8 weight scale, and columns of one activation scale (official release)."""

PAGE_TOKENS = 256
"""Tokens of one logical KV page: divisible by 4 and 128, so one page table serves every compressed pool."""

MAX_EXPERTS = 1 << 16
"""Bounds the table of tensor names, which has three entries per expert and layer, against a corrupt config."""

FIXED_KEYS: dict[str, tuple[object, ...]] = {
    "model_type": ("deepseek_v4",),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "topk_method": ("noaux_tc",),
    "norm_topk_prob": (True,),
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "tie_word_embeddings": (False,),
}
"""Keys with one computable value; another one would need other arithmetic or other tensors, so it is refused."""

IGNORED_KEYS = frozenset(
    {
        "architectures",
        "attention_dropout",
        "auto_map",
        "dtype",
        "initializer_range",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Keys that only training or the transformers library reads (tensor dtypes come from the shards, never from here)."""

QUANTIZATION: dict[str, tuple[object, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("ue8m0",),
    "weight_block_size": ([WEIGHT_BLOCK, WEIGHT_BLOCK],),
}
"""The only `quantization_config` whose arithmetic is implemented (both official releases ship exactly this)."""

_NAME_KEY = "_name_or_path"

WHOLE_FILE = "(file)"
"""`BadConfig.key` when the file itself cannot be read or parsed."""


class LayerKind(enum.Enum):
    """How one layer attends beyond its sliding window; the value is its compression ratio."""

    SLIDING = 0
    C4 = 4
    C128 = 128


class RouterKind(enum.Enum):
    """How a layer's MoE picks experts: by token-id table or by learned scores."""

    HASH = "hash"
    LEARNED = "learned"


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """YaRN parameters of the compressed layers (`rope_scaling` in config.json)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """The DSpark draft of the 0731 release (`dspark_*` keys): its tensors replace the MTP block's. Not run yet."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model's architecture. Raises `BadConfig` naming the key when fields contradict each other.

    `compress_ratios` has one entry per trunk layer and then one 0 per MTP block or draft stage. `expert_dtype` None
    means that the tensors decide (Pro's config lacks the key): see `workers/checkpoint/names.py`.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    num_hash_layers: int
    routed_scaling_factor: float
    swiglu_limit: float
    hc_mult: int
    hc_sinkhorn_iters: int
    hc_eps: float
    rms_norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    rope_scaling: RopeScaling
    max_position_embeddings: int
    vocab_size: int
    bos_token_id: int
    eos_token_id: int
    num_nextn_predict_layers: int
    compress_ratios: tuple[int, ...]
    expert_dtype: str | None = "fp4"
    model_name: str = "deepseek-v4"
    draft: DraftConfig | None = None

    def __post_init__(self) -> None:
        _check_config(self)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`, given as its path, its directory, or the parsed mapping; raises `BadConfig`."""
        if isinstance(source, Mapping):
            return _parse_config(source, "config.json", None)
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise BadConfig(WHOLE_FILE, exc.strerror, "a readable file", str(path)) from exc
        except (ValueError, RecursionError) as exc:
            raise BadConfig(WHOLE_FILE, str(exc), "a JSON object in UTF-8", str(path)) from exc
        if not isinstance(data, dict):
            raise BadConfig(WHOLE_FILE, type(data).__name__, "a JSON object", str(path))
        return _parse_config(data, str(path), path.resolve().parent.name)

    def to_json(self) -> dict[str, Any]:
        """The official `config.json` mapping; `from_json(to_json())` gives an equal config."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("model_name", "draft", "rope_scaling", "compress_ratios", "expert_dtype"):
            del fields[name]
        data: dict[str, Any] = {"architectures": ["DeepseekV4ForCausalLM"], _NAME_KEY: self.model_name}
        data |= {key: allowed[0] for key, allowed in FIXED_KEYS.items() if key != "mlp_bias"} | fields
        data["rope_scaling"] = {"type": "yarn"} | dataclasses.asdict(self.rope_scaling)
        data["compress_ratios"] = list(self.compress_ratios)
        if self.expert_dtype is not None:
            data["expert_dtype"] = self.expert_dtype
        data["quantization_config"] = {key: allowed[0] for key, allowed in QUANTIZATION.items()}
        data["torch_dtype"] = "bfloat16"
        if self.draft is not None:
            data |= {f"dspark_{key}": value for key, value in dataclasses.asdict(self.draft).items()}
            data["dspark_target_layer_ids"] = list(self.draft.target_layer_ids)
        return data

    @property
    def num_draft_blocks(self) -> int:
        """Blocks stored under `mtp.`: the DSpark stages of a 0731 checkpoint, else the MTP blocks."""
        if self.draft is not None:
            return len(self.compress_ratios) - self.num_hidden_layers
        return self.num_nextn_predict_layers

    @property
    def nope_head_dim(self) -> int:
        """Dimensions of a head that carry no rotary position."""
        return self.head_dim - self.qk_rope_head_dim

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each trunk layer (the entries of `compress_ratios` beyond them belong to MTP or draft stages)."""
        return tuple(LayerKind(r) for r in self.compress_ratios[: self.num_hidden_layers])

    def layers_of(self, *kinds: LayerKind) -> tuple[int, ...]:
        """Trunk layer indices of the given kinds, ascending."""
        return tuple(i for i, kind in enumerate(self.layer_kinds) if kind in kinds)

    def router_kind(self, layer: int) -> RouterKind:
        """`HASH` for the first `num_hash_layers` layers."""
        return RouterKind.HASH if layer < self.num_hash_layers else RouterKind.LEARNED


def _check_config(config: ModelConfig) -> None:
    """Cross-checks that the arithmetic needs; the storage formats check their own multiples."""

    def require(ok: bool, key: str, expected: str) -> None:
        if not ok:
            raise BadConfig(key, getattr(config, key), expected)

    may_be_zero = {"num_hash_layers", "bos_token_id", "eos_token_id", "num_nextn_predict_layers"}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            positive = value >= 0 if field.name in may_be_zero else value > 0
            require(positive and math.isfinite(value), field.name, "a positive number")
    layers = config.num_hidden_layers
    require(config.head_dim > config.qk_rope_head_dim, "head_dim", f"more than {config.qk_rope_head_dim} rope dims")
    require(config.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim", "an even number (rotated pairs)")
    require(config.index_head_dim >= config.qk_rope_head_dim, "index_head_dim", "at least qk_rope_head_dim")
    require(config.index_head_dim.bit_count() == 1, "index_head_dim", "a power of two (Hadamard rotation)")
    require(config.num_attention_heads % config.o_groups == 0, "o_groups", "a divisor of num_attention_heads")
    require(config.num_experts_per_tok <= config.n_routed_experts, "num_experts_per_tok", "at most n_routed_experts")
    require(config.n_routed_experts <= MAX_EXPERTS, "n_routed_experts", f"at most {MAX_EXPERTS}")
    require(config.n_shared_experts == 1, "n_shared_experts", "1")
    require(config.num_hash_layers <= layers, "num_hash_layers", f"at most {layers} layers")
    require(config.bos_token_id < config.vocab_size, "bos_token_id", "an id inside vocab_size")
    require(config.eos_token_id < config.vocab_size, "eos_token_id", "an id inside vocab_size")
    require(config.expert_dtype in (None, "fp4", "fp8"), "expert_dtype", "'fp4', 'fp8' or absent")
    require(len(config.compress_ratios) >= layers, "compress_ratios", f"at least {layers} entries (one per layer)")
    kinds = tuple(kind.value for kind in LayerKind)
    require(all(r in kinds for r in config.compress_ratios), "compress_ratios", f"layer types {kinds} only")
    require(not any(config.compress_ratios[layers:]), "compress_ratios", "0 for every entry beyond the trunk")
    if config.draft is not None:
        require(all(0 <= i < layers for i in config.draft.target_layer_ids), "draft", "target layers inside the trunk")
        require(config.num_draft_blocks > 0, "compress_ratios", "entries beyond the trunk for the draft stages")


def _parse_config(data: Mapping[str, Any], source: str, default_name: str | None) -> ModelConfig:
    """Typed fields of one mapping; a `BadConfig` of the cross-checks is re-raised with `source` in it."""
    data = dict(data)
    fields = {f.name: f for f in dataclasses.fields(ModelConfig) if f.name not in ("model_name", "draft")}
    _check_known_keys(data, set(fields), source)
    for key, allowed in FIXED_KEYS.items():
        if key in data and (data[key] not in allowed or isinstance(data[key], bool) != isinstance(allowed[0], bool)):
            raise BadConfig(key, data[key], " or ".join(map(repr, allowed)), source)
    _check_quantization(data.get("quantization_config"), source)
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in data and field.default is dataclasses.MISSING:
            raise BadConfig(name, "nothing", f"a value of type {field.type}", source)
        if name in ("rope_scaling", "compress_ratios", "expert_dtype"):
            continue
        values[name] = _typed(name, data[name], str(field.type), source)
    values["expert_dtype"] = data.get("expert_dtype")
    values["rope_scaling"] = _parse_rope_scaling(data["rope_scaling"], source)
    values["compress_ratios"] = _int_list("compress_ratios", data["compress_ratios"], source)
    values["draft"] = _parse_draft(data, source)
    values["model_name"] = str(data.get(_NAME_KEY) or default_name or "deepseek-v4")
    if (factor := data.get("partial_rotary_factor")) is not None:
        expected = values["qk_rope_head_dim"] / values["head_dim"]
        if factor != expected:
            raise BadConfig("partial_rotary_factor", factor, f"qk_rope_head_dim / head_dim = {expected}", source)
    try:
        config = ModelConfig(**values)
    except BadConfig as exc:
        raise BadConfig(exc.key, exc.found, exc.expected, source) from exc
    length = config.num_hidden_layers + config.num_draft_blocks
    if len(config.compress_ratios) != length:
        raise BadConfig("compress_ratios", f"{len(config.compress_ratios)} entries", f"{length} entries", source)
    return config


def _check_known_keys(data: Mapping[str, Any], fields: set[str], source: str) -> None:
    draft = {f"dspark_{f.name}" for f in dataclasses.fields(DraftConfig)}
    known = fields | set(FIXED_KEYS) | IGNORED_KEYS | draft
    known |= {"quantization_config", "partial_rotary_factor", _NAME_KEY}
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)
            raise BadConfig(key, "an unknown key", f"a known key (nearest: {near[0]!r})", source)


def _check_quantization(quantization: object, source: str) -> None:
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise BadConfig("quantization_config", quantization, "an object or null", source)
    for key, value in quantization.items():
        if key == "expert_dtype" and value in ("fp4", "fp8"):
            continue
        if value not in QUANTIZATION.get(key, ()):
            allowed = " or ".join(map(repr, QUANTIZATION[key])) if key in QUANTIZATION else "no such key"
            raise BadConfig(f"quantization_config.{key}", value, allowed, source)


def _parse_rope_scaling(value: object, source: str) -> RopeScaling:
    """YaRN parameters; the type may be spelled `type` or `rope_type`."""
    if not isinstance(value, Mapping):
        raise BadConfig("rope_scaling", value, "an object of YaRN parameters", source)
    fields = {f.name: str(f.type) for f in dataclasses.fields(RopeScaling)}
    for key in value:
        if key not in fields and key not in ("type", "rope_type"):
            raise BadConfig(f"rope_scaling.{key}", "an unknown key", f"one of {sorted(fields)}", source)
    kind = value.get("type", value.get("rope_type"))
    if kind != "yarn":
        raise BadConfig("rope_scaling.type", kind, "'yarn'", source)
    for name in fields:
        if name not in value:
            raise BadConfig(f"rope_scaling.{name}", "nothing", f"a value of type {fields[name]}", source)
    typed = {name: _typed(f"rope_scaling.{name}", value[name], kind, source) for name, kind in fields.items()}
    for name, number in typed.items():
        if number <= 0:
            raise BadConfig(f"rope_scaling.{name}", number, "a positive number", source)
    original = int(typed.pop("original_max_position_embeddings"))
    return RopeScaling(**typed, original_max_position_embeddings=original)


def _parse_draft(data: Mapping[str, Any], source: str) -> DraftConfig | None:
    names = [f.name for f in dataclasses.fields(DraftConfig)]
    given = [name for name in names if f"dspark_{name}" in data]
    if not given:
        return None
    for name in names:
        if name not in given:
            raise BadConfig(f"dspark_{name}", "nothing", "a value, because other dspark keys are given", source)
    values = {name: data[f"dspark_{name}"] for name in names}
    targets = _int_list("dspark_target_layer_ids", values.pop("target_layer_ids"), source)
    typed = {name: int(_typed(f"dspark_{name}", value, "int", source)) for name, value in values.items()}
    return DraftConfig(**typed, target_layer_ids=targets)


def _typed(key: str, value: object, kind: str, source: str) -> int | float:
    """`value` as `kind` ("int" or "float"); whole numbers pass as float, booleans never pass."""
    if isinstance(value, bool) or not isinstance(value, int if kind == "int" else int | float):
        raise BadConfig(key, value, f"a value of type {kind}", source)
    return value if kind == "int" else float(value)


def _int_list(key: str, value: object, source: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or any(isinstance(v, bool) or not isinstance(v, int) for v in value):
        raise BadConfig(key, value, "a list of integers", source)
    return tuple(value)
