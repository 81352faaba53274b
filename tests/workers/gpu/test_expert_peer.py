"""Two workers that hold what the other lacks: the same bits with a peer, after its end, and with its successor.

Slabs lie in host memory here; `test_peer_slab.py` has those of a GPU.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.triton_interpreter import allow_loaded_bounds
from tests.workers.gpu.test_serving_experts import BOTH, BYTES, CONFIG, PAIRS, Run, limited
from workers.checkpoint.save import save_official
from workers.experts.config import PeerPlace
from workers.experts.layout import TIER_SHIFT, Tier
from workers.gpu import expert_peer
from workers.gpu.serving_experts import GpuExperts
from workers.model.weights import random_named_weights

allow_loaded_bounds()

POISON = 0x77
STEPS = 9
SLOTS = {"prefill-0": PAIRS - 4, "decode-0": 8}
PLACES = {"prefill-0": PeerPlace("decode-0", 0, is_even=False), "decode-0": PeerPlace("prefill-0", 1, is_even=False)}


class HostSlab:
    """`SharedSlab` in memory that a descriptor names."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.block_bytes = num_bytes
        self._fd = os.memfd_create("slab")
        os.ftruncate(self._fd, num_bytes)
        self.memory = torch.frombuffer(mmap.mmap(self._fd, num_bytes), dtype=torch.uint8)

    def export(self) -> int:
        return os.dup(self._fd)

    def close(self) -> None:
        os.close(self._fd)


class HostWindow:
    """`PeerWindow`; whoever reads it while it is shut finds poison."""

    own_bytes = 0

    def __init__(self, device: torch.device) -> None:
        self.memory = torch.full((2 * PAIRS * BYTES,), POISON, dtype=torch.uint8)

    def open(self, fd: int, block_bytes: int) -> None:
        self.memory[:block_bytes] = torch.frombuffer(bytearray(os.pread(fd, block_bytes, 0)), dtype=torch.uint8)

    def shut(self) -> None:
        self.memory.fill_(POISON)

    def close(self) -> None:
        self.shut()


@pytest.fixture(autouse=True)
def host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_peer, "SharedSlab", HostSlab)
    monkeypatch.setattr(expert_peer, "PeerWindow", HostWindow)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m"
    save_official(path, CONFIG, random_named_weights(CONFIG, seed=4, mtp=False))
    return path


@pytest.fixture
def share() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="dsv4-") as name:
        yield name


