"""dsv4-nano on GPUs, two workers with two fifths of its experts each that read the rest from each other.

Its answers are the same with the other's memory, without it, and while the other dies and comes back.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.config import BUNDLED_MODEL
from tests.e2e.deployment import Deployment, deploy
from tests.e2e.test_expert_budget import ask, experts_of, samples

CONFIG = """
model: {model}
device: cuda
max_context: 4096
router: {{port: 0, drain: 1s, request_deadline: 60s}}
prefill: {{chunk_tokens: 1024, kv_budget: 128MiB, max_running: 4, threads: 2}}
decode: {{max_running: 8, kv_budget: 256MiB, lease: 10s, threads: 2}}
experts: {{slots: 38, host: 8MiB}}
"""

COUNT = 12
MEETING_S = 20.0
COUNTED_S = 10.0


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for temporary files whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="d-", dir="/tmp") as name:
        monkeypatch.setenv("TMPDIR", name)
        yield Path(name)


@pytest.fixture
def pair(scratch: Path, tmp_path: Path) -> Iterator[Deployment]:
    running = deploy(tmp_path, CONFIG.format(model=BUNDLED_MODEL))
    try:
        yield running
    finally:
        running.dsv4("down")
        running.destroy()


def bytes_from(deployment: Deployment, path: str) -> float:
    """Of the decode worker's experts, since its start."""
    return next(row.value("bytes_total", path) for row in experts_of(deployment) if row.name == "decode-0")


def until_read(deployment: Deployment, path: str, before: float) -> None:
    """Until the decode worker has read more than `before` bytes that way: the router asks workers once a second, and
    a GPU has given all answers by then."""
    limit = time.monotonic() + COUNTED_S
    while bytes_from(deployment, path) <= before:
        assert time.monotonic() < limit, f"no more than {before} bytes from {path}"
        time.sleep(0.1)


def until_peers(deployment: Deployment, *, met: bool) -> None:
    """Until both workers read from each other, or neither does."""
    limit = time.monotonic() + MEETING_S
    while [row.value("slots", "peer") > 0 for row in experts_of(deployment)] != [met, met]:
        assert time.monotonic() < limit, [dict(row.series["slots"]) for row in experts_of(deployment)]
        time.sleep(0.1)


def until_back(deployment: Deployment, name: str, before: str) -> None:
    """Until the router has work for the worker's next process: it answers metrics a little before."""
    limit = time.monotonic() + 90
    while True:
        found = deployment.status()
        row = next(row for row in found.workers if row["name"] == name)
        if row["up"] and row["incarnation"] != before and found.ready:
            return
        assert time.monotonic() < limit, deployment.log.read_text()
        time.sleep(0.2)


@pytest.mark.gpu
@pytest.mark.timeout(300)
@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_answers_are_the_same_with_the_peer_without_it_and_after_its_death(
    victim: str, pair: Deployment, scratch: Path
) -> None:
    asked = samples(COUNT)
    until_peers(pair, met=True)
    expected = ask(pair, asked).texts
    until_read(pair, "peer", 0)

    (share,) = (path.parent for path in scratch.glob("dsv4-*/decode-0.sock"))
    (share / "peer-off").touch()
    until_peers(pair, met=False)
    read_then = bytes_from(pair, "host")
    assert ask(pair, asked).texts == expected
    until_read(pair, "host", read_then)
    (share / "peer-off").unlink()

    before = next(row["incarnation"] for row in pair.status().workers if row["name"] == victim)
    pair.worker_process(victim).send_signal(signal.SIGKILL)
    until_back(pair, victim, str(before))
    until_peers(pair, met=True)
    read_then = bytes_from(pair, "peer")
    assert ask(pair, asked).texts == expected
    until_read(pair, "peer", read_then)
    assert pair.stop(signal.SIGINT) == []
    assert not share.exists()
