"""The plumbing of the GPU steps, apart from the kernels: torch stand-ins of every op against the reference model.

Activations are fp32 here and never rounded to e4m3, so what is left to differ is the order of sums and the stored codes
that a last bit flips: a wrong operand, row, page or order shows as an error of order one.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kvstore.sequence_kv import SequenceIndices
from tests.support.paged import PagedRun
from tests.support.tiny import random_tokens
from tests.workers.gpu import stand_ins
from tests.workers.gpu.models import TINY, make_gpu_model, stored_weights
from workers.batch import ForwardBatch
from workers.gpu import buffers
from workers.gpu import model as gpu_model
from workers.gpu.branch import Branch
from workers.gpu.kernel_set import KernelSet, MakeKernels, StepSizes
from workers.model.config import LayerKind, ModelConfig
from workers.model.precision import Precision
from workers.model.transformer import ReferenceTransformer

UNROUNDED = Precision(kv_fp8=True, indexer="fp8", act_fp8=False)
TYPICAL, WORST = 2e-4, 0.05
"""Relative error of logits at most positions, and where a stored code was flipped."""


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "ACTIVATION", torch.float32)
    monkeypatch.setattr(stand_ins, "_rounded", lambda x: x.float())


def _run(
    prompts: list[list[int]],
    *,
    reference: bool = False,
    seed: int = 0,
    decode: MakeKernels = stand_ins.stand_ins,
    **options: object,
) -> PagedRun:
    def make(*args: object) -> object:
        if reference:
            return ReferenceTransformer(*args)  # type: ignore[arg-type]
        ops = (decode, stand_ins.stand_ins)
        return make_gpu_model(*args, kernels=ops, **options)  # type: ignore[arg-type]

    return PagedRun(make, TINY, stored_weights(TINY), UNROUNDED, prompts, seed)


def _tokens(count: int, seed: int = 5) -> list[int]:
    return random_tokens(TINY, count, seed)[0].tolist()


def _decode_batch(run: PagedRun, members: list[int]) -> ForwardBatch:
    """One token of each member, from its prompt."""
    items = []
    for b in members:
        start = run.tables[b].num_tokens
        items.append((run.tables[b], start, [run.prompts[b][start]]))
        run.tables[b].num_tokens += 1
    return ForwardBatch.build(items)


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.isfinite().all() and errors.median() < TYPICAL and errors.max() < WORST


def test_prefill_equals_the_reference() -> None:
    prompt = _tokens(300)
    _close(_run([prompt], seed=1).step({0: 300}), _run([prompt], reference=True).step({0: 300}))


def test_packed_chunks_equal_the_reference_whole() -> None:
    prompts = [_tokens(290, seed=1), _tokens(7, seed=2), _tokens(140, seed=3)]
    run = _run(prompts)
    first = run.step({0: 129, 2: 3})
    second = run.step({2: 137, 0: 1, 1: 7})
    third = run.step({0: 160})
    found = [torch.cat((first[:129], second[137:138], third)), second[138:], torch.cat((first[129:], second[:137]))]
    for b, prompt in enumerate(prompts):
        _close(found[b], _run([prompt], reference=True, seed=4).step({0: len(prompt)}))


def test_decode_after_prefill_equals_the_reference() -> None:
    prompts = [_tokens(270, seed=1), _tokens(20, seed=2), _tokens(135, seed=3)]
    run = _run(prompts)
    run.step({0: 250, 1: 3, 2: 120})
    rows = [run.model.decode(_decode_batch(run, [2, 0, 1])).clone() for _ in range(15)]
    for column, b in enumerate((2, 0, 1)):
        expected = _run([prompts[b]], reference=True, seed=9).step({0: len(prompts[b])})
        start = run.tables[b].num_tokens - 15
        _close(torch.stack([row[column] for row in rows]), expected[start : start + 15])


def _branched(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    return dataclasses.replace(stand_ins.stand_ins(config, sizes), branch=Branch(sizes.device))


def test_a_step_with_a_branch_equals_one_without() -> None:
    prompt = _tokens(150, seed=1)

    def decoded(decode: MakeKernels) -> tuple[torch.Tensor, dict[int, list[str]]]:
        run = _run([prompt], decode=decode)
        run.step({0: 140})
        logits = torch.stack([run.model.decode(_decode_batch(run, [0])).clone() for _ in range(8)])
        ops: dict[int, list[str]] = {}
        for launch in run.model.launches(_decode_batch(run, [0])):
            ops.setdefault(-1 if launch.layer is None else launch.layer, []).append(launch.op)
        return logits, ops

    (expected, plain), (found, branched) = decoded(stand_ins.stand_ins), decoded(_branched)
    _close(found, expected)
    for layer, kind in enumerate(TINY.layer_kinds):
        selects = ["linear", "select_entries"] if kind is LayerKind.C4 else ["linear"]
        before = plain[layer].index("sparse_attention")
        assert plain[layer][:before] == ["project_x", "store_and_compress", *selects]
        before = branched[layer].index("sparse_attention")
        more = ["linear"] if kind is LayerKind.C4 else []
        assert branched[layer][:before] == ["project_x", "store_and_compress", *selects, *more]


def test_last_logits_are_the_rows_of_all_logits() -> None:
    prompts = [_tokens(9, seed=1), _tokens(4, seed=2)]
    every = _run(prompts).step({0: 9, 1: 4})
    _close(_run(prompts).step({0: 9, 1: 4}, logits_for="last"), every[[8, 12]])


def test_attention_blocks_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [_tokens(90, seed=1), _tokens(45, seed=2)]
    whole = _run(prompts).step({0: 90, 1: 45})
    monkeypatch.setattr(gpu_model, "ATTENTION_BLOCK", 32)
    assert torch.equal(_run(prompts).step({0: 90, 1: 45}), whole)


def test_a_step_feeds_the_next_one_on_the_device() -> None:
    prompts = [_tokens(60, seed=1), _tokens(5, seed=2)]
    chained, told = _run(prompts, max_running=3), _run(prompts, max_running=3)
    for run in (chained, told):
        run.step({0: 20, 1: 2})
    chained.model.start(_decode_batch(chained, [0, 1]))
    batch, expected = _decode_batch(told, [0, 1]), []
    for step in range(6):
        ids = told.model.decode(batch).argmax(-1)
        expected.append(ids.tolist())
        found, finite = chained.model.greedy()
        assert found == expected[-1] and finite == [True, True]
        # The last steps get their tokens from the host, as a sampled request's do.
        chained.model.start_next(None if step < 3 else np.array(found))
        items = [(told.tables[b], told.tables[b].num_tokens, [int(ids[b])]) for b in range(2)]
        for tables in told.tables:
            tables.num_tokens += 1
        batch = ForwardBatch.build(items)


def test_a_step_whose_result_is_not_used_changes_no_live_row() -> None:
    """What exact retract needs of launching ahead: an image taken after it equals one taken before."""
    run = _run([_tokens(140, seed=1)])
    run.step({0: 131})
    tables = run.tables[0]
    indices = SequenceIndices(tables.full_pages, tables.window_pages, tables.slot, 131)  # type: ignore[arg-type]
    before = run.pools.get_cpu_copy(indices).payload.clone()
    run.model.decode(_decode_batch(run, [0]))
    assert torch.equal(run.pools.get_cpu_copy(indices).payload, before)


def test_launches_of_a_step_are_the_step() -> None:
    run, again = _run([_tokens(40, seed=1)]), _run([_tokens(40, seed=1)])
    for either in (run, again):
        either.step({0: 33})
    expected = run.model.decode(_decode_batch(run, [0])).clone()
    again.model.decode(_decode_batch(again, [0]))
    again.tables[0].num_tokens -= 1
    launches = again.model.launches(_decode_batch(again, [0]))
    assert {launch.layer for launch in launches} == {None, 0, 1, 2, 3}
    for launch in launches:
        launch.call()
    assert torch.equal(again.model.logits(), expected)


def test_launches_of_a_prefill_are_the_prefill() -> None:
    run, again = _run([_tokens(40, seed=1)]), _run([_tokens(40, seed=1)])
    expected = run.step({0: 40}, "last")
    launches = again.model.prefill_launches(ForwardBatch.build([(again.tables[0], 0, again.prompts[0])]))
    for launch in launches:
        launch.call()
    assert torch.equal(launches[-1].call.args[2], expected)


def test_walks_launch_every_op_of_every_kind_of_layer_within_the_buffers() -> None:
    run = _run([_tokens(40, seed=1)], max_running=2)
    model = run.model
    model.reserve_prefill(256, num_sequences=2)
    model.reserve_decode()
    step, before = model._prefill, model._prefill.buffers.nbytes
    parts = model._parts.representatives()
    kinds = [(layer.kind, layer.tid2eid is None) for layer in parts.weights.layers]
    assert set(kinds) == {(layer.kind, layer.tid2eid is None) for layer in model.weights.layers}
    assert len(parts.pools) == len(kinds) == len(set(kinds))
    model._walk_prefill()
    model._walk_decode()
    assert model._prefill is step and step.buffers.nbytes == before


def test_a_step_does_not_run_out_of_its_pages() -> None:
    """Kernels would write before the pool: a page that is not mapped has the number -1."""
    run = _run([_tokens(260, seed=1), _tokens(260, seed=2)], max_running=2)
    run.step({0: 253, 1: 20}, "last")
    run.model.start(_decode_batch(run, [0, 1]))
    for _ in range(2):
        run.model.start_next(None)
    with pytest.raises(ValueError, match="page"):
        run.model.start_next(None)
    run.tables[0].num_tokens = run.tables[1].num_tokens = 256
    run.model.start(_decode_batch(run, [0]))
    run.model.start_next(None)


def test_reserved_prefill_buffers_hold_every_smaller_step() -> None:
    prompts = [_tokens(90, seed=1), _tokens(45, seed=2)]
    expected = _run(prompts).step({0: 90, 1: 45}, "last")
    run = _run(prompts)
    run.model.reserve_prefill(150, num_sequences=2, num_entries=34)
    step, before = run.model._prefill, run.model._prefill.buffers.nbytes
    assert torch.equal(run.step({0: 90, 1: 45}, "last"), expected)
    assert run.model._prefill is step and step.buffers.nbytes == before


def test_what_does_not_exist_is_refused_before_any_launch() -> None:
    run = _run([_tokens(300)])
    run.step({0: 290}, "last")
    tables = run.tables[0]
    pages = tables.window_pages
    tables.window_pages = (pages[0], None)
    with pytest.raises(ValueError, match="window"):
        run.model.decode(ForwardBatch.build([(tables, 290, [1])]))
    tables.window_pages = pages
    with pytest.raises(ValueError, match="token ids"):
        run.model.decode(ForwardBatch.build([(tables, 290, [TINY.vocab_size])]))
    with pytest.raises(ValueError, match="one token"):
        run.model.decode(ForwardBatch.build([(tables, 290, [1, 2])]))
    tables.slot = 77
    with pytest.raises(ValueError, match="slots"):
        run.model.forward(ForwardBatch.build([(tables, 290, [1])]))
