"""Random life over allocators, slots and tiers: six requests, three tiers, faults, and a full check after every step.

A request is absent, running (it owns pages and a slot) or parked (the cascade owns its image). The model in the test
says which; after each operation the allocators must be owned exactly by the running ones, the cascade must hold exactly
the parked ones, and host and disk must be within their budgets. An image that comes back must have the bytes of its
last retract.
"""

from __future__ import annotations

import errno
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from kvstore.allocator import KVAllocators
from kvstore.image import KVImage
from kvstore.sequence_kv import SequenceKV, check_ownership
from kvstore.tiers.base import ImageKey, planned_header
from kvstore.tiers.cascade import Cascade
from kvstore.tiers.disk import DiskTier
from kvstore.tiers.host import HostTier
from kvstore.tiers.placement import Place, Refusal
from tests.kvstore.tiers.parts import TINY, FaultyFiles, StepExecutor, key
from tests.kvstore.tiers.test_cascade import PeerTier

NAMES = [key(name) for name in "abcdef"]
MAX_TOKENS = 700
HOST_BYTES, DISK_BYTES = 26_000, 45_000
OPERATIONS = {
    "admit": 6,
    "grow": 2,
    "retract": 8,
    "filled": 8,
    "want": 2,
    "unwant": 0.5,
    "resume": 3,
    "lend": 0.7,
    "take_back": 2,
    "abort": 1,
    "write": 8,
    "read": 8,
    "poll": 8,
    "tick": 3,
    "fail": 0.1,
    "damage": 0.2,
}


class LimitedPeer(PeerTier):
    """Takes one image at a time."""

    def put(self, key: ImageKey, image: KVImage):  # noqa: ANN201
        self.takes = not self.held
        return super().put(key, image)


