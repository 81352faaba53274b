"""How commands end when what was to be expected goes wrong: one line on stderr, exit status 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console

from cluster.errors import ClusterError
from cluster.http_client import ApiFailure
from workers.errors import WorkerError

_err = Console(stderr=True, highlight=False)


@contextmanager
def user_errors() -> Iterator[None]:
    """Around a command: expected failures become one line; any other exception is our bug and passes."""
    try:
        yield
    except ApiFailure as exc:
        fail(f"{exc} (status {exc.status})" if exc.status else str(exc))
    except (ClusterError, WorkerError) as exc:
        fail(str(exc))


def fail(message: str) -> NoReturn:
    """Ends the command."""
    _err.print(f"[red]error:[/red] {message}", soft_wrap=True)
    raise typer.Exit(1)
