"""Sparse attention over fp8 pages against `workers/reference`, and that a request's result ignores its batch.

Bounds: queries after rope, probabilities and the output are bf16 (official kernel): 2**-9 relative a rounding, which a
sum over many keys averages out and cancellation between values makes larger again, relative to a small result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from tests.support.tolerances import relative_error
from tests.support.triton_interpreter import allow_loaded_bounds
from tests.workers.kernels.attention_steps import EPS, AttentionStep, Meta, attention_step
from workers.kernels import sparse_attention as module
from workers.kernels.sparse_attention import prefill_work_floats, sparse_attention, work_floats

allow_loaded_bounds()

HEAD_BOUND = 2**-7
"""Largest relative error of any head of any token."""

BOUND = 2**-8
"""Relative error over everything."""


def attend(step: AttentionStep, meta: Meta | None = None, q: Tensor | None = None, **options: object) -> Tensor:
    """Run the kernel over poisoned outputs; bf16 [T, H * hd]. `together`: whether programs may wait for each other."""
    mode: Literal["decode", "prefill"] = options.pop("mode", "decode")  # type: ignore[assignment]
    meta = step.meta if meta is None else meta
    q = step.q if q is None else q
    pool, entries, selected, *rest = step.tensors
    selected = options.pop("selected", selected)  # type: ignore[assignment]
    arrived = None
    if mode == "decode" and options.pop("together", True):
        arrived = torch.zeros(q.shape[0] * step.heads, dtype=torch.int32, device=q.device)
    out = torch.full((q.shape[0], step.heads * step.head_dim), float("nan"), dtype=torch.bfloat16, device=q.device)
    num_sequences, num_pages = meta.full_pages.shape
    columns = 0 if selected is None else selected.shape[1]
    if mode == "decode":
        floats = work_floats(q.shape[0], step.heads, step.head_dim, num_pages, columns, step.ratio, device=q.device)
    else:
        ends = meta.start + meta.cu_starts.diff()
        num_entries = int((ends // step.ratio).sum()) if step.ratio else 0
        floats = prefill_work_floats(q.shape[0], num_sequences, num_entries, step.head_dim)
    work = torch.full((max(floats, 1),), float("nan"), device=q.device)
    inputs = (q, meta, pool, entries, selected, *rest)
    sparse_attention(*inputs, out, work, EPS, mode=mode, arrived=arrived)  # type: ignore[arg-type]
    assert arrived is None or not arrived.any()
    return out


def check(found: Tensor, expected: Tensor, heads: int) -> None:
    """Both bounds; everything must be finite."""
    assert torch.isfinite(found).all()
    found, expected = found.float().unflatten(1, (heads, -1)), expected.unflatten(1, (heads, -1))
    by_head = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert float(by_head.max()) < HEAD_BOUND
    assert relative_error(found, expected) < BOUND


def split_of(step: AttentionStep, monkeypatch: pytest.MonkeyPatch, chunk_programs: int, run_programs: int) -> Tensor:
    """Decode with other limits of the split."""
    monkeypatch.setattr(module, "MOST_CHUNK_PROGRAMS", chunk_programs)
    monkeypatch.setattr(module, "MOST_RUN_PROGRAMS", run_programs)
    return attend(step)


CASES = [
    # ratio, head size, heads, selected, positions of one token each
    (4, 512, 8, 128, (3000, 40)),
    (128, 512, 3, 0, (126, 127, 9000)),
    (0, 512, 8, 0, (0, 127, 128, 700)),
    (4, 128, 8, 64, (2, 3, 255, 256, 600)),
    (128, 128, 8, 0, (5, 20000)),
]


@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize(("ratio", "head_dim", "heads", "selected", "positions"), CASES)
def test_attention_equals_the_reference(
    device: torch.device,
    mode: str,
    ratio: int,
    head_dim: int,
    heads: int,
    selected: int,
    positions: Sequence[int],
) -> None:
    step = attention_step(
        device, [(p, 1) for p in positions], ratio=ratio, head_dim=head_dim, heads=heads, num_selected=selected
    )
    found = attend(step, mode=mode)
    check(found, step.expected(), heads)


def test_prefill_tokens_of_several_prompts_see_their_own_past(device: torch.device) -> None:
    step = attention_step(device, [(0, 3), (250, 9), (125, 5)], ratio=4, head_dim=128, num_selected=64)
    check(attend(step, mode="prefill"), step.expected(), step.heads)
    step = attention_step(device, [(0, 2), (254, 3)], ratio=128, head_dim=128)
    check(attend(step, mode="prefill"), step.expected(), step.heads)


def test_prefill_in_blocks_of_the_step_gives_the_same_bits(device: torch.device) -> None:
    """Blocks keep the step's tables: they may begin and end inside a sequence."""
    step = attention_step(device, [(0, 5), (1022, 6), (600, 7)], ratio=4, head_dim=128, num_selected=64)
    whole = attend(step, mode="prefill")
    for first, last in ((0, 3), (3, 5), (4, 14), (11, 18)):
        part, chosen = step.meta.rows(range(first, last)), step.selected[first:last]  # type: ignore[index]
        found = attend(step, part, step.q[first:last], selected=chosen, mode="prefill")
        assert torch.equal(found, whole[first:last])


