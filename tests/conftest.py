"""Settings every test shares: one thread a process, and a seed that comes from the test's own name."""

from __future__ import annotations

import hashlib
import os

import pytest

# Before torch, which reads it once: its threads spin while they wait, and a machine with other work stands still.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402

# Triton reads this when it is first imported, whoever does that first: parts of its own library become interpreted
# functions then, or never. Without it kernels cannot run on a machine that has no GPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A stable seed derived from the test id, so that a failure reproduces and two tests never share data."""
    return int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
