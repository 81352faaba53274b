"""The numba path equals the paged reference, and its rows are bitwise independent of batch, chunking and threads."""

from __future__ import annotations

import pytest
import torch

from tests.support.paged import PagedRun, chunk_sizes, relative_error
from tests.support.tiny import random_tokens, tiny_config, tiny_pro_config
from workers.cpu.model import CpuModel, unsupported_reason
from workers.model.config import ModelConfig
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.transformer import ReferenceTransformer, Transformer
from workers.model.weights import ModelWeights, random_named_weights

FLASH = tiny_config(index_topk=16, index_n_heads=16)
PRO = tiny_pro_config()
ODD = tiny_config(
    (0, 4, 128), hidden_size=72, num_attention_heads=2, q_lora_rank=40, o_lora_rank=24, index_n_heads=1, index_topk=8
)
"""Sizes that are multiples of no vector, and one index head."""

FP32, NATIVE = Precision.fp32(), Precision.native()


def _run(
    config: ModelConfig,
    prompts: list[list[int]],
    precision: Precision,
    *,
    reference: bool = False,
    seed: int = 0,
    threads: int = 1,
    bf16_weights: bool = False,
) -> PagedRun:
    named = random_named_weights(config, seed=3)
    if bf16_weights:
        named = {n: v.bfloat16().float() if v.is_floating_point() and ".hc_" not in n else v for n, v in named.items()}

    def make(*args: object) -> object:
        return ReferenceTransformer(*args) if reference else CpuModel(*args, num_threads=threads)

    return PagedRun(make, config, ModelWeights.from_named(config, named), precision, prompts, seed)


def _tokens(config: ModelConfig, count: int, seed: int = 5) -> list[int]:
    return random_tokens(config, count, seed)[0].tolist()


@pytest.mark.parametrize("config", [FLASH, PRO, ODD, NANO], ids=["flash", "pro", "odd", "nano"])
def test_fp32_logits_equal_the_reference(config: ModelConfig) -> None:
    tokens = _tokens(config, 300)
    expected = _run(config, [tokens], FP32, reference=True).step({0: 300})
    for sizes in ([300], [127, 1, 3, 64]):
        found = _run(config, [tokens], FP32, seed=1).chunks(0, chunk_sizes(300, sizes))
        assert relative_error(found, expected) <= 1e-4


def test_fp32_long_context_equals_the_reference() -> None:
    """More than top-k x 4 tokens and several C128 entries, bf16-exact weights. The seed has no two index scores at the
    edge of the top-k that are closer than fp32 rounding (one token of seed 5 has)."""
    tokens = _tokens(NANO, 1100, seed=6)
    expected = _run(NANO, [tokens], FP32, reference=True, bf16_weights=True).step({0: 1100})
    found = _run(NANO, [tokens], FP32, bf16_weights=True).chunks(0, [600, 500])
    assert relative_error(found, expected) <= 1e-4


def test_quantised_activations_equal_the_reference_until_a_rounding_flips() -> None:
    """Every linear's input passes e4m3, so a last-bit difference can flip a code and grow to percents on random
    weights. About one first token in three has such a flip; the others agree to fp32 rounding."""
    precision = Precision(kv_fp8=False, indexer="fp32", act_fp8=True)
    reference, ours = (_run(NANO, [_tokens(NANO, 1)], precision, reference=which) for which in (True, False))
    errors = []
    for token in range(100, 109):
        for run in (reference, ours):
            run.prompts, run.tables[0].num_tokens = [[token]], 0
        errors.append(relative_error(ours.step({0: 1}), reference.step({0: 1})))
    assert sorted(errors)[4] <= 1e-5
    assert max(errors) <= 0.5


def test_stored_fp8_equals_the_reference() -> None:
    """Without activation rounding a flip only moves one stored value by one e4m3 step. On random weights even that can
    change a router's choice, on some processors and not on others: most token sequences must be free of it."""
    precision = Precision(kv_fp8=True, indexer="fp8", act_fp8=False)
    errors = []
    for seed in range(1, 6):
        tokens = _tokens(NANO, 64, seed=seed)
        expected = _run(NANO, [tokens], precision, reference=True).step({0: 64})
        errors.append(relative_error(_run(NANO, [tokens], precision).step({0: 64}), expected))
    assert sorted(errors)[2] <= 0.02
    assert max(errors) <= 0.5


