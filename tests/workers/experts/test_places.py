"""What a GPU budget buys: never more than it says, and a refusal that names the smallest that works."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from workers.errors import BadConfig
from workers.experts.config import ExpertConfig
from workers.experts.host_memory import available_bytes, page_cache_bytes
from workers.experts.places import SHARED_BYTES, ExpertSizes, Places, plan_places

FLASH = 13_369_344
DECODE = ExpertSizes(43, 256, 6, FLASH, max_running=128, prefills=False)
PREFILL = ExpertSizes(43, 256, 6, FLASH, max_running=0, prefills=True)
BOTH = ExpertSizes(43, 256, 6, FLASH, max_running=4, prefills=True)
NANO = ExpertSizes(8, 12, 3, 52_224, max_running=2, prefills=True)
SHARED = ExpertSizes(43, 256, 6, FLASH, max_running=128, prefills=False, unit_bytes=SHARED_BYTES)
IN_PLACE = dataclasses.replace(DECODE, stages=False)


@pytest.mark.parametrize("sizes", [DECODE, PREFILL, BOTH, NANO, SHARED, IN_PLACE])
@pytest.mark.parametrize("experts", [6, 7, 20, 100, 1000, 5000, 9999, 11_007, 11_008, 20_000])
def test_places_of_a_budget_in_bytes_fit_it(sizes: ExpertSizes, experts: int) -> None:
    budget = sizes.slab_bytes(Places(experts)) + sizes.table_bytes + 17
    places = plan_places(ExpertConfig(hbm_bytes=budget), sizes)
    assert places.total * sizes.expert_bytes <= sizes.slab_bytes(places) <= budget - sizes.table_bytes
    assert sizes.top_k <= places.slots <= sizes.pairs
    assert (places.half > 0) <= sizes.prefills and (places.scratch > 0) <= (sizes.max_running > 0)
    if places.slots == sizes.pairs:
        assert places == Places(sizes.pairs)
    # Nothing worth an expert is left over, as long as experts are absent.
    elif sizes.prefills or places.total < sizes.pairs:
        left = budget - places.total * sizes.expert_bytes - sizes.table_bytes
        assert left < 2 * sizes.expert_bytes + sizes.unit_bytes


def test_prefill_of_a_large_budget_stages_whatever_a_layer_lacks() -> None:
    places = plan_places(ExpertConfig(hbm_bytes=110 * 10**9), PREFILL)
    absent_a_layer = 256 - places.slots // 43
    assert absent_a_layer <= places.half <= absent_a_layer + 2


@pytest.mark.parametrize("values", [{"hbm_bytes": 16 * 10**9}, {"slots": 900}])
def test_who_reads_absent_experts_in_place_has_slots_instead_of_scratch(values: dict[str, int]) -> None:
    staged, in_place = (plan_places(ExpertConfig(**values), sizes) for sizes in (DECODE, IN_PLACE))
    assert staged.scratch > 0 == in_place.scratch
    assert in_place.slots == (values.get("slots") or staged.total)


def test_total_budget_is_what_the_rest_leaves() -> None:
    config = ExpertConfig(total_gpu_bytes=24 * 10**9)
    places = plan_places(config, DECODE, spare_bytes=12 * 10**9)
    assert places == plan_places(ExpertConfig(hbm_bytes=12 * 10**9), DECODE)


@pytest.mark.parametrize("sizes", [DECODE, PREFILL, NANO, SHARED])
@pytest.mark.parametrize("taken", [0, 7 * 10**9])
def test_the_refusal_names_a_budget_that_works(sizes: ExpertSizes, taken: int) -> None:
    least = taken + sizes.table_bytes + sizes.slab_bytes(Places(sizes.top_k))
    for key in ("hbm_bytes", "total_gpu_bytes") if taken else ("hbm_bytes",):
        used = taken if key == "total_gpu_bytes" else 0
        named = least - taken + used
        with pytest.raises(BadConfig, match=f"at least {named} bytes"):
            plan_places(ExpertConfig(**{key: named - 1}), sizes, spare_bytes=named - 1 - used)
        assert plan_places(ExpertConfig(**{key: named}), sizes, spare_bytes=named - used).slots == sizes.top_k


def test_slots_below_one_tokens_choices_are_refused() -> None:
    with pytest.raises(BadConfig, match=r"experts\.slots.*at least 6 slots"):
        plan_places(ExpertConfig(slots=5), DECODE)
    assert plan_places(ExpertConfig(slots=6), DECODE).slots == 6
    assert plan_places(ExpertConfig(slots=20_000), DECODE) == Places(11_008)


def test_free_host_memory_is_what_machine_and_group_leave(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    group = tmp_path / "group"
    assert available_bytes(meminfo, group) == 3000 * 1024
    group.mkdir()
    for name, text in {"memory.max": "2048000", "memory.current": "1024000", "memory.stat": "anon 5\n"}.items():
        (group / name).write_text(text + "\n")
    assert available_bytes(meminfo, group) == 1024000
    (group / "memory.stat").write_text("anon 5\ninactive_file 1000\nactive_file 24\n")
    assert available_bytes(meminfo, group) == 1025024
    (group / "memory.max").write_text("max\n")
    assert available_bytes(meminfo, group) == 3000 * 1024
    # A machine that grows: 4,096,000 bytes now, 8,192,000 if it wants them.
    (group / "memory.max").write_text("8192000\n")
    assert available_bytes(meminfo, group) == 8192000 - 1024000 + 1024
    (group / "memory.max").write_text(f"{2**63 - 4096}\n")
    assert available_bytes(meminfo, group) == 3000 * 1024


def test_page_cache_is_the_groups_without_shared_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 4000 kB\nCached: 900 kB\nSwapCached: 7 kB\nShmem: 100 kB\n")
    assert page_cache_bytes(meminfo, tmp_path) == 800 * 1024
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.stat").write_text("cache 5\nshmem 1\ntotal_cache 5000\ntotal_shmem 1000\n")
    assert page_cache_bytes(meminfo, tmp_path) == 4000
    (tmp_path / "memory.stat").write_text("anon 5\nfile 700\nfile_mapped 3\nshmem 200\n")
    assert page_cache_bytes(meminfo, tmp_path) == 500
