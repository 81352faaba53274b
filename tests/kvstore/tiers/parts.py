"""Images without pools, an executor that runs when told, and files that fail when told."""

from __future__ import annotations

import dataclasses
import errno
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import torch

from kvstore.image import KVImage
from kvstore.spec import KVSpec, Plane
from kvstore.tiers.base import ImageKey, planned_header
from kvstore.tiers.file_ops import FileOps
from tests.kvstore.layouts import small_spec

TINY_SEGMENT_BYTES = 2000


def tiny_spec() -> KVSpec:
    """Every pool with rows of 8 bytes: an image of 600 tokens has 15 KB."""
    pools = tuple(dataclasses.replace(pool, planes=(Plane("data", 8),)) for pool in small_spec().pools)
    return KVSpec(pools, "fp8")


TINY = tiny_spec()


def fill(image: KVImage, seed: int) -> KVImage:
    """The same bytes for the same seed, in every byte of the payload."""
    generator = torch.Generator().manual_seed(seed)
    image.payload.copy_(torch.randint(0, 256, image.payload.shape, dtype=torch.uint8, generator=generator))
    return image


def make_image(
    num_tokens: int, seed: int = 0, *, request_id: str = "r", spec: KVSpec = TINY, model_hash: str = ""
) -> KVImage:
    """An unsealed image with seeded bytes."""
    header = planned_header(
        spec, num_tokens, request_id=request_id, model_hash=model_hash, segment_bytes=TINY_SEGMENT_BYTES
    )
    return fill(KVImage(header, torch.empty(header.payload_bytes, dtype=torch.uint8)), seed)


def key(name: str) -> ImageKey:
    return ImageKey(name)


class StepExecutor(Executor):
    """Queued work runs only in `run_one` or `run_all`, on the calling thread."""

    def __init__(self) -> None:
        self._queue: deque[tuple[Future[Any], Callable[[], Any]]] = deque()

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._queue.append((future, lambda: fn(*args, **kwargs)))
        return future

    def run_one(self) -> bool:
        if not self._queue:
            return False
        future, work = self._queue.popleft()
        try:
            future.set_result(work())
        except Exception as exc:
            future.set_exception(exc)
        return True

    def run_all(self) -> None:
        while self.run_one():
            pass

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.run_all()


class FaultyFiles(FileOps):
    """Real files that fail on request, and the bytes they hold at any moment."""

    def __init__(self) -> None:
        self.sizes: dict[Path, int] = {}
        self.peak_bytes = 0
        self.written = 0
        self.calls: list[str] = []
        self._paths: dict[int, Path] = {}
        self._planned: dict[str, tuple[int, int]] = {}
        self._actions: dict[str, Callable[[], object]] = {}

    def fail(self, call: str, *, after: int = 0, code: int = errno.ENOSPC) -> None:
        """Make one call of this name fail, after `after` that succeed."""
        self._planned[call] = (after, code)

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    def during(self, call: str, action: Callable[[], object]) -> None:
        """Run `action` once, at the next call of this name."""
        self._actions[call] = action

    def _enter(self, call: str) -> None:
        self.calls.append(call)
        self._actions.pop(call, lambda: None)()
        if call in self._planned:
            left, code = self._planned[call]
            if left:
                self._planned[call] = (left - 1, code)
            else:
                del self._planned[call]
                raise OSError(code, f"injected into {call}")

    def _grow(self, path: Path, end: int) -> None:
        self.sizes[path] = max(self.sizes.get(path, 0), end)
        self.peak_bytes = max(self.peak_bytes, self.total_bytes)

    def create(self, path: Path, *, direct: bool) -> int:
        self._enter("create")
        fd = super().create(path, direct=direct)
        self._paths[fd] = path
        self._grow(path, 0)
        return fd

    def open(self, path: Path, *, direct: bool) -> int:
        self._enter("open")
        return super().open(path, direct=direct)

    def preallocate(self, fd: int, length: int) -> None:
        self._enter("preallocate")
        super().preallocate(fd, length)
        self._grow(self._paths[fd], length)

    def write_at(self, fd: int, data: Any, offset: int) -> int:
        self._enter("write_at")
        done = super().write_at(fd, data, offset)
        self.written += done
        self._grow(self._paths[fd], offset + done)
        return done

    def read_at(self, fd: int, into: Any, offset: int) -> int:
        self._enter("read_at")
        return super().read_at(fd, into, offset)

    def sync(self, fd: int) -> None:
        self._enter("sync")
        super().sync(fd)

    def sync_folder(self, folder: Path) -> None:
        self._enter("sync_folder")
        super().sync_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        self._enter("rename")
        super().rename(source, target)
        self.sizes[target] = self.sizes.pop(source)

    def unlink(self, path: Path) -> None:
        self._enter("unlink")
        super().unlink(path)
        self.sizes.pop(path, None)
