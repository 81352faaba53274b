"""The one launch that stores a decode step: the same bytes as its parts one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvstore.pools.pool import Pool
from kvstore.spec import PoolName
from tests.workers.kernels.test_compressor import EPS, Run, spec_of
from tests.workers.kernels.test_mhc import Step
from workers.kernels import mhc
from workers.kernels.compressor import compress_c4, compress_c128
from workers.kernels.kv_step import store_and_compress
from workers.kernels.kv_store import norm_and_store

LATENT = 128


class Inputs:
    """Raw rows of one step of every sequence, the step's metadata, and a poisoned window pool."""

    def __init__(self, run: Run, padding: int) -> None:
        self.counts = dict.fromkeys(range(len(run.rows)), 1)
        self.meta, self.rows = run.meta(self.counts, padding)
        self.meta.window_pages = self.meta.full_pages
        tokens, head_dim = len(self.rows), run.parts[0].head_dim
        self.out_fp8 = run.normal(tokens, LATENT + head_dim).to(torch.bfloat16)
        self.q_norm, self.kv_norm = 1 + 0.1 * run.normal(LATENT), 1 + 0.1 * run.normal(head_dim)
        self.latent = torch.full((tokens, LATENT), 7.0, dtype=torch.bfloat16, device=run.device)
        pool = spec_of(head_dim).pool(PoolName.WINDOW)
        self.window = Pool(pool, run.parts[0].entries.num_units, run.device)
        self.window.data.fill_(0xFF)


def bytes_after(run: Run, inputs: Inputs) -> list[Tensor]:
    """All that a step writes."""
    pools = [pool.data for part in run.parts for pool in (part.entries, part.state)]
    return [*pools, inputs.window.data, inputs.latent.view(torch.uint8)]


@pytest.mark.parametrize("with_latent", [True, False])
@pytest.mark.parametrize(("ratio", "done", "padding"), [(4, 6, 2), (4, 7, 0), (128, 126, 2), (128, 127, 0)])
def test_one_launch_stores_what_three_store(
    ratio: int, done: int, padding: int, with_latent: bool, device: torch.device, seed: int
) -> None:
    apart, together = (Run(device, seed, ratio=ratio, head_dim=128, lengths=[140, 140]) for _ in range(2))
    for run in (apart, together):
        run.step({0: done, 1: done - 3}, "prefill")
    one, other = Inputs(apart, padding), Inputs(together, padding)
    norm_and_store(one.out_fp8, one.q_norm, one.kv_norm, apart.rope, one.meta, one.window.data[0], one.latent, EPS)
    compress = compress_c4 if ratio == 4 else compress_c128
    compress(one.rows, one.meta, *[part.tensors for part in apart.parts], apart.rope, EPS)
    tensors = [part.tensors for part in together.parts]
    main, index = tensors if ratio == 4 else (tensors[0], None)
    norms, window = (other.q_norm, other.kv_norm, together.rope), other.window.data[0]
    latent = other.latent if with_latent else None
    store_and_compress(other.out_fp8, *norms, other.meta, window, latent, other.rows, main, index, EPS)
    if not with_latent:
        assert (other.latent == 7).all()
        other.latent = one.latent
    for x, y in zip(bytes_after(apart, one), bytes_after(together, other), strict=True):
        assert torch.equal(x, y)


def test_a_layer_without_compressors_stores_latents_and_window_rows(device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=4, head_dim=128, lengths=[140, 140])
    one, other = Inputs(run, 1), Inputs(run, 1)
    other.out_fp8 = one.out_fp8
    norms = (one.q_norm, one.kv_norm, run.rope)
    norm_and_store(one.out_fp8, *norms, one.meta, one.window.data[0], one.latent, EPS)
    window = other.window.data[0]
    store_and_compress(other.out_fp8, *norms, other.meta, window, other.latent, None, None, None, EPS)
    assert torch.equal(one.window.data, other.window.data) and (one.window.data != 0xFF).any()
    assert torch.equal(one.latent, other.latent) and (one.latent != 7).any()


@pytest.mark.parametrize("with_latent", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_the_launch_finishes_the_matrices_that_were_left_open(
    device: torch.device, num_tokens: int, with_latent: bool, seed: int
) -> None:
    left, closed = Step(num_tokens, device), Step(num_tokens, device)
    closed.post_pre()
    left.post_pre(finish=False)
    assert not torch.equal(left.comb, closed.comb)
    run = Run(device, seed, ratio=4, head_dim=128, lengths=[8] * num_tokens)
    inputs = Inputs(run, 0)
    norms, window = (inputs.q_norm, inputs.kv_norm, run.rope), inputs.window.data[0]
    absent, latent = (None, None, None), inputs.latent if with_latent else None
    comb = (left.comb, left.hc)
    store_and_compress(inputs.out_fp8, *norms, inputs.meta, window, latent, *absent, EPS, comb=comb)
    assert torch.equal(left.comb, closed.comb)


@pytest.mark.parametrize("padding", [False, True])
def test_the_launch_makes_the_gates_of_one_token(device: torch.device, padding: bool, seed: int) -> None:
    left, closed = Step(1, device, parts=4), Step(1, device, parts=4)
    for step in (left, closed):
        if padding:
            step.streams.zero_()
            step.sub_out.zero_()
    closed.post_pre()
    mhc.hc_sums(left.sub_out, left.streams, left.post, left.comb, left.hc, left.work)
    run = Run(device, seed, ratio=4, head_dim=128, lengths=[8])
    inputs = Inputs(run, 0)
    norms, window = (inputs.q_norm, inputs.kv_norm, run.rope), inputs.window.data[0]
    mixed = mhc.Mixed(left.streams, left.hc, left.norm_weight, left.work, left.post, left.comb)
    absent = (None, None, None)
    store_and_compress(inputs.out_fp8, *norms, inputs.meta, window, inputs.latent, *absent, EPS, mixed=mixed)
    assert torch.equal(left.streams, closed.streams)
    assert torch.equal(left.post, closed.post) and torch.equal(left.comb, closed.comb)
    assert left.post.isfinite().all() and left.comb.isfinite().all()


def test_no_tokens_store_nothing(device: torch.device, seed: int) -> None:
    run = Run(device, seed, ratio=4, head_dim=128, lengths=[8])
    inputs = Inputs(run, 0)
    norms, none = (inputs.q_norm, inputs.kv_norm, run.rope), slice(0)
    window, latent = inputs.window.data[0], inputs.latent[none]
    store_and_compress(inputs.out_fp8[none], *norms, inputs.meta, window, latent, None, None, None, EPS)
    assert (inputs.window.data == 0xFF).all() and (inputs.latent == 7).all()
