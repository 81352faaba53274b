"""Every launch of a whole step with real operands, pools and metadata, against its stand-in on the same bytes."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from kvstore.pools.aggregate import KVPools, PoolSizes
from tests.support.paged import Tables
from tests.support.tiny import random_tokens
from tests.support.triton_interpreter import allow_loaded_bounds
from tests.workers.gpu import stand_ins
from tests.workers.gpu.lockstep import Difference, run_in_lockstep
from tests.workers.gpu.models import NATIVE, TINY, make_gpu_model, stored_weights
from workers.batch import ForwardBatch
from workers.gpu.model import GpuModel
from workers.model.kv_layout import kv_spec
from workers.model.transformer import ReferenceTransformer

allow_loaded_bounds()

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
"""numpy computes on what padding rows hold, which is nobody's business."""

CONFIG = dataclasses.replace(TINY, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1)

USUAL_LIMIT = 0.006
"""Relative error of bf16 results where the interpreter truncates and torch rounds to nearest; on a GPU both round."""

LIMITS = {
    ("expert_down", "sub_out"): 0.05,  # the hidden state passes e4m3, whose codes a truncated bit flips
    ("store_and_compress", "pool window"): 0.12,  # share of bytes: codes and rope values of truncated norms
    ("store_and_compress", "pool c4_indexer"): 0.02,
    ("select_entries", "selected"): 0.06,  # near ties at the edge
    ("hc_post_head", "streams"): 2.0,  # nobody reads them any more
}

TYPICAL, WORST = 0.25, 0.8
"""Relative error of a position's logits against the fp32 reference, half of them and all: random weights turn every
flipped e4m3 code into about 0.1, a flipped expert into more."""


class Scene:
    """The model under test and the one on stand-ins, over equal pools with equal history."""

    def __init__(self, lengths: list[int]) -> None:
        self.weights = stored_weights(CONFIG)
        sizes = PoolSizes(8, 8, 5)
        spec = kv_spec(CONFIG, "fp8")
        ops = (stand_ins.stand_ins, stand_ins.stand_ins)
        self.models: list[GpuModel] = []
        for kernels in (None, ops):
            pools = KVPools(spec, sizes)
            self.models.append(make_gpu_model(CONFIG, self.weights, NATIVE, pools, kernels=kernels, max_running=4))
        shuffle = random.Random(1)
        full, window, slots = ([*range(n)] for n in (8, 8, 5))
        for items in (full, window, slots):
            shuffle.shuffle(items)
        self.tables = [
            Tables(tuple(full.pop() for _ in range(2)), tuple(window.pop() for _ in range(2)), slots.pop(), n)
            for n in lengths
        ]
        self.prompts = [random_tokens(CONFIG, 320, seed=b)[0].tolist() for b in range(len(lengths))]
        ours, theirs = (model.pools for model in self.models)
        for pool in theirs.pools:
            pool.data.fill_(0xFF)
        for tables in self.tables:
            theirs.reset_slot(tables.slot)
        history = [(t, 0, self.prompts[b][: t.num_tokens]) for b, t in enumerate(self.tables) if t.num_tokens]
        if history:
            self.models[1].forward(ForwardBatch.build(history))
            self.models[1]._prefill, self.models[1]._prefill_sizes = None, (0, 0, 0, 0)  # of the history's size
        for a, b in zip(ours.pools, theirs.pools, strict=True):
            a.data.copy_(b.data)

    def batch(self, counts: list[int]) -> ForwardBatch:
        items = [
            (t, t.num_tokens, self.prompts[b][t.num_tokens : t.num_tokens + n])
            for b, (t, n) in enumerate(zip(self.tables, counts, strict=True))
            if n
        ]
        return ForwardBatch.build(items)

    def reference(self, counts: list[int]) -> torch.Tensor:
        """Logits of every token of `batch(counts)` by the fp32 reference, over the same pools before the step."""
        theirs = self.models[1]
        return ReferenceTransformer(CONFIG, self.weights, NATIVE, theirs.pools).forward(self.batch(counts), "all")


def _check(differences: list[Difference]) -> None:
    assert differences
    wrong = [d for d in differences if not d.error <= LIMITS.get((d.launch.op, d.name), USUAL_LIMIT)]
    assert not wrong, "\n".join(map(str, wrong))


def _near(found: torch.Tensor, expected: torch.Tensor) -> None:
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.isfinite().all() and errors.median() < TYPICAL and errors.max() < WORST, errors


def test_every_launch_of_a_decode_step() -> None:
    """Positions that finish a C4 and a C128 entry, a first token, and a bucket with padding."""
    scene = Scene([255, 262, 0])
    batch = scene.batch([1, 1, 1])
    ours, theirs = scene.models
    launches = ours.launches(batch), theirs.launches(batch)
    _check(run_in_lockstep(ours, theirs, launches, (ours._decode.step, theirs._decode.step)))


def test_every_launch_of_a_prefill_step() -> None:
    """Two chunks, the first across a page and a C128 boundary, the second from the start; padding behind them."""
    scene = Scene([250, 0])
    batch = scene.batch([9, 5])
    ours, theirs = scene.models
    launches = ours.prefill_launches(batch), theirs.prefill_launches(batch)
    assert ours._prefill is not None and theirs._prefill is not None
    _check(run_in_lockstep(ours, theirs, launches, (ours._prefill, theirs._prefill)))


def test_a_row_of_a_decode_batch_is_bitwise_the_batch_of_one_and_near_the_reference() -> None:
    scene = Scene([255, 262, 0])
    model = scene.models[0]
    before = [pool.data.clone() for pool in model.pools.pools]
    together = model.decode(scene.batch([1, 1, 1])).clone()
    for pool, data in zip(model.pools.pools, before, strict=True):
        pool.data.copy_(data)
    assert torch.equal(model.decode(scene.batch([1, 0, 0]))[0], together[0])
    _near(together, scene.reference([1, 1, 1]))


def test_a_packed_chunk_is_bitwise_the_chunk_alone_and_near_the_reference() -> None:
    scene = Scene([250, 0])
    model = scene.models[0]
    before = [pool.data.clone() for pool in model.pools.pools]
    together = model.forward(scene.batch([9, 5]), "all")
    for pool, data in zip(model.pools.pools, before, strict=True):
        pool.data.copy_(data)
    assert torch.equal(model.forward(scene.batch([9, 0]), "all"), together[:9])
    _near(together, scene.reference([9, 5]))


def test_warming_up_writes_nothing() -> None:
    """Steps of padding alone, over pools that hold NaN everywhere and page tables that map nothing."""
    pools = KVPools(kv_spec(CONFIG, "fp8"), PoolSizes(2, 2, 2))
    for pool in pools.pools:
        pool.data.fill_(0xFF)
    model = make_gpu_model(CONFIG, stored_weights(CONFIG), NATIVE, pools, max_running=1)
    model.warm_up()
    model.warm_up_prefill()
    for pool in pools.pools:
        assert bool((pool.data == 0xFF).all()), pool.spec.name