class Worker:
    """One worker's experts, and an engine thread's stand-in."""

    def __init__(self, model: Path, share: str, name: str) -> None:
        settings = {"slots": SLOTS[name], "worker": name, "share": share, "peer": PLACES[name]}
        self.bundle = limited(model, host_bytes=PAIRS * BYTES, **settings)
        assert self.bundle.supply is not None
        device = torch.device("cpu")
        self.experts = GpuExperts(CONFIG, self.bundle.supply, BOTH, device, num_readers=2, key=self.bundle.model_hash)
        self.experts.open()
        self.engine = threading.Lock()
        self.experts.start_sharing(self.call)

    def call(self, command: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        with self.engine:
            command()
        future.set_result(None)
        return future

    def logits(self) -> torch.Tensor:
        with self.engine:
            return Run(self.bundle, self.experts).logits(STEPS)

    def tiers(self) -> set[int]:
        with self.engine:
            return set((self.experts.cache.slots.codes >> TIER_SHIFT).tolist())

    def until(self, *tiers: Tier) -> None:
        """Waits until experts are in just these."""
        limit = time.monotonic() + 20
        while self.tiers() != set(tiers):
            assert time.monotonic() < limit, self.tiers()
            time.sleep(0.02)


def test_bits_are_the_same_with_a_peer_without_it_and_with_its_successor(model: Path, share: str) -> None:
    whole = limited(model, slots=PAIRS)
    assert whole.supply is not None
    resident = GpuExperts(CONFIG, whole.supply, BOTH, torch.device("cpu"), num_readers=2)
    resident.open()
    expected = Run(whole, resident).logits(STEPS)

    with ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(lambda name: Worker(model, share, name), SLOTS)
    banks = [worker.experts.bank_bytes for worker in (prefill, decode)]
    assert sorted(banks) == [0, PAIRS * BYTES], "one bank on the host, counted once"
    for worker in (prefill, decode):
        worker.until(Tier.SLAB, Tier.PEER)
        assert torch.equal(worker.logits(), expected)
        assert worker is prefill or worker.experts.cache.counters.peer_misses > 0
        worker.experts.check_integrity()
    residents = prefill.experts.cache.slots.residents()
    assert len(residents) == SLOTS["prefill-0"], "what it promised fills its slots"
    slots = prefill.experts.stats_fields()["expert_slots"]
    assert slots == {"used": len(residents), "free": 0, "peer": PAIRS - len(residents)}
    lacking = np.setdiff1d(np.arange(PAIRS), residents)
    assert set(lacking) <= set(decode.experts.cache.slots.residents().tolist())

    prefill.experts.close()
    decode.until(Tier.SLAB, Tier.HOST)
    assert torch.equal(decode.logits(), expected)

    again = Worker(model, share, "prefill-0")
    assert not again.experts.bank_bytes, "the survivor's bank is still there"
    for worker in (again, decode):
        worker.until(Tier.SLAB, Tier.PEER)
        assert torch.equal(worker.logits(), expected)
    for worker in (decode, again):
        worker.experts.close()


def test_a_worker_that_holds_everything_serves_the_other(
    model: Path, share: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SLOTS, "prefill-0", PAIRS)
    with ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(lambda name: Worker(model, share, name), SLOTS)
    assert prefill.tiers() == {Tier.SLAB}
    decode.until(Tier.PEER)
    assert decode.experts.cache.slots.num_free == SLOTS["decode-0"], "nothing is promised to who lacks nothing"
    assert torch.equal(prefill.logits(), decode.logits())
    for worker in (prefill, decode):
        worker.experts.close()


def test_a_peer_that_never_turns_up_costs_nothing_but_the_wait(
    model: Path, share: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(expert_peer, "PEER_WAIT_S", 0.1)
    worker = Worker(model, share, "decode-0")
    assert "prefill-0 has not turned up" in caplog.text
    assert worker.tiers() == {Tier.SLAB, Tier.HOST} or worker.tiers() == {Tier.HOST}
    assert worker.experts.cache.slots.num_free == SLOTS["decode-0"], "nothing is promised"
    worker.experts.close()


def test_memory_of_a_dead_peer_is_kept_for_experts_that_have_no_other_home(
    model: Path, share: str, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(lambda name: Worker(model, share, name), SLOTS)
    decode.until(Tier.SLAB, Tier.PEER)
    expected = decode.logits()
    with decode.engine:
        # Our own fault, of a kind that planning rules out: a pair that only the other slab holds.
        memory = decode.experts._memory
        assert memory is not None and memory.bank is not None
        codes = decode.experts.cache.slots.codes
        memory.bank.place[np.flatnonzero(codes >> TIER_SHIFT == Tier.PEER)[0]] = -1
    prefill.experts.close()
    limit = time.monotonic() + 20
    while "its memory is kept" not in caplog.text:
        assert time.monotonic() < limit
        time.sleep(0.02)
    assert decode.tiers() == {Tier.SLAB, Tier.PEER}
    assert torch.equal(decode.logits(), expected)
    decode.experts.close()


def test_a_stranger_in_the_folder_is_refused(model: Path, share: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another model under the peer's name: its experts are never read."""
    other = model.parent / "other"
    if not other.exists():
        save_official(other, CONFIG, random_named_weights(dataclasses.replace(CONFIG), seed=5, mtp=False))
    with ThreadPoolExecutor(2) as pool:
        stranger, decode = pool.map(
            lambda item: Worker(item[0], share, item[1]), ((other, "prefill-0"), (model, "decode-0"))
        )
    time.sleep(0.7)
    assert Tier.PEER not in decode.tiers() | stranger.tiers()
    for worker in (stranger, decode):
        worker.experts.close()
