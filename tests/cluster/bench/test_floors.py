"""The floors of V4-Flash are those of its published shapes."""

from __future__ import annotations

import pytest

from cluster.bench import floors
from workers.model.presets import NANO, V4_FLASH, V4_PRO


def test_a_decode_token_of_flash_reads_11_22_gb() -> None:
    assert floors.decode_bytes(V4_FLASH, 1, 0) == pytest.approx(11_217_580_252, rel=1e-5)


@pytest.mark.parametrize(("batch", "gigabytes"), [(2, 14.59), (16, 54.24), (64, 122.68), (256, 154.60)])
def test_a_batch_reads_each_distinct_expert_once(batch: int, gigabytes: float) -> None:
    assert floors.decode_bytes(V4_FLASH, batch, 0) / 1e9 == pytest.approx(gigabytes, abs=0.006)


def test_a_decode_token_of_pro_reads_39_67_gb() -> None:
    assert floors.decode_bytes(V4_PRO, 1, 0) / 1e9 == pytest.approx(39.67, abs=0.01)


@pytest.mark.parametrize(("tokens", "megabytes"), [(4096, 12.7), (1 << 20, 830)])
def test_kv_of_one_token_grows_with_the_context(tokens: int, megabytes: float) -> None:
    assert floors.kv_bytes(V4_FLASH, tokens) / 1e6 == pytest.approx(megabytes, rel=0.06)


def test_operations_of_flash() -> None:
    assert floors.token_flops(V4_FLASH) / 1e9 == pytest.approx(25.49, abs=0.02)  # less the mixing of streams
    assert (floors.token_flops(V4_FLASH) + floors.head_flops(V4_FLASH)) / 1e9 == pytest.approx(26.55, abs=0.02)
    assert floors.context_flops(V4_FLASH, 4096) / 1e9 == pytest.approx(2.57, abs=0.01)
    assert floors.context_flops(V4_FLASH, 1 << 20) / 1e9 == pytest.approx(114.5, abs=0.2)


def test_a_prompt_costs_more_per_token_when_it_is_longer() -> None:
    assert floors.prompt_flops(V4_FLASH, 0, 4096) / 4096 / 1e9 == pytest.approx(27.5, abs=0.2)
    assert floors.prompt_flops(V4_FLASH, 0, 32768) / 32768 / 1e9 == pytest.approx(29.3, abs=0.3)


def test_rows_of_nano_and_flash() -> None:
    assert floors.kv_row_bytes(V4_FLASH) == 584
    assert floors.kv_row_bytes(NANO) == 64 + 128 + 8


def test_the_floor_is_the_slower_of_bytes_and_operations() -> None:
    rates = floors.Rates(4000.0, 800.0, 1600.0)
    assert rates.floor_ms(4e9, 1.0) == pytest.approx(1.0)
    assert rates.floor_ms(1.0, 800e9) == pytest.approx(1.0)
    assert rates.floor_ms(1.0, 400e9, 800e9) == pytest.approx(1.0)
    assert floors.Rates(4000.0, 800.0).floor_ms(1.0, 0.0, 800e9) == pytest.approx(1.0)
