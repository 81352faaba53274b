"""Another process's slab, read in place by captured kernels: the same bits while it comes, dies and comes again."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from workers.engine import Engine
from workers.errors import DeviceLost
from workers.experts.peer_link import PeerLink, offer_slab
from workers.experts.share import Share
from workers.gpu.device_memory import DriverRefused, tensor_at
from workers.gpu.peer_slab import PeerWindow, SharedSlab

PLACES, BYTES = 48, 1 << 20
HOST, PEER = 1 << 24, 2 << 24
CONTEXT = multiprocessing.get_context("spawn")


def content(pair: int) -> Tensor:
    """An expert's bytes."""
    return torch.randint(0, 256, (BYTES,), generator=torch.Generator().manual_seed(pair), dtype=torch.uint8)


def owner(folder: str, pairs: list[int], ready: multiprocessing.connection.Connection) -> None:
    """Another worker, until it is killed."""
    slab = SharedSlab(len(pairs) * BYTES, "cuda:0")
    for place, pair in enumerate(pairs):
        slab.memory[place * BYTES : (place + 1) * BYTES].copy_(content(pair))
    torch.cuda.synchronize()
    share = Share(Path(folder), "prefill-0")
    offer_slab(share, slab, pairs, key="m", expert_bytes=BYTES)
    ready.send(True)
    time.sleep(120)


class Reader:
    """A table over host memory and the window, and a captured step that sums every expert where the table says."""

    def __init__(self) -> None:
        self.window = PeerWindow("cuda:0")
        self.host = torch.stack([content(pair) for pair in range(PLACES)]).pin_memory()
        self.homes = torch.arange(PLACES, dtype=torch.int32) | HOST
        self.table = self.homes.cuda()
        self.sums = torch.zeros(PLACES, dtype=torch.int64, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        self.engine = threading.Lock()
        self._step()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self._step()

    def _step(self) -> None:
        from tests.workers.gpu.tier_sums import sum_experts

        sum_experts(self.table, self.host.view(-1), self.window.memory, self.sums, BYTES)

    def step(self) -> list[int]:
        with self.engine:
            self.sums.zero_()
            self.graph.replay()
            found: list[int] = self.sums.tolist()
            return found

    def call(self, command: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        with self.engine:
            try:
                command()
                future.set_result(None)
            except Exception as exc:
                future.set_exception(exc)
        return future

    def peer_came(self, pairs: npt.NDArray[np.int64]) -> None:
        codes = self.homes.clone()
        codes[torch.from_numpy(pairs)] = torch.arange(len(pairs), dtype=torch.int32) | PEER
        self.table.copy_(codes)

    def peer_left(self) -> None:
        self.table.copy_(self.homes)
        torch.cuda.synchronize()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dsv4-") as name:
        yield Path(name)


def start_owner(folder: Path, pairs: list[int]) -> multiprocessing.process.BaseProcess:
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=owner, args=(str(folder), pairs, there), daemon=True)
    process.start()
    assert here.poll(60) and here.recv()
    return process


@pytest.mark.gpu
def test_captured_steps_read_a_peer_that_comes_dies_and_comes_again(folder: Path) -> None:
    reader, share = Reader(), Share(folder, "decode-0")
    expected = [int(content(pair).sum()) for pair in range(PLACES)]
    assert reader.step() == expected
    link = PeerLink(share, "prefill-0", reader.window, reader, reader.call, key="m", expert_bytes=BYTES)
    link.start()
    for turn, pairs in enumerate(([5, 3, 40, 21], list(range(PLACES - 1, 0, -2)))):
        process = start_owner(folder, pairs)
        assert link.is_met.wait(20)
        codes = reader.table.tolist()
        assert [codes[pair] for pair in pairs] == [PEER | place for place in range(len(pairs))]
        assert reader.step() == expected
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        # Steps go on while nobody has noticed yet.
        limit = time.monotonic() + 20
        while link.num_partings == turn or link.is_met.is_set():
            assert reader.step() == expected and time.monotonic() < limit
        with reader.engine:
            assert not reader.window.is_open and int(reader.table.max()) < PEER
        process.join()
        assert reader.step() == expected
    link.close()
    share.close()
    reader.window.close()


@pytest.mark.gpu
def test_a_window_is_read_only_memory_of_its_own_device() -> None:
    slab, window = SharedSlab(3 * BYTES, "cuda:0"), PeerWindow("cuda:0")
    start = window.memory.data_ptr()
    slab.memory.copy_(content(1).repeat(3))
    fd = slab.export()
    window.open(fd, slab.block_bytes)
    os.close(fd)
    assert window.memory.device == slab.memory.device and window.memory.data_ptr() == start
    assert torch.equal(window.memory[BYTES : 2 * BYTES].clone().cpu(), content(1))
    slab.close()
    assert torch.equal(window.memory[2 * BYTES : 3 * BYTES].cpu(), content(1)), "a reader keeps the bytes"
    window.shut()
    with open(os.devnull) as other, pytest.raises(DriverRefused, match="cuMemImport"):
        window.open(other.fileno(), BYTES)
    assert not window.is_open
    window.close()


@pytest.mark.gpu
def test_more_memory_than_the_device_has_is_refused() -> None:
    with pytest.raises(DriverRefused, match="cuMemCreate.*OUT_OF_MEMORY"):
        SharedSlab(1 << 42, "cuda:0")


def read_nowhere(told: multiprocessing.connection.Connection) -> None:
    """A kernel reads a window that is shut; then the engine looks at the device."""
    from tests.workers.gpu.tier_sums import sum_experts

    device, window = torch.device("cuda", 0), PeerWindow("cuda:0")
    table = torch.tensor([PEER | (1 << 12)], dtype=torch.int32, device=device)
    sums = torch.zeros(1, dtype=torch.int64, device=device)
    engine = cast(Engine, SimpleNamespace(pools=SimpleNamespace(device=device)))
    Engine.check_device(engine)
    sum_experts(table, window.memory, window.memory, sums, BYTES)
    try:
        Engine.check_device(engine)
    except DeviceLost as lost:
        told.send(str(lost))
    told.send("the device answers")
    os._exit(0)


@pytest.mark.gpu
def test_a_read_of_memory_that_is_gone_ends_the_worker() -> None:
    here, there = CONTEXT.Pipe()
    process = CONTEXT.Process(target=read_nowhere, args=(there,), daemon=True)
    process.start()
    assert here.poll(60)
    assert "illegal memory access" in here.recv()
    process.join()


def test_a_tensor_over_an_address_is_an_ordinary_one() -> None:
    source = torch.arange(100, dtype=torch.uint8)
    view = tensor_at(source.data_ptr() + 10, 20, "cpu")
    assert view.tolist() == list(range(10, 30)) and view.device == source.device
    view[0] = 99
    assert source[10] == 99