class World:
    """The system under test and the model of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.allocators = KVAllocators.of_sizes(full_pages=9, window_pages=6, slots=4)
        self.writer, self.reader, self.files = StepExecutor(), StepExecutor(), FaultyFiles()
        self.folder = folder
        self.disk = DiskTier(
            folder,
            "w0",
            spec=TINY,
            budget_bytes=DISK_BYTES,
            sync=False,
            direct_io=False,
            ops=self.files,
            writer=self.writer,
            reader=self.reader,
        )
        self.now = 0.0
        self.host = HostTier(HOST_BYTES, pinned=False)
        lower = [self.disk, LimitedPeer()]
        self.cascade = Cascade(self.host, lower, high=0.9, low=0.5, retry_after_s=3, clock=lambda: self.now)
        self.running: dict[ImageKey, SequenceKV] = {}
        self.filling: dict[ImageKey, tuple[SequenceKV, KVImage]] = {}
        self.parked: dict[ImageKey, tuple[int, torch.Tensor]] = {}
        self.seen: Counter[str] = Counter()
        source = torch.Generator().manual_seed(seed)
        self.noise = torch.randint(0, 256, (1 << 16,), dtype=torch.uint8, generator=source)

    def pick(self, names: object) -> ImageKey | None:
        candidates = sorted(names)  # type: ignore[call-overload]
        return self.rng.choice(candidates) if candidates else None

    def opened(self, num_tokens: int) -> SequenceKV | None:
        sequence = SequenceKV.open(self.allocators, window_tokens=128)
        if sequence is not None and not sequence.grow_to(num_tokens, window_from=max(0, num_tokens - 128)):
            sequence.free()
            return None
        return sequence

    def admit(self) -> None:
        name = self.pick(set(NAMES) - set(self.running) - set(self.filling) - set(self.parked))
        sequence = self.opened(self.rng.randrange(1, MAX_TOKENS)) if name else None
        if name and sequence:
            self.running[name] = sequence

    def grow(self) -> None:
        name = self.pick(self.running)
        if name:
            sequence = self.running[name]
            sequence.grow_to(min(MAX_TOKENS, sequence.num_tokens + self.rng.randrange(200)))
            sequence.reclaim_window(sequence.num_tokens)

    def retract(self) -> None:
        name = self.pick(set(self.running) - set(self.filling))
        if not name:
            return
        sequence = self.running[name]
        header = planned_header(TINY, sequence.num_tokens, request_id=name, segment_bytes=2000)
        image = self.cascade.reserve(name, header)
        if isinstance(image, Refusal):
            self.seen[f"refused {image.cause.value}"] += 1
            if not image.retry:
                self.running.pop(name).free()  # recompute elsewhere
            return
        self.filling[name] = (self.running.pop(name), image)

    def filled(self) -> None:
        name = self.pick(self.filling)
        if name:
            sequence, image = self.filling.pop(name)
            start = self.rng.randrange(len(self.noise) - image.payload.numel())
            payload = self.noise[start : start + image.payload.numel()]
            image.payload.copy_(payload)
            self.cascade.commit(name)
            self.parked[name] = (sequence.num_tokens, payload)
            sequence.free()

    def want(self) -> None:
        name = self.pick(self.parked)
        if name:
            self.cascade.want(name)

    def unwant(self) -> None:
        name = self.pick(self.parked)
        if name:
            self.cascade.want(name, soon=False)

    def lend(self) -> None:
        name = self.pick(self.parked)
        if name and self.cascade.place(name) is not Place.LENT:
            self.cascade.lend(name)

    def resume(self) -> None:
        ready = [n for n in self.parked if self.cascade.place(n) in (Place.HOST, Place.DEMOTING)]
        name = self.pick(ready)
        if not name:
            return
        num_tokens, payload = self.parked[name]
        sequence = self.opened(num_tokens)
        if sequence is None:
            return
        image = self.cascade.lend(name)
        assert image is not None and torch.equal(image.payload, payload), name
        self.cascade.discard(name)
        del self.parked[name]
        self.running[name] = sequence
        self.seen["resumed"] += 1

    def take_back(self) -> None:
        name = self.pick([n for n in self.parked if self.cascade.place(n) is Place.LENT])
        if name:
            self.cascade.take_back(name)

    def abort(self) -> None:
        name = self.pick([*self.running, *self.filling, *self.parked])
        if not name:
            return
        place = self.cascade.place(name)
        self.seen[f"aborted {place.value if place else 'running'}"] += 1
        self.cascade.discard(name)
        if name in self.running:
            self.running.pop(name).free()
        if name in self.filling:
            self.filling.pop(name)[0].free()
        self.parked.pop(name, None)

    def write(self) -> None:
        self.writer.run_one()

    def read(self) -> None:
        self.reader.run_one()

    def poll(self) -> None:
        for lost in self.cascade.poll():
            self.seen["lost"] += 1
            del self.parked[lost.key]

    def tick(self) -> None:
        self.now += 1

    def fail(self) -> None:
        call = self.rng.choice(["create", "preallocate", "write_at", "rename", "open", "read_at"])
        self.files.fail(call, after=self.rng.randrange(2), code=self.rng.choice([errno.ENOSPC, errno.EIO]))

    def damage(self) -> None:
        path = self.pick(path for path in self.files.sizes if path.suffix == ".kv")
        if path:
            raw = bytearray(path.read_bytes())  # type: ignore[attr-defined]
            raw[self.rng.randrange(len(raw))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(raw)  # type: ignore[attr-defined]

    def check(self) -> None:
        owners = [*self.running.values(), *(sequence for sequence, _ in self.filling.values())]
        check_ownership(self.allocators, owners)
        self.cascade.check_integrity()
        assert self.cascade.stats().parked_images == len(self.parked) + len(self.filling)
        assert all(self.cascade.place(name) not in (None, Place.RESERVED) for name in self.parked)
        assert all(self.cascade.place(name) is Place.RESERVED for name in self.filling)
        assert self.host.used_bytes <= HOST_BYTES
        assert self.files.total_bytes <= DISK_BYTES

    def drain(self) -> None:
        for name in NAMES:
            self.cascade.discard(name)
        for sequence in [*self.running.values(), *(sequence for sequence, _ in self.filling.values())]:
            sequence.free()
        for _ in range(2):
            self.reader.run_all()
            self.writer.run_all()
            self.cascade.poll()
        assert self.allocators.num_held == self.host.used_bytes == self.disk.stats().used_bytes == 0
        self.disk.check_integrity(files=True)
        self.cascade.close()


@pytest.mark.parametrize(
    "operations", [5_000, pytest.param(100_000, marks=[pytest.mark.stress, pytest.mark.timeout(600)])]
)
def test_random_operations_keep_every_account(
    tmp_path: Path, seed: int, operations: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("CRITICAL")
    world = World(tmp_path, seed)
    chosen = world.rng.choices(list(OPERATIONS), weights=list(OPERATIONS.values()), k=operations)
    for step, operation in enumerate(chosen):
        getattr(world, operation)()
        try:
            world.check()
        except BaseException as exc:
            exc.add_note(f"after step {step}: {operation}, seed {seed}")
            raise
    world.drain()
    stats = world.cascade.stats()
    disk = stats.tiers[1]
    print(f"{operations} operations: {dict(world.seen)} fallbacks {dict(stats.fallbacks)} {stats.tiers}")
    assert world.seen["resumed"] > operations // 100
    assert disk.puts and disk.gets and disk.put_failures and disk.corrupt + disk.read_errors
    assert {name for name, *_ in stats.promoted_from} == {"disk", "peer"}
    states = {"reserved", "host", "demoting", "lower", "promoting", "lent", "running"}
    assert {f"aborted {state}" for state in states} <= set(world.seen)
