"""The streamed form of decode linears: its plans fit the GPU, and its bits are those of the plain form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.workers.kernels.test_linear_decode import fp8_weight, poisoned, tokens
from tests.workers.kernels.test_mhc import Step
from workers.kernels import linear_decode, linear_stream, mhc
from workers.kernels.kv_store import norm_and_store
from workers.kernels.tiles import SHARED_BYTES

FLASH = [
    ("project", 1, 1536, 4096, 2624, 0),
    ("project", 1, 1536, 4096, 1024, 0),
    ("project_less", 1, 1536, 4096, 0, 0),
    ("grouped", 1, 8192, 4096, 0, 8),
    ("long", 1, 4096, 8192, 0, 0),
    ("short_less", 1, 8192, 1024, 0, 0),
    *(("short", T, 40960, 1024, 0, 0) for T in (1, 2, 16, 17, 64, 65)),
]
PRO = [
    ("project", 1, 2048, 7168, 2624, 0),
    ("grouped", 1, 16384, 4096, 0, 16),
    ("long", 1, 7168, 16384, 0, 0),
    *(("short", T, 73728, 1536, 0, 0) for T in (1, 64)),
]


@pytest.mark.parametrize(("op", "T", "rows", "K", "word_rows", "groups"), FLASH + PRO)
def test_a_plan_deals_all_tiles_and_steps(op: str, T: int, rows: int, K: int, word_rows: int, groups: int) -> None:
    tiles, programs, plan = linear_stream.plan(op, T, rows, K, word_rows, groups, 90)
    assert programs <= tiles <= programs * plan["TILES"]
    assert tiles * plan["ROWS"] >= rows + word_rows
    assert K % (plan["KW"] * 128 * plan["SUB"]) == 0
    assert plan["STAGES"] >= 3, "at least one step is on its way while another is multiplied"
    if groups:
        assert tiles == programs * plan["TILES"]
        assert plan["GROUP_TILES"] % plan["TILES"] == 0, "a program's rows see one group of columns"


@pytest.mark.parametrize(("op", "T", "rows", "K", "word_rows", "groups"), FLASH)
def test_rings_admit_no_more_programs_than_the_grid_counts_on(
    op: str, T: int, rows: int, K: int, word_rows: int, groups: int
) -> None:
    tiles, programs, plan = linear_stream.plan(op, T, rows, K, word_rows, groups, 90)
    ring = plan["STAGES"] * plan["SUB"] * plan["KW"] * plan["ROWS"] * 128
    most = linear_stream.SHARED_BYTES // ring
    assert ring < SHARED_BYTES[90]
    assert programs > linear_stream.H200_SMS * (most - 1) * 0.7, "fewer would crowd some multiprocessors"


def bits(op: str, x: torch.Tensor, T: int, rows: int, K: int, words: torch.Tensor | None, groups: int) -> list:
    weight = fp8_weight(rows, K, x.device)
    out = poisoned(T, rows, dtype=torch.bfloat16, device=x.device)
    if groups:
        linear_decode.grouped_linear(x, weight, out)
        return [out]
    if op.startswith("project"):
        more = None if words is None else poisoned(T, len(words), dtype=torch.float32, device=x.device)
        linear_decode.project_x(x, weight, words, out, more)
        return [out] if more is None else [out, more]
    linear_decode.linear(x, weight, out)
    return [out]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "T", "rows", "K", "word_rows", "groups"),
    [
        *FLASH,
        ("project", 1, 2048, 7168, 2624, 0),
        ("project", 1, 256, 512, 52, 0),
        ("project_less", 1, 128, 2048, 17, 0),
        ("grouped", 1, 512, 512, 0, 4),
        ("long", 1, 384, 2048, 0, 0),
        ("short", 1, 128, 512, 0, 0),
        ("short", 3, 384, 1536, 0, 0),
        ("short", 40, 128, 512, 0, 0),
        ("short", 70, 256, 1536, 0, 0),
    ],
)
def test_streamed_bits_are_the_plain_ones(
    op: str,
    T: int,
    rows: int,
    K: int,
    word_rows: int,
    groups: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.get_device_capability(device) not in ((9, 0), (10, 0)):
        pytest.skip("this GPU has the plain form only")
    x = tokens(T, groups, K, device=device) if groups else tokens(T, K, device=device)
    words = torch.randn(word_rows, K, device=device).bfloat16() if word_rows else None
    streamed = bits(op, x, T, rows, K, words, groups)
    monkeypatch.setattr(linear_decode, "streams", lambda *sizes: False)
    plain = bits(op, x, T, rows, K, words, groups)
    for got, expected in zip(streamed, plain, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("hidden", "rows", "word_rows"), [(4096, 1536, 2624), (4096, 1536, 1024), (4096, 1536, 0), (7168, 2048, 2624)]
)
def test_a_projection_mixes_its_input(hidden: int, rows: int, word_rows: int, device: torch.device) -> None:
    """Bits of the launches of mHC and of the projection one after the other, for one token and for many. A sum fused
    another way changes the input of one token in thirty."""
    if not linear_decode.mixes_x(torch.empty(1, hidden, device=device), rows):
        pytest.skip("this GPU has the plain form only")
    weight = fp8_weight(rows, hidden, device)
    words = (torch.randn(word_rows, hidden, device=device) / 8).bfloat16() if word_rows else None

    def projected(step: Step, mixed: mhc.Mixed | None) -> list[torch.Tensor]:
        outs = [poisoned(1, rows, dtype=torch.bfloat16, device=device)]
        if words is not None:
            outs.append(poisoned(1, word_rows, dtype=torch.float32, device=device))
        linear_decode.project_x(step.x, weight, words, outs[0], outs[1] if words is not None else None, mixed=mixed)
        return outs

    batch = Step(64, device, hidden=hidden, parts=7)
    tokens = [batch.take(slice(i, i + 1)) for i in range(64)]
    batch.post_pre(finish=False)
    for i, step in enumerate(tokens):
        apart = step.take(slice(0, 1))
        apart.post_pre(finish=False)
        assert torch.equal(apart.x[0], batch.x[i])
        mhc.hc_sums(step.sub_out, step.streams, step.post, step.comb, step.hc, step.work)
        found = projected(step, mhc.Mixed(step.streams, step.hc, step.norm_weight, step.work, step.post, step.comb))
        assert torch.equal(step.streams[0], batch.streams[i]) and step.x.isnan().all()
        for mine, theirs in zip(found, projected(apart, None), strict=True):
            assert torch.equal(mine, theirs)


EPS = 1e-6


def normed(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`x` after the norm of the launch that stores prefill's latents."""
    (T, K), device = x.shape, x.device
    none = torch.full((T,), -1, dtype=torch.int32, device=device)
    meta = SimpleNamespace(positions=none, sequence_of_token=torch.zeros_like(none), window_pages=none[:, None])
    rope, pool = torch.zeros(1, 64, device=device), torch.zeros(1, 576, dtype=torch.uint8, device=device)
    out = poisoned(T, K, dtype=torch.bfloat16, device=device)
    rows = torch.cat((x, x[:, :128]), 1)
    norm_and_store(rows, weights, torch.ones(128, device=device), rope, meta, pool, out, EPS)
    return out


