"""Actor shells: settings reach the process before the libraries load, and a failed worker makes room for a new one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.actors import PartFailed, RouterActor, WorkerActor
from cluster.assembly import effort_style, worker_config
from cluster.backends import WorkerAddress
from cluster.config import ClusterConfig, config_from_mapping
from cluster.errors import ClusterError
from cluster.launch import context_limit, router_spec, worker_spec
from cluster.placement import NodeResources, plan
from router.model_info import EffortStyle
from workers.experts.config import PeerPlace
from workers.messages import WorkerRole, WorkerStats


def config(tmp_path: Path, **values: object) -> ClusterConfig:
    (tmp_path / "model-0731").mkdir(exist_ok=True)
    (tmp_path / "model-0731" / "config.json").write_text('{"max_position_embeddings": 4096, "vocab_size": 129280}')
    return config_from_mapping({"model": "model-0731", **values}, source="test", base=tmp_path)


def actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **values: object) -> WorkerActor:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(variable, "99")
    settings = config(tmp_path, **values)
    return WorkerActor(worker_spec(plan(settings, [NodeResources("n", 0, 2)])[1], settings))


class FailedService:
    async def stats(self) -> WorkerStats:
        return WorkerStats("decode-0", WorkerRole.DECODE, "i", "", 0.0, False, failure="page 3 has two owners")


def test_thread_counts_are_set_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor(tmp_path, monkeypatch, decode={"threads": 3})
    assert os.environ["OMP_NUM_THREADS"] == os.environ["NUMBA_NUM_THREADS"] == "3"


async def test_a_worker_that_was_not_started_has_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await actor(tmp_path, monkeypatch).address() is None


async def test_a_worker_that_stopped_by_itself_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(status: int) -> None:
        raise SystemExit(status)

    shell = actor(tmp_path, monkeypatch)
    shell._service = FailedService()
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    with pytest.raises(SystemExit):
        await shell.address()


async def test_a_start_that_fails_carries_only_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PartFailed) as failure:
        await actor(tmp_path, monkeypatch, device="cpu").start()
    assert failure.value.args == (str(failure.value),)
    assert "config.json" in str(failure.value)


async def test_two_starts_at_once_load_the_model_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    async def serve(spec: object, on_progress: object) -> SimpleNamespace:
        loads.append(spec)
        await asyncio.sleep(0)
        return SimpleNamespace(address="127.0.0.1:1", incarnation="i", engine=SimpleNamespace(experts=None))

    monkeypatch.setattr("cluster.assembly.serve_worker_of", serve)
    monkeypatch.setattr("cluster.actors._node_id", lambda: "n")
    shell = actor(tmp_path, monkeypatch, device="cpu")
    first, second = await asyncio.gather(shell.start(), shell.start())
    assert first is second and len(loads) == 1


async def test_a_worker_sees_its_own_gpu_first_and_its_peers_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.setattr("ray.get_gpu_ids", lambda: [1])
    shell = actor(tmp_path, monkeypatch, device="cpu")
    for beside, seen in (((), "1"), (("0",), "1,0"), (("1",), "1")):
        with pytest.raises(PartFailed):
            await shell.start(beside)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


async def test_a_router_whose_process_is_new_hears_of_a_worker_without_failing(tmp_path: Path) -> None:
    """Both died: the watch tells of the worker before it starts the router again, with everybody's address."""
    shell = RouterActor(router_spec(config(tmp_path)))
    await shell.unbind("decode-0")
    await shell.bind(WorkerAddress("decode-0", WorkerRole.DECODE, "127.0.0.1:1", "i", 1, "n", 0.5))
    assert not await shell.is_started()


async def test_a_router_probes_a_worker_that_came_back_at_once(tmp_path: Path) -> None:
    bound, probed = [], []

    class Backend:
        address, role = None, WorkerRole.PREFILL

        async def bind(self, address: WorkerAddress) -> None:
            bound.append(address.incarnation)

    async def probe(name: str) -> None:
        probed.append((name, list(bound)))

    shell = RouterActor(router_spec(config(tmp_path)))
    shell._backends = {"prefill-0": Backend()}
    shell._router = SimpleNamespace(probe=probe)
    await shell.bind(WorkerAddress("prefill-0", WorkerRole.PREFILL, "127.0.0.1:1", "new", 1, "n", 0.5))
    assert probed == [("prefill-0", ["new"])]


def test_settings_reach_the_workers_own_config(tmp_path: Path) -> None:
    settings = config(tmp_path, precision="fp32", decode={"kv_budget": "64MiB", "lease": "7s", "port": 9000})
    prefill, decode = (worker_spec(item, settings) for item in plan(settings, [NodeResources("n", 0, 2)]))
    found = worker_config(decode, "10.0.0.7")
    assert (found.role, found.name, found.port, found.advertise_host) == (
        WorkerRole.DECODE,
        "decode-0",
        9000,
        "10.0.0.7",
    )
    assert (found.precision, found.kv_budget_bytes, found.lease_s) == ("fp32", 64 * 2**20, 7.0)
    assert worker_config(prefill, "").max_context == 4096


def test_workers_that_share_experts_are_told_the_folder_and_their_peer(tmp_path: Path) -> None:
    settings = config(tmp_path, experts={"slots": 40})
    workers = [worker_spec(item, settings, "/tmp/share") for item in plan(settings, [NodeResources("n", 2, 2)])]
    prefill, decode = (worker_config(spec, "").experts for spec in workers)
    assert prefill.share == decode.share == "/tmp/share"
    assert prefill.peer == PeerPlace("decode-0", 0, is_even=False)
    assert decode.peer == PeerPlace("prefill-0", 1, is_even=False)


@pytest.mark.parametrize(
    ("effort", "style"),
    [("auto", EffortStyle.REFRESH), ("none", EffortStyle.NONE), ("preview", EffortStyle.PREVIEW)],
)
def test_effort_goes_by_the_checkpoint_unless_set(tmp_path: Path, effort: str, style: EffortStyle) -> None:
    assert effort_style(router_spec(config(tmp_path, effort=effort))) is style


def test_a_small_vocabulary_has_no_effort_text(tmp_path: Path) -> None:
    settings = config(tmp_path)
    (settings.model / "config.json").write_text('{"max_position_embeddings": 4096, "vocab_size": 1024}')
    assert effort_style(router_spec(settings)) is EffortStyle.NONE


def test_context_limit_follows_the_model_up_to_the_default(tmp_path: Path) -> None:
    settings = config(tmp_path)
    assert context_limit(settings) == 4096
    (settings.model / "config.json").write_text('{"max_position_embeddings": 1048576}')
    assert context_limit(settings) == 16384
    assert context_limit(config(tmp_path, max_context=100)) == 100
    (settings.model / "config.json").write_text("{}")
    with pytest.raises(ClusterError, match="max_position_embeddings"):
        context_limit(settings)
