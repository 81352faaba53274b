"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter (`tests/conftest.py` chooses it)."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    from tests.support.quick_interpreter import quicken_interpreter
    from tests.support.triton_interpreter import allow_loaded_bounds

    allow_loaded_bounds()
    quicken_interpreter()


@pytest.fixture
def device() -> torch.device:
    """The device kernels under test run on."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped where there is none, also when the marker is selected by hand."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
