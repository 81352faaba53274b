"""The committed gRPC stubs are what the generator makes of `proto/` today."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import GENERATED, ROOT

GENERATOR = "1.71.2"
"""Stubs carry their generator's version and refuse older run times, so it is pinned low."""


def test_stubs_match_the_proto_files(tmp_path: Path) -> None:
    tools = pytest.importorskip("grpc_tools")
    del tools
    if (found := importlib.metadata.version("grpcio-tools")) != GENERATOR:
        pytest.skip(f"grpcio-tools {found} is not the pinned {GENERATOR}")
    command = ["make", "--silent", "proto", f"PY={sys.executable}", "DEV_READY=", f"PROTO_OUT={tmp_path}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*")}
    committed = {
        path.relative_to(ROOT): path.read_text() for folder in GENERATED for path in (ROOT / folder).glob("*_pb2*.py*")
    }
    assert fresh, "no .proto file was compiled"
    assert sorted(fresh) == sorted(committed)
    stale = [str(path) for path in fresh if fresh[path] != committed[path]]
    assert not stale, f"run `make proto`: {stale}"
