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

ROUNDING = 2.0**-9
"""Half a unit in the last place of bf16, relative: what the yardstick changes once, at the embedding."""

FACTOR = 2.0
"""Error allowed, in yardsticks. With random weights a changed bit flips e4m3 codes and top-k choices all the way down:
the reference itself moves by 7 % over two layers when its embedding moves by 2**-12 (CPU)."""

LENGTHS, STEPS = (2300, 40), 8
"""Two packed prompts, one over page boundaries with more C4 entries than are selected; then decode steps."""


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
    """No further from it than the reference with one rounding more at its very beginning."""
    config = reduced(V4_FLASH, 8, 2048)
    weights = synthetic_weights(config, "cuda", layer_ids=LAYERS)
    ids = torch.randint(2, config.vocab_size, (2, LENGTHS[0] + STEPS), generator=torch.Generator().manual_seed(7))
    prompts = [ids[b, : length + STEPS].tolist() for b, length in enumerate(LENGTHS)]
    pools = _pools(config)
    found = _logits(GpuModel(config, weights, pools, max_running=2), prompts)
    exact = fp32_weights(config, weights)
    expected = _logits(ReferenceTransformer(config, exact, NATIVE, _pools(config)), prompts)
    noise = torch.randn(exact.embed.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    moved = dataclasses.replace(exact, embed=exact.embed * (1 + ROUNDING * noise))
    yardstick = _logits(ReferenceTransformer(config, moved, NATIVE, _pools(config)), prompts)
    for name in ("prefill", "decode"):
        ours, theirs = (
            _errors(f"{name} {who}", x[name], expected[name]) for who, x in (("", found), ("moved", yardstick))
        )
        assert all(one < FACTOR * other for one, other in zip(ours, theirs, strict=True)), name


def _pools(config: ModelConfig) -> KVPools:
    pools = KVPools(kv_spec(config, "fp8"), PoolSizes(12, 12, 2), "cuda")
    for pool in pools.pools:
        pool.data.fill_(0xFF)
    for slot in range(2):
        pools.reset_slot(slot)  # type: ignore[arg-type]
    return pools


def _logits(model: GpuModel | ReferenceTransformer, prompts: list[list[int]]) -> dict[str, Tensor]:
    """Of every prompt token, and of the steps that follow."""
    tables = [Tables((4, 2, 7, 5, 1, 9, 0, 8, 3, 10), (8, 3, 0, 6, 2, 9, 1, 7, 4, 10), 1), Tables((6,), (5,), 0)]
    device = "cpu" if isinstance(model, GpuModel) else "cuda"

    def batch(start: tuple[int, ...], count: tuple[int, ...]) -> ForwardBatch:
        items = zip(tables, start, prompts, count, strict=True)
        return ForwardBatch.build([(t, at, p[at : at + n]) for t, at, p, n in items], device)

    prefill = model.forward(batch((0, 0), LENGTHS), "all")
    places = [tuple(length + step for length in LENGTHS) for step in range(STEPS)]
    return {"prefill": prefill, "decode": torch.cat([model.decode(batch(at, (1, 1))).clone() for at in places])}


def _errors(name: str, found: Tensor, expected: Tensor) -> tuple[float, float, float]:
    """Median, nine-in-ten bound and worst of the rows' relative errors."""
    errors = ((found - expected).norm(dim=-1) / expected.norm(dim=-1)).sort().values
    median, most, worst = (float(errors[int(share * (len(errors) - 1))]) for share in (0.5, 0.9, 1.0))
    agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
    print(
        f"{name}: {len(errors)} rows, median {median:.4f} p90 {most:.4f} worst {worst:.4f} same best token {agree:.3f}"
    )
    assert errors.isfinite().all()
    return median, most, worst
