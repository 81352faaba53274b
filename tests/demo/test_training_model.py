"""The GPU layout of the training pass computes what `run_full` computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.demo.train_nano import initial_weights, load_named, save_named
from deploy.demo.training_model import ParameterStore, TrainingModel, choose, sinkhorn
from workers.model.full_sequence import FullOptions, mtp_forward, run_full
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.weights import ModelWeights, TensorInfo, WeightClass, random_named_weights
from workers.reference import mhc
from workers.reference.quant import fp4_weight_fake_quant, fp8_weight_fake_quant

CPU = torch.device("cpu")


def fake_quantise(info: TensorInfo, tensor: Tensor) -> Tensor:
    """What the checkpoint would hold."""
    if info.weight_class is WeightClass.EXPERT:
        return fp4_weight_fake_quant(tensor)
    return fp8_weight_fake_quant(tensor) if info.weight_class is WeightClass.LINEAR else tensor


@pytest.fixture(scope="module")
def named() -> dict[str, Tensor]:
    return random_named_weights(NANO, 3)


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return torch.randint(0, NANO.vocab_size, (2, 385), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("is_dense", [True, False])
def test_losses_equal_those_of_the_full_sequence_form(named: dict[str, Tensor], rows: Tensor, is_dense: bool) -> None:
    inputs, targets = rows[:, :-1], rows[:, 1:]
    weights = ModelWeights.from_named(NANO, named)
    options = FullOptions(weight_transform=fake_quantise, dense_c4=is_dense)
    with torch.no_grad():
        full = run_full(weights, NANO, inputs, Precision.fp32(), options)
        mtp = mtp_forward(weights, NANO, full.streams, targets, Precision.fp32(), options)
    model = TrainingModel(ParameterStore(NANO, named, CPU), Precision.fp32(), dtype=torch.float32, is_compiled=False)
    out = model.run(inputs, targets, torch.ones(inputs.shape), is_dense=is_dense, with_mtp=True)
    expected = F.cross_entropy(full.logits.flatten(0, 1), targets.flatten())
    # The MTP loss has no target at the last position and weighs it 0.
    expected_mtp = F.cross_entropy(mtp.logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
    tolerance = 1e-5 if is_dense else 2e-3  # near-equal index scores may be chosen differently
    assert out.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert out.mtp_loss.item() == pytest.approx(expected_mtp.item(), rel=tolerance)
    assert out.load[:8].sum() == full.expert_load.sum()


def test_every_parameter_gets_a_finite_gradient(named: dict[str, Tensor], rows: Tensor) -> None:
    store = ParameterStore(NANO, named, CPU)
    model = TrainingModel(store, Precision.native(), dtype=torch.float32, is_compiled=False)
    out = model.run(rows[:1, :256], rows[:1, 1:257], torch.ones(1, 256), with_mtp=True)
    (out.loss + out.divergence + out.mtp_loss).backward()
    for key, stack in store.stacks.items():
        assert stack.grad is not None and stack.grad.isfinite().all(), key


def test_divergence_trains_only_the_indexers(named: dict[str, Tensor], rows: Tensor) -> None:
    store = ParameterStore(NANO, named, CPU)
    model = TrainingModel(store, Precision.native(), dtype=torch.float32, is_compiled=False)
    model.run(rows[:1, :128], rows[:1, 1:129], torch.ones(1, 128)).divergence.backward()
    touched = {
        name
        for key, names in store.members.items()
        if (grad := store.stacks[key].grad) is not None
        for name, part in zip(names, grad, strict=True)
        if part.abs().sum() > 0
    }
    assert touched and all(".indexer." in name for name in touched)


def test_a_few_steps_lower_the_loss(rows: Tensor) -> None:
    store = ParameterStore(NANO, initial_weights(NANO, 0), CPU)
    model = TrainingModel(store, Precision.native(), dtype=torch.float32, is_compiled=False)
    inputs, targets, weights = rows[:1, :128], rows[:1, 1:129], torch.ones(1, 128)
    optimiser = torch.optim.Adam(store.stacks.values(), lr=3e-3)
    losses = []
    for _ in range(5):
        out = model.run(inputs, targets, weights)
        losses.append(out.loss.item())
        out.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < 0.8 * losses[0]


def test_sinkhorn_value_is_the_reference_value() -> None:
    logits = 2 * torch.randn(50, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = mhc.sinkhorn(logits, iters=20, eps=1e-6)
    torch.testing.assert_close(sinkhorn(logits, iters=20, eps=1e-6), expected, rtol=1e-4, atol=1e-6)


def test_choose_keeps_k_visible_entries() -> None:
    scores = torch.randn(1, 3, 10, generator=torch.Generator().manual_seed(2))
    visible = torch.arange(10) < torch.tensor([[0], [2], [9]])
    chosen = choose(scores, visible, 4)
    assert chosen is not None
    assert chosen.sum(-1).tolist() == [[0, 2, 4]]
    best = scores[0, 2, :9].topk(4).indices.sort().values
    assert chosen[0, 2].nonzero().squeeze(-1).tolist() == best.tolist()


def test_restart_point_keeps_the_stored_model(named: dict[str, Tensor], tmp_path) -> None:  # type: ignore[no-untyped-def]
    store = ParameterStore(NANO, named, CPU)
    save_named(tmp_path, NANO, store.to_named())
    read = load_named(tmp_path)
    assert read.keys() == named.keys()
    for name, tensor in named.items():
        if ".experts." in name and "shared" not in name:
            torch.testing.assert_close(read[name], tensor, rtol=8e-3, atol=1e-6)
        else:
            assert torch.equal(read[name], tensor)