def test_decode_is_bitwise_the_prefill() -> None:
    tokens = _tokens(NANO, 140)
    whole = _run(NANO, [tokens], NATIVE).step({0: 140})
    assert torch.equal(_run(NANO, [tokens], NATIVE, seed=1).chunks(0, [1] * 140), whole)
    assert torch.equal(_run(NANO, [tokens], NATIVE, seed=2).chunks(0, chunk_sizes(140, [3, 65, 7])), whole)


def test_pool_bytes_do_not_depend_on_chunking() -> None:
    tokens = _tokens(FLASH, 270)
    one, many = _run(FLASH, [tokens], NATIVE), _run(FLASH, [tokens], NATIVE)
    one.step({0: 270})
    many.chunks(0, chunk_sizes(270, [130, 1, 9]))
    for a, b in zip(one.pools.pools, many.pools.pools, strict=True):
        live = a.locations(a.spec.live_rows(270), one.tables[0])
        assert torch.equal(a.gather(live), b.gather(live)), a.spec.name


def test_a_row_of_a_batch_is_bitwise_the_batch_of_one() -> None:
    lengths = [300, 5, 130, 64, 3, 290, 129, 17]
    prompts = [_tokens(NANO, length, seed=b) for b, length in enumerate(lengths)]
    together = _run(NANO, prompts, NATIVE)
    together.step({b: length - 2 for b, length in enumerate(lengths)})
    rows = [together.step(dict.fromkeys(range(8), 1)) for _ in range(2)]
    for b, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        alone = _run(NANO, [prompt], NATIVE, seed=9)
        alone.step({0: length - 2})
        for row in rows:
            assert torch.equal(alone.step({0: 1})[0], row[b])


def test_threads_do_not_change_a_bit() -> None:
    prompts = [_tokens(NANO, 300, seed=1), _tokens(NANO, 150, seed=2)]
    one = _run(NANO, prompts, NATIVE, threads=1).step({0: 300, 1: 150})
    three = _run(NANO, prompts, NATIVE, threads=3).step({0: 300, 1: 150})
    assert torch.equal(one, three)


def test_weights_are_packed_to_two_bytes_when_exact() -> None:
    wide = _run(NANO, [[1]], NATIVE).model.packed.nbytes
    assert _run(NANO, [[1]], NATIVE, bf16_weights=True).model.packed.nbytes < 0.6 * wide


def test_last_logits_are_the_rows_of_all_logits() -> None:
    prompts = [_tokens(FLASH, 9, seed=1), _tokens(FLASH, 4, seed=2)]
    every = _run(FLASH, prompts, FP32).step({0: 9, 1: 4})
    assert torch.equal(_run(FLASH, prompts, FP32).step({0: 9, 1: 4}, logits_for="last"), every[[8, 12]])


def test_transformer_takes_the_cpu_path_and_can_be_told_not_to() -> None:
    run = _run(FLASH, [[1]], NATIVE)
    weights = ModelWeights.from_named(FLASH, random_named_weights(FLASH, seed=3))
    assert Transformer(FLASH, weights, NATIVE, run.pools).backend == "cpu"
    assert Transformer(FLASH, weights, NATIVE, run.pools, backend="reference").backend == "reference"


def test_models_without_kernels_are_named() -> None:
    run = _run(FLASH, [[1]], NATIVE)
    assert unsupported_reason(FLASH, NATIVE, run.pools) is None
    assert "hc_mult" in (unsupported_reason(tiny_config(hc_mult=2), NATIVE, run.pools) or "")
    assert "fp4" in (unsupported_reason(FLASH, Precision(True, "fp4", True), run.pools) or "")


def test_addresses_outside_the_pools_are_refused_before_any_kernel_runs() -> None:
    run = _run(FLASH, [_tokens(FLASH, 600)], NATIVE)
    run.step({0: 500}, "last")
    tables = run.tables[0]
    pages = tables.window_pages
    tables.window_pages = (pages[0], None, pages[2])
    with pytest.raises(ValueError, match="window"):
        run.step({0: 1})
    tables.window_pages = (None, *pages[1:])
    run.step({0: 1})
    tables.full_pages = (*tables.full_pages[:2], 99)
    with pytest.raises(ValueError, match="full"):
        run.step({0: 20})
    run.prompts[0][501] = FLASH.vocab_size
    with pytest.raises(ValueError, match="token ids"):
        run.step({0: 1})
    run.prompts[0][501], tables.slot = 0, 77
    with pytest.raises(ValueError, match="slots"):
        run.step({0: 1})
