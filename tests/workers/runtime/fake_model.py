"""A model that is pure bookkeeping: every row of every pool is a hash, and the next token hashes all live rows.

It reads and writes through page tables like the real one, so a row that is lost, stale, misplaced or mixed up with
another request's changes the tokens. `oracle_tokens` computes the same function from the token ids alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch

from kvstore.pools.aggregate import KVPools, PoolSizes
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import KVSpec, PoolName, build_kv_spec
from workers.batch import ForwardBatch
from workers.engine import Engine, ModelFacts
from workers.messages import SamplingParams
from workers.sampler import SampleState, request_seed, sample, splitmix64

VOCAB = 61
EOS = 1
GROWING = (PoolName.C4, PoolName.C4_INDEXER, PoolName.C128)
STATES = (PoolName.C4_STATE, PoolName.C4_INDEXER_STATE, PoolName.C128_STATE)
STATE_OF = dict(zip(GROWING, STATES, strict=True))
LAYER = {name: 2 if "c128" in name else 1 for name in (*GROWING, *STATES)} | {PoolName.WINDOW: 0}


def tiny_spec() -> KVSpec:
    """One layer of each kind."""
    return build_kv_spec([0, 4, 128], head_dim=128, rope_dim=64, index_head_dim=128, window=128, fmt="fp8")


def mix(values: np.ndarray, tag: int) -> int:
    """Order-sensitive 31-bit hash of int64 `values`."""
    powers = np.multiply.accumulate(np.full(len(values), 6364136223846793005, dtype=np.uint64))
    total = int((values.astype(np.uint64) * powers).sum()) if len(values) else 0
    return splitmix64((total + tag * 0x51_7C_C1) % 2**64) & 0x7FFFFFFF


def _tag(name: PoolName) -> int:
    return list(PoolName).index(name) + 1


@functools.cache
def state_value(name: PoolName, token: int, position: int) -> int:
    return mix(np.array([token, position]), _tag(name))


def pooled_rows(spec: KVSpec, name: PoolName, row: int) -> range:
    """State rows that entry `row` of a compressed pool is made of."""
    ratio = spec.pool(name).ratio
    return range(max(0, ratio * row - spec.pool(STATE_OF[name]).span), ratio * (row + 1))


def logits_of(hashes: Sequence[int]) -> torch.Tensor:
    """[B, V] fp32: spread-out values that differ for each hash."""
    keys = torch.tensor([[splitmix64(h * VOCAB + v) >> 44 for v in range(VOCAB)] for h in hashes])
    return keys.to(torch.float32) / 2**18


class FakeModel:
    """A `StepModel` over real pools. `fail_on` raises when a step computes that token id."""

    def __init__(self, pools: KVPools) -> None:
        self.pools = pools
        self.fail_on: int | None = None
        self.nan_on: int | None = None
        self.steps: list[tuple[int, ...]] = []
        self.ahead: FakeAhead | None = None

    def forward(self, batch: ForwardBatch, logits_for: str = "last") -> torch.Tensor:
        self.steps.append(tuple(batch.num_new.tolist()))
        if self.fail_on is not None and self.fail_on in batch.token_ids.tolist():
            raise RuntimeError("fake model failure")
        hashes, broken = [], []
        for b in range(batch.num_sequences):
            first, end = int(batch.cu_starts[b]), int(batch.cu_starts[b + 1])
            start = int(batch.start[b])
            assert batch.positions[first:end].tolist() == list(range(start, start + end - first))
            indices = SequenceIndices(
                tuple(batch.full_pages[b].tolist()),
                tuple(None if p < 0 else p for p in batch.window_pages[b].tolist()),
                int(batch.slots[b]),
                start + end - first,
            )
            ids = batch.token_ids[first:end].tolist()
            for position, token in enumerate(ids, start):
                self._append(indices, token, position)
            hashes.append(self._hash(indices))
            broken.append(self.nan_on is not None and ids[-1] == self.nan_on)
        logits = logits_of(hashes)
        logits[broken] = torch.nan
        return logits

    def decode(self, batch: ForwardBatch) -> torch.Tensor:
        return self.forward(batch)

    def _append(self, indices: SequenceIndices, token: int, position: int) -> None:
        for name in (PoolName.WINDOW, *STATES):
            self._write(name, position, indices, state_value(name, token, position))
        for name in GROWING:
            ratio = self.pools.spec.pool(name).ratio
            if (position + 1) % ratio == 0:
                row = position // ratio
                parts = self._read(STATE_OF[name], pooled_rows(self.pools.spec, name, row), indices)
                self._write(name, row, indices, mix(parts, _tag(name)))

    def _hash(self, indices: SequenceIndices) -> int:
        values = [self._read(p.name, p.live_rows(indices.num_tokens), indices) for p in self.pools.spec.pools]
        return mix(np.concatenate(values), indices.num_tokens)

    def _write(self, name: PoolName, row: int, indices: SequenceIndices, value: int) -> None:
        pool = self.pools.pool(name)
        words = np.full(pool.spec.row_bytes // 4, value, dtype=np.int32)
        location = pool.locations(range(row, row + 1), indices)
        pool.write_rows(LAYER[name], location, torch.from_numpy(words.view(np.uint8)[None]))

    def _read(self, name: PoolName, rows: range, indices: SequenceIndices) -> np.ndarray:
        if not rows:
            return np.zeros(0, dtype=np.int64)
        pool = self.pools.pool(name)
        found = pool.read_rows(LAYER[name], pool.locations(rows, indices)).contiguous().numpy().view(np.int32)
        assert (found == found[:, :1]).all(), f"{name}: a row is torn"
        return found[:, 0].astype(np.int64)


def oracle_hash(spec: KVSpec, ids: Sequence[int]) -> int:
    """What `FakeModel` computes after `ids`, without any pool."""
    n = len(ids)
    values = []
    for pool in spec.pools:
        live = pool.live_rows(n)
        if pool.name in GROWING:
            source = STATE_OF[pool.name]
            rows = [
                mix(
                    np.array([state_value(source, ids[p], p) for p in pooled_rows(spec, pool.name, r)]), _tag(pool.name)
                )
                for r in live
            ]
        else:
            rows = [state_value(pool.name, ids[p], p) for p in live]
        values.append(np.array(rows, dtype=np.int64))
    return mix(np.concatenate(values), n)


def oracle_tokens(prompt: Sequence[int], params: SamplingParams, request_id: str = "") -> list[int]:
    """The tokens a request must get, computed without pools, batches or workers."""
    spec, ids, output = tiny_spec(), list(prompt), []
    stop = frozenset({EOS, *params.stop_token_ids})
    while len(output) < params.max_tokens:
        state = SampleState(params, request_seed(params, request_id), stop, prompt, output, VOCAB)
        token = sample(logits_of([oracle_hash(spec, ids)]), [state])[0].token_id
        assert token is not None
        output.append(token)
        ids.append(token)
        if token in stop and not params.ignore_eos:
            break
    return output


class FakeAhead:
    """An `AheadModel` on a fake: a started step has run at once, as early as a device could run it."""

    def __init__(self, model: FakeModel) -> None:
        self._model = model
        self._batch: ForwardBatch | None = None
        self._logits = torch.empty(0)
        self.num_next = 0

    def start(self, batch: ForwardBatch) -> None:
        self._batch = batch
        self._logits = self._model.forward(batch)

    def start_next(self, token_ids: np.ndarray | None) -> None:
        assert self._batch is not None
        batch = self._batch
        ids = self._logits.argmax(-1) if token_ids is None else torch.from_numpy(token_ids).long()
        self.num_next += 1
        self.start(dataclasses.replace(batch, token_ids=ids, positions=batch.positions + 1, start=batch.start + 1))

    def greedy(self) -> tuple[list[int], list[bool]]:
        best, ids = self._logits.max(-1)
        return ids.tolist(), (best - best == 0).tolist()

    def logits(self) -> torch.Tensor:
        return self._logits


def fake_engine(*, full_pages: int = 24, window_pages: int = 24, slots: int = 6, ahead: bool = False) -> Engine:
    """An engine over poisoned pools: whatever is read before it was written is NaN, not zero.

    `ahead`: its decode steps are launched before the last one's tokens are taken.
    """
    pools = KVPools(tiny_spec(), PoolSizes(full_pages, window_pages, slots))
    for pool in pools.pools:
        pool.data.fill_(0xFF)
    model = FakeModel(pools)
    if ahead:
        model.ahead = FakeAhead(model)
    return Engine(model, pools, ModelFacts("fake", VOCAB, EOS))
