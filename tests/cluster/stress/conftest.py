"""A scripted deployment per test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.stress.fake_cluster import FakeCluster


@pytest.fixture
def fake() -> Iterator[FakeCluster]:
    cluster = FakeCluster()
    yield cluster
    cluster.close()
