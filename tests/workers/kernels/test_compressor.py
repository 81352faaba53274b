"""The compressor kernels against `workers/reference`: stored bytes of entries and keys, rings, chunking, batches."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kvstore.pools.pool import Pool
from kvstore.spec import KVSpec, PoolName, build_kv_spec
from workers.kernels.compressor import CompressorTensors, compress_c4, compress_c128
from workers.reference import kv_format
from workers.reference.compressor import compress_finish, compress_pool
from workers.reference.indexer import hadamard

ROPE, EPS, DI = 64, 1e-6, 128
MAX_POSITIONS = 1024


def spec_of(head_dim: int) -> KVSpec:
    """One C4 and one C128 layer."""
    return build_kv_spec([4, 128], head_dim=head_dim, rope_dim=ROPE, index_head_dim=DI, window=128, fmt="fp8")


@dataclass
class Meta:
    """Step metadata of the kernels."""

    positions: Tensor
    sequence_of_token: Tensor
    slots: Tensor
    full_pages: Tensor
    start: Tensor
    cu_starts: Tensor


@dataclass
class Compressor:
    """One compressor under test: weights, poisoned pools, and the raw rows that each sequence has fed it."""

    ratio: int
    head_dim: int
    entries: Pool
    state: Pool
    ape: Tensor
    norm: Tensor

    @property
    def tensors(self) -> CompressorTensors:
        return CompressorTensors(self.ape, self.norm, self.state.data[0], self.entries.data[0])

    @property
    def width(self) -> int:
        return (4 if self.ratio == 4 else 2) * self.head_dim

    @property
    def is_key(self) -> bool:
        return self.entries.spec.name is PoolName.C4_INDEXER


class Run:
    """Sequences over shuffled pages and slots of poisoned pools; `step` advances some of them by some tokens."""

    def __init__(self, device: torch.device, seed: int, *, ratio: int, head_dim: int, lengths: list[int]) -> None:
        self.device, self.ratio = device, ratio
        self.random = torch.Generator().manual_seed(seed)
        pages = [-(-n // 256) for n in lengths]
        num_pages, num_slots = sum(pages) + 3, len(lengths) + 2
        order = torch.randperm(num_pages, generator=self.random).tolist()
        self.pages = [[order.pop() for _ in range(n)] for n in pages]
        self.slots = torch.randperm(num_slots, generator=self.random).tolist()[: len(lengths)]
        spec = spec_of(head_dim)
        names = [(PoolName.C128, PoolName.C128_STATE, head_dim)]
        if ratio == 4:
            names = [
                (PoolName.C4, PoolName.C4_STATE, head_dim),
                (PoolName.C4_INDEXER, PoolName.C4_INDEXER_STATE, DI),
            ]
        self.parts = []
        for entries, state, size in names:
            pools = [Pool(spec.pool(entries), num_pages, device), Pool(spec.pool(state), num_slots, device)]
            for pool in pools:
                pool.data.fill_(0xFF)
            ape = self.normal(ratio, (2 if ratio == 4 else 1) * size)
            self.parts.append(Compressor(ratio, size, *pools, ape, 1 + 0.1 * self.normal(size)))
        for part in self.parts:
            part.state.reset(torch.tensor(self.slots, device=device))
        angles = torch.rand(MAX_POSITIONS, ROPE // 2, generator=self.random) * 6.28
        self.rope = torch.cat((angles.cos(), angles.sin()), -1).to(device)
        self.width = sum(part.width for part in self.parts)
        self.rows = [4 * self.normal(n, self.width) for n in lengths]
        self.done = [0] * len(lengths)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random).to(self.device)

    def meta(self, counts: dict[int, int], padding: int) -> tuple[Meta, Tensor]:
        columns = max(len(p) for p in self.pages)
        pages = [self.pages[b] + [-1] * (columns - len(self.pages[b])) for b in counts]
        positions = [torch.arange(self.done[b], self.done[b] + n) for b, n in counts.items()]
        rows = [self.rows[b][self.done[b] : self.done[b] + n] for b, n in counts.items()]
        cu_starts = torch.tensor([0, *counts.values()]).cumsum(0)
        sequences = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(list(counts.values())))
        ints = {
            "positions": torch.cat((*positions, torch.full((padding,), -1))),
            "sequence_of_token": torch.cat((sequences, torch.zeros(padding, dtype=torch.int64))),
            "slots": torch.tensor([self.slots[b] for b in counts] + [0] * padding),
            "full_pages": torch.tensor(pages + [[-1] * columns] * padding),
            "start": torch.tensor([self.done[b] for b in counts] + [0] * padding),
            "cu_starts": torch.cat((cu_starts, cu_starts[-1:].expand(padding))),
        }
        raw = torch.cat((*rows, torch.full((padding, self.width), float("nan"), device=self.device)))
        wide = torch.full((raw.shape[0], self.width + 32), float("nan"), device=self.device)
        wide[:, : self.width] = raw  # further columns of the fused projection
        return Meta(**{k: v.to(torch.int32).to(self.device) for k, v in ints.items()}), wide

    def step(self, counts: dict[int, int], mode: str, padding: int = 0) -> None:
        meta, rows = self.meta(counts, padding)
        tensors = [part.tensors for part in self.parts]
        (compress_c4 if self.ratio == 4 else compress_c128)(rows, meta, *tensors, self.rope, EPS, mode=mode)
        for b, count in counts.items():
            self.done[b] += count

    def raw(self, part: Compressor, b: int) -> Tensor:
        first = 0 if part is self.parts[0] else self.parts[0].width
        return self.rows[b][: self.done[b], first : first + part.width]

    def expected_entries(self, part: Compressor, b: int) -> Tensor:
        """Stored rows uint8 [N, row bytes] of the finished entries, by the reference."""
        rows, span = self.raw(part, b), 8 if self.ratio == 4 else 128
        last = torch.arange(self.done[b] // self.ratio, device=self.device) * self.ratio + self.ratio - 1
        source = last.unsqueeze(1) + torch.arange(1 - span, 1, device=self.device)
        gathered = rows[source.clamp(min=0)] if len(last) else rows.new_zeros(0, span, part.width)
        pooled = compress_pool(gathered, source >= 0, part.ape, ratio=self.ratio)
        cos, sin = self.rope[last + 1 - self.ratio].chunk(2, -1)
        entries = compress_finish(pooled, part.norm, cos, sin, EPS)
        return kv_format.pack_indexer_fp8(hadamard(entries)) if part.is_key else kv_format.pack_kv_fp8(entries, ROPE)

    def stored_entries(self, part: Compressor, b: int) -> Tensor:
        row = torch.arange(self.done[b] // self.ratio, device=self.device)
        per_page = 256 // self.ratio
        pages = torch.tensor(self.pages[b], device=self.device)
        return part.entries.read_rows(part.entries.spec.layers[0], pages[row // per_page] * per_page + row % per_page)

    def check(self) -> None:
        """Entries by the reference up to rare neighbouring codes; rings hold the last rows, bit for bit."""
        for part in self.parts:
            ring = part.state.spec.rows_per_unit
            written = torch.zeros(part.entries.num_units, 256 // self.ratio, dtype=torch.bool)
            for b, done in enumerate(self.done):
                for row in range(done // self.ratio):
                    written[self.pages[b][row * self.ratio // 256], row % (256 // self.ratio)] = True
                assert_same_rows(self.stored_entries(part, b), self.expected_entries(part, b), part)
                last = torch.arange(max(0, done - ring), done, device=self.device)
                stored = part.state.read_rows(part.state.spec.layers[0], self.slots[b] * ring + last % ring)
                assert torch.equal(stored.view(torch.float32), self.raw(part, b)[last])
            for plane in range(2):  # nothing else was touched
                assert (part.entries.plane(plane)[0].cpu()[~written] == 0xFF).all()


def assert_same_rows(found: Tensor, expected: Tensor, part: Compressor) -> None:
    """At most 1 % of bytes differ (sums in another order, at a rounding boundary), by one code or one bf16 ulp."""
    if part.is_key:
        found_value, expected_value = (kv_format.unpack_indexer_fp8(x, DI) for x in (found, expected))
        found, expected = found[:, :DI], expected[:, :DI]  # the scale is fp32: its last bits may differ
    else:
        found_value, expected_value = (kv_format.unpack_kv_fp8(x, part.head_dim, ROPE) for x in (found, expected))
    assert (found != expected).float().mean() <= 0.01 if found.numel() else True
    torch.testing.assert_close(found_value, expected_value, rtol=0.13, atol=2e-3 if part.is_key else 1e-4)


PLANS = {
    (4, "into a second page"): [{0: 262, 1: 7, 2: 5}],
    (4, "cuts anywhere"): [{0: 1, 1: 3}, {0: 2, 2: 1, 1: 6}, {1: 7, 0: 9}, {0: 10, 1: 4, 2: 4}],
    (4, "many short ones"): [{0: 4, 1: 4, 2: 4}, {0: 3, 1: 3, 2: 1}, {0: 1, 1: 1}, {0: 1, 1: 5}, {0: 14}],
    (128, "into a second page"): [{0: 262, 1: 7, 2: 5}],
    (128, "cuts anywhere"): [{0: 1, 1: 3}, {0: 2, 2: 1, 1: 6}, {1: 20, 0: 9}, {0: 120, 1: 4, 2: 4}],
    (128, "many short ones"): [{0: 4, 1: 4, 2: 4}, {0: 3, 1: 3, 2: 1}, {0: 1, 1: 1}, {0: 1, 1: 21}, {0: 125, 1: 100}],
}


@pytest.mark.parametrize(("ratio", "plan"), PLANS)
def test_prefill_chunks_store_what_the_reference_stores(ratio: int, plan: str, device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=ratio, head_dim=128, lengths=[300, 131, 5])
    for counts in PLANS[ratio, plan]:
        run.step(counts, "prefill")
    run.check()


@pytest.mark.parametrize(("ratio", "length"), [(4, 22), (128, 130)])
def test_decode_stores_what_the_reference_stores(ratio: int, length: int, device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=ratio, head_dim=128, lengths=[length, length, length])
    first = length - 12
    run.step({0: first, 1: first - 1, 2: first - 3}, "prefill")
    for i in range(9):
        run.step({2: 1, 0: 1, 1: 1} if i % 2 else {0: 1, 2: 1}, "decode", padding=i % 3)
    run.check()


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_sequence_decoded_from_its_first_token(ratio: int, device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=ratio, head_dim=128, lengths=[ratio + 1])
    for _ in range(ratio + 1):
        run.step({0: 1}, "decode")
    run.check()


@pytest.mark.parametrize("ratio", [4, 128])
def test_flash_head_size(ratio: int, device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=ratio, head_dim=512, lengths=[133])
    run.step({0: 120}, "prefill")
    for _ in range(8):
        run.step({0: 1}, "decode")
    run.step({0: 5}, "prefill")
    run.check()


@pytest.mark.parametrize("ratio", [4, 128])
def test_bytes_do_not_depend_on_chunks_or_batch(ratio: int, device: torch.device, seed: int) -> None:
    """Sequence 0 alone in one chunk, and cut up beside others (C4: some tokens decoded): equal entries and keys."""
    length, mode = (30, "decode") if ratio == 4 else (140, "prefill")
    alone, beside = (Run(device, seed, ratio=ratio, head_dim=128, lengths=[length] * 3) for _ in range(2))
    alone.step({0: length}, "prefill")
    beside.rows[1].fill_(1e15)  # what others hold must not matter
    beside.step({1: 2, 0: length - 23, 2: 9}, "prefill")
    for i in range(9):
        beside.step({1: 1, 0: 1} if i % 2 else {0: 1, 2: 1}, mode, padding=int(mode == "decode"))
    beside.step({2: 10, 0: 14}, "prefill")
    for one, other in zip(alone.parts, beside.parts, strict=True):
        assert torch.equal(alone.stored_entries(one, 0), beside.stored_entries(other, 0))


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_decoded_entry_does_not_depend_on_its_batch(ratio: int, device: torch.device, seed: int) -> None:
    begin = 6 if ratio == 4 else 126
    lengths = [begin + 4, begin + 5, begin + 6]
    alone, beside = (Run(device, seed, ratio=ratio, head_dim=128, lengths=lengths) for _ in range(2))
    for run in (alone, beside):
        run.step({0: begin, 1: begin + 1, 2: begin + 2}, "prefill")
    beside.rows[1].fill_(1e15)
    for counts in ({0: 1}, {0: 1}, {0: 1}):
        alone.step(counts, "decode")
        beside.step({2: 1, **counts, 1: 1}, "decode", padding=2)
    for one, other in zip(alone.parts, beside.parts, strict=True):
        assert torch.equal(alone.stored_entries(one, 0), beside.stored_entries(other, 0))


@pytest.mark.parametrize("ratio", [4, 128])
def test_a_reused_slot_leaks_nothing(ratio: int, device: torch.device, seed: int) -> None:
    """Rows of the slot's previous owner are never read: visibility comes from positions, not from the ring."""
    run = Run(device, seed, ratio=ratio, head_dim=128, lengths=[140, 140])
    run.rows[0].fill_(1e15)
    run.slots[1] = run.slots[0]
    run.step({0: 15 if ratio == 4 else 135}, "prefill")
    run.step({1: 3}, "prefill")
    for _ in range(6):
        run.step({1: 1}, "decode")
    run.step({1: 6 if ratio == 4 else 126}, "prefill")
    run.done[0] = 0
    for part in run.parts:
        found, expected = run.stored_entries(part, 1), run.expected_entries(part, 1)
        assert_same_rows(found, expected, part)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_no_tokens_and_padding_alone_write_nothing(mode: str, device: torch.device, seed: int) -> None:
    for ratio in (4, 128):
        run = Run(device, seed, ratio=ratio, head_dim=128, lengths=[8])
        before = [pool.data.clone() for part in run.parts for pool in (part.entries, part.state)]
        meta, rows = run.meta({0: 1}, 3)
        meta.positions.fill_(-1)
        meta.cu_starts.fill_(0)
        tensors = [part.tensors for part in run.parts]
        call = compress_c4 if ratio == 4 else compress_c128
        call(rows, meta, *tensors, run.rope, EPS, mode=mode)
        call(rows[:0], meta, *tensors, run.rope, EPS, mode=mode)
        after = [pool.data for part in run.parts for pool in (part.entries, part.state)]
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize("ratio", [4, 128])
def test_an_entry_without_a_page_is_not_stored(ratio: int, mode: str, device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=ratio, head_dim=128, lengths=[ratio])
    run.step({0: ratio - 1}, "prefill")
    before = [part.entries.data.clone() for part in run.parts]
    meta, rows = run.meta({0: 1}, 0)
    meta.full_pages.fill_(-1)
    tensors = [part.tensors for part in run.parts]
    # Views from the second page on: page -1 is then inside the pool.
    tensors = [t._replace(entries=t.entries[1:]) for t in tensors]
    (compress_c4 if ratio == 4 else compress_c128)(rows, meta, *tensors, run.rope, EPS, mode=mode)
    assert all(torch.equal(part.entries.data, data) for part, data in zip(run.parts, before, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("ratio", [4, 128])
def test_pools_beyond_two_gib(ratio: int, device: torch.device, seed: int) -> None:
    """Pages and slots whose byte offset needs more than 31 bits (and words of fp32: more than 2**31 bytes)."""
    run = Run(device, seed, ratio=ratio, head_dim=512, lengths=[300])
    spec = spec_of(512)
    for part in run.parts:
        for field_name in ("entries", "state"):
            old = getattr(part, field_name)
            units = (5 << 30) // spec.pool(old.spec.name).unit_stride_bytes
            setattr(part, field_name, Pool(old.spec, units, device))
    smallest = min(min(p.entries.num_units, p.state.num_units) for p in run.parts)
    run.pages, run.slots = [[smallest - 1, smallest - 7]], [smallest - 3]
    run.step({0: 290}, "prefill")
    for _ in range(10):
        run.step({0: 1}, "decode")
    for part in run.parts:
        assert_same_rows(run.stored_entries(part, 0), run.expected_entries(part, 0), part)
        del part.entries, part.state
