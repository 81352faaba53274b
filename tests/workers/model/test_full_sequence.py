"""The full-sequence form as a training function: causality, gradients, quantisation switches, indexer signal."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.support.tiny import random_tokens, tiny_config, tiny_weights
from tests.support.tolerances import OP_FP32, relative_error, worst_position_error
from workers.model import full_sequence
from workers.model.config import ModelConfig
from workers.model.full_sequence import FullOptions, forward_full, run_full
from workers.model.layers import Rope, index_queries
from workers.model.precision import Precision
from workers.model.weights import ModelWeights, TensorInfo, WeightClass
from workers.reference.quant import fp4_weight_fake_quant, fp8_weight_fake_quant

CONFIG = tiny_config((0, 4, 128, 4), index_topk=8, index_n_heads=16, num_hash_layers=2)
IDS = random_tokens(CONFIG, 200, seed=1, batch=2)


@pytest.fixture(scope="module")
def weights() -> ModelWeights:
    return tiny_weights(CONFIG, seed=2)


def trainable(weights: ModelWeights, config: ModelConfig = CONFIG) -> ModelWeights:
    def as_parameter(_: TensorInfo, tensor: Tensor) -> Tensor:
        return torch.nn.Parameter(tensor.clone()) if tensor.is_floating_point() else tensor

    return weights.map(config, as_parameter)


def checkpoint_form(info: TensorInfo, tensor: Tensor) -> Tensor:
    if info.weight_class is WeightClass.EXPERT:
        return fp4_weight_fake_quant(tensor)
    return fp8_weight_fake_quant(tensor) if info.weight_class is WeightClass.LINEAR else tensor


@pytest.mark.parametrize("position", [0, 3, 126, 127, 128, 150, 199])
def test_no_logit_depends_on_a_later_token(weights: ModelWeights, position: int) -> None:
    """Entries completed by later tokens exist in the tensors all along; only the masks keep them out."""
    changed = IDS.clone()
    changed[:, position] = (changed[:, position] + 1) % CONFIG.vocab_size
    plain = forward_full(weights, CONFIG, IDS, Precision.fp32())
    other = forward_full(weights, CONFIG, changed, Precision.fp32())
    if position:
        assert relative_error(other[:, :position], plain[:, :position]) < OP_FP32
    assert relative_error(other[:, position], plain[:, position]) > 1e-3


def test_first_logits_do_not_depend_on_the_length(weights: ModelWeights) -> None:
    long = forward_full(weights, CONFIG, IDS, Precision.fp32())
    for length in (1, 3, 4, 5, 127, 128, 129):
        short = forward_full(weights, CONFIG, IDS[:, :length], Precision.fp32())
        assert worst_position_error(short, long[:, :length]) < OP_FP32


def test_rows_of_a_batch_are_independent(weights: ModelWeights) -> None:
    both = forward_full(weights, CONFIG, IDS, Precision.native())
    for row in range(2):
        alone = forward_full(weights, CONFIG, IDS[row : row + 1], Precision.native())
        assert worst_position_error(alone, both[row : row + 1]) < 1e-2


SWITCHES = {
    "kv_fp8": Precision(kv_fp8=True, indexer="fp32", act_fp8=False),
    "act_fp8": Precision(kv_fp8=False, indexer="fp32", act_fp8=True),
    "indexer_fp8": Precision(kv_fp8=False, indexer="fp8", act_fp8=False),
    "indexer_fp4": Precision(kv_fp8=False, indexer="fp4", act_fp8=False),
}


@pytest.mark.parametrize("name", sorted(SWITCHES))
def test_each_quantisation_switch_acts_alone_and_stays_close(weights: ModelWeights, name: str) -> None:
    plain = forward_full(weights, CONFIG, IDS, Precision.fp32())
    quantised = forward_full(weights, CONFIG, IDS, SWITCHES[name])
    assert 1e-6 < relative_error(quantised, plain) < 0.5


def test_indexer_formats_matter_only_where_entries_are_dropped(weights: ModelWeights) -> None:
    config = dataclasses.replace(CONFIG, index_topk=64)
    plain = forward_full(weights, config, IDS, Precision.fp32())
    for name in ("indexer_fp8", "indexer_fp4"):
        assert worst_position_error(forward_full(weights, config, IDS, SWITCHES[name]), plain) < OP_FP32


def test_index_weights_carry_both_scales_once(weights: ModelWeights) -> None:
    indexer = weights.layers[1].attn.indexer
    assert indexer is not None
    x, latent = torch.ones(1, CONFIG.hidden_size), torch.ones(1, CONFIG.q_lora_rank)
    rope = Rope.at(CONFIG, CONFIG.layer_kinds[1], torch.tensor([5]))
    _, head_weights = index_queries(indexer, CONFIG, x, latent, rope, Precision.fp32())
    expected = indexer.weights_proj.sum(-1) * CONFIG.index_head_dim**-0.5 * CONFIG.index_n_heads**-0.5
    torch.testing.assert_close(head_weights[0], expected)


@pytest.mark.parametrize("dense", [False, True])
def test_language_loss_trains_everything_but_the_indexer(weights: ModelWeights, dense: bool) -> None:
    held = trainable(weights)
    options = FullOptions(dense_c4=dense, indexer_loss=True, weight_transform=checkpoint_form)
    run_full(held, CONFIG, IDS, Precision.native(), options).logits.square().mean().backward()
    for info, tensor in held.items(CONFIG):
        steered = ".indexer." in info.name or info.name.endswith("gate.bias") or info.name.startswith("mtp.")
        if steered or not tensor.is_floating_point():
            assert tensor.grad is None or not tensor.grad.any(), info.name
        else:
            assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), info.name


@pytest.mark.parametrize("dense", [False, True])
def test_indexer_divergence_trains_the_indexer_only(weights: ModelWeights, dense: bool) -> None:
    held = trainable(weights)
    out = run_full(held, CONFIG, IDS, Precision.native(), FullOptions(dense_c4=dense, indexer_loss=True))
    assert [report.layer for report in out.indexer] == [1, 3]
    torch.stack([report.divergence for report in out.indexer]).sum().backward()
    for info, tensor in held.items(CONFIG):
        if ".indexer." in info.name:
            assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(), info.name
        elif tensor.is_floating_point():
            assert tensor.grad is None or not tensor.grad.any(), info.name


def test_descending_the_divergence_captures_more_attention_mass(weights: ModelWeights) -> None:
    held = trainable(weights)
    options = FullOptions(dense_c4=True, indexer_loss=True, captured_mass=True)
    learnt = [tensor for info, tensor in held.items(CONFIG) if ".indexer." in info.name]
    optimiser = torch.optim.Adam(learnt, lr=0.02)
    captured, divergence = [], []
    for _ in range(12):
        reports = run_full(held, CONFIG, IDS[:1], Precision.fp32(), options).indexer
        loss = torch.stack([report.divergence for report in reports]).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        divergence.append(loss.item())
        captured.append(sum(float(report.captured) for report in reports if report.captured is not None) / 2)
    assert divergence[-1] < 0.8 * divergence[0]
    assert captured[-1] > captured[0] + 0.02


def test_divergence_is_the_mean_kl_of_the_masked_distributions(
    weights: ModelWeights, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uniform index scores make each query's term log(count) minus the attention entropy over its entries."""
    monkeypatch.setattr(full_sequence, "index_scores", lambda q, w, keys: q.new_zeros(*q.shape[:2], keys.shape[1]))
    masses: list[Tensor] = []
    plain = full_sequence.windowed_attention

    def watched(*args):  # type: ignore[no-untyped-def]
        heads, mass = plain(*args)
        masses.append(mass)
        return heads, mass

    monkeypatch.setattr(full_sequence, "windowed_attention", watched)
    options = FullOptions(dense_c4=True, indexer_loss=True)
    report = run_full(weights, CONFIG, IDS[:1, :40], Precision.fp32(), options).indexer[0]
    terms = []
    for position in range(3, 40):
        count = (position + 1) // 4
        target = masses[1][0, position, :count].double()
        target = target / target.sum()
        terms.append((target * target.log()).sum() + torch.tensor(float(count)).double().log())
    assert report.divergence.item() == pytest.approx(float(torch.stack(terms).mean()), rel=1e-4)


