"""Row kernels: number formats bit for bit, products independent of their blocking, exact top-k."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.cpu import rows, select
from workers.cpu.block_product import BF16, FP4, FP32, HAS_FP4, PANEL
from workers.cpu.compile import jit
from workers.cpu.panels import pack_panels, padded
from workers.cpu.simd import LANES, e4m3_decode, e4m3_encode, exp, f32_at, u8_at
from workers.reference import indexer, kv_format, quant
from workers.reference.norm_rope import apply_rope


@jit
def _encode(source, target, size):  # type: ignore[no-untyped-def]
    x, y = f32_at(source), u8_at(target)
    for i in range(size):
        y[i] = e4m3_encode(x[i])


@jit
def _decode(source, target, size):  # type: ignore[no-untyped-def]
    x, y = u8_at(source), f32_at(target)
    for i in range(size):
        y[i] = e4m3_decode(x[i])


@jit
def _exp(source, target, size):  # type: ignore[no-untyped-def]
    x, y = f32_at(source), f32_at(target)
    for i in range(size):
        y[i] = exp(x[i])


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_e4m3_encode_is_torch_bit_for_bit() -> None:
    edges = torch.tensor([448.0, 449.0, -1e9, 0.0, -0.0, 2.0**-9, 2.0**-10, 1.5 * 2.0**-9, 0.015625, 17.0, 19.0])
    x = torch.cat((_random(20000) * 10 ** torch.linspace(-6, 3, 20000), edges))
    found = torch.empty(len(x), dtype=torch.uint8)
    _encode(x.data_ptr(), found.data_ptr(), len(x))
    assert torch.equal(found, quant.e4m3_encode(x).view(torch.uint8))


def test_e4m3_decode_is_torch_bit_for_bit() -> None:
    codes = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
    found = torch.empty(len(codes))
    _decode(codes.data_ptr(), found.data_ptr(), len(codes))
    assert torch.equal(found.view(torch.int32), codes.view(torch.float8_e4m3fn).float().view(torch.int32))


def test_exp_is_accurate() -> None:
    x = torch.linspace(-86, 87, 5001)
    found = torch.empty_like(x)
    _exp(x.data_ptr(), found.data_ptr(), len(x))
    assert ((found - x.double().exp()) / x.double().exp()).abs().max() < 3e-7


@pytest.mark.parametrize(("head_dim", "rope"), [(512, 64), (128, 64), (80, 16)])
@pytest.mark.parametrize("scale", [1.0, 1e-6, 300.0])
def test_stored_entry_is_the_reference_row(head_dim: int, rope: int, scale: float) -> None:
    entry = _random(head_dim) * scale
    expected = kv_format.pack_kv_fp8(entry, rope)
    data_bytes = kv_format.kv_data_bytes(head_dim, rope)
    row = torch.full_like(expected, 0xFF)
    rows.store_entry(entry.data_ptr(), row.data_ptr(), row.data_ptr() + data_bytes, head_dim, rope, True)
    assert torch.equal(row, expected)
    back = torch.empty(head_dim)
    rows.load_entry(row.data_ptr(), row.data_ptr() + data_bytes, back.data_ptr(), head_dim, rope, True)
    assert torch.equal(back, kv_format.unpack_kv_fp8(expected, head_dim, rope))


def test_stored_index_key_is_the_reference_row() -> None:
    key = _random(128)
    expected, row, back = kv_format.pack_indexer_fp8(key), torch.zeros(132, dtype=torch.uint8), torch.empty(128)
    rows.store_index_key(key.data_ptr(), row.data_ptr(), row.data_ptr() + 128, 128, True)
    assert torch.equal(row, expected)
    rows.load_index_key(row.data_ptr(), row.data_ptr() + 128, back.data_ptr(), 128, True)
    assert torch.equal(back, kv_format.unpack_indexer_fp8(expected, 128))


@pytest.mark.parametrize("size", [128, 256, 300, 40])
def test_rounded_activations_are_the_reference(size: int) -> None:
    x, out = _random(size) * 7, torch.empty(size)
    rows.round_activations(x.data_ptr(), out.data_ptr(), size)
    assert torch.equal(out, quant.fp8_fake_quant(x, 128))


def test_rotation_and_hadamard_follow_the_reference() -> None:
    x, angle = _random(64), _random(16, seed=2)
    expected = indexer.hadamard(apply_rope(x, angle.cos(), angle.sin()))
    cos, sin = angle.cos(), angle.sin()
    rows.rotate(x.data_ptr() + 32 * 4, cos.data_ptr(), sin.data_ptr(), 16, np.float32(1))
    rows.hadamard(x.data_ptr(), 64)
    assert torch.allclose(x, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("count", "size", "columns"), [(1, 1, 1), (7, 33, 24), (9, 256, 130), (6, 80, 96), (3, 128, 4)]
)
@pytest.mark.parametrize("exact", [True, False])
def test_product_is_right_and_each_row_is_bitwise_alone(count: int, size: int, columns: int, exact: bool) -> None:
    x, weight = _random(count, size), _random(columns, size, seed=2)
    weight = weight.bfloat16().float() if exact else weight
    packed = pack_panels(weight)
    assert packed.element == (BF16 if exact else FP32)
    width = padded(columns)

    def run(first: int, n: int) -> torch.Tensor:
        out = torch.empty(n, width)
        source = x.data_ptr() + first * size * 4
        element = packed.element
        rows.linear(source, size * 4, packed.address, element, out.data_ptr(), width * 4, n, size, columns)
        return out[:, :columns]

    together = run(0, count)
    assert torch.allclose(together, x @ weight.T, atol=1e-4)
    for r in range(count):
        assert torch.equal(run(r, 1)[0], together[r])


@pytest.mark.skipif(not HAS_FP4, reason="no 16-entry register lookups on this machine")
@pytest.mark.parametrize(("count", "size", "columns"), [(1, 32, PANEL), (7, 64, 2 * PANEL), (9, 256, 3 * PANEL)])
def test_fp4_panels_give_the_bits_of_bf16_panels(count: int, size: int, columns: int) -> None:
    x, weight = _random(count, size), quant.fp4_weight_fake_quant(_random(columns, size, seed=2) * 0.05)
    outputs = []
    for packed in (pack_panels(weight, allow_fp4=True), pack_panels(weight)):
        out, width = torch.empty(count, padded(columns)), padded(columns)
        element = packed.element
        rows.linear(x.data_ptr(), size * 4, packed.address, element, out.data_ptr(), width * 4, count, size, columns)
        outputs.append((element, out[:, :columns]))
    assert [element for element, _ in outputs] == [FP4, BF16]
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_weights_that_are_not_fp4_are_not_packed_as_fp4() -> None:
    assert pack_panels(_random(PANEL, 64).bfloat16().float(), allow_fp4=True).element == BF16


@pytest.mark.parametrize("k", [1, 16, 63, 64])
def test_top_k_is_exact_with_ties_to_the_lower_entry(k: int) -> None:
    scores = torch.randint(-3, 4, (64,), generator=torch.Generator().manual_seed(k)).float()
    scores[5] = -0.0
    wide = torch.zeros(64, LANES)
    wide[:, 2] = scores
    from workers.cpu import tables as t

    order, chosen = np.zeros(64, np.int32), np.zeros(k, np.int64)
    scratch = np.zeros(t.SCRATCH_SIZE, np.int64)
    scratch[t.SCORES], scratch[t.ORDER] = wide.data_ptr(), order.ctypes.data
    select.choose_best(scratch, 2, 64, k, chosen.ctypes.data)
    expected, _ = indexer.select_topk(scores.unsqueeze(0), torch.ones(1, 64, dtype=torch.bool), k)
    assert sorted(expected[0].tolist()) == chosen.tolist()
