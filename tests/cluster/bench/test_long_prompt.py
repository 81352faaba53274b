"""The long prompt in small, on the CPU: prefill does nothing, decode is torch's operations over made-up KV."""

from __future__ import annotations

import pytest

from cluster.bench.long_prompt import long_prompt
from cluster.bench.scene import Scene, Wanted
from tests.cluster.bench.test_costs import idle_kernels
from tests.workers.gpu.stand_ins import stand_ins
from workers.model.presets import NANO

TOKENS, CHUNK = 768, 256


@pytest.fixture
def scene() -> Scene:
    wanted = Wanted("nano", NANO, 4, False, (1,), (256,), (CHUNK,), long_prompt=TOKENS)
    return Scene(wanted, NANO.n_routed_experts, device="cpu", kernels=(stand_ins, idle_kernels))


def test_decode_goes_on_from_what_was_handed_over(scene: Scene) -> None:
    said: list[str] = []
    found = long_prompt(scene, TOKENS, CHUNK, said.append, new_tokens=1)
    assert found.same_logits and (found.tokens, found.new_tokens) == (TOKENS, 1)
    assert found.handoff_bytes == scene.pools.spec.image_bytes(TOKENS)
    assert len(said) == TOKENS // CHUNK + 1


def test_a_hand_off_that_brings_nothing_is_seen(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scene.pools, "load_cpu_copy", lambda image, indices: None)
    assert not long_prompt(scene, TOKENS, CHUNK, lambda line: None, new_tokens=1).same_logits


def test_the_prompt_ends_with_a_page(scene: Scene) -> None:
    with pytest.raises(ValueError, match="pages of 256"):
        long_prompt(scene, TOKENS - 1, CHUNK, lambda line: None)
