"""Random weights of any config made on the device, in the kernels' layouts: for speed and memory, never for sense.

Owns: the values. Does not own: layouts (`weights.py`) or checkpoints of random weights (`workers/checkpoint/synth.py`).
Every expert differs, so that no cache holds what a real model would read from memory. Each tensor has its own stream,
seeded by `seed` and its name in the whole model: layer 3 is the same alone as among all. Beside the weights themselves
at most `CHUNK` elements of scratch are held.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from workers.experts.layout import ExpertShape
from workers.gpu.weights import Compressor, Fp8Weight, GpuLayer, GpuWeights, HyperConnection
from workers.model.config import ModelConfig

E2M1_RMS = 2.926
"""Root mean square of the sixteen e2m1 codes drawn uniformly."""

E4M3_SIGMA = 112.0
"""Standard deviation of the e4m3 codes before clamping at 448 = 4 sigma."""

CHUNK = 1 << 24
"""Elements drawn at a time where the stored form is not drawn in place."""

TABLE_ROWS = 1 << 14
"""Rows of a token-to-expert table drawn at a time; each is the beginning of a permutation of all experts."""


def synthetic_weights(
    config: ModelConfig,
    device: torch.device | str,
    *,
    seed: int = 0,
    layer_ids: Sequence[int] | None = None,
    experts_per_layer: int | None = None,
) -> GpuWeights:
    """Allocate and fill the weights of `config`, a cut as `cut_layers` makes it, or a whole model.

    Args:
        layer_ids: the layers' numbers in the whole model, for their seeds; 0, 1, ... when not given.
        experts_per_layer: hold only so many different experts a layer, and let the others share their bytes.
    """
    limit = {} if experts_per_layer is None else {"experts_per_layer": experts_per_layer}
    weights = GpuWeights.allocate(config, device, **limit)
    fill(weights, config, seed=seed, layer_ids=layer_ids)
    return weights


def fill(weights: GpuWeights, config: ModelConfig, *, seed: int = 0, layer_ids: Sequence[int] | None = None) -> None:
    """Overwrite every operand. Asynchronous on a GPU."""
    draw = _Draw(seed, weights.device)
    draw.normal("embed", weights.embed, std=1.0)
    draw.normal("head", weights.head, std=1 / math.sqrt(config.hidden_size))
    draw.normal("norm", weights.norm, std=0.02, mean=1.0)
    _fill_streams(draw, "hc_head", weights.hc_head)
    ids = range(len(weights.layers)) if layer_ids is None else layer_ids
    for number, layer in zip(ids, weights.layers, strict=True):
        _fill_layer(draw, f"layers.{number}", layer, config)


def _fill_layer(draw: _Draw, name: str, layer: GpuLayer, config: ModelConfig) -> None:
    for leaf in ("attn_norm", "ffn_norm", "q_norm", "kv_norm"):
        draw.normal(f"{name}.{leaf}", getattr(layer, leaf), std=0.02, mean=1.0)
    for leaf in ("hc_attn", "hc_ffn"):
        _fill_streams(draw, f"{name}.{leaf}", getattr(layer, leaf))
    for leaf in ("x_fp8", "q_fp8", "wo_a", "wo_b", "shared_w13", "shared_w2"):
        draw.fp8(f"{name}.{leaf}", getattr(layer, leaf))
    draw.normal(f"{name}.sink", layer.sink, std=1.0)
    draw.normal(f"{name}.gate", layer.gate, std=1 / math.sqrt(config.hidden_size))
    if layer.x_bf16 is not None:
        draw.normal(f"{name}.x_bf16", layer.x_bf16, std=1 / math.sqrt(config.hidden_size))
    for leaf in ("compressor", "index_compressor"):
        _fill_compressor(draw, f"{name}.{leaf}", getattr(layer, leaf))
    if layer.bias is not None:
        draw.normal(f"{name}.bias", layer.bias, std=0.02)
    if layer.tid2eid is not None:
        draw.distinct(f"{name}.tid2eid", layer.tid2eid, config.n_routed_experts)
    shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
    slots = layer.experts.base.view(-1, shape.expert_bytes)
    first, last = (int(slot) & 0xFFFFFF for slot in torch.aminmax(layer.experts.table))
    draw.experts(f"{name}.experts", slots[first : last + 1], shape)


def _fill_streams(draw: _Draw, name: str, streams: HyperConnection) -> None:
    draw.normal(f"{name}.fn", streams.fn, std=1 / math.sqrt(streams.fn.shape[1]))
    draw.normal(f"{name}.base", streams.base, std=0.02)
    streams.scale.fill_(1.0)


def _fill_compressor(draw: _Draw, name: str, compressor: Compressor | None) -> None:
    if compressor is not None:
        draw.normal(f"{name}.ape", compressor.ape, std=0.02)
        draw.normal(f"{name}.norm", compressor.norm, std=0.02, mean=1.0)


class _Draw:
    """Fills tensors in place from a stream of each name."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._generator = torch.Generator(device=device)

    def _stream(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed}:{name}".encode()).digest()
        return self._generator.manual_seed(int.from_bytes(digest[:7], "little"))

    def normal(self, name: str, out: Tensor, *, std: float, mean: float = 0.0) -> None:
        """Gaussian, in the tensor's own type."""
        out.normal_(mean, std, generator=self._stream(name))

    def fp8(self, name: str, out: Fp8Weight) -> None:
        """Gaussian codes; block scales of two neighbouring powers of two that give std 1 / sqrt(K)."""
        stream = self._stream(name)
        flat = out.codes.view(-1)
        for start in range(0, flat.numel(), CHUNK):
            part = flat[start : start + CHUNK]
            values = torch.empty(part.numel(), device=part.device).normal_(0.0, E4M3_SIGMA, generator=stream)
            part.copy_(values.clamp_(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
        exponent = _exponent(out.codes.shape[1], E4M3_SIGMA)
        out.scales.random_(0, 2, generator=stream).add_(exponent).exp2_()

    def experts(self, name: str, slots: Tensor, shape: ExpertShape) -> None:
        """`slots` uint8 [n, expert_bytes]: uniform e2m1 codes, then e8m0 scales as `fp8`'s."""
        codes_end = 3 * shape.codes_bytes
        words = slots[:, :codes_end].view(torch.int64)
        words.random_(torch.iinfo(torch.int64).min, None, generator=self._stream(f"{name}.codes"))
        stream = self._stream(f"{name}.scales")
        for matrix, (_, start) in shape.offsets().items():
            byte = 127 + _exponent(shape.inner if matrix == "w2" else shape.hidden, E2M1_RMS)
            slots[:, start : start + shape.scales_bytes].random_(byte, byte + 2, generator=stream)

    def distinct(self, name: str, out: Tensor, experts: int) -> None:
        """int32 [V, k]: distinct expert ids in each row."""
        stream = self._stream(name)
        for start in range(0, len(out), TABLE_ROWS):
            part = out[start : start + TABLE_ROWS]
            keys = torch.rand((len(part), experts), device=out.device, generator=stream)
            part.copy_(keys.topk(out.shape[1], dim=1).indices)


def _exponent(columns: int, code_std: float) -> int:
    """log2 of the smaller scale with which codes of that deviation give values of about 1 / sqrt(columns)."""
    return math.floor(math.log2(1 / (math.sqrt(columns) * code_std)))


def layer_experts(out: Tensor, shape: ExpertShape, layer: int, *, seed: int = 0) -> None:
    """Fills `out` uint8 [E, expert_bytes] with what `synthetic_weights` gives a layer of the whole model."""
    _Draw(seed, out.device).experts(f"layers.{layer}.experts", out, shape)
