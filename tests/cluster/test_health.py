"""A worker that dies is taken out, brought back under a new incarnation, or given up."""

from __future__ import annotations

from cluster.backends import WorkerAddress
from cluster.health import Health, HealthWatch, WorkerDown, WorkerLost
from workers.messages import WorkerRole


def address(incarnation: str) -> WorkerAddress:
    return WorkerAddress("decode-0", WorkerRole.DECODE, f"127.0.0.1:{len(incarnation)}", incarnation, 1, "n", 0.5)


class ScriptedWorker:
    """Answers `address` from a script; exceptions are raised."""

    def __init__(self, *script: WorkerAddress | Exception | None, looks: int = 0) -> None:
        self.script = list(script)
        self.starts = 0
        self.looks = looks
        """Looks at a start that find it under way."""

    def address(self) -> WorkerAddress | None:
        answer = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def start(self) -> WorkerAddress | None:
        if self.looks:
            self.looks -= 1
            return None
        self.starts += 1
        return address(f"restart-{self.starts}")


class RecordingRegistry:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def bind(self, address: WorkerAddress) -> None:
        self.calls.append(f"bind {address.incarnation}")

    def unbind(self, name: str) -> None:
        self.calls.append(f"unbind {name}")


def watch(worker: ScriptedWorker) -> tuple[HealthWatch, RecordingRegistry, list[str]]:
    registry, reports = RecordingRegistry(), []
    return (
        HealthWatch({"decode-0": worker}, {"decode-0": address("first")}, registry, reports.append),
        registry,
        reports,
    )


def test_a_healthy_worker_causes_no_calls() -> None:
    health, registry, reports = watch(ScriptedWorker(address("first")))
    health.check()
    health.check()
    assert (registry.calls, reports) == ([], [])


def test_a_restarted_worker_is_started_and_registered_again() -> None:
    worker = ScriptedWorker(WorkerDown("killed"), WorkerDown("killed"), None, address("restart-1"))
    health, registry, reports = watch(worker)
    for _ in range(4):
        health.check()
    assert registry.calls == ["unbind decode-0", "bind restart-1"]
    assert worker.starts == 1
    assert health.health == {"decode-0": Health.UP}
    assert len(reports) == 2


def test_others_are_watched_while_a_worker_loads() -> None:
    loading, other = ScriptedWorker(None, looks=2), ScriptedWorker(address("first"), WorkerDown("killed"))
    registry = RecordingRegistry()
    addresses = {"decode-0": address("first"), "decode-1": address("first")}
    health = HealthWatch({"decode-0": loading, "decode-1": other}, addresses, registry, lambda text: None)
    for _ in range(2):
        health.check()
    assert registry.calls == ["unbind decode-0", "unbind decode-1"]
    health.check()
    assert registry.calls[2:] == ["bind restart-1"] and loading.starts == 1
    assert health.health == {"decode-0": Health.UP, "decode-1": Health.DOWN}


def test_a_replacement_that_was_never_seen_down_is_noticed() -> None:
    health, registry, _ = watch(ScriptedWorker(None))
    health.check()
    assert registry.calls == ["unbind decode-0", "bind restart-1"]


def test_a_connection_that_came_back_is_bound_again() -> None:
    health, registry, _ = watch(ScriptedWorker(WorkerDown("network"), address("first")))
    health.check()
    health.check()
    assert registry.calls == ["unbind decode-0", "bind first"]


def test_a_lost_worker_is_not_asked_again() -> None:
    worker = ScriptedWorker(WorkerLost("3 restarts"), address("x"))
    health, registry, reports = watch(worker)
    health.check()
    health.check()
    assert health.lost == ["decode-0"]
    assert len(worker.script) == 1
    assert registry.calls == ["unbind decode-0"]
    assert "lost: 3 restarts" in reports[-1]
