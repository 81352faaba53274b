"""Costs of a step's launches: they add up to the floor that the shapes alone give."""

from __future__ import annotations

import dataclasses

import pytest

from cluster.bench import floors
from cluster.bench.costs import Cost, CostModel, Seen
from cluster.bench.scene import DoesNotFitDevice, Scene, Wanted, experts_that_fit
from workers.gpu.kernel_set import KernelSet, Launch, StepSizes
from workers.model.config import LayerKind, ModelConfig
from workers.model.presets import NANO, V4_FLASH

CONTEXT = 1024
BATCH = 3


def idle_kernels(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    """Ops that do nothing: the list of launches is what is looked at."""
    ops = [field.name for field in dataclasses.fields(KernelSet) if field.default is dataclasses.MISSING]
    return KernelSet(**dict.fromkeys(ops, lambda *args, **kwargs: None))


@pytest.fixture(scope="module")
def scene() -> Scene:
    wanted = Wanted("nano", NANO, 8, False, (1, BATCH), (CONTEXT,), (256,))
    return Scene(wanted, NANO.n_routed_experts, device="cpu", kernels=(idle_kernels, idle_kernels))


@pytest.fixture(scope="module")
def costed(scene: Scene) -> list[tuple[str, Launch, Cost]]:
    return costs_of(scene, scene.model.launches(scene.decode_batch(BATCH, CONTEXT, CONTEXT - 1)))


def costs_of(scene: Scene, launches: list[Launch]) -> list[tuple[str, Launch, Cost]]:
    """As if every expert had been chosen by some token."""
    model = CostModel(scene.config, scene.weights)
    found = []
    for launch in launches:
        kind = LayerKind.SLIDING if launch.layer is None else scene.weights.layers[launch.layer].kind
        for operand in launch.call.args:
            if hasattr(operand, "num_active"):
                operand.num_active.fill_(NANO.n_routed_experts)
        found.append((model.name(launch), launch, model.cost(launch, kind)))
    return found


def test_costs_of_a_step_add_up_to_its_floor(scene: Scene, costed: list[tuple[str, Launch, Cost]]) -> None:
    total = sum((cost for _, _, cost in costed), Cost(0.0))
    floor = floors.decode_bytes(scene.config, BATCH, CONTEXT, NANO.n_routed_experts)
    # Activations, which the floor leaves out, are a large part of so small a model.
    assert floor < total.nbytes < 1.5 * floor
    flops = floors.token_flops(scene.config) + floors.context_flops(scene.config, CONTEXT)
    # The step is padded to its bucket of one more or less; rows of the head count too.
    rows = next(launch.call.args[0].shape[0] for name, launch, _ in costed if name == "embed_streams")
    expected = rows * (flops + floors.head_flops(scene.config))
    assert total.bf16_flops + total.fp8_flops == pytest.approx(expected, rel=0.05)


def test_costs_of_a_prompt_add_up_to_its_operations(scene: Scene) -> None:
    tokens = 256
    costed = costs_of(scene, scene.model.prefill_launches(scene.prompt_batch(tokens, sequences=2)))
    flops = sum(cost.bf16_flops + cost.fp8_flops for _, _, cost in costed)
    assert flops == pytest.approx(2 * floors.prompt_flops(scene.config, 0, tokens // 2), rel=0.05)


def test_linears_are_told_apart_by_their_operand(costed: list[tuple[str, Launch, Cost]]) -> None:
    names = {name for name, _, _ in costed}
    assert {"linear q_fp8", "linear wo_b", "grouped_linear wo_a"} <= names


def test_every_launch_costs_something(costed: list[tuple[str, Launch, Cost]]) -> None:
    free = {name for name, _, cost in costed if cost.nbytes <= 0}
    assert not free


def test_tokens_of_one_sequence_share_what_they_read() -> None:
    alone = Seen(((1023,),))
    both = Seen(((1022, 1023),))
    apart = Seen(((1022,), (1023,)))
    kind = LayerKind.C128
    assert alone.rows(V4_FLASH, kind) == 128 + 8
    assert both.rows(V4_FLASH, kind) == 129 + 8
    assert apart.rows(V4_FLASH, kind) == 256 + 7 + 8
    assert both.keys(V4_FLASH, kind) == apart.keys(V4_FLASH, kind) == 256 + 7 + 8
    assert both.visible(4) == 255 + 256 and both.entries(4) == 256


def test_a_decode_row_of_the_scene_owns_its_pages(scene: Scene) -> None:
    batch = scene.decode_batch(BATCH, CONTEXT, CONTEXT - 1)
    assert len(batch.full_pages.unique()) == batch.full_pages.numel()
    assert len(batch.window_pages[:, -1].unique()) == BATCH


def test_folding_keeps_as_many_experts_as_fit() -> None:
    def wanted(folded: bool) -> Wanted:
        return Wanted("v4-flash", V4_FLASH, 43, folded, (1, 64), (1024, 65536), (8192,))

    assert 190 < experts_that_fit(wanted(True), 149 * 10**9) < 256
    assert experts_that_fit(wanted(True), 200 * 10**9) == 256
    with pytest.raises(DoesNotFitDevice, match="--experts folded"):
        experts_that_fit(wanted(False), 149 * 10**9)
    with pytest.raises(DoesNotFitDevice, match="fewer layers"):
        experts_that_fit(wanted(True), 30 * 10**9)
