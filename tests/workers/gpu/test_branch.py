"""The second line of launches: order on the CPU, and what a captured join guarantees on a GPU."""

from __future__ import annotations

import pytest
import torch

from workers.gpu.branch import Branch


def test_without_a_device_calls_stay_in_order() -> None:
    branch, calls = Branch(torch.device("cpu")), []
    with branch.beside():
        calls.append(1)
    calls.append(2)
    branch.join()
    assert calls == [1, 2]


@pytest.mark.gpu
def test_who_is_not_dependent_finds_behind_a_join_what_the_branch_wrote() -> None:
    triton = pytest.importorskip("triton")
    device = torch.device("cuda")
    if torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("no dependent launches")
    from tests.workers.gpu import dependent_kernels as kernels

    branch, value = Branch(device), torch.zeros(1, dtype=torch.int32, device=device)
    wanted, seen = torch.zeros_like(value), torch.zeros_like(value)
    dependent = {"num_warps": 1, "launch_pdl": True}

    def step() -> None:
        kernels.signals[(1,)](seen, **dependent)
        with branch.beside():
            kernels.copies_late[(1,)](wanted, value, **dependent)
        kernels.signals[(1,)](seen, **dependent)
        branch.join()
        kernels.reads_early[(1,)](value, seen, num_warps=1)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for i in range(1, 50):
        wanted.fill_(i)
        graph.replay()
        assert int(seen) == i, "read before the branch had ended"
    assert triton is not None
