"""Latent norm and window rows against `workers/reference`: bytes, places, and what must not be written."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.pools.pool import Pool
from kvstore.spec import PoolName, build_kv_spec
from tests.support.triton_interpreter import allow_loaded_bounds
from tests.workers.kernels.attention_steps import EPS, ROPE, Meta
from workers.kernels.kv_store import norm_and_store
from workers.reference import kv_format
from workers.reference.norm_rope import apply_rope, rms_norm

allow_loaded_bounds()

SIZES = [(1024, 512), (1536, 512), (128, 128)]


class Store:
    """One call over a poisoned pool: each token in a sequence of its own."""

    def __init__(self, device: torch.device, q_lora: int, head_dim: int, positions: list[int], seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)
        spec = build_kv_spec([0], head_dim=head_dim, rope_dim=ROPE, index_head_dim=128, window=128, fmt="fp8")
        columns = max(2, *(p // 256 + 1 for p in positions), 0)
        self.pool = Pool(spec.pool(PoolName.WINDOW), len(positions) * 2 + 3, device)
        self.pool.data.fill_(0xFF)
        tables = torch.full((len(positions), columns), -1, dtype=torch.int32)
        order = torch.randperm(self.pool.num_units, generator=random)
        for b, position in enumerate(positions):
            tables[b, max(position, 0) // 256] = order[b]
        angles = torch.randn(max(1, *positions, 0) + 1, ROPE // 2, generator=random) * 3
        self.rope_table = torch.cat((angles.cos(), angles.sin()), dim=1).to(device)
        self.q_lora, self.head_dim = q_lora, head_dim
        self.q_norm = (1 + torch.randn(q_lora, generator=random) * 0.2).to(device)
        self.kv_norm = (1 + torch.randn(head_dim, generator=random) * 0.2).to(device)
        rows = torch.randn(len(positions), q_lora + head_dim, generator=random)
        self.rows = (rows * torch.rand(len(positions), 1, generator=random) * 4).bfloat16().to(device)
        self.positions = torch.tensor(positions, dtype=torch.int32, device=device)
        tables = tables.to(device)
        each = torch.arange(len(positions) + 1, dtype=torch.int32, device=device)
        self.meta = Meta(self.positions, each[:-1], tables, tables, self.positions, each)

    def run(self) -> Tensor:
        """bf16 latents; fills the pool."""
        latent = torch.full((len(self.rows), self.q_lora), float("nan"), dtype=torch.bfloat16, device=self.rows.device)
        norm_and_store(self.rows, self.q_norm, self.kv_norm, self.rope_table, self.meta, self.pool.data[0], latent, EPS)
        return latent

    def locations(self, tokens: list[int]) -> Tensor:
        positions = self.positions[tokens].long()
        return self.meta.window_pages[tokens, positions // 256].long() * 256 + positions % 256

    def entries(self, tokens: list[int]) -> Tensor:
        """Vectors before quantisation with the official roundings: fp32 values of bf16."""
        kv = rms_norm(self.rows[tokens, self.q_lora :], self.kv_norm, EPS)
        cos, sin = self.rope_table[self.positions[tokens].long()].split(ROPE // 2, dim=1)
        return apply_rope(kv, cos, sin).float()


@pytest.mark.parametrize(("q_lora", "head_dim"), SIZES)
def test_stored_rows_are_the_references_bytes(device: torch.device, q_lora: int, head_dim: int) -> None:
    """But for vectors whose norm differs in its last fp32 bit, where some bf16 roundings fall the other way."""
    store = Store(device, q_lora, head_dim, [0, 255, 256, 700, 13])
    latent = store.run()
    tokens = list(range(5))
    expected = kv_format.pack_kv_fp8(store.entries(tokens), ROPE)
    found = store.pool.read_rows(0, store.locations(tokens))
    assert (found != expected).float().mean() < 2e-3
    nope, scales = head_dim - ROPE, kv_format.kv_data_bytes(head_dim, ROPE)
    assert torch.equal(found[:, scales:], expected[:, scales:])
    values, reference = (kv_format.unpack_kv_fp8(rows, head_dim, ROPE) for rows in (found, expected))
    step = torch.where(torch.arange(head_dim, device=device) < nope, 2**-3, 2**-7)  # e4m3 and bf16 spacing
    assert ((values - reference).abs() <= reference.abs() * step).all()
    reference = rms_norm(store.rows[:, :q_lora].float(), store.q_norm, EPS)
    torch.testing.assert_close(latent.float(), reference, rtol=2**-8, atol=1e-6)


def test_only_the_tokens_own_rows_are_written(device: torch.device) -> None:
    """Padding tokens and tokens on unmapped pages write nothing, but have finite latents."""
    store = Store(device, 128, 128, [40, -1, 300])
    store.meta.window_pages[2] = -1
    latent = store.run()
    assert torch.isfinite(latent).all()
    touched = (store.pool.plane(0)[0] != 0xFF).any(-1) | (store.pool.plane(1)[0] != 0xFF).any(-1)
    assert touched.nonzero().tolist() == [[int(store.meta.window_pages[0, 0]), 40]]
    unit = store.pool.data[0, store.meta.window_pages[0, 0]]
    used = store.pool.spec.rows_per_unit * store.pool.spec.row_bytes
    assert (unit[used:] == 0xFF).all()


def test_zeros_and_large_values_get_the_references_scales(device: torch.device) -> None:
    store = Store(device, 128, 128, [1, 2, 3])
    store.rows[0] = 0
    store.rows[1, 128:] = 0
    store.rows[1, 130] = 3e4
    store.kv_norm.fill_(300.0)
    store.run()
    found = store.pool.read_rows(0, store.locations([0, 1, 2]))
    expected = kv_format.pack_kv_fp8(store.entries([0, 1, 2]), ROPE)
    assert torch.equal(found[:, -8:], expected[:, -8:])
    values, reference = (kv_format.unpack_kv_fp8(rows[:2], 128, ROPE) for rows in (found, expected))
    assert torch.equal(values, reference)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the interpreter's maximum
def test_a_row_does_not_depend_on_its_batch(device: torch.device) -> None:
    store = Store(device, 128, 128, [5, 6, 7, 8])
    latent = store.run()
    rows = store.pool.read_rows(0, store.locations([2]))
    store.rows[[0, 1, 3]] = float("nan")
    store.pool.data.fill_(0xFF)
    assert torch.equal(store.run()[2], latent[2])
    assert torch.equal(store.pool.read_rows(0, store.locations([2])), rows)


def test_no_tokens_are_no_work(device: torch.device) -> None:
    store = Store(device, 128, 128, [5])
    store.rows = store.rows[:0]
    assert store.run().shape == (0, 128)
    assert (store.pool.data == 0xFF).all()


@pytest.mark.gpu
def test_pools_beyond_two_gib_are_addressed(device: torch.device) -> None:
    store = Store(device, 1024, 512, [700])
    store.run()
    expected = store.pool.read_rows(0, store.locations([0]))
    page = 2**31 // store.pool.data.shape[2] * 2
    far = torch.full((page + 1, store.pool.data.shape[2]), 0xFF, dtype=torch.uint8, device=device)
    store.meta.window_pages[0, 700 // 256] = page
    store.pool.data = far[None]
    store.run()
    row = 700 % 256
    assert torch.equal(far[page, row * 576 : (row + 1) * 576], expected[0, :576])
    assert torch.equal(far[page, 256 * 576 + row * 8 : 256 * 576 + row * 8 + 8], expected[0, 576:])
