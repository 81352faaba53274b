"""A deployment survives a worker's death, and leaves nothing behind however it ends."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from cluster.http_client import ApiFailure
from cluster.processes import descendants, wait_gone
from tests.e2e.deployment import CONFIG, LIMIT_S, Deployment, deploy, launch
from tests.e2e.test_serving import QUESTION, wait_until

pytestmark = pytest.mark.timeout(LIMIT_S)


def answers(deployment: Deployment) -> bool:
    body = {"model": deployment.model, "messages": QUESTION, "max_tokens": 4, "temperature": 0}
    try:
        with deployment.client() as client:
            return client.chat(body).completion_tokens > 0
    except ApiFailure:
        return False


def test_killed_processes_come_back_and_ctrl_c_leaves_no_process(tmp_path: Path, model: Path) -> None:
    deployment = deploy(tmp_path, CONFIG.format(model=model))
    try:
        assert answers(deployment)
        before = next(row for row in deployment.status().workers if row["name"] == "decode-0")
        deployment.worker_process("decode-0").send_signal(signal.SIGKILL)

        def is_back() -> bool:
            row = next(row for row in deployment.status().workers if row["name"] == "decode-0")
            return bool(row["up"]) and row["incarnation"] != before["incarnation"]

        assert wait_until(is_back, timeout_s=90.0), deployment.log.read_text()
        assert wait_until(lambda: answers(deployment), timeout_s=20.0), deployment.log.read_text()
        row = next(row for row in deployment.status().workers if row["name"] == "decode-0")
        assert (row["restarts"], row["leaked_pages"]) == (1, 0)

        deployment.listener(deployment.url).send_signal(signal.SIGKILL)
        assert wait_until(lambda: answers(deployment), timeout_s=60.0), deployment.log.read_text()

        port = int(deployment.url.rpartition(":")[2])
        assert deployment.stop(signal.SIGINT) == []
        assert deployment.process.returncode == 0, deployment.log.read_text()
        assert not (tmp_path / "state" / "default.json").exists()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)
    finally:
        deployment.destroy()


def test_sigterm_while_starting_leaves_no_process(tmp_path: Path, model: Path) -> None:
    process, log = launch(tmp_path, CONFIG.format(model=model))
    try:
        assert wait_until(lambda: "ray " in log.read_text() or process.poll() is not None, timeout_s=60.0)
        everything = descendants(process.pid)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=40) == 130, log.read_text()
        assert wait_gone(everything, timeout_s=1.0) == ()
        assert "stopped while starting" in log.read_text() and "Traceback" not in log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait(timeout=10)


def test_a_damaged_checkpoint_is_reported_by_name(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).symlink_to(path)
    shard = sorted(broken.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(whole[: len(whole) // 2])
    process, log = launch(tmp_path, CONFIG.format(model=broken))
    # Long before the 300 s that a deployment may take to become ready.
    assert process.wait(timeout=150) == 1
    text = log.read_text()
    assert shard.name in text.replace("\n", "")
    assert "Traceback" not in text
