"""mHC: spec traps 1, 2, 3 and its numeric oracles."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workers.reference.mhc import hc_head, hc_post, hc_pre, sinkhorn

SPEC_COMB = torch.tensor(
    [
        [0.131157, 0.363314, 0.379487, 0.126040],
        [0.231336, 0.322292, 0.261872, 0.184499],
        [0.318764, 0.206281, 0.192841, 0.282113],
        [0.318742, 0.108112, 0.165798, 0.407347],
    ]
)
SPEC_LOGITS = torch.sin(1.7 * torch.arange(16.0)).view(4, 4)


def gates_from_base(base: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre` on unit streams with a zero projection: the gates are functions of `base` alone."""
    streams = torch.eye(4).unsqueeze(0)
    return hc_pre(streams, torch.zeros(24, 16), base, torch.ones(3), iters=20, eps=1e-6, norm_eps=1e-6)


def test_comb_equals_the_published_matrix() -> None:
    _, _, comb = gates_from_base(torch.cat((torch.zeros(8), SPEC_LOGITS.flatten())))
    torch.testing.assert_close(comb[0], SPEC_COMB, rtol=0, atol=2e-6)
    torch.testing.assert_close(comb.sum(-1), torch.full((1, 4), 0.999999), rtol=0, atol=1e-6)
    torch.testing.assert_close(comb.sum(-2), torch.full((1, 4), 0.999999), rtol=0, atol=1e-6)


def test_pre_and_post_gates_equal_the_published_numbers() -> None:
    base = torch.cat((torch.tensor([-1.2, -1.1, -1.0, -0.9, -0.8, -0.7, -0.6, -0.5]), torch.zeros(16)))
    mixed, post, _ = gates_from_base(base)
    torch.testing.assert_close(mixed[0], torch.tensor([0.231476, 0.249741, 0.268942, 0.289051]), rtol=0, atol=1e-6)
    torch.testing.assert_close(post[0], torch.tensor([0.620051, 0.663624, 0.708687, 0.755081]), rtol=0, atol=1e-6)


def test_post_mixes_along_the_first_index_of_comb() -> None:
    rotated = hc_post(torch.zeros(1, 4), torch.eye(4).unsqueeze(0), torch.ones(1, 4), SPEC_COMB.unsqueeze(0))
    for stream in range(4):
        torch.testing.assert_close(rotated[0, stream], SPEC_COMB[:, stream])


@pytest.mark.parametrize("iters", [1, 2, 3])
def test_sinkhorn_starts_with_softmax_and_a_column_step(iters: int) -> None:
    eps = 0.05  # large on purpose: a missing or extra eps shows
    comb = torch.softmax(SPEC_LOGITS, dim=1) + eps
    comb = comb / (comb.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        comb = comb / (comb.sum(1, keepdim=True) + eps)
        comb = comb / (comb.sum(0, keepdim=True) + eps)
    torch.testing.assert_close(sinkhorn(SPEC_LOGITS, iters=iters, eps=eps), comb)


def test_comb_of_random_logits_is_doubly_stochastic() -> None:
    logits = torch.randn(100, 4, 4, generator=torch.Generator().manual_seed(1))
    comb = sinkhorn(logits, iters=20, eps=1e-6)
    torch.testing.assert_close(comb.sum(-1), torch.ones(100, 4), rtol=0, atol=1e-4)
    torch.testing.assert_close(comb.sum(-2), torch.ones(100, 4), rtol=0, atol=1e-5)


def test_large_streams_are_mixed_without_clipping() -> None:
    generator = torch.Generator().manual_seed(2)
    streams, out = torch.randn(3, 4, 8, generator=generator), torch.randn(3, 8, generator=generator)
    post, comb = torch.rand(3, 4, generator=generator), torch.rand(3, 4, 4, generator=generator)
    small = hc_post(out, streams, post, comb)
    torch.testing.assert_close(hc_post(out * 2**20, streams * 2**20, post, comb), small * 2**20)


def test_gates_do_not_depend_on_the_scale_of_the_streams() -> None:
    generator = torch.Generator().manual_seed(3)
    streams, fn = torch.randn(5, 4, 8, generator=generator), torch.randn(24, 32, generator=generator)
    small = hc_pre(streams, fn, torch.zeros(24), torch.ones(3), iters=20, eps=1e-6, norm_eps=1e-6)
    large = hc_pre(streams * 1024, fn, torch.zeros(24), torch.ones(3), iters=20, eps=1e-6, norm_eps=1e-6)
    torch.testing.assert_close(large[1:], small[1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(large[0], small[0] * 1024, rtol=1e-4, atol=1e-2)


def test_projection_reads_streams_in_stream_major_order() -> None:
    streams = torch.arange(8.0).view(1, 4, 2)
    fn = torch.zeros(24, 8)
    fn[4, 2 * 3 + 1] = 1.0  # post gate 0 reads stream 3, channel 1
    _, post, _ = hc_pre(streams, fn, torch.zeros(24), torch.ones(3), iters=20, eps=1e-6, norm_eps=1e-6)
    rms = streams.square().mean().sqrt()
    torch.testing.assert_close(post[0, 0], 2 * torch.sigmoid(7.0 / rms))


def test_head_weighs_streams_by_a_sigmoid_plus_eps() -> None:
    streams = torch.eye(4).unsqueeze(0)
    collapsed = hc_head(streams, torch.zeros(4, 16), torch.zeros(4), torch.ones(1), eps=0.25, norm_eps=1e-6)
    torch.testing.assert_close(collapsed, torch.full((1, 4), 0.75))


@pytest.mark.parametrize("num_tokens", [0, 1, 3])
def test_row_of_a_batch_equals_the_batch_of_one(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(4)
    streams, fn = torch.randn(num_tokens, 4, 8, generator=generator), torch.randn(24, 32, generator=generator)
    mixed, _, comb = hc_pre(streams, fn, torch.zeros(24), torch.ones(3), iters=20, eps=1e-6, norm_eps=1e-6)
    assert mixed.shape == (num_tokens, 8)
    for row in range(num_tokens):
        alone = hc_pre(streams[row : row + 1], fn, torch.zeros(24), torch.ones(3), iters=20, eps=1e-6, norm_eps=1e-6)
        torch.testing.assert_close(alone[0][0], mixed[row])
        torch.testing.assert_close(alone[2][0], comb[row])
