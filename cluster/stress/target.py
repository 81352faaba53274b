"""The deployment under test: one that runs, or one that is started for the length of the command.

Owns: the settings of a self-started deployment (control allowed, room for other pages and slots, two decode workers for
peers), and its end. Nothing that was started here outlives the block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.config import AdminSettings, ClusterConfig
from cluster.errors import ClusterError
from cluster.http_client import RouterClient
from cluster.stress.link import RetractLink
from cluster.stress.options import StressOptions

TOP_K_FACTOR = 4
"""A C4 entry stands for four tokens: contexts beyond top-k x 4 are those in which the indexer leaves entries out."""

USUAL_LIMIT = 4096
"""`max_context` of a self-started deployment unless the options ask for longer prompts."""


class ModelTooShort(ClusterError):
    """The model cannot hold the contexts that were asked for."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where the questions go."""

    url: str
    api_key: str | None
    model: str

    def client(self) -> RouterClient:
        return RouterClient(self.url, self.api_key)


@contextlib.contextmanager
def running_target(url: str, api_key: str | None) -> Iterator[Target]:
    """A deployment that somebody else runs. Raises `NotForced` when it allows no control, `ApiFailure`."""
    with RouterClient(url, api_key) as client:
        RetractLink(client).require()
        model = client.model()
    yield Target(url, api_key, model)


@contextlib.contextmanager
def started_target(
    config: ClusterConfig, report: Callable[[str], None], on_started: Callable[[], None]
) -> Iterator[Target]:
    """A deployment for the length of the block; `on_started` is called once it answers."""
    from cluster.foreground import check_model
    from cluster.launch import start_cluster

    check_model(config)
    with start_cluster(config, report) as cluster:
        on_started()
        key = config.router.api_keys[0] if config.router.api_keys else None
        yield Target(cluster.url, key, config.served_name)


@contextlib.contextmanager
def stress_config(base: ClusterConfig, options: StressOptions) -> Iterator[ClusterConfig]:
    """`base` as the options need it; the disk tier's folder lives as long as the block."""
    limit = longest(base)
    wanted = options.max_context or min(USUAL_LIMIT, limit)
    if wanted > limit:
        raise ModelTooShort(f"--max-context: found {wanted}, but {base.model.name} takes at most {limit} tokens")
    decode = dataclasses.replace(
        base.decode,
        count=max(base.decode.count, 2) if options.tier == "peer" else base.decode.count,
        # Other pages and another slot than before must be free when a request comes back.
        max_running=max(base.decode.max_running, 2 * options.concurrency),
    )
    with tempfile.TemporaryDirectory(prefix="dsv4-stress-") as folder:
        yield dataclasses.replace(
            base,
            router=dataclasses.replace(base.router, port=0),
            decode=decode,
            admin=AdminSettings(allow_retract_control=True),
            max_context=wanted,
            retract=dataclasses.replace(base.retract, disk_directory=base.retract.disk_directory or Path(folder)),
        )


def far_tokens(model: Path) -> int:
    """Context beyond which the model's indexer chooses, from its config.json; 256 when that does not say."""
    try:
        return TOP_K_FACTOR * int(json.loads((model / "config.json").read_text())["index_topk"])
    except (OSError, ValueError, KeyError, TypeError):
        return StressOptions().far_tokens


def longest(config: ClusterConfig) -> int:
    """Most tokens of one request that the model takes."""
    from cluster.launch import context_limit

    return context_limit(dataclasses.replace(config, max_context=None))