def test_prefill_of_padding_alone_writes_zeros_and_no_row(device: torch.device) -> None:
    step = attention_step(device, [(500, 3)], ratio=4, head_dim=128, num_selected=64)
    step.meta.positions.fill_(-1)
    assert not attend(step, mode="prefill").any()


@pytest.mark.filterwarnings("ignore:(All-NaN slice|invalid value):RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("ratio", [4, 128])
def test_a_tokens_bits_do_not_depend_on_its_batch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, ratio: int
) -> None:
    """Whether a program has a chunk, a run of chunks or all of a token. Other rows hold NaN."""
    positions = (1500, 700, 90) if ratio == 4 else (128 * 450, 300)
    step = attention_step(device, [(p, 1) for p in positions], ratio=ratio, head_dim=128, num_selected=256)
    whole = split_of(step, monkeypatch, 0, 0)
    assert torch.equal(split_of(step, monkeypatch, 0, 10_000), whole)
    assert torch.equal(split_of(step, monkeypatch, 10_000, 0), whole)
    for t in range(len(positions)):
        chosen = None if step.selected is None else step.selected[t : t + 1]
        alone = attend(step, step.meta.rows([t]), step.q[t : t + 1], selected=chosen)
        assert torch.equal(alone[0], whole[t])
    poisoned = step.q.clone()
    poisoned[1:] = float("nan")
    assert torch.equal(attend(step, q=poisoned)[0], whole[0])


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [64, 128])
@pytest.mark.parametrize("ratio", [0, 4, 128])
def test_every_form_of_decode_gives_the_same_bits(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, ratio: int, heads: int
) -> None:
    """Explicit layouts by runs and by pairs of chunks, and the plain form, alone and in every split."""
    positions = [3000, 5, -1, 1500, 127, 20_000, 128, 90, 2047, 4095, *range(700, 740)]
    step = attention_step(device, [(p, 1) for p in positions], ratio=ratio, heads=heads, capacity_pages=200)
    whole = attend(step)
    check(whole[[0, 1, *range(3, 50)]], step.expected([0, 1, *range(3, 50)]), heads)
    assert not whole[2].any()
    assert torch.equal(attend(step, together=False), whole)
    for tokens in (range(6), range(4, 13), [0], [1], [3], [5], [9]):
        chosen = None if step.selected is None else step.selected[list(tokens)]
        some = attend(step, step.meta.rows(list(tokens)), step.q[list(tokens)], selected=chosen)
        assert torch.equal(some, whole[list(tokens)])
    monkeypatch.setattr(module, "MOST_PLAIN_PROGRAMS", 0)
    chosen = None if step.selected is None else step.selected[5:6]
    assert torch.equal(attend(step, step.meta.rows([5]), step.q[5:6], selected=chosen)[0], whole[5])
    monkeypatch.setattr(module, "MOST_PLAIN_PROGRAMS", 1 << 30)
    assert torch.equal(split_of(step, monkeypatch, 0, 0), whole)
    assert torch.equal(split_of(step, monkeypatch, 0, 10_000), whole)


@pytest.mark.parametrize("mode", ["decode", "prefill"])
def test_padding_tokens_yield_zeros_and_disturb_nobody(device: torch.device, mode: str) -> None:
    step = attention_step(device, [(300, 1), (-1, 1), (70, 1)], ratio=4, head_dim=128, num_selected=64)
    found = attend(step, mode=mode)
    assert not found[1].any()
    check(found[[0, 2]], step.expected([0, 2]), step.heads)


def test_selections_without_entries_leave_the_window(device: torch.device) -> None:
    step = attention_step(device, [(900, 1)], ratio=4, head_dim=128, num_selected=128)
    assert step.selected is not None
    step.selected.fill_(-1)
    for mode in ("decode", "prefill"):
        check(attend(step, mode=mode), step.expected(), step.heads)


