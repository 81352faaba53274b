"""Layers of V4-Flash's real shape on a GPU, synthetic weights, against the fp32 reference with the same fake
quantisation; and that synthetic operands are tensors of a checkpoint."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from cluster.bench.floors import trunk
from kvstore.pools.aggregate import KVPools, PoolSizes
from tests.support.paged import Tables
from workers.batch import ForwardBatch
from workers.checkpoint.names import tensor_table
from workers.checkpoint.synth import cut_layers
from workers.gpu.loading import _Bytes, _Fp8Rows, _Plain, _targets, convert
from workers.gpu.model import GpuModel
from workers.gpu.synthetic import synthetic_weights
from workers.gpu.weights import GpuWeights
from workers.model.config import ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.presets import NANO, V4_FLASH
from workers.model.transformer import ReferenceTransformer
from workers.model.weights import ModelWeights
from workers.reference.quant import fp4_dequant, fp8_block_dequant

NATIVE = Precision.native()

LAYERS = (1, 2, 3, 4)
"""A sliding, a C4, a C128 and a C4 layer; the first two of them route by token id."""

MEDIAN, NINE_IN_TEN = 0.05, 0.15
"""Relative error of a position's logits: bf16 between operations, and e4m3 codes that it flips."""


def reduced(config: ModelConfig, experts: int, vocabulary: int) -> ModelConfig:
    """A few layers, experts and tokens of a model; every other size is its own."""
    small = dataclasses.replace(trunk(config), n_routed_experts=experts, vocab_size=vocabulary)
    return cut_layers(small, LAYERS)


def fp32_weights(config: ModelConfig, weights: GpuWeights) -> ModelWeights:
    """The values of GPU operands by official name, on the same device."""
    table, named = tensor_table(config), {}
    for name, target in _targets(config, weights):
        named[name] = _values(target, table[name].shape)
    return ModelWeights.from_named(config, named)


def _values(target: _Plain | _Fp8Rows | _Bytes, shape: tuple[int, ...]) -> Tensor:
    match target:
        case _Plain(tensor):
            return tensor.long() if tensor.dtype == torch.int32 else tensor.float()
        case _Fp8Rows(weight, row):
            rows = slice(row, row + shape[0])
            return fp8_block_dequant(weight.codes[rows], weight.scales[row // 128 : -(-rows.stop // 128)])
        case _Bytes(codes, scales):
            packed = codes.view(torch.int8).view(shape[0], shape[1] // 2)
            return fp4_dequant(packed, scales.view(shape[0], shape[1] // 32))


def test_synthetic_operands_are_tensors_of_a_checkpoint() -> None:
    config = reduced(NANO, NANO.n_routed_experts, 256)
    weights = synthetic_weights(config, "cpu", layer_ids=LAYERS)
    again = convert(config, fp32_weights(config, weights), "cpu")
    for (name, ours), (_, theirs) in zip(_targets(config, weights), _targets(config, again), strict=True):
        shape = tensor_table(config)[name].shape
        assert torch.equal(_values(ours, shape), _values(theirs, shape)), name


@pytest.mark.gpu
@pytest.mark.timeout(300)
@torch.no_grad()
def test_logits_of_real_shapes_are_near_the_reference() -> None:
    """Two packed prompts, one over a page boundary with more C4 entries than are selected; then decode steps."""
    config = reduced(V4_FLASH, 8, 2048)
    weights = synthetic_weights(config, "cuda", layer_ids=LAYERS)
    lengths, steps = (2300, 40), 8
    pools = [KVPools(kv_spec(config, "fp8"), PoolSizes(12, 12, 2), "cuda") for _ in range(2)]
    for pool in (pool for either in pools for pool in either.pools):
        pool.data.fill_(0xFF)
    tables = [Tables((4, 2, 7, 5, 1, 9, 0, 8, 3, 10), (8, 3, 0, 6, 2, 9, 1, 7, 4, 10), 1), Tables((6,), (5,), 0)]
    for either in pools:
        either.reset_slot(0)  # type: ignore[arg-type]
        either.reset_slot(1)  # type: ignore[arg-type]
    ids = torch.randint(2, config.vocab_size, (2, max(lengths) + steps), generator=torch.Generator().manual_seed(7))
    prompts = [ids[b, : length + steps].tolist() for b, length in enumerate(lengths)]
    model = GpuModel(config, weights, pools[0], max_running=2)
    reference = ReferenceTransformer(config, fp32_weights(config, weights), NATIVE, pools[1])  # type: ignore[arg-type]
    packed = ForwardBatch.build([(t, 0, p[:n]) for t, p, n in zip(tables, prompts, lengths, strict=True)])
    _near("prefill", model.forward(packed, "all"), reference.forward(_on_gpu(packed), "all"))
    found, expected = [], []
    for step in range(steps):
        batch = ForwardBatch.build(
            [(t, n + step, p[n + step : n + step + 1]) for t, p, n in zip(tables, prompts, lengths, strict=True)]
        )
        found.append(model.decode(batch).clone())
        expected.append(reference.forward(_on_gpu(batch), "all"))
    _near("decode", torch.cat(found), torch.cat(expected))


def _on_gpu(batch: ForwardBatch) -> ForwardBatch:
    return ForwardBatch(*(getattr(batch, name).cuda() for name in ForwardBatch.__slots__))


def _near(name: str, found: Tensor, expected: Tensor) -> None:
    errors = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).sort().values
    median, most, worst = (float(errors[int(share * (len(errors) - 1))]) for share in (0.5, 0.9, 1.0))
    agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    print(
        f"{name}: {len(errors)} rows, median {median:.4f} p90 {most:.4f} worst {worst:.4f} same best token {agree:.3f}"
    )
    assert errors.isfinite().all() and median < MEDIAN and most < NINE_IN_TEN