@pytest.mark.gpu
@pytest.mark.parametrize("K", [1024, 1536])
@pytest.mark.parametrize("T", [1, 3, 16, 40, 64])
def test_a_product_norms_its_input(T: int, K: int, device: torch.device) -> None:
    if not linear_decode.norms(device, 256, K):
        pytest.skip("this GPU has the plain form only")
    generator = torch.Generator().manual_seed(T)
    weight, weights = fp8_weight(256, K, device), (1 + 0.1 * torch.randn(K, generator=generator)).to(device)
    x = tokens(T, K + 128, device=device)[:, :K]
    found, expected = (poisoned(T, 256, dtype=torch.bfloat16, device=device) for _ in range(2))
    linear_decode.linear(x, weight, found, norm=(weights, EPS))
    linear_decode.linear(normed(x, weights), weight, expected)
    assert torch.equal(found, expected)
    for row in {0, T // 2, T - 1}:
        alone = poisoned(1, 256, dtype=torch.bfloat16, device=device)
        linear_decode.linear(x[row : row + 1], weight, alone, norm=(weights, EPS))
        assert torch.equal(found[row], alone[0])


def test_where_no_product_norms_it_is_said(device: torch.device) -> None:
    x, out = tokens(1, 128, device=device), torch.empty(1, 128, dtype=torch.bfloat16, device=device)
    with pytest.raises(ValueError, match="norms 128 columns"):
        linear_decode.linear(x, fp8_weight(128, 128, device), out, norm=(torch.ones(128, device=device), EPS))
