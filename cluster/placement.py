"""Which actors a deployment has and what each asks of Ray: pure arithmetic over roles, GPUs and nodes.

Owns: actor names, ports and resource requests; the check that they fit, with an error that says what is missing. Does
not own: starting anything. Ray would leave an actor that cannot fit pending for ever, so nothing is started before
`plan` agrees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from cluster.config import ClusterConfig, DecodeSettings, Device, PrefillSettings
from cluster.errors import ClusterError
from workers.experts.config import PeerPlace
from workers.messages import WorkerRole


class DoesNotFit(ClusterError):
    """The deployment needs more than the Ray cluster has."""


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What one Ray node offers."""

    name: str
    num_gpus: float
    num_cpus: float


@dataclass(frozen=True, slots=True)
class ActorPlan:
    """One worker actor: what it is, what it asks for, where it listens."""

    name: str
    role: WorkerRole
    device: str
    """`cpu` or `cuda`."""
    num_gpus: float
    num_cpus: float
    threads: int
    port: int
    """gRPC port, for requests and for KV; 0 takes a free one."""
    peer: PeerPlace | None = None
    """The worker whose GPU memory it reads absent experts from, and the other way round."""


def plan(config: ClusterConfig, nodes: Sequence[NodeResources]) -> tuple[ActorPlan, ...]:
    """One plan per worker, prefill first. Raises `DoesNotFit` when the GPUs are not there."""
    total_gpus = sum(node.num_gpus for node in nodes)
    on_gpu = config.device is Device.CUDA or (config.device is Device.AUTO and total_gpus > 0)
    if config.device is Device.CUDA and total_gpus == 0:
        raise DoesNotFit("device is cuda, but Ray sees no GPU on any of its nodes: " + _list_nodes(nodes))
    num_workers = config.prefill.count + config.decode.count
    share = _gpu_share(num_workers, total_gpus) if on_gpu else 0.0
    plans = tuple(
        _actor_plan(role, index, settings, on_gpu=on_gpu, share=share, is_local=config.ray.address is None)
        for role, settings in ((WorkerRole.PREFILL, config.prefill), (WorkerRole.DECODE, config.decode))
        for index in range(settings.count)
    )
    _check_fit(plans, nodes)
    return _paired(plans) if config.experts.is_limited and config.experts.peer and len(nodes) == 1 else plans


def _paired(plans: tuple[ActorPlan, ...]) -> tuple[ActorPlan, ...]:
    """GPU workers of one node, two and two: each prefill worker with a decode worker as long as there are both.

    On several nodes nobody is paired: Ray alone knows who ends up beside whom.
    """
    on_gpu = [item for item in plans if item.num_gpus]
    prefill = [item for item in on_gpu if item.role is WorkerRole.PREFILL]
    decode = [item for item in on_gpu if item.role is WorkerRole.DECODE]
    both = min(len(prefill), len(decode))
    rest = [*prefill[both:], *decode[both:]]
    pairs = [*zip(prefill, decode, strict=False), *zip(rest[::2], rest[1::2], strict=False)]
    places = {}
    for first, second in pairs:
        is_even = first.role is second.role
        places[first.name] = PeerPlace(second.name, 0, is_even)
        places[second.name] = PeerPlace(first.name, 1, is_even)
    return tuple(dataclasses.replace(item, peer=places.get(item.name)) for item in plans)


def _actor_plan(
    role: WorkerRole,
    index: int,
    settings: PrefillSettings | DecodeSettings,
    *,
    on_gpu: bool,
    share: float,
    is_local: bool,
) -> ActorPlan:
    num_gpus = (share if settings.gpus is None else settings.gpus) if on_gpu else 0.0
    return ActorPlan(
        name=f"{role.value}-{index}",
        role=role,
        device="cuda" if num_gpus else "cpu",
        num_gpus=num_gpus,
        # A local Ray serves nothing else, and two cores may carry three actors: only a shared cluster counts CPUs.
        num_cpus=0.0 if is_local else float(settings.threads),
        threads=settings.threads,
        port=settings.port + index if settings.port else 0,
    )


def _gpu_share(num_workers: int, total_gpus: float) -> float:
    """A whole GPU each when there are enough, else equal shares of the ones there are."""
    if total_gpus >= num_workers:
        return 1.0
    return math.floor(100 / math.ceil(num_workers / total_gpus)) / 100


def _check_fit(plans: Sequence[ActorPlan], nodes: Sequence[NodeResources]) -> None:
    """First-fit of the largest requests first, as no actor spans two nodes."""
    free = [[node.num_gpus, node.num_cpus] for node in nodes]
    missing = []
    for item in sorted(plans, key=lambda item: (-item.num_gpus, -item.num_cpus)):
        for room in free:
            if item.num_gpus <= room[0] + 1e-9 and item.num_cpus <= room[1] + 1e-9:
                room[0] -= item.num_gpus
                room[1] -= item.num_cpus
                break
        else:
            missing.append(f"{item.name} ({item.num_gpus:g} GPU, {item.num_cpus:g} CPU)")
    if missing:
        need = sum(item.num_gpus for item in plans)
        wanted = f"no room for {', '.join(missing)}; the workers need {need:g} GPU in all"
        raise DoesNotFit(f"{wanted}, the nodes have {_list_nodes(nodes)}")


def _list_nodes(nodes: Sequence[NodeResources]) -> str:
    return "; ".join(f"{node.name}: {node.num_gpus:g} GPU, {node.num_cpus:g} CPU" for node in nodes) or "none"
