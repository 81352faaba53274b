"""Which models run on the Triton path, and what the log says of the others."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kvstore.pools.aggregate import KVPools, PoolSizes
from tests.workers.gpu.models import NATIVE, TINY, stored_weights
from workers import ops
from workers.errors import InexactWeights
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.presets import PRESETS
from workers.model.transformer import Transformer
from workers.model.weights import ModelWeights, random_named_weights


def _pools() -> KVPools:
    return KVPools(kv_spec(TINY, "fp8"), PoolSizes(4, 4, 2))


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_native_presets_have_kernels(name: str) -> None:
    assert ops.no_triton_reason(PRESETS[name], NATIVE) is None


@pytest.mark.parametrize(
    ("config", "precision", "word"),
    [
        (TINY, Precision.fp32(), "native"),
        (TINY, Precision(True, "fp4", True), "native"),
        (dataclasses.replace(TINY, hidden_size=192), NATIVE, "hidden_size"),
        (dataclasses.replace(TINY, hc_mult=2), NATIVE, "hc_mult"),
        (dataclasses.replace(TINY, expert_dtype="fp8"), NATIVE, "FP8"),
    ],
)
def test_other_models_are_named_with_their_reason(config: object, precision: Precision, word: str) -> None:
    assert word in (ops.no_triton_reason(config, precision) or "")  # type: ignore[arg-type]


def test_cpu_pools_never_take_the_triton_path() -> None:
    assert ops.choose_backend(TINY, NATIVE, _pools())[0] != "triton"


def test_a_forced_path_drives_decode_ahead_and_wants_batches_on_the_host() -> None:
    model = Transformer(TINY, stored_weights(TINY), NATIVE, _pools(), backend="triton", max_context=512)
    assert model.backend == "triton" and model.ahead is not None and model.batch_device == torch.device("cpu")
    assert model.ahead.num_pages == 2
    reference = Transformer(TINY, stored_weights(TINY), NATIVE, _pools(), backend="reference")
    assert reference.ahead is None


def test_weights_that_would_have_to_be_rounded_are_refused_by_a_forced_path() -> None:
    weights = ModelWeights.from_named(TINY, random_named_weights(TINY, seed=1, mtp=False))
    with pytest.raises(InexactWeights):
        Transformer(TINY, weights, NATIVE, _pools(), backend="triton")
