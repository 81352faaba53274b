"""One deployment for all tests that only talk to it, and its orderly end at the end of the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.deployment import CONFIG, Deployment, deploy, model_folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def deployment(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Deployment]:
    running = deploy(tmp_path_factory.mktemp("deployment"), CONFIG.format(model=model))
    try:
        yield running
    finally:
        stopped = running.dsv4("down")
        leftovers = [process for process in running.processes() if process.is_alive]
        running.destroy()
    assert stopped.returncode == 0, stopped.stderr
    assert leftovers == []


@pytest.fixture
def openai_client(deployment: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client
