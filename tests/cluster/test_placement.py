"""Roles and GPUs become actor requests, and what does not fit is said in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import ClusterConfig, config_from_mapping
from cluster.placement import DoesNotFit, NodeResources, plan
from workers.messages import WorkerRole


def config(**values: object) -> ClusterConfig:
    return config_from_mapping(values, source="test", base=Path("/"))


def node(gpus: float, cpus: float = 16, name: str = "n0") -> NodeResources:
    return NodeResources(name, gpus, cpus)


def test_laptop_gets_two_cpu_workers_that_reserve_nothing() -> None:
    plans = plan(config(), [node(0, cpus=2)])
    assert [item.name for item in plans] == ["prefill-0", "decode-0"]
    assert {(item.device, item.num_gpus, item.num_cpus) for item in plans} == {("cpu", 0.0, 0.0)}


@pytest.mark.parametrize(("gpus", "share"), [(1, 0.5), (2, 1.0), (8, 1.0)])
def test_auto_divides_the_gpus_that_are_there(gpus: int, share: float) -> None:
    plans = plan(config(), [node(gpus)])
    assert {(item.device, item.num_gpus) for item in plans} == {("cuda", share)}


def test_three_workers_on_two_gpus_share_in_halves() -> None:
    plans = plan(config(decode={"count": 2}), [node(2)])
    assert [item.num_gpus for item in plans] == [0.5, 0.5, 0.5]


def test_device_cpu_ignores_gpus() -> None:
    assert {item.device for item in plan(config(device="cpu"), [node(4)])} == {"cpu"}


def test_explicit_gpus_are_asked_for_as_written() -> None:
    plans = plan(config(prefill={"gpus": 2}, decode={"gpus": 0.25, "count": 2}), [node(2, name="a"), node(1, name="b")])
    assert [(item.role, item.num_gpus) for item in plans] == [
        (WorkerRole.PREFILL, 2.0),
        (WorkerRole.DECODE, 0.25),
        (WorkerRole.DECODE, 0.25),
    ]


def test_missing_gpus_name_worker_and_nodes() -> None:
    with pytest.raises(DoesNotFit, match=r"no room for decode-0 \(1 GPU.*need 2 GPU.*n0: 1 GPU"):
        plan(config(prefill={"gpus": 1}, decode={"gpus": 1}), [node(1)])


def test_no_actor_spans_two_nodes() -> None:
    with pytest.raises(DoesNotFit, match="prefill-0"):
        plan(config(prefill={"gpus": 2}, decode={"gpus": 0.5}), [node(1, name="a"), node(1, name="b")])


def test_cuda_without_gpus_is_refused() -> None:
    with pytest.raises(DoesNotFit, match="no GPU"):
        plan(config(device="cuda"), [node(0)])


def test_shared_cluster_counts_cpus() -> None:
    shared = {"ray": {"address": "10.0.0.1:6379"}, "decode": {"threads": 8}}
    assert [item.num_cpus for item in plan(config(**shared), [node(0, cpus=9)])] == [1.0, 8.0]
    with pytest.raises(DoesNotFit, match="decode-0"):
        plan(config(**shared), [node(0, cpus=4)])


def test_ports_count_up_from_the_first() -> None:
    plans = plan(config(decode={"count": 2, "port": 9100}), [node(0)])
    assert [item.port for item in plans] == [0, 9100, 9101]


def peers(num_gpus: float = 4, nodes: int = 1, **values: object) -> dict[str, tuple[str, int, bool]]:
    plans = plan(config(**values), [node(num_gpus, name=f"n{i}") for i in range(nodes)])
    return {p.name: (p.peer.name, p.peer.side, p.peer.is_even) for p in plans if p.peer is not None}


def test_workers_with_absent_experts_are_paired_prefill_with_decode_first() -> None:
    budget = {"experts": {"slots": 40}}
    assert peers(**budget) == {"prefill-0": ("decode-0", 0, False), "decode-0": ("prefill-0", 1, False)}
    assert peers(decode={"count": 4}, **budget) == {
        "prefill-0": ("decode-0", 0, False),
        "decode-0": ("prefill-0", 1, False),
        "decode-1": ("decode-2", 0, True),
        "decode-2": ("decode-1", 1, True),
    }


def test_nobody_is_paired_without_need_without_gpus_across_nodes_or_when_told_not_to() -> None:
    assert not peers()
    assert not peers(num_gpus=0, experts={"slots": 40})
    assert not peers(nodes=2, experts={"slots": 40})
    assert not peers(experts={"slots": 40, "peer": False})