def test_expert_load_counts_every_choice(weights: ModelWeights) -> None:
    load = run_full(weights, CONFIG, IDS, Precision.fp32()).expert_load
    assert load.shape == (4, CONFIG.n_routed_experts)
    assert load.sum(-1).tolist() == [IDS.numel() * CONFIG.num_experts_per_tok] * 4


def test_checkpointed_layers_give_the_same_gradients(weights: ModelWeights) -> None:
    gradients = []
    for recompute in (False, True):
        held = trainable(weights)
        options = FullOptions(indexer_loss=True, checkpoint_layers=recompute)
        out = run_full(held, CONFIG, IDS[:, :130], Precision.fp32(), options)
        (out.logits.square().mean() + out.indexer[0].divergence).backward()
        gradients.append(held.layers[1].attn.wkv.grad)
    torch.testing.assert_close(gradients[1], gradients[0])


def test_half_precision_matmuls_stay_close_to_fp32(weights: ModelWeights) -> None:
    config = dataclasses.replace(CONFIG, index_topk=512)
    plain = run_full(weights, config, IDS, Precision.fp32())
    coarse = run_full(weights, config, IDS, Precision.fp32(), FullOptions(matmul_dtype=torch.bfloat16))
    assert coarse.logits.dtype is torch.float32
    assert coarse.streams.dtype is torch.float32
    assert 1e-4 < relative_error(coarse.logits, plain.logits) < 0.1


def test_weight_transform_equals_transformed_weights(weights: ModelWeights) -> None:
    ahead = forward_full(weights.map(CONFIG, checkpoint_form), CONFIG, IDS, Precision.fp32())
    inside = forward_full(weights, CONFIG, IDS, Precision.fp32(), FullOptions(weight_transform=checkpoint_form))
    assert torch.equal(inside, ahead)
    assert relative_error(inside, forward_full(weights, CONFIG, IDS, Precision.fp32())) > 1e-3


@pytest.mark.slow
def test_a_training_step_compiles_as_one_graph(weights: ModelWeights) -> None:
    held = trainable(weights)
    options = FullOptions(indexer_loss=True, weight_transform=checkpoint_form)
    step = torch.compile(
        lambda ids: run_full(held, CONFIG, ids, Precision.native(), options), backend="aot_eager", fullgraph=True
    )
    step(IDS).logits.sum().backward()
    assert held.embed.grad is not None
