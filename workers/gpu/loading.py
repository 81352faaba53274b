"""Fills `GpuWeights`: from a checkpoint's stored tensors as they are, or from fp32 `ModelWeights` without any rounding.

Owns: which official tensor goes to which rows of which operand, and the refusal of values that the operand cannot hold
exactly. Does not own: reading and checking shards (`workers/checkpoint`), the layouts (`weights.py`).

Memory: from a checkpoint one stored tensor at a time is in host memory, and no fp32 form of a quantised matrix ever
exists. From fp32 weights it is one tensor and its codes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from workers.checkpoint.check import CheckedCheckpoint, check_directory
from workers.checkpoint.load import TensorHead, head_of, iter_tensors, load_expert_heads
from workers.checkpoint.names import Encoding, StoredForm, TensorSpec, tensor_table
from workers.checkpoint.progress import OnProgress, Progress
from workers.errors import InexactWeights
from workers.experts.layout import ExpertShape
from workers.gpu.weights import Fp8Weight, GpuLayer, GpuWeights, HyperConnection, x_bf16_columns
from workers.model.config import WEIGHT_BLOCK, ModelConfig
from workers.model.weights import ModelWeights
from workers.reference.quant import e8m0_decode, fp4_dequant, fp4_quant, fp8_block_dequant, fp8_block_quant

logger = logging.getLogger(__name__)

LOG_EVERY = 0.1
"""Share of the bytes between two lines of the log."""


@dataclass(frozen=True, slots=True)
class _Fp8Rows:
    """Rows of an FP8 operand, from `row` on."""

    weight: Fp8Weight
    row: int

    def put(self, spec: TensorSpec, form: StoredForm, weight: Tensor, scale: Tensor | None) -> None:
        if form.dtype != "F8_E4M3":
            values = weight.float()
            weight, scale = fp8_block_quant(values, WEIGHT_BLOCK)
            _require_exact(spec, fp8_block_dequant(weight, scale, WEIGHT_BLOCK), values)
        assert scale is not None
        rows, first = weight.shape[0], self.row // WEIGHT_BLOCK
        self.weight.codes[self.row : self.row + rows].copy_(weight.view(torch.uint8))
        factors = scale if scale.dtype == torch.float32 else e8m0_decode(scale)
        self.weight.scales[first : first + factors.shape[0]].copy_(factors)


@dataclass(frozen=True, slots=True)
class _Bytes:
    """Codes and scales of one expert matrix, as flat bytes."""

    codes: Tensor
    scales: Tensor

    def put(self, spec: TensorSpec, form: StoredForm, weight: Tensor, scale: Tensor | None) -> None:
        if form.dtype not in ("I8", "U8"):
            values = weight.float()
            weight, scale = fp4_quant(values)
            _require_exact(spec, fp4_dequant(weight, scale), values)
        assert scale is not None
        self.codes.copy_(weight.view(torch.uint8).reshape(-1))
        self.scales.copy_(scale.view(torch.uint8).reshape(-1))


@dataclass(frozen=True, slots=True)
class _Plain:
    """A bf16, fp32 or int32 tensor (or rows of one)."""

    tensor: Tensor

    def put(self, spec: TensorSpec, form: StoredForm, weight: Tensor, scale: Tensor | None) -> None:
        narrow = weight.to(self.tensor.dtype)
        if self.tensor.dtype is torch.bfloat16 and weight.dtype is not torch.bfloat16:
            _require_exact(spec, narrow.float(), weight.float())
        self.tensor.copy_(narrow)


_Target = _Fp8Rows | _Bytes | _Plain


def _require_exact(spec: TensorSpec, found: Tensor, expected: Tensor) -> None:
    if not torch.equal(found, expected):
        worst = float((found - expected).abs().max())
        raise InexactWeights(f"{spec.name}: values do not fit {spec.encoding.value} exactly (off by up to {worst:g})")


def load_checkpoint(
    directory: str | Path,
    device: torch.device | str,
    *,
    routed_experts: bool = True,
    on_progress: OnProgress | None = None,
) -> tuple[CheckedCheckpoint, GpuWeights, dict[str, TensorHead]]:
    """What was found, weights on `device`, and the head of every trunk tensor by official name.

    `routed_experts` false: no memory is taken for them, and nothing is read of them but their heads.

    Raises `BadCheckpoint`, `InexactWeights`, and `ValueError` for a shape without kernels.
    """
    began = time.perf_counter()
    checked = check_directory(directory).require_sound()
    weights = GpuWeights.allocate(checked.config, device, experts_per_layer=None if routed_experts else 0)
    targets = dict(_targets(checked.config, weights))
    heads = {} if routed_experts else load_expert_heads(checked)
    tensors = iter_tensors(
        directory,
        draft_blocks=False,
        routed_experts=routed_experts,
        on_progress=_logged(directory, on_progress),
    )
    for raw in tensors:
        targets.pop(raw.spec.name).put(raw.spec, raw.form, raw.weight, raw.scale)
        heads[raw.spec.name] = head_of(raw)
    assert not targets, f"no tensor filled {min(targets)}"
    seconds = time.perf_counter() - began
    logger.info("weights=%s device=%s bytes=%d load_s=%.1f", directory, device, weights.nbytes, seconds)
    return checked, weights, heads


def convert(config: ModelConfig, weights: ModelWeights, device: torch.device | str) -> GpuWeights:
    """Kernel operands of fp32 weights; MTP blocks are left out.

    Raises `InexactWeights` when a matrix was never FP8 or FP4, and ValueError for a shape without kernels.
    """
    began = time.perf_counter()
    converted = GpuWeights.allocate(config, device)
    targets, table = dict(_targets(config, converted)), tensor_table(config)
    for name, tensor in weights.to_named(config).items():
        if name in targets:
            spec = table[name]
            form = StoredForm("I64" if spec.encoding is Encoding.I64 else "F32", spec.shape)
            targets.pop(name).put(spec, form, tensor, None)
    assert not targets, f"no tensor filled {min(targets)}"
    seconds = time.perf_counter() - began
    logger.info("weights converted from fp32: device=%s bytes=%d seconds=%.1f", device, converted.nbytes, seconds)
    return converted


def _logged(directory: str | Path, on_progress: OnProgress | None) -> OnProgress:
    """Passes progress on and writes a line for each tenth."""
    reported = 0.0

    def report(progress: Progress) -> None:
        nonlocal reported
        share = progress.done_bytes / max(1, progress.total_bytes)
        if share >= reported + LOG_EVERY:
            reported = share
            speed = progress.bytes_per_s / 1e9
            logger.info("weights=%s loaded=%.0f%% GB_per_s=%.2f", directory, 100 * share, speed)
        if on_progress is not None:
            on_progress(progress)

    return report


def _targets(config: ModelConfig, weights: GpuWeights) -> Iterator[tuple[str, _Target]]:
    """Official name of every trunk tensor and where it goes."""
    yield "embed.weight", _Plain(weights.embed)
    yield "head.weight", _Plain(weights.head)
    yield "norm.weight", _Plain(weights.norm)
    yield from _hyper_connection("hc_head", weights.hc_head)
    for index, layer in enumerate(weights.layers):
        prefix = f"layers.{index}."
        yield f"{prefix}attn_norm.weight", _Plain(layer.attn_norm)
        yield f"{prefix}ffn_norm.weight", _Plain(layer.ffn_norm)
        yield from _hyper_connection(f"{prefix}hc_attn", layer.hc_attn)
        yield from _hyper_connection(f"{prefix}hc_ffn", layer.hc_ffn)
        yield from _attention(config, layer, f"{prefix}attn.")
        yield from _ffn(config, layer, f"{prefix}ffn.")


def _hyper_connection(prefix: str, hc: HyperConnection) -> Iterator[tuple[str, _Target]]:
    for leaf in ("fn", "base", "scale"):
        yield f"{prefix}_{leaf}", _Plain(getattr(hc, leaf))


def _attention(config: ModelConfig, layer: GpuLayer, prefix: str) -> Iterator[tuple[str, _Target]]:
    yield f"{prefix}attn_sink", _Plain(layer.sink)
    yield f"{prefix}q_norm.weight", _Plain(layer.q_norm)
    yield f"{prefix}kv_norm.weight", _Plain(layer.kv_norm)
    yield f"{prefix}wq_a.weight", _Fp8Rows(layer.x_fp8, 0)
    yield f"{prefix}wkv.weight", _Fp8Rows(layer.x_fp8, config.q_lora_rank)
    yield f"{prefix}wq_b.weight", _Fp8Rows(layer.q_fp8, 0)
    yield f"{prefix}wo_a.weight", _Fp8Rows(layer.wo_a, 0)
    yield f"{prefix}wo_b.weight", _Fp8Rows(layer.wo_b, 0)
    for leaf, (start, end) in x_bf16_columns(config, layer.kind).items():
        assert layer.x_bf16 is not None
        yield f"{prefix}{leaf}.weight", _Plain(layer.x_bf16[start:end])
    for owner, compressor in (("compressor", layer.compressor), ("indexer.compressor", layer.index_compressor)):
        if compressor is not None:
            yield f"{prefix}{owner}.ape", _Plain(compressor.ape)
            yield f"{prefix}{owner}.norm.weight", _Plain(compressor.norm)
    if layer.index_compressor is not None:
        heads = _Fp8Rows(layer.q_fp8, config.num_attention_heads * config.head_dim)
        yield f"{prefix}indexer.wq_b.weight", heads


def _ffn(config: ModelConfig, layer: GpuLayer, prefix: str) -> Iterator[tuple[str, _Target]]:
    yield f"{prefix}gate.weight", _Plain(layer.gate)
    if layer.bias is not None:
        yield f"{prefix}gate.bias", _Plain(layer.bias)
    if layer.tid2eid is not None:
        yield f"{prefix}gate.tid2eid", _Plain(layer.tid2eid)
    yield f"{prefix}shared_experts.w1.weight", _Fp8Rows(layer.shared_w13, 0)
    yield f"{prefix}shared_experts.w3.weight", _Fp8Rows(layer.shared_w13, config.moe_intermediate_size)
    yield f"{prefix}shared_experts.w2.weight", _Fp8Rows(layer.shared_w2, 0)
    shape = ExpertShape(config.hidden_size, config.moe_intermediate_size)
    base = layer.experts.base
    slots = layer.experts.table.tolist() if base.numel() else []
    for expert, slot in enumerate(slots):
        for name, (codes, scales) in shape.offsets().items():
            at = slot * shape.expert_bytes
            yield (
                f"{prefix}experts.{expert}.{name}.weight",
                _Bytes(
                    base.narrow(0, at + codes, shape.codes_bytes),
                    base.narrow(0, at + scales, shape.scales_bytes),
                ),
            )
