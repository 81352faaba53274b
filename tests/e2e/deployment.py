"""A real deployment for tests: `dsv4 up` as a user starts it, in its own process, on free ports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from cluster.config import BUNDLED_MODEL
from cluster.http_client import RouterClient
from cluster.processes import ProcessRef, descendants, end_all, wait_gone
from cluster.status import ClusterStatus, read_status
from tests.architecture.source_tree import ROOT

START_S = 110.0
"""Longest wait for a deployment on a machine that is busy with other tests."""

LIMIT_S = 300
"""Of a test that starts deployments: two may be started before its first line, and the machine may be busy."""

CONFIG = """
model: {model}
device: cpu
max_context: 4096
router: {{port: 0, drain: 1s, request_deadline: 60s}}
prefill: {{chunk_tokens: 128, kv_budget: 96MiB}}
decode: {{max_running: 8, kv_budget: 96MiB, lease: 10s}}
"""


def has_trained_model() -> bool:
    return (BUNDLED_MODEL / "config.json").is_file()


def model_folder(scratch: Path) -> Path:
    """The bundled checkpoint, or one of the same shape with random weights and the bundled tokenizer."""
    if has_trained_model():
        return BUNDLED_MODEL
    target = scratch / "dsv4-nano"
    command = ["checkpoint", "synth", "--preset", "nano", "--out", str(target)]
    subprocess.run([sys.executable, "-m", "cluster", *command], cwd=ROOT, check=True, capture_output=True)
    for path in BUNDLED_MODEL.glob("*.json"):
        shutil.copy(path, target)
    return target


@dataclass(slots=True)
class Deployment:
    """One running `dsv4 up`. Ended by `stop` in an orderly way, by `destroy` in any case."""

    process: subprocess.Popen[bytes]
    state: dict[str, Any]
    log: Path
    folder: Path

    @property
    def url(self) -> str:
        return str(self.state["url"])

    @property
    def model(self) -> str:
        return str(self.state["model"])

    def client(self) -> RouterClient:
        return RouterClient(self.url, timeout_s=60.0)

    def status(self) -> ClusterStatus:
        with self.client() as client:
            return read_status(client)

    def processes(self) -> list[ProcessRef]:
        own = ProcessRef.of(self.process.pid)
        return [ref for ref in (own, *descendants(self.process.pid)) if ref is not None]

    def worker_process(self, name: str) -> psutil.Process:
        """The process that listens on the worker's address."""
        row = next(row for row in self.status().workers if row["name"] == name)
        return self.listener(str(row["address"]))

    def listener(self, address: str) -> psutil.Process:
        """The process that listens on the port of `address`."""
        port = int(address.rpartition(":")[2])
        for ref in descendants(self.process.pid):
            process = psutil.Process(ref.pid)
            if any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp")):
                return process
        raise AssertionError(f"nobody listens on {port}")

    def dsv4(self, *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        """Another `dsv4` command against this deployment."""
        return subprocess.run(
            [sys.executable, "-m", "cluster", *arguments],
            cwd=ROOT,
            env=environment(self.folder),
            input=text,
            capture_output=True,
            text=True,
            timeout=100,
        )

    def stop(self, number: int = signal.SIGINT) -> list[ProcessRef]:
        """Signals the whole process group, as a terminal's Ctrl-C does; returns processes that survived."""
        everything = self.processes()
        os.killpg(self.process.pid, number)
        self.process.wait(timeout=40)
        return list(wait_gone(everything, timeout_s=1.0))

    def destroy(self) -> None:
        everything = self.processes()
        end_all(everything, grace_s=0.0)
        self.process.wait(timeout=10)


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "DSV4_STATE_DIR": str(folder / "state"), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def launch(folder: Path, config: str) -> tuple[subprocess.Popen[bytes], Path]:
    """`dsv4 up` in its own process group; output goes to a file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config)
    log = folder / "up.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster", "up", "--config", str(folder / "config.yaml")],
            cwd=ROOT,
            env=environment(folder),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, log


def deploy(folder: Path, config: str) -> Deployment:
    """A deployment that answers. Fails with its output when it does not come up."""
    process, log = launch(folder, config)
    state = folder / "state" / "default.json"
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        if state.exists():
            return Deployment(process, json.loads(state.read_text()), log, folder)
        time.sleep(0.05)
    end_all([ref for ref in (ProcessRef.of(process.pid), *descendants(process.pid)) if ref], grace_s=0.0)
    process.wait(timeout=10)
    raise AssertionError(f"dsv4 up did not become ready:\n{log.read_text()}")
