"""The state file of a running cluster: how `dsv4 status`, `chat`, `eval` and `down` find what `dsv4 up` started.

Owns: where the file lies, its format, and the rule that a file whose process is gone counts as absent. One file per
deployment name, readable by its user only (it may carry an API key).
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.processes import ProcessRef, end_all


@dataclass(frozen=True, slots=True)
class ClusterState:
    """One running deployment."""

    name: str
    url: str
    """Base URL of the router, without `/v1`."""
    model: str
    """Name that clients use."""
    pid: int
    """Process of `dsv4 up`."""
    created: float
    """Creation time of that process, seconds since the epoch."""
    api_key: str | None
    children: tuple[tuple[int, float], ...]
    """(pid, creation time) of every local process the command started."""
    ready_s: float
    """Seconds from the command to the first accepted request."""

    @property
    def owner(self) -> ProcessRef:
        return ProcessRef(self.pid, self.created)

    @property
    def processes(self) -> tuple[ProcessRef, ...]:
        return tuple(ProcessRef(pid, created) for pid, created in self.children)


def state_folder() -> Path:
    """The user's runtime folder; `DSV4_STATE_DIR` overrides it."""
    if chosen := os.environ.get("DSV4_STATE_DIR"):
        return Path(chosen)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "dsv4"
    return Path(tempfile.gettempdir()) / f"dsv4-{os.getuid()}"


def state_path(name: str) -> Path:
    return state_folder() / f"{name}.json"


def write_state(state: ClusterState) -> None:
    """Publishes the state; a reader sees the old file or the new one, never half of one."""
    path = state_path(state.name)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{state.name}.")
    with os.fdopen(handle, "w") as file:
        json.dump(dataclasses.asdict(state), file)
    os.replace(temporary, path)


def read_state(name: str) -> ClusterState | None:
    """The running deployment of that name; None when there is none."""
    state = _recorded(name)
    return state if state is not None and state.owner.is_alive else None


def end_leftovers(name: str) -> int:
    """Ends what a deployment left behind whose command was killed outright; returns how many processes that were."""
    state = _recorded(name)
    if state is None or state.owner.is_alive:
        return 0
    left = [process for process in state.processes if process.is_alive]
    end_all(left, grace_s=0.0)
    remove_state(name)
    return len(left)


def _recorded(name: str) -> ClusterState | None:
    """What the file says, whether it still runs or not. A damaged file is removed."""
    path = state_path(name)
    try:
        values = json.loads(path.read_text())
        values["children"] = tuple((int(pid), float(created)) for pid, created in values["children"])
        return ClusterState(**values)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        return None


def remove_state(name: str) -> None:
    state_path(name).unlink(missing_ok=True)
