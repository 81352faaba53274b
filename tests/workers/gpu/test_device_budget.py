"""A total that a worker must not exceed: what experts get of it, and what happens when the rest took too much."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.errors import BadConfig
from workers.gpu.device_budget import CONTEXT_BYTES, LATER_BYTES, DeviceBudget

WHOLE = 140 << 30


class Driver:
    """A GPU with `free` bytes that only tests change."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free, self.reserved, self.fraction = WHOLE - (7 << 30), 0, 1.0
        calls = {
            "current_device": lambda: 0,
            "synchronize": lambda device: None,
            "mem_get_info": lambda device: (self.free, WHOLE),
            "memory_reserved": lambda device: self.reserved,
            "get_device_properties": lambda device: SimpleNamespace(total_memory=WHOLE),
            "set_per_process_memory_fraction": lambda fraction, device: setattr(self, "fraction", fraction),
        }
        for name, call in calls.items():
            monkeypatch.setattr(torch.cuda, name, call)

    def take(self, num_bytes: int, *, by_torch: bool = True) -> None:
        self.free -= num_bytes
        self.reserved += num_bytes * by_torch


def test_experts_get_what_is_left_and_torch_cannot_pass_the_total(monkeypatch: pytest.MonkeyPatch) -> None:
    driver, total = Driver(monkeypatch), 24 << 30
    budget = DeviceBudget("cuda", total)
    driver.take(9 << 30)
    driver.take(1 << 20, by_torch=False)
    spare = budget.spare_bytes()
    assert spare == total - CONTEXT_BYTES - LATER_BYTES - (9 << 30) - (1 << 20)
    driver.take(spare)
    driver.take(300 << 20, by_torch=False)
    budget.seal()
    allowed = driver.fraction * WHOLE
    # What the driver took counts against torch's share.
    assert abs(CONTEXT_BYTES + (301 << 20) + allowed - total) < 1024


def test_a_total_that_is_exceeded_already_is_refused_with_what_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    budget = DeviceBudget("cuda:0", 10 << 30)
    driver.take(11 << 30)
    assert budget.spare_bytes() < 0
    with pytest.raises(BadConfig, match=rf"total_gpu.*at least {(11 << 30) + CONTEXT_BYTES} bytes"):
        budget.seal()


def test_memory_that_others_give_back_is_not_ours_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    budget = DeviceBudget("cuda", 10 << 30)
    driver.free += 5 << 30
    assert budget.used_bytes() == CONTEXT_BYTES