def test_no_tokens_are_no_work(device: torch.device) -> None:
    step = attention_step(device, [(5, 1)], ratio=0, head_dim=128)
    pool, entries, selected, *rest = step.tensors
    out = torch.full((1, step.heads * 128), 7.0, dtype=torch.bfloat16, device=device)
    work, before = torch.full((4096,), 7.0, device=device), pool.clone()
    for mode in ("decode", "prefill"):
        none = (step.q[:0], step.meta.rows([]), pool, entries, selected)
        sparse_attention(*none, *rest, out[:0], work, EPS, mode=mode)  # type: ignore[arg-type]
    assert (out == 7).all() and (work == 7).all() and torch.equal(pool, before)


def test_wider_page_tables_change_nothing(device: torch.device) -> None:
    narrow = attention_step(device, [(600, 1)], ratio=128, head_dim=128)
    padding = torch.full((1, 700), -1, dtype=torch.int32, device=device)
    wide = Meta(
        narrow.meta.positions,
        narrow.meta.sequence_of_token,
        torch.cat((narrow.meta.full_pages, padding), dim=1),
        torch.cat((narrow.meta.window_pages, padding), dim=1),
        narrow.meta.start,
        narrow.meta.cu_starts,
    )
    assert torch.equal(attend(narrow), attend(narrow, wide))


@pytest.mark.parametrize(("arguments", "text"), [({"ratio": 8}, "ratio 8"), ({"ratio": 4}, "selection False")])
def test_sizes_without_a_kernel_are_refused(device: torch.device, arguments: dict[str, int], text: str) -> None:
    step = attention_step(device, [(5, 1)], ratio=0, head_dim=128)
    step.ratio = arguments["ratio"]
    with pytest.raises(ValueError, match=text):
        out = torch.empty(1, step.heads * step.head_dim, dtype=torch.bfloat16, device=device)
        sparse_attention(step.q, step.meta, *step.tensors, out, None, EPS, mode="prefill")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["decode", "prefill"])
@pytest.mark.parametrize(("ratio", "heads"), [(4, 64), (128, 64), (0, 64), (4, 128)])
def test_flash_and_pro_shapes(device: torch.device, mode: str, ratio: int, heads: int) -> None:
    positions = [4095, 8191, 127, 3, 65535, 1, 20000, 512] * 2
    step = attention_step(device, [(p, 1) for p in positions], ratio=ratio, heads=heads)
    found = attend(step, mode=mode)
    check(found, step.expected(), heads)
    if mode == "decode":
        for t in (0, 4, 9):
            chosen = None if step.selected is None else step.selected[t : t + 1]
            alone = attend(step, step.meta.rows([t]), step.q[t : t + 1], selected=chosen)
            assert torch.equal(alone[0], found[t])


@pytest.mark.gpu
@pytest.mark.parametrize(("ratio", "heads"), [(4, 64), (128, 64), (0, 128)])
def test_both_forms_of_prefill_agree(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, ratio: int, heads: int
) -> None:
    """Where the GPU has the one with explicit layouts. Chunks of one sequence, a short one behind it, then padding."""
    if not module.explicit_form(device, heads, 512, 128):
        pytest.skip("this GPU runs Triton's form")
    step = attention_step(device, [(2500, 90), (0, 3), (130, 2)], ratio=ratio, heads=heads)
    step.meta.positions[-1] = -1
    found = attend(step, mode="prefill")
    assert not found[-1].any()
    part, chosen = step.meta.rows(range(40, 92)), None if step.selected is None else step.selected[40:92]
    assert torch.equal(attend(step, part, step.q[40:92], selected=chosen, mode="prefill"), found[40:92])
    monkeypatch.setattr(module, "explicit_form", lambda *sizes: False)
    check(found[:-1], attend(step, mode="prefill")[:-1].float(), heads)


def test_sizes_of_the_form_with_explicit_layouts(device: torch.device) -> None:
    from workers.kernels.sparse_attention_sm90 import serves

    assert serves(64, 512, 128) and serves(128, 512, 256)
    assert not any(serves(*sizes) for sizes in ((8, 512, 128), (64, 128, 128), (64, 512, 64), (64, 512, 160)))
    assert not module.explicit_form(torch.device("cpu"), 64, 512, 128)


@pytest.mark.gpu
def test_pools_beyond_two_gib_are_addressed(device: torch.device) -> None:
    step = attention_step(device, [(4000, 1)], ratio=4, heads=64)
    far = 2**31 // step.window.data.shape[2] + 100  # units
    expected = attend(step)
    assert step.entries is not None
    for pool, table in ((step.window, step.meta.window_pages), (step.entries, step.meta.full_pages)):
        units = pool.data.shape[1]
        big = torch.full((1, far * 4 + units, pool.data.shape[2]), 0xFF, dtype=torch.uint8, device=device)
        shift = big.shape[1] - units
        big[:, shift:] = pool.data
        pool.data = big
        table[table >= 0] += shift
    assert step.window.data.numel() > 2**31
    assert torch.equal(attend(step), expected)
